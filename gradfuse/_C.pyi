from collections.abc import Iterable

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
) -> None: ...

class ParameterList:
    def __init__(self) -> None: ...
    def add(self, parameter: Tensor) -> None: ...
    def clip_(
        self, max_norm: float, norm_type: float, nonfinite: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...
