"""Schedule-free AdamW that unscales, clips, checks and updates in one pass."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradfuse._codes import Rule, Slot
from gradfuse._records import ScheduleFreeGroup
from gradfuse.distributed import Group, ReplicatedOver
from gradfuse.optim.base import Clip, ClippedOptimizer, check_torchs_options
from gradfuse.optim.options import OptionsOfGroups

__all__ = ["ScheduleFreeAdamW"]


class ScheduleFreeAdamW(OptionsOfGroups, ClippedOptimizer):
    """AdamW that needs no schedule: a mean of its iterates takes the place of a decaying rate.

    While training, parameters hold y, where gradients are taken; between `eval()` and `train()` x,
    the mean, which is to be validated and saved. Moves 8 values per element, as AdamW. Works as
    gradfuse.optim.AdamW in all else; the package schedulefree loads its state_dict, and it that
    package's. Steps, and the weights of the mean, count for each parameter: one without a gradient
    stands still. betas[0] must stay as it is: OneCycleLR and CyclicLR take cycle_momentum=False.

    Args:
        params: tensors, (name, tensor) pairs or parameter groups.
        lr: as in gradfuse.optim.AdamW.
        betas: share of the mean in y, in (0, 1), and decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: at y, >= 0.
        warmup_steps: over which the learning rate grows linearly, >= 0.
        r: power of the step's number in its weight, >= 0.
        weight_lr_power: power of the largest learning rate so far in the weight, >= 0.
        maximize: ascend.
        foreach: accepted for schedulefree's signature; every step is fused.
        clip: as in gradfuse.optim.AdamW.
        nonfinite: as in gradfuse.optim.AdamW.
        materialize_clipped_grads: as in gradfuse.optim.AdamW.
        master_weights: as in gradfuse.optim.AdamW; eval() and train() then lose nothing.
        stochastic_rounding: as in gradfuse.optim.AdamW.
        eps_follows_clip: as in gradfuse.optim.AdamW.
        group, replicated_over: as in gradfuse.optim.AdamW.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: clip without group is given within torch's ZeroRedundancyOptimizer.
        TypeError: params holds no tensors.

    Source: Defazio et al. 2024, "The Road Less Scheduled", algorithm 1, in the form of its
    implementation, which stores y and z.
    """

    _rule = Rule.SCHEDULE_FREE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        clip: Clip = None,
        nonfinite: str = "skip",
        materialize_clipped_grads: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        eps_follows_clip: bool = False,
        group: Group | None = None,
        replicated_over: ReplicatedOver | None = None,
    ) -> None:
        self._configure(
            clip,
            nonfinite,
            materialize_clipped_grads,
            master_weights,
            stochastic_rounding,
            group,
            replicated_over,
        )
        self._eps_follows_clip = eps_follows_clip
        check_torchs_options("ScheduleFreeAdamW", None, foreach, None)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "maximize": maximize,
            "train_mode": True,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for name in ("warmup_steps", "r", "weight_lr_power"):
            value = group[name]
            if not isinstance(value, Real) or not 0.0 <= float(value) < math.inf:
                raise ValueError(
                    f"ScheduleFreeAdamW: {name} must be a finite number >= 0, got {value!r}"
                )
        if group["betas"][0] == 0.0:
            raise ValueError(
                "ScheduleFreeAdamW: betas[0] must be > 0, because with 0 y holds nothing of the "
                f"mean, got {group['betas']!r}"
            )

    def _unready(self) -> Exception | None:
        if all(group["train_mode"] for group in self.param_groups):
            return None
        return RuntimeError(
            "ScheduleFreeAdamW.step: parameters hold the mean; call train() of the optimizer "
            "before a step"
        )

    @torch.no_grad()
    def eval(self) -> None:
        """Puts x, the mean, into the parameters. Does nothing where they hold it already.

        Raises:
            ValueError: a state z has another shape than its parameter; nothing was written.
        """
        for group, p, state in self._stepped_in(train_mode=True):
            y, master = p, state.get("master_param")
            if master is not None:
                y = torch.where(_same(master.to(p.dtype), p), master, p)  # a written p counts
                master.copy_(y)  # and keeps y for train()
            p.copy_(_mixed(y, state["z"], 1.0 - 1.0 / group["betas"][0]))
        self._set_mode(False)

    @torch.no_grad()
    def train(self) -> None:
        """Puts y, where gradients are taken, back into the parameters.

        With master_weights bit for bit what it was before eval(), unless someone wrote the
        parameter in between; else to rounding.

        Raises:
            ValueError: as eval().
        """
        for group, p, state in self._stepped_in(train_mode=False):
            beta1 = group["betas"][0]
            y, master = _mixed(p, state["z"], 1.0 - beta1), state.get("master_param")
            if master is not None:
                x = _mixed(master, state["z"], 1.0 - 1.0 / beta1).to(p.dtype)
                y = torch.where(_same(x, p), master, y)
                master.copy_(y)
            p.copy_(y)
        self._set_mode(True)

    def _stepped_in(self, train_mode: bool) -> list[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
        """The parameters of the groups in a mode that have taken a step, each once."""
        found, seen = [], set()
        for group in self.param_groups:
            for p in group["params"] if bool(group["train_mode"]) == train_mode else ():
                state = self.state.get(p) or {}
                if "z" not in state or id(p) in seen:
                    continue
                self._check_shape("z", state["z"], p, Slot.EXP_AVG)
                seen.add(id(p))
                found.append((group, p, state))
        return found

    def _set_mode(self, train_mode: bool) -> None:
        for group in self.param_groups:
            group["train_mode"] = train_mode

    def _group(self, group: dict[str, Any], lr: float | Tensor) -> ScheduleFreeGroup:
        beta1, beta2 = group["betas"]
        names = ("eps", "weight_decay", "warmup_steps", "r", "weight_lr_power")
        numbers = (float(group[name]) for name in names)
        return ScheduleFreeGroup(lr, group["maximize"], float(beta1), float(beta2), *numbers)

    def _needed(self, group: dict[str, Any]) -> Slot:
        moments = Slot.EXP_AVG | Slot.EXP_AVG_SQ
        return moments | Slot.MASTER_PARAM | Slot.STEP | Slot.WEIGHT_SUM | Slot.LR_MAX

    def _initial(self, slot: Slot, p: Tensor, dtype: torch.dtype) -> Tensor:
        if slot == Slot.EXP_AVG:  # z begins at the parameter
            made = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
            return made.copy_(p)
        return super()._initial(slot, p, dtype)

    def state_dict(self) -> dict[str, Any]:
        """As gradfuse.optim.AdamW's, with what the package schedulefree keeps in each group."""
        out = super().state_dict()
        for saved, group in zip(out["param_groups"], self.param_groups, strict=True):
            seen = [(float(s["weight_sum"]), float(s["lr_max"])) for s in self._averaged(group)]
            weight_sum, lr_max = max(seen, default=(0.0, -1.0))
            counts = {"k": int(self._taken(group)), "weight_sum": weight_sum, "lr_max": lr_max}
            saved |= {**counts, "scheduled_lr": 0.0, "foreach": True}
        return out

    def _averaged(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [state for state in self._states(group) if "weight_sum" in state]

    def _load_own(self, state_dict: dict[str, Any], old_groups: list[dict[str, Any]]) -> None:
        super()._load_own(state_dict, old_groups)
        for group in self.param_groups:
            for state in self._states(group):
                if "z" not in state:
                    raise ValueError(
                        "ScheduleFreeAdamW: state_dict must be of a schedule-free AdamW, with z of "
                        f"each parameter, got {', '.join(state)}"
                    )
            seen = {"weight_sum": group.pop("weight_sum", 0.0), "lr_max": group.pop("lr_max", 0.0)}
            group.pop("scheduled_lr", None)
            group.pop("foreach", None)
            has_stepped = self._advance(group, float(group.pop("k", 0)))
            for p in group["params"]:
                state = self.state.get(p) or {}
                own = state.get("weight_sum")
                # The package keeps ours as it was, in the parameter's dtype.
                if state and (has_stepped or own is None or own.dtype != torch.float64):
                    numbers = {name: max(float(value), 0.0) for name, value in seen.items()}
                    state |= {
                        name: torch.tensor(value, dtype=torch.float64, device=p.device)
                        for name, value in numbers.items()
                    }


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _mixed(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """start + weight (end - start), in float32 at least."""
    wide = torch.promote_types(start.dtype, torch.float32)
    return start.to(wide).lerp(end.to(wide), weight)
