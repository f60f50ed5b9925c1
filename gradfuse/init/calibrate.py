"""Corrects weights by data, layer by layer, while the model runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradfuse.init.probe import call, undisturbed
from gradfuse.init.watch import rms

__all__ = ["Layer", "Sweep", "calibrate"]

SWEEPS = 16
NEAR = math.log(4)  # how far from its target an rms may be, in either pass
FEATURES: dict[Any, int] = {  # the dimension of a convolution's channels, from the end
    torch.conv1d: -2, torch.conv2d: -3, torch.conv3d: -4, torch.conv_transpose1d: -2,
    torch.conv_transpose2d: -3, torch.conv_transpose3d: -4,
}  # fmt: skip
PLACES: dict[Any, tuple[int, int]] = {  # of the data and the weight
    F.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    **dict.fromkeys(FEATURES, (0, 1)),
}


@dataclass
class Layer:
    """A layer that is corrected.

    Attributes:
        path: of the weight.
        weight, bias: the parameters; no bias: only the scale is corrected.
        hidden: whether the gradient's way back is corrected too: an activation and another
            corrected layer follow, and one comes before.
        target: rms of the output.
        working: the same in a net so deep that biases are needed.
        tail: whether no corrected layer reads its output.
    """

    path: str
    weight: Tensor
    bias: Tensor | None
    hidden: bool
    target: float = 1.0
    working: float = 1.0
    tail: bool = False


@dataclass
class Sweep:
    """What one forward and backward pass found, by path."""

    scale: dict[str, float] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)

    targets: dict[str, float] = field(default_factory=dict)

    def distance(self) -> float:
        """The largest |log rms|, over its target, of either pass."""
        figures = [f / self.targets[p] for p, f in self.forward.items()]
        figures += self.backward.values()
        return max((abs(math.log(f)) if 0 < f < math.inf else math.inf for f in figures), default=0)


class Corrector(TorchFunctionMode):
    """Scales each layer's output as it runs, and moves it by a bias where the layer is deep.

    A scale acts on both passes alike. Deep in a plain net all samples are close together, so a bias
    can change the forward pass alone: a multiple of the mean over the batch. The scale then keeps
    a tangent, and with it the gradient, at its size; the bias gives the output an rms of 1.
    """

    def __init__(self, layers: list[Layer], biases: bool, trim: dict[str, float]) -> None:
        super().__init__()
        self.layers = {id(layer.weight): layer for layer in layers}
        self.biases = biases
        self.trim = trim
        self.sweep = Sweep()
        self.outputs: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        place = PLACES.get(func)
        if place is None or place[1] >= len(args):
            return out
        layer = self.layers.get(id(args[place[1]]))
        if layer is None:
            return out
        return self._corrected(layer, out, FEATURES.get(func, -1))

    def _corrected(self, layer: Layer, out: Tensor, dim: int) -> Tensor:
        sweep, path = self.sweep, layer.path
        again = path in sweep.scale
        if not again:
            self._measure(layer, out, dim)
        out = out * sweep.scale[path]
        if path in sweep.bias:
            shape = [1] * out.dim()
            shape[dim] = -1
            out = out + sweep.bias[path].to(out.dtype).reshape(shape)
        if not again:
            sweep.forward[path] = rms(out)
        if torch.is_grad_enabled():
            out = self._begin_tangent(layer, out)
            if not again:
                self.outputs[path] = out
                out = out.clone()  # an activation may write over what it is given
        return out

    def _measure(self, layer: Layer, out: Tensor, dim: int) -> None:
        sweep, path = self.sweep, layer.path
        tangent = fwad.unpack_dual(out).tangent if torch.is_grad_enabled() else None
        values = out.detach().double()
        size = rms(values)
        target = layer.working if self.biases and not layer.tail else layer.target
        sweep.targets[path] = target
        if not (self.biases and layer.hidden and tangent is not None and layer.bias is not None):
            sweep.scale[path] = target / size if size > 0 else 1.0
            return
        length = rms(tangent)
        scale = self.trim.get(path, 1.0) / length if length > 0 else 1.0
        dims = [d for d in range(values.dim()) if d != dim % values.dim()]
        mean = values.mean(dims, keepdim=True)
        apart = rms(values - mean)
        sweep.scale[path] = scale
        mean, spread = mean * scale, (apart * scale) ** 2
        middle = rms(mean)
        if middle > 0:
            left = max(target**2 - spread, 0.01 * target**2)
            sweep.bias[path] = ((math.sqrt(left) / middle - 1) * mean).flatten()

    def _begin_tangent(self, layer: Layer, out: Tensor) -> Tensor:
        """The output with a tangent of rms 1, kept at its size where it has one."""
        primal: Tensor
        primal, tangent = fwad.unpack_dual(out)
        if not self.biases or layer.tail:
            return primal
        length = rms(tangent) if tangent is not None else 0.0
        if length > 0:
            assert tangent is not None
            # Its direction is kept. Its size is 1 again, whatever the trim has made of it.
            tangent = tangent / length
        else:
            tangent = torch.randn(primal.shape, generator=self.random).to(primal)
        dual: Tensor = fwad.make_dual(primal, tangent)
        return dual


def calibrate(model: nn.Module, layers: list[Layer], inputs: Any, deep: bool) -> Sweep:
    """Corrects the layers so that each output has the rms of its target, and, if deep, so that the
    gradient keeps its size from layer to layer.

    Returns:
        The best of the sweeps, whose scales and biases have been written.

    Source: Mishkin, Matas 2016 for the scale; Salimans, Kingma 2016 for a bias by data; Poole et
    al. 2016 and Schoenholz et al. 2017 for the two conditions.
    """
    for layer in layers:
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.zero_()
    best = _sweep(model, layers, inputs, False, {}, deep)
    if deep and best.distance() > NEAR:
        trim: dict[str, float] = {}
        for _ in range(SWEEPS):
            found = _sweep(model, layers, inputs, True, trim, True)
            if not found.distance() >= best.distance():
                best = found
            if best.distance() <= NEAR:
                break
            trim = _trimmed(trim, found)
    _write(layers, best)
    return best


def _sweep(
    model: nn.Module,
    layers: list[Layer],
    inputs: Any,
    biases: bool,
    trim: dict[str, float],
    backward: bool,
) -> Sweep:
    corrector = Corrector(layers, biases, trim)
    with undisturbed(model), torch.set_grad_enabled(backward):
        with _tangents(), corrector:
            call(model, inputs)
        if backward:  # outside of the level, where the gradient has no tangent of its own
            _go_back(layers, corrector)
    return corrector.sweep


@contextmanager
def _tangents() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch compiles its own formulas with torch.jit.script when a level is first entered.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
        warnings.filterwarnings(
            "ignore", message=".*torch.jit.script.*", category=DeprecationWarning
        )
        with fwad.dual_level():
            yield


def _go_back(layers: list[Layer], corrector: Corrector) -> None:
    """Gradients of a random cotangent at each tail, relative to those at the last hidden layer."""
    outputs = corrector.outputs
    tails = [outputs[layer.path] for layer in layers if layer.tail and layer.path in outputs]
    hidden = [layer.path for layer in layers if layer.hidden and layer.path in outputs]
    if not hidden or not tails:
        return
    ends = [torch.randn(t.shape, generator=corrector.random).to(t) for t in tails]
    found = torch.autograd.grad(tails, [outputs[p] for p in hidden], ends, allow_unused=True)
    sizes = {p: rms(g) if g is not None else math.nan for p, g in zip(hidden, found, strict=True)}
    last = sizes[hidden[-1]]
    corrector.sweep.backward = {
        p: size / last if last > 0 else math.inf for p, size in sizes.items() if size == size
    }


def _trimmed(trim: dict[str, float], found: Sweep) -> dict[str, float]:
    """Factors that undo 7/10 of what the gradient gained or lost in each layer."""
    new = dict(trim)
    before: float | None = None
    for path, size in found.backward.items():
        if before is not None and 0 < before < math.inf and 0 < size < math.inf:
            step = max(-0.5, min(0.5, 0.7 * math.log(size / before)))
            new[path] = new.get(path, 1.0) * math.exp(step)
        before = size
    return new


@torch.no_grad()
def _write(layers: list[Layer], sweep: Sweep) -> None:
    for layer in layers:
        if layer.path in sweep.scale:
            layer.weight.mul_(sweep.scale[layer.path])
        if layer.path in sweep.bias and layer.bias is not None:
            layer.bias.copy_(sweep.bias[layer.path])
