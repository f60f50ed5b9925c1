from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradfuse._records import (
    AdamWGroup,
    BatchNormCall,
    BatchNormOptions,
    BatchNormSaved,
    SGDGroup,
    StepOptions,
)

torch_version: str
cuda_version: str
cuda_archs: str
compiler: str
codes: dict[str, dict[str, int]]

def isa() -> str: ...
def set_isa(name: str) -> None: ...
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
def batch_norm_forward(call: BatchNormCall) -> tuple[Tensor, Tensor, Tensor]: ...
def batch_norm_backward(
    grad_output: Tensor,
    saved: BatchNormSaved,
    options: BatchNormOptions,
    wanted: Sequence[bool],
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
    def apply_(self, plan: Tensor, coefficients: Tensor | None) -> None: ...
    def clamp_(self, clip_value: float) -> None: ...

class Stepper:
    def __init__(self, rule: int) -> None: ...
    def is_current(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Any],
        needs: Sequence[int],
    ) -> bool: ...
    def bind(
        self,
        groups: Sequence[dict[str, Any]],
        state: Mapping[Tensor, Any],
        needs: Sequence[int],
    ) -> None: ...
    def parameters(self) -> list[Tensor]: ...
    def measure(
        self, max_norm: float, nonfinite: int, scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def step(
        self,
        groups: Sequence[AdamWGroup] | Sequence[SGDGroup],
        max_norm: float,
        nonfinite: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
        options: StepOptions,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def update(
        self,
        groups: Sequence[AdamWGroup] | Sequence[SGDGroup],
        plan: Tensor | None,
        coefficients: Tensor | None,
        options: StepOptions,
    ) -> None: ...
