from collections.abc import Iterable
from typing import Any

from torch import Tensor

torch_version: str
cuda_version: str
cuda_archs: str
compiler: str

def isa() -> str: ...
def num_threads() -> int: ...
def stats(
    tensors: Tensor | Iterable[Tensor], of_grad: bool, norm_type: float, nonfinite: int
) -> tuple[Tensor, Tensor, Tensor]: ...
def clip_(
    tensors: Tensor | Iterable[Tensor],
    of_grad: bool,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
def scale_(
    tensors: Tensor | Iterable[Tensor], of_grad: bool, max_norm: float, total_norm: Tensor
) -> None: ...
def clamp_(tensors: Tensor | Iterable[Tensor], of_grad: bool, clip_value: float) -> None: ...
def adaptive_clip_(
    weights: Tensor | Iterable[Tensor],
    grads: Tensor | Iterable[Tensor] | None,
    clip_factor: float,
    eps: float,
    norm_type: float,
    scale: Tensor | None = None,
) -> None: ...
def batch_norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: int,
    negative_slope: float,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]: ...
def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    channels_last: bool,
    training: bool,
    eps: float,
    activation: int,
    negative_slope: float,
    wants_input: bool,
    wants_residual: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...

class ParameterList:
    def __init__(self) -> None: ...
    def add(self, parameter: Tensor) -> None: ...
    def clip_(
        self, max_norm: float, norm_type: float, nonfinite: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def measure(
        self, max_norm: float, norm_type: float, nonfinite: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def apply_(self, totals: Tensor, coefficients: Tensor | None) -> None: ...
    def clamp_(self, clip_value: float) -> None: ...

class Stepper:
    def __init__(self, rule: int) -> None: ...
    def holds(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], needs: list[int]
    ) -> bool: ...
    def hold(
        self, groups: list[dict[str, Any]], state: dict[Tensor, Any], needs: list[int]
    ) -> None: ...
    def parameters(self) -> list[Tensor]: ...
    def measure(
        self, max_norm: float, nonfinite: int, scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def step(
        self,
        groups: list[tuple[Any, ...]],
        max_norm: float,
        nonfinite: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
        update_clip: bool,
        stochastic_rounding: bool,
        materialize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def update(
        self,
        groups: list[tuple[Any, ...]],
        totals: Tensor | None,
        coefficients: Tensor | None,
        bound: float,
        update_clip: bool,
        stochastic_rounding: bool,
        materialize: bool,
    ) -> None: ...
