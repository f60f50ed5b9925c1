"""The tensors of a model that an initialisation may write, by path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Slot", "seen_tensors", "slots_of"]


@dataclass
class Slot:
    """A parameter, or a parametrized tensor with the parameters it is made of.

    path names the parameter as named_parameters does, a parametrized tensor as the module has it.
    aliases are the further paths of a tied one, with their modules.
    left says why it may not be written, or is "".
    """

    path: str
    owner: nn.Module
    name: str
    aliases: dict[str, nn.Module]
    left: str = ""

    @property
    def parametrized(self) -> bool:
        return parametrize.is_parametrized(self.owner, self.name)

    @property
    def value(self) -> Tensor:
        """The tensor as the model's ops see it."""
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, Tensor)
        return tensor

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Copies values, cast to its dtype, into the parameter.

        Raises:
            ValueError: a parametrization has no right_inverse that takes them.
        """
        target = self.value
        if target.device.type == "meta":
            return
        values = like(values, target)
        if not self.parametrized:
            target.copy_(values)
            return
        try:
            setattr(self.owner, self.name, values)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            chain = _parametrizations(self.owner)[self.name].children()
            kinds = ", ".join(type(p).__name__ for p in chain)
            raise ValueError(
                f"initialize_: {self.path} must have parametrizations with a right_inverse, "
                f"got {kinds}: {error}"
            ) from error


def like(values: Tensor, target: Tensor) -> Tensor:
    """The values with the dtype, device and placements of the target."""
    values = values.to(target.dtype)
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return values.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    # Each rank has drawn the whole tensor, and keeps its own part: nothing is sent.
    return distribute_tensor(
        values.to(mesh.device_type),
        mesh,
        target.placements,  # type: ignore[attr-defined]
        src_data_rank=None,
    )


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every parameter once, by the first of its paths."""
    found: dict[str, Slot] = {}
    by_id: dict[int, str] = {}
    for prefix, module in model.named_modules():
        dot = prefix + "." if prefix else ""
        if isinstance(module, parametrize.ParametrizationList):
            continue
        names = [name for name, p in module._parameters.items() if p is not None]
        if parametrize.is_parametrized(module):
            names += list(_parametrizations(module))
        for name in names:
            own = parametrize.is_parametrized(module, name)
            held = _parametrizations(module)[name] if own else module._parameters[name]
            key = id(held)
            if key in by_id:
                found[by_id[key]].aliases[dot + name] = module
                continue
            by_id[key] = dot + name
            found[dot + name] = Slot(dot + name, module, name, {}, _left(module, name, own))
    return found


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return found


def _left(module: nn.Module, name: str, own: bool) -> str:
    if own:
        originals = list(_parametrizations(module)[name].parameters())
        return "" if any(p.requires_grad for p in originals) else "frozen: requires_grad is False"
    p = module._parameters[name]
    assert p is not None
    if isinstance(p, nn.parameter.UninitializedParameter):
        return "lazy"
    if not (p.is_floating_point() or p.is_complex()):
        return f"no floating-point tensor: {p.dtype}"
    return "" if p.requires_grad else "frozen: requires_grad is False"


@contextmanager
def seen_tensors(slots: dict[str, Slot]) -> Iterator[dict[str, Tensor]]:
    """The tensors that the model's ops see in the block, where parametrized ones are made once."""
    with parametrize.cached():
        yield {path: slot.value for path, slot in slots.items()}
