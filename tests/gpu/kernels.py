"""Every kernel on awkward tensors, against torch in float64: python -m tests.gpu.kernels.

Odd offsets, ragged sizes, maps of 7 x 7, one channel, one sample, lists longer than a launch takes.
Memory that the results will get is full of NaN before, so that an element left out shows. The suite
runs a sample on the emulator and on the CPU kernels. So the script is known to be right before a
GPU sees it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

import gradfuse

sys.path.append(str(Path(__file__).parents[1]))  # python -m leaves it out, pytest does not
import batch_norm_papers
import papers

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Layout = torch.memory_format


class Case(NamedTuple):
    """A check of one op; it raises AssertionError."""

    name: str
    run: Callable[[], None]
    is_small: bool  # enough for the emulator


class Maker:
    """Random tensors on a device, at any offset from an aligned address."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def seed(self, name: str) -> None:
        """Draws from here on depend on the name alone, not on what was drawn before."""
        self._generator.manual_seed(zlib.crc32(name.encode()))

    def tensor(
        self, *shape: int, dtype: torch.dtype, offset: int = 0, scale: float = 1.0
    ) -> Tensor:
        """A contiguous tensor whose first element lies `offset` elements after 64 aligned bytes."""
        n = torch.Size(shape).numel()
        made = torch.full((n + offset,), torch.nan, dtype=dtype, device=self.device)[offset:]
        values = torch.randn(n, generator=self._generator, dtype=torch.float64)
        return made.copy_(values).view(shape)

    def poison(self, like: Tensor, count: int = 3) -> None:
        """Leaves blocks of that size, full of NaN, to the allocator's next calls."""
        blocks = [torch.full_like(like, torch.nan) for _ in range(count)]
        del blocks


def wide(t: Tensor) -> Tensor:
    return t.detach().cpu().double().clone()


def close(
    name: str, got: Tensor, want: Tensor, tolerance: float, size: float | None = None
) -> None:
    """Compares with a tolerance relative to the largest element, or to size; names the worst."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, not {list(want.shape)}"
    if not want.numel():
        return
    error = (got - want).abs()
    limit = tolerance * max(want.abs().max().item() if size is None else size, 1e-30)
    at = int(torch.where(error.isnan(), torch.inf, error).flatten().argmax())
    worst = error.flatten()[at].item()
    assert worst <= limit, (
        f"{name}: element {at} is {got.flatten()[at].item()!r}, not "
        f"{want.flatten()[at].item()!r} (limit {limit:.2e})"
    )


def tolerance(dtype: torch.dtype, few: float = 4.0) -> float:
    """A few roundings; in float64 as many as torch's own sums over millions of elements need."""
    return few * {torch.float64: 5e-14, torch.float32: 1.2e-7}.get(dtype, torch.finfo(dtype).eps)


# ---- clips ----

LISTS = {
    "one": [1],
    "ragged": [1, 7, 255, 4097],
    "large": [3, 70_001, 1_000_003],
    "many": [i % 37 for i in range(1500)],
}


def gradients(make: Maker, sizes: list[int], dtype: torch.dtype, offset: int) -> list[Parameter]:
    found = []
    for i, n in enumerate(sizes):
        p = Parameter(make.tensor(n, dtype=dtype, offset=(offset + i) % 8 if offset else 0))
        p.grad = make.tensor(n, dtype=dtype, offset=(offset * (i + 1)) % 8)
        found.append(p)
    return found


def norm_of(ps: list[Parameter]) -> Tensor:
    return torch.cat([wide(p.grad).flatten() for p in ps]).norm()


def coefficient(norm: Tensor, max_norm: Tensor) -> Tensor:
    """As torch's clip has it."""
    return max_norm / (norm + 1e-6)


def clip(make: Maker, sizes: list[int], dtype: torch.dtype, offset: int) -> None:
    ps = gradients(make, sizes, dtype, offset)
    before, norm = [wide(p.grad) for p in ps], norm_of(ps)
    for order in (1.0, torch.inf):
        flat = torch.cat([b.flatten() for b in before])
        want = flat.norm(order)
        close(f"norm {order}", gradfuse.get_total_norm([p.grad for p in ps], order), want, 1e-6)
    report = gradfuse.GradClipper(ps, norm.item() / 2, nonfinite="zero").clip_()
    assert abs(report.total_norm / norm.item() - 1) < 1e-6, (report.total_norm, norm)
    factor = coefficient(norm, norm / 2)
    for i, (p, b) in enumerate(zip(ps, before, strict=True)):
        close(f"clipped {i}", p.grad, b * factor, tolerance(dtype))
    gradfuse.clip_grad_value_(ps, 0.25)
    for i, (p, b) in enumerate(zip(ps, before, strict=True)):
        close(f"clamped {i}", p.grad, (b * factor).clamp(-0.25, 0.25), tolerance(dtype))


def large_and_small(make: Maker, sizes: list[int], dtype: torch.dtype, offset: int) -> None:
    """Squares that overflow or vanish, and a NaN that is zeroed."""
    scale = 1e4 if dtype == torch.float16 else 1e30
    ps = gradients(make, sizes, dtype, offset)
    for p in ps:
        p.grad.mul_(scale)
    before = [wide(p.grad) for p in ps]
    norm = gradfuse.clip_grad_norm_(ps, 1.0)
    expected = torch.cat([b.flatten() for b in before]).norm()
    close("large norm", norm.double() / scale, expected / scale, 1e-6 + torch.finfo(norm.dtype).eps)
    for i, (p, b) in enumerate(zip(ps, before, strict=True)):
        close(f"large {i}", p.grad, b / expected, tolerance(dtype, 8.0))
    ps[-1].grad.view(-1)[0] = torch.nan
    assert gradfuse.GradClipper(ps, 1.0, nonfinite="zero").clip_().void
    assert all(not p.grad.any() for p in ps)


def strided(make: Maker, sizes: list[int], dtype: torch.dtype, offset: int) -> None:
    p = Parameter(make.tensor(sizes[-1], 6, dtype=dtype))
    p.grad = make.tensor(sizes[-1], 12, dtype=dtype, offset=offset)[:, ::2]
    before = wide(p.grad)
    norm, max_norm = before.norm(), before.norm() / 2
    found = gradfuse.clip_grad_norm_([p], max_norm.item())
    close("norm", found, norm, max(1e-6, torch.finfo(found.dtype).eps))
    close("strided", p.grad, before * coefficient(norm, max_norm), tolerance(dtype))


def adaptive(make: Maker, sizes: list[int], dtype: torch.dtype, offset: int) -> None:
    ps = []
    for i, n in enumerate(sizes[:40]):
        p = Parameter(make.tensor(5, n, dtype=dtype, offset=offset))
        p.grad = make.tensor(5, n, dtype=dtype, offset=(offset + i) % 8)
        ps.append(p)
    before = [wide(p.grad) for p in ps]
    gradfuse.adaptive_clip_grad_(ps, 0.1)
    for i, (p, b) in enumerate(zip(ps, before, strict=True)):
        allowed = wide(p).norm(dim=1, keepdim=True).clamp(min=1e-3) * 0.1
        norm = b.norm(dim=1, keepdim=True)
        want = torch.where(norm > allowed, b * (allowed / norm.clamp(min=1e-6)), b)
        close(f"unit-wise {i}", p.grad, want, tolerance(dtype, 32.0))


def clip_cases(make: Maker) -> Iterator[Case]:
    for check, (name, sizes), dtype, offset in itertools.product(
        (clip, large_and_small, strided, adaptive), LISTS.items(), REAL, (0, 1, 3)
    ):
        if name == "many" and check in (strided, adaptive):
            continue
        yield Case(
            f"{check.__name__} {name} {short(dtype)} +{offset}",
            lambda c=check, s=sizes, d=dtype, o=offset: c(make, s, d, o),
            name == "ragged" and offset == 3,
        )


# ---- batch norm ----

MAPS = {
    "7x7": (8, 40, 7, 7),
    "14x14": (4, 24, 14, 14),
    "three channels": (3, 3, 21, 17),
    "64 channels": (4, 64, 12, 12),
    "2048 channels": (2, 2048, 3, 3),
    "one channel": (5, 1, 9, 9),
    "one sample": (1, 6, 30, 31),
    "features": (70, 33),
    "large map": (2, 5, 131, 127),
}
SMALL_MAPS = ("three channels", "one channel", "features")
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def batch_norm(
    make: Maker,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
    name: str | None,
    train: bool,
) -> None:
    offset = 0 if last else 3
    form: Layout = torch.channels_last if last else torch.contiguous_format

    def of_map() -> Tensor:
        made = make.tensor(*shape, dtype=dtype, offset=offset)
        return made.contiguous(memory_format=form) if last else made

    def by_channel(t: Tensor) -> Tensor:
        return t.view(-1, *[1] * (len(shape) - 2))

    x, r, g = of_map(), of_map(), of_map()
    w, b = (make.tensor(shape[1], dtype=torch.float32) for _ in range(2))
    mean, var = make.tensor(shape[1], dtype=torch.float32), torch.ones_like(w)
    leaves = [t.requires_grad_() for t in (x, r, w, b)]
    copies = [wide(t).requires_grad_() for t in leaves]
    running = [wide(mean), wide(var)]
    for t in (x, w):
        make.poison(t)
    options = {"training": train, "activation": name, "save": "output" if last else "bitmask"}
    y = gradfuse.batch_norm_act(x, mean, var, w, b, residual=r, **options)
    make.poison(x)
    y.backward(g)
    z = F.batch_norm(copies[0], *running, *copies[2:], train) + copies[1]
    z.retain_grad()
    want = ACTIVATIONS[name](z)
    want.backward(wide(g))
    assert z.grad is not None
    few = tolerance(dtype, 16.0)
    close("output", y, want, few)
    # Near a kink the gradient of a rounded value is another; those elements are left out.
    kinks = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
    near = torch.zeros(shape, dtype=torch.bool)
    for kink in kinks.get(name or "", ()):
        near |= (z - kink).abs() < 20 * few
    for what, leaf, copy in zip(("x", "r"), leaves, copies, strict=False):
        keep = ~near
        slack = few * 4 + 0.02 * bool(near.any())  # the sums over a channel see those elements too
        close(f"d{what}", wide(leaf.grad)[keep], copy.grad[keep], slack)
    # Sums over a channel may cancel: their usual size is the root of the sum of squares.
    normalised = (z - copies[1] - by_channel(copies[3])) / by_channel(copies[2])
    terms = {"w": z.grad * normalised, "b": z.grad}
    for what, leaf, copy in zip(("w", "b"), leaves[2:], copies[2:], strict=True):
        size = terms[what].detach().transpose(0, 1).flatten(1).norm(dim=1).max().item()
        slack = max(few * 4, tolerance(leaf.dtype, 16.0)) + 0.02 * bool(near.any())
        close(f"d{what}", leaf.grad, copy.grad, slack, size)
    close("mean", mean, running[0], 1e-5)
    close("var", var, running[1], 1e-5)


MODES: dict[str, dict[str, Any]] = {
    "renorm": {"renorm": (1.2, 0.1)},
    "renorm in its warm-up": {"renorm": (9.0, 9.0, 2.0, 7.0, 30.0), "step": 5},
    "ghost batches": {"ghost_size": 2},
    "momentum of its drift": {"drift": True},
    "all modes": {"ghost_size": 2, "renorm": (1.5, 0.4), "drift": True},
}


def batch_norm_in_mode(
    make: Maker, shape: tuple[int, ...], dtype: torch.dtype, last: bool, mode: dict[str, Any]
) -> None:
    """Against the papers in plain torch. Without an activation, whose kinks are tested above."""
    form: Layout = torch.channels_last if last else torch.contiguous_format
    x, g = (make.tensor(*shape, dtype=dtype).contiguous(memory_format=form) for _ in range(2))
    # A ghost batch is corrected by what the one before has rounded.
    parameter = torch.promote_types(dtype, torch.float32)
    w, b, mean = (make.tensor(shape[1], dtype=parameter) for _ in range(3))
    state = {"mean": mean, "var": torch.ones_like(mean)}
    options = {k: v for k, v in mode.items() if k not in ("step", "drift")}
    if "step" in mode:
        state["step"] = torch.tensor(mode["step"], device=make.device)
    if "drift" in mode:
        rows = [w / 4, b / 4, w.square() + 1, torch.full_like(w, 7.0)]
        state["drift"] = torch.stack(rows).detach()
    copies = {name: wide(t) for name, t in state.items()}
    leaf = {"x": wide(x), "w": wide(w), "b": wide(b)}
    for t in (x, w, b, *leaf.values()):
        t.requires_grad_()
    make.poison(x)
    y = gradfuse.batch_norm_act(
        x, mean, state["var"], w, b, activation=None, training=True, momentum=0.1,
        step=state.get("step"), drift=state.get("drift"), **options,
    )  # fmt: skip
    y.backward(g)
    want = batch_norm_papers.by_mode(leaf, copies, momentum=0.1, eps=1e-5, **options)
    want.backward(wide(g))
    few = tolerance(dtype, 16.0)
    close("output", y, want, few)
    for name, t in (("x", x), ("w", w), ("b", b)):
        size = wide(g).norm().item() if name != "x" else None
        close(f"d{name}", t.grad, leaf[name].grad, max(few, tolerance(t.dtype, 16.0)) * 4, size)
    for name in state.keys() - {"step"}:
        close(name, state[name], copies[name], max(few, 1e-5))


def batch_norm_mode_cases(make: Maker) -> Iterator[Case]:
    for (what, mode), (which, shape), last in itertools.product(
        MODES.items(), {"three channels": (5, 3, 9, 7), "features": (70, 33)}.items(), (False, True)
    ):
        if last and len(shape) != 4:
            continue
        dtype = REAL[len(what) % 4] if last else torch.float32
        yield Case(
            f"batch_norm {what} {which} {short(dtype)} {'NHWC' if last else 'NCHW'}",
            lambda s=shape, d=dtype, la=last, m=mode: batch_norm_in_mode(make, s, d, la, m),
            what == "all modes" and which != "features",
        )


def batch_norm_cases(make: Maker) -> Iterator[Case]:
    names = itertools.cycle(ACTIVATIONS)
    for (what, shape), dtype, last, train in itertools.product(
        MAPS.items(), REAL, (False, True), (True, False)
    ):
        if last and len(shape) != 4:
            continue
        name = next(names)
        yield Case(
            f"batch_norm {what} {short(dtype)} {'NHWC' if last else 'NCHW'} {name} "
            f"{'train' if train else 'eval'}",
            lambda s=shape, d=dtype, la=last, n=name, t=train: batch_norm(make, s, d, la, n, t),
            what in SMALL_MAPS and (train or dtype == torch.bfloat16),
        )


# ---- steps ----

STEPS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (gradfuse.optim.SGD, {"lr": 0.1}),
    "SGD nesterov": (gradfuse.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "AdamW": (gradfuse.optim.AdamW, {"lr": 1e-2}),
    "AdamW amsgrad": (gradfuse.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "Adam": (gradfuse.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}),
    "LAMB": (gradfuse.optim.LAMB, {"lr": 1e-2}),
    # The sign of the gradient: that of a mean is another one where it rounds to 0.
    "Lion": (gradfuse.optim.Lion, {"lr": 1e-2, "betas": (0.0, 0.9)}),
    "ScheduleFreeAdamW": (gradfuse.optim.ScheduleFreeAdamW, {"lr": 1e-2}),
}
HALF_SAFE = (gradfuse.optim.SGD, gradfuse.optim.Lion)  # they keep no squares of gradients
OWN = {
    "masters": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True},
    "update_clip": {"update_clip": True},
    "tensor lr": {},
}


def step(
    make: Maker, rule: str, sizes: list[int], dtype: torch.dtype, offset: int, own: str | None
) -> None:
    cls, options = STEPS[rule]
    ps = gradients(make, sizes, dtype, offset)
    copies = [Parameter(wide(p)) for p in ps]
    more = dict(OWN.get(own or "", {}))
    if dtype == torch.float16 and cls not in HALF_SAFE:
        more["master_weights"] = True  # squares of gradients are below float16
    if own == "tensor lr":
        more["lr"] = torch.tensor(options["lr"], device=make.device)
    ours = cls(ps, **{**options, **more}, clip=1.0)
    where = torch.optim if hasattr(torch.optim, cls.__name__) else papers
    theirs = getattr(where, cls.__name__)(copies, **options)
    rounds = 2
    for i in range(rounds):
        for p, c in zip(ps, copies, strict=True):
            p.grad = make.tensor(*p.shape, dtype=dtype, offset=(offset + i) % 8)
            c.grad = wide(p.grad)
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        ours.step()
        theirs.step()
    if own == "update_clip":  # bounds what AdamW does
        assert all(torch.isfinite(p).all() for p in ps)
        return
    few = rounds * (8.0 if own == "stochastic" else 4.0)
    for i, (p, c) in enumerate(zip(ps, copies, strict=True)):
        close(f"parameter {i}", p, c, tolerance(dtype, few) + 1e-6 * (dtype != torch.float64))


def step_cases(make: Maker) -> Iterator[Case]:
    lists = {k: LISTS[k] for k in ("ragged", "large", "many")}
    for rule, (name, sizes), dtype, offset in itertools.product(STEPS, lists.items(), REAL, (0, 3)):
        yield Case(
            f"step {rule} {name} {short(dtype)} +{offset}",
            lambda r=rule, s=sizes, d=dtype, o=offset: step(make, r, s, d, o, None),
            name == "ragged" and offset == 3,
        )
    for own, rule in itertools.product(OWN, ("SGD nesterov", "AdamW")):
        if own == "update_clip" and rule != "AdamW":
            continue
        dtype = torch.float32 if own in ("update_clip", "tensor lr") else torch.bfloat16
        yield Case(
            f"step {rule} {own}",
            lambda r=rule, d=dtype, o=own: step(make, r, LISTS["ragged"], d, 1, o),
            True,
        )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(device: str) -> Iterator[Case]:
    make = Maker(device)

    def seeded(case: Case) -> None:
        make.seed(case.name)
        case.run()

    for found in (clip_cases, batch_norm_cases, batch_norm_mode_cases, step_cases):
        for case in found(make):
            yield case._replace(run=partial(seeded, case))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="only the cases of the emulator")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    passed = failed = 0
    for case in cases(arguments.device):
        if arguments.only not in case.name or (arguments.small and not case.is_small):
            continue
        try:
            case.run()
            passed += 1
        except Exception as error:  # the next cases are to run
            failed += 1
            expected = isinstance(error, AssertionError)
            print(
                f"FAILED {case.name}: {error if expected else traceback.format_exc()}", flush=True
            )
    print(f"kernels: {passed} passed, {failed} failed", flush=True)
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main())
