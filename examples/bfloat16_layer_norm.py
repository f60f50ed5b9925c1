"""Prints what torch's LayerNorm on the CPU makes of bfloat16 gradients, and what gradfuse's does.

Errors are those of a gradient's largest element, in percent, against float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import gradfuse

BF16 = torch.bfloat16


def parameter_grads(norm, x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    w, b = (t.detach().requires_grad_() for t in (w, b))
    return torch.autograd.grad(norm(x, w.shape, w, b), (w, b), g)


def error(ours: Tensor, truth: Tensor) -> str:
    return f"{100 * ((ours.double() - truth).abs().max() / truth.abs().max()).item():.2f} %"


def row(what: str, *columns: object) -> None:
    print(f"{what:52}" + "".join(f"{c!s:>12}" for c in columns))


def main() -> None:
    torch.manual_seed(0)
    row(f"torch {torch.__version__}, {torch.get_num_threads()} threads", "torch", "gradfuse")
    both = (F.layer_norm, gradfuse.layer_norm)

    x, ones = torch.randn(65536, 128, dtype=BF16), torch.ones(65536, 128, dtype=BF16)
    w, b = torch.ones(128, dtype=BF16), torch.zeros(128, dtype=BF16)
    sums = [parameter_grads(norm, x, w, b, ones)[1][0].item() for norm in both]
    row("gradient of bias, from 65,536 ones", *(f"{s:,.0f}" for s in sums))

    g = torch.randn(65536, 128, dtype=BF16)
    truth = parameter_grads(F.layer_norm, *(t.double() for t in (x, w, b, g)))
    found = [parameter_grads(norm, x, w, b, g) for norm in both]
    for i, name in enumerate(("weight", "bias")):
        row(
            f"error of {name}'s gradient, random gradients", *(error(f[i], truth[i]) for f in found)
        )

    huge = torch.randn(4, 128) * 1e19
    truth = F.layer_norm(huge.double(), (128,))
    row("error of the result, float32 rows of 1e19", *(error(n(huge, (128,)), truth) for n in both))
    truth, rms = F.rms_norm(huge.double(), (128,)), (F.rms_norm, gradfuse.rms_norm)
    row("the same, rms_norm", *(error(n(huge, (128,)), truth) for n in rms))
    far = torch.randn(4, 128) + 1e6
    truth = F.layer_norm(far.double(), (128,))
    row(
        "error of the result, float32 rows about 1e6", *(error(n(far, (128,)), truth) for n in both)
    )


if __name__ == "__main__":
    main()
