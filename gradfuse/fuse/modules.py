"""Batch norms whose output waits for what follows it.

The output of such a module is a torch.Tensor without memory. A residual that is added to it is
taken up, and an activation runs batch norm, residual and activation as one op. Whatever else uses
it computes the value first. csrc/ops/deferred.h says how.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from gradfuse import _native
from gradfuse._codes import Activation
from gradfuse.fuse.swapped import PLAIN, Swapped, recorded
from gradfuse.nn.batch_norm import normalise
from gradfuse.nn.batch_norm_mode import DRIFT, HasMode, averaging, is_auto
from gradfuse.ops.checks import is_transformed

__all__ = ["DEFERRED", "DeferredBatchNorm1d", "DeferredBatchNorm2d", "DeferredBatchNorm3d"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
# To Dynamo before torch 2.13, __dict__["_buffers"] is the property of that name, which asks again.
_OLD_DYNAMO = torch.__version__ < "2.13"
# Fields of a BatchNormCall: no activation, no mode, and no other ranks.
_NO_ACTIVATION = (int(Activation.NONE), 0.01, False, None)
_ALONE = (None, None)
_NO_MODE = (0, None, None, None)


class _Deferred(Swapped, HasMode):
    """What the classes share. `_site` is the compiled module's record of a module's calls."""

    def forward(self, input: Any) -> Any:
        # torch.compile gets the op in training. In eval mode a batch norm is elementwise, and
        # inductor fuses it with what surrounds it. torch.export, torch.jit and torch.fx record what
        # they would of the plain module.
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and self.training and not torch.compiler.is_exporting():
            self._check_input_dim(input)
            return self._finish(normalise(self, input))
        if not is_compiling and not isinstance(input, Tensor):
            found = recorded(self, input)
            if found is not None:
                return found
        if is_compiling or torch._C._is_tracing():
            if not self._is_plain:
                if self.training:
                    return self._finish(normalise(self, input))
                return self._finish(self._plain_eval(input))
            plain: Tensor = super().forward(input)
            return plain
        self._check_input_dim(input)
        return self._finish(self._eager(input))

    def _plain_eval(self, input: Tensor) -> Tensor:
        """Eval mode's norm by torch, to which a momentum of "auto" means nothing."""
        self._check_input_dim(input)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(input, *statistics, self.weight, self.bias, False, 0.0, self.eps)

    def _finish(self, output: Tensor) -> Tensor:
        """What the plain class does after it has normalised."""
        return output

    def _eager(self, input: Tensor) -> Tensor:
        reason = self._reason_not_to_wait(input)
        if not reason:
            output = self._wait(input)
            if output is not None:
                return output
            reason = "a backward pass, dispatch mode, saved-tensor hook or subclass of a weight"
        if self._site is not None:
            self._site.computed_at_once(reason)
        return normalise(self, input)

    def _reason_not_to_wait(self, input: Tensor) -> str:
        """Why the output has to be computed at once; "" if nothing speaks against waiting."""
        if self._site is None and not self._begin():
            return "outputs do not wait here: GRADFUSE_DEFER=0 or no compiled module"
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or torch_module._has_any_global_hook()
        ):
            return "the module has hooks"
        if self._mode.renorm and self.training:
            # A second use would compute it again, after the update of what it corrects towards.
            return "renorm"
        if type(input) not in PLAIN or is_transformed():
            return "a transform or tensor subclass sees the call"
        return ""

    def _begin(self) -> bool:
        site = getattr(_native.backend, "BatchNormSite", None)
        if site is None or os.environ.get("GRADFUSE_DEFER") == "0":
            return False
        self.__dict__["_site"] = site()
        return True

    def _wait(self, input: Tensor) -> Tensor | None:
        """An output that waits; None where it has to be computed at once."""
        # Attributes take Python's slow way through __getattr__.
        parameters, buffers = self.__dict__["_parameters"], self.__dict__["_buffers"]
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
        except KeyError:  # parametrized ones are attributes only
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if type(weight) not in PLAIN or type(bias) not in PLAIN:
            return None
        training = self.training
        momentum: float | Tensor | None = self.momentum
        counted = buffers["num_batches_tracked"] if training and self.track_running_stats else None
        modes: tuple[Any, ...] = _NO_MODE
        if training and not self._is_plain:
            given = self._modes()
            modes = (given["ghost_size"] or 0, None, None, given["drift"])
        if not isinstance(momentum, (float, int)):
            momentum = 0.0
            if self.momentum is None and counted is not None:
                momentum = averaging(counted, input.shape[0], modes[0] or None)
        uses_batch = training or (mean is None and var is None)
        if training and not self.track_running_stats:
            mean = var = None
        output: Tensor | None = self._site.defer(
            (
                input, None, weight, bias, mean, var, uses_batch, momentum, self.eps,
                *_NO_ACTIVATION, *modes, *_ALONE,
            )
        )  # fmt: skip
        if counted is not None and output is not None:
            counted.add_(1)
        return output

    # An output that waits has not updated the running statistics. Whoever reads them from here
    # finds them as they ought to be.

    def __getattr__(self, name: str) -> Any:
        if name in ("running_mean", "running_var", DRIFT) and self._site is not None:
            self._site.count()
        if name == "qconfig":  # whose readers put another class in this one's place
            self._refuse_mode("convert")
        return super().__getattr__(name)

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        if self._site is not None:
            self._site.count()
        name = "_same_buffers" if _OLD_DYNAMO and torch.compiler.is_compiling() else "_buffers"
        buffers: dict[str, Tensor | None] = self.__dict__[name]
        return buffers

    @_buffers.setter
    def _buffers(self, value: dict[str, Tensor | None]) -> None:
        self.__dict__["_buffers"] = value
        if _OLD_DYNAMO:
            self.__dict__["_same_buffers"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard sets a parameter before it frees the memory of the one that was there.
        if name in _TENSORS:
            self._finish_waiting()
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_waiting()
        return super()._apply(*args, **kwargs)

    def _finish_waiting(self) -> None:
        """Computes what waits, before a parameter or buffer is replaced."""
        if self._site is not None:
            self._site.finish("a change of the module's parameters")

    def _state(self) -> dict[str, Any]:
        if self._site is not None:
            self._site.count()
        return super()._state()

    def _plain_state(self) -> dict[str, Any]:
        state = self._state()
        state.pop("_mode", None)
        own = state.pop("_own_momentum", None)
        if is_auto(self):
            state["momentum"] = own
            buffers = state["_buffers"]
            state["_buffers"] = {name: t for name, t in buffers.items() if name != DRIFT}
        return state

    def _refuse_mode(self, to: str) -> None:
        if not self._is_plain:
            raise TypeError(
                f"{type(self).__name__}: expected a plain batch norm to {to}, got one with a mode"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        if self.training:
            self._refuse_mode("script in training mode")
        return super().__prepare_scriptable__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers = state["_buffers"]


def become_deferred(bn: nn.Module, cls: type[_Deferred]) -> None:
    """Gives a module a class of this file."""
    bn.__class__ = cls
    bn._buffers = bn.__dict__["_buffers"]


class DeferredBatchNorm1d(_Deferred, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d whose output waits for a residual and an activation."""

    plain = nn.BatchNorm1d


class DeferredBatchNorm2d(_Deferred, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d whose output waits for a residual and an activation."""

    plain = nn.BatchNorm2d


class DeferredBatchNorm3d(_Deferred, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d whose output waits for a residual and an activation."""

    plain = nn.BatchNorm3d


DEFERRED: dict[type[nn.Module], type[_Deferred]] = {
    c.plain: c for c in (DeferredBatchNorm1d, DeferredBatchNorm2d, DeferredBatchNorm3d)
}
