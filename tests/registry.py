"""What an entry of the registry in ops.py is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers import REAL, assert_as_close_as_torch, wide
from torch import Tensor

Outcome = dict[str, Tensor]
Wrap = Callable[[Callable[[], Any]], Callable[[], Any]]


def as_it_is(call: Callable[[], Any]) -> Callable[[], Any]:
    return call


@dataclass
class Sample:
    """The arguments of a call: tensors by name, which the call may write, and options."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def fresh(self, dtype_of: Callable[[torch.dtype], torch.dtype] = lambda d: d) -> Sample:
        """A copy with the same strides, in other dtypes if asked for."""

        def copied(t: Tensor) -> Tensor:
            like = {"dtype": dtype_of(t.dtype), "device": t.device}
            return torch.empty_strided(t.shape, t.stride(), **like).copy_(t)

        return replace(self, tensors={name: copied(t) for name, t in self.tensors.items()})

    def wide(self) -> Sample:
        """In float64 or complex128."""
        return self.fresh(lambda d: torch.complex128 if d.is_complex else torch.float64)

    def grads(self) -> list[Tensor]:
        return [t for name, t in self.tensors.items() if name.startswith("grad")]

    def weights(self) -> list[Tensor]:
        return [t for name, t in self.tensors.items() if name.startswith("weight")]


@dataclass(frozen=True)
class Bad:
    """A change that turns a good sample into one that the op refuses before it writes anything."""

    what: str
    change: Callable[[Sample], None]
    error: type[Exception]
    match: str  # in the message, which begins with the op's name
    in_python: bool = False  # refused before any implementation is called


@dataclass(frozen=True)
class Traffic:
    """A call on the emulator, and how often it reads and writes its tensors. Keys are prefixes of
    the emulator's names: "tensor" is a list's element or a first argument, "grad" a parameter's
    gradient."""

    what: str
    make: Callable[[torch.dtype], Sample]
    loaded: dict[str, float]
    stored: dict[str, float]


Samples = Callable[[torch.dtype, "torch.device | str"], Iterable[Sample]]


@dataclass(frozen=True)
class Op:
    name: str  # its public name; its errors begin with it
    # Calls the op, through `wrap` if given. Returns the results and the tensors it may write.
    ours: Callable[..., Outcome]
    stock: Callable[[Sample], Outcome]  # the same by torch's own ops, in any dtype
    samples: Samples
    dtypes: Sequence[torch.dtype] = REAL
    errors: Sequence[Bad] = ()  # changes to `good`, or to the first float32 sample
    good: Callable[[], Sample] | None = None
    large: Callable[[torch.dtype], Iterable[Sample]] = lambda dtype: ()  # work for several threads
    # The torch.library ops that it calls, and sample arguments for each.
    registered: dict[str, Callable[[torch.dtype], Iterable[tuple]]] = field(default_factory=dict)
    # Names to functions of float64 tensors that require grad, for numerical derivatives. They need
    # few elements: each is a column of the Jacobians.
    derivatives: dict[str, Callable[[], tuple[Callable, Sequence[Tensor]]]] = field(
        default_factory=dict
    )
    compiles: str = "bits"  # torch.compile gives the same "bits" or "close" numbers; "": not tested
    traffic: Sequence[Traffic] = ()
    truth: Callable[[Sample], dict] | None = None  # exact results; default: stock in float64
    compare: Callable[[Outcome, dict, Outcome], None] | None = None  # ours, truth, torch's
    # Against the reference: for results narrower than float64, and for the others.
    tolerance: tuple[float, float] = (3e-6, 1e-12)

    def assert_as_close_as_torch(self, sample: Sample, ours: Outcome) -> None:
        """The error is at most 4 times that of torch."""
        truth = self.truth(sample.fresh()) if self.truth else self.stock(sample.wide())
        theirs = self.stock(sample.fresh())
        if self.compare is not None:
            self.compare(ours, truth, theirs)
            return
        for name, value in ours.items():
            exact = truth[name]
            exact = wide(exact) if isinstance(exact, Tensor) else exact
            assert_as_close_as_torch(value, exact, theirs[name])


def leaf_of(t: Any) -> Any:
    is_differentiable = isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    return t.detach().requires_grad_() if is_differentiable else t


# Arguments of ops that are no tensors of a sample. Those of its options need not be here.
OPTIONS = (
    "activation", "drop_mode", "drop_path", "eps", "ghost_size", "momentum", "negative_slope", "p",
    "renorm",
    "residual_dtype", "save", "training",
)  # fmt: skip


def bad_call(match: str, error: type[Exception] = ValueError, kernel: bool = False, **given: Any):
    """Replaces tensors or options of the good sample."""

    def change(sample: Sample) -> None:
        for name, value in given.items():
            of = sample.options if name in sample.options or name in OPTIONS else sample.tensors
            of[name] = value

    what = ", ".join(
        f"{name}={list(v.shape)} {v.dtype} {v.layout} {v.device}".replace("torch.", "")
        if isinstance(v, Tensor)
        else f"{name}={v}"
        for name, v in given.items()
    )
    return Bad(what, change, error, match, in_python=not kernel)
