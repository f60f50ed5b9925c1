import collections.abc
import typing

import torch

import gradfuse._records

__all__: list[str] = [
    "BatchNormSite",
    "DropoutSite",
    "ParameterList",
    "Stepper",
    "adaptive_clip_",
    "apply_",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_gradient_sums",
    "batch_norm_statistics",
    "clamp_",
    "clip_",
    "codes",
    "compiler",
    "count_waiting",
    "cuda_archs",
    "cuda_version",
    "exact_limbs",
    "exact_plan",
    "expect_sum",
    "isa",
    "normalise_sum",
    "num_threads",
    "plan_of_sums",
    "row_norm_backward",
    "row_norm_forward",
    "run_deferred_with",
    "run_dropout_with",
    "scale_",
    "set_isa",
    "set_last_level_cache",
    "stats",
    "stream",
    "torch_version",
]

class ParameterList:
    def __init__(self) -> None: ...
    def add(self, parameter: torch.Tensor) -> None: ...
    def apply_(self, plan: torch.Tensor, coefficients: torch.Tensor | None) -> None: ...
    def clamp_(self, clip_value: float) -> None: ...
    def clip_(
        self, max_norm: float, norm_type: float, nonfinite: int, exact: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def measure(
        self, max_norm: float, norm_type: float, nonfinite: int, exact: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

class BatchNormSite:
    def __init__(self) -> None: ...
    def computed_at_once(self, reason: str) -> None: ...
    def count(self) -> None: ...
    def defer(self, call: gradfuse._records.BatchNormCall) -> torch.Tensor | None: ...
    def finish(self, reason: str) -> None: ...
    @property
    def last(self) -> typing.Any: ...

class DropoutSite:
    def __init__(self) -> None: ...
    def computed_at_once(self, reason: str) -> None: ...
    def defer(
        self,
        input: torch.Tensor,
        p: float,
        seed: torch.Tensor | None,
        sample_scale: torch.Tensor | None,
    ) -> torch.Tensor | None: ...
    @property
    def last(self) -> typing.Any: ...

class Stepper:
    def __init__(self, rule: int) -> None: ...
    def bind(
        self,
        groups: list[dict[str, typing.Any]],
        state: dict[torch.Tensor, typing.Any],
        needs: collections.abc.Sequence[int],
    ) -> None: ...
    def check(self) -> None: ...
    def is_current(
        self,
        groups: list[dict[str, typing.Any]],
        state: dict[torch.Tensor, typing.Any],
        needs: collections.abc.Sequence[int],
    ) -> bool: ...
    def lr_sums(
        self,
        groups: collections.abc.Sequence[gradfuse._records.StepGroup],
        plan: torch.Tensor | None,
        coefficients: torch.Tensor | None,
        options: gradfuse._records.StepOptions,
    ) -> torch.Tensor: ...
    def measure(
        self,
        max_norm: float,
        nonfinite: int,
        scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        exact: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def parameters(self) -> list[torch.Tensor]: ...
    def step(
        self,
        groups: collections.abc.Sequence[gradfuse._records.StepGroup],
        max_norm: float,
        nonfinite: int,
        scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        options: gradfuse._records.StepOptions,
        exact: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
    def update(
        self,
        groups: collections.abc.Sequence[gradfuse._records.StepGroup],
        plan: torch.Tensor | None,
        coefficients: torch.Tensor | None,
        options: gradfuse._records.StepOptions,
        lr_scales: torch.Tensor | None = None,
    ) -> None: ...

def adaptive_clip_(
    weights: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    grads: torch.Tensor | collections.abc.Iterable[torch.Tensor] | None,
    clip_factor: float,
    eps: float,
    norm_type: float,
    scale: torch.Tensor | None = None,
) -> None: ...
def apply_(
    op: str,
    tensors: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    plan: torch.Tensor,
    coefficients: torch.Tensor | None = None,
) -> None: ...
def batch_norm_backward(
    grad_output: torch.Tensor,
    saved: gradfuse._records.BatchNormSaved,
    options: gradfuse._records.BatchNormOptions,
    wanted: collections.abc.Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]: ...
def batch_norm_forward(
    call: gradfuse._records.BatchNormCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def batch_norm_gradient_sums(
    grad_output: torch.Tensor,
    saved: gradfuse._records.BatchNormSaved,
    options: gradfuse._records.BatchNormOptions,
) -> torch.Tensor: ...
def batch_norm_statistics(call: gradfuse._records.BatchNormCall) -> torch.Tensor: ...
def clamp_(
    tensors: torch.Tensor | collections.abc.Iterable[torch.Tensor], of_grad: bool, clip_value: float
) -> None: ...
def clip_(
    tensors: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    of_grad: bool,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def count_waiting() -> int: ...
def exact_limbs(
    op: str, tensors: torch.Tensor | collections.abc.Iterable[torch.Tensor], written: bool
) -> tuple[torch.Tensor, torch.Tensor]: ...
def exact_plan(
    op: str,
    limbs: torch.Tensor,
    wide: bool,
    max_norm: float,
    nonfinite: int,
    scale: torch.Tensor | None,
    found_inf: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def expect_sum(t: torch.Tensor, least_bytes: int) -> None: ...
def isa() -> str: ...
def normalise_sum(
    sum: torch.Tensor, function: collections.abc.Callable[..., typing.Any]
) -> typing.Any: ...
def num_threads() -> int: ...
def plan_of_sums(
    op: str,
    sums: torch.Tensor,
    wide: bool,
    max_norm: float,
    norm_type: float,
    nonfinite: int,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def row_norm_backward(
    grad_output: torch.Tensor | None,
    grad_sum: torch.Tensor | None,
    saved: gradfuse._records.RowNormSaved,
    options: gradfuse._records.RowNormOptions,
    wanted: collections.abc.Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]: ...
def row_norm_forward(
    call: gradfuse._records.RowNormCall,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]: ...
def run_deferred_with(function: collections.abc.Callable[..., typing.Any]) -> None: ...
def run_dropout_with(function: collections.abc.Callable[..., typing.Any]) -> None: ...
def scale_(
    tensors: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    of_grad: bool,
    max_norm: float,
    total_norm: torch.Tensor,
) -> None: ...
def set_isa(name: str) -> None: ...
def set_last_level_cache(bytes: int) -> None: ...
def stats(
    tensors: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    of_grad: bool,
    norm_type: float,
    nonfinite: int,
    exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
def stream(
    reads: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    writes: torch.Tensor | collections.abc.Iterable[torch.Tensor],
    backwards: bool = False,
) -> None:
    """
    Reads and writes the bytes of the tensors once, without arithmetic.
    """

codes: dict[str, dict[str, int]]
compiler: str
cuda_archs: str
cuda_version: str
torch_version: str
