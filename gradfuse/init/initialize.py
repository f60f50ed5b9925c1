"""initialize_: plans, draws, writes and corrects."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from gradfuse.init.calibrate import Layer, calibrate
from gradfuse.init.findings import Findings, Weight
from gradfuse.init.gains import working_rms
from gradfuse.init.plan import plan
from gradfuse.init.probe import one_thread, recorded
from gradfuse.init.reads import previous
from gradfuse.init.report import InitReport, InitRow
from gradfuse.init.rule import Rule
from gradfuse.init.schemes import NEEDS_RUN, SCHEMES, Options, check_structure
from gradfuse.init.slots import Slot, slots_of
from gradfuse.init.watch import restore, rms

__all__ = ["initialize_"]


def initialize_(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    scheme: str = "auto",
    residual: str | None = "scale",
    distribution: str = "normal",
    mode: str = "fan_in",
    generator: torch.Generator | None = None,
) -> InitReport:
    """Initialises every parameter of a model by what reads it.

    A weight gets the gain of the activation that follows it, computed for any function; a norm's
    scale 1, a bias 0; a recurrent layer and attention's joint weight are drawn gate by gate; the
    last weight of a residual branch is divided by what its stream adds up. A tied weight is drawn
    once. Frozen parameters (requires_grad=False), and those that no op takes as a weight, such as a
    class token, are left as they are and reported as "left".

    With example_inputs the model runs, so that functional activations, weights without a module
    and residual branches are found; without, modules tell what they can, in the order of their
    registration. Then "auto" also corrects by data: the scale of each layer that no norm follows,
    and in plain nets so deep that this leaves the gradient beyond a factor of 4, biases too.
    The run leaves nothing behind: buffers, gradients, modes, hooks and torch's random numbers.

    Args:
        model: an nn.Module, on any device; on the meta device rules are reported and nothing is
            drawn. Of DTensors each rank draws the whole tensor and keeps its shard, so that values
            do not depend on the number of ranks; example_inputs must be None then.
        example_inputs: what the model is called with: a Tensor, a tuple of arguments, a mapping of
            keywords. A batch of real data, some 64 samples, where data corrects.
        scheme: "auto"; or, as its paper has it, "xavier" (Glorot, Bengio 2010), "he" (He et al.
            2015, with the gain of any activation), "lecun" (LeCun et al. 1998), "orthogonal" (Saxe
            et al. 2014), "lsuv" (Mishkin, Matas 2016), "fixup" (Zhang, Dauphin, Ma 2019),
            "skipinit" (De, Smith 2020), "deepnorm" (Wang et al. 2022), "gpt2" (Radford et al.
            2019). The last five, "lsuv" on, need example_inputs.
        residual: "scale": the last weight of a branch is multiplied with 1/sqrt(L) in a stream of L
            branches, with 1/L where the branch ends in an activation whose outputs have a mean;
            "zero": it is 0, or the scale of a norm that ends the branch is; None: neither. "fixup",
            "deepnorm" and "lsuv" have their own rule.
        distribution: "normal" or "uniform", of the same variance. "gpt2" is normal by definition,
            "orthogonal" and "lsuv" are neither.
        mode: "fan_in", "fan_out" or "fan_avg", for "auto" and "he".
        generator: of the values; None: torch's default generator, which drawing alone advances.
            Values are drawn in float32, in float64 for float64, on the generator's device.

    Returns:
        InitReport: path, rule, gain, why, and the rms before and after of every parameter.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: an argument has no such value, or the scheme needs data or a structure that are
            not there. Nothing has been written then, nor is anything where the run fails.
    """
    options = Options(scheme, residual, distribution, mode)
    _check(model, example_inputs, options)
    slots = slots_of(model)
    _check_slots(slots, example_inputs, scheme)
    with one_thread():
        recorder = recorded(model, slots, example_inputs) if example_inputs is not None else None
        findings = Findings(model, slots, recorder)
        if recorder is not None:
            check_structure(findings, scheme)
        rules = plan(slots, findings, options)
        meta = any(slot.value.is_meta for slot in slots.values())
        saved = [(p, p.detach().clone()) for p in model.parameters() if not p.is_meta]
        before = {path: rms(_whole(slot)) for path, slot in slots.items()}
        report = InitReport(scheme, [])
        try:
            _draw(slots, rules, generator)
            layers = [] if meta else _layers(slots, findings, scheme)
            if layers:
                sweep = calibrate(model, layers, example_inputs, deep=scheme == "auto")
                report.forward, report.backward = sweep.forward, sweep.backward
        except BaseException:
            restore(saved)
            raise
    corrected = {layer.path for layer in layers}
    report.rows = [
        _row(slot, rules[path], before[path], findings.weights.get(path), path in corrected)
        for path, slot in slots.items()
    ]
    return report


def _check(model: nn.Module, example_inputs: Any, options: Options) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"initialize_: model must be an nn.Module, got {type(model).__name__}")
    for name, value, allowed in (
        ("scheme", options.scheme, SCHEMES),
        ("residual", options.residual, ("scale", "zero", None)),
        ("distribution", options.distribution, ("normal", "uniform")),
        ("mode", options.mode, ("fan_in", "fan_out", "fan_avg")),
    ):
        if value not in allowed:
            raise ValueError(f"initialize_: {name} must be one of {allowed}, got {value!r}")
    if example_inputs is None and options.scheme in NEEDS_RUN:
        raise ValueError(
            "initialize_: example_inputs must be what the model is called with for scheme "
            f"{options.scheme!r}, got None"
        )


def _check_slots(slots: dict[str, Slot], example_inputs: Any, scheme: str) -> None:
    for slot in slots.values():
        if slot.left == "lazy":
            raise ValueError(
                f"initialize_: model must have run once before its lazy parameters have shapes, "
                f"got {slot.path} without"
            )
        if example_inputs is not None and hasattr(slot.value, "device_mesh"):
            raise ValueError(
                f"initialize_: example_inputs must be None for a model of DTensors, as {slot.path} "
                f"is one, got {type(example_inputs).__name__}"
            )
        if slot.value.is_meta and scheme == "lsuv":
            raise ValueError(
                f"initialize_: model must hold data for scheme 'lsuv', got {slot.path} on the meta "
                "device"
            )


@torch.no_grad()
def _draw(
    slots: dict[str, Slot], rules: dict[str, Rule], generator: torch.Generator | None
) -> None:
    for path, slot in slots.items():
        draw = rules[path].draw
        target = slot.value
        if draw is not None and not target.is_meta:
            slot.write(draw.values(tuple(target.shape), target.dtype, generator))


def _layers(slots: dict[str, Slot], findings: Findings, scheme: str) -> list[Layer]:
    """The layers that data corrects, in the order they run."""
    if scheme not in ("auto", "lsuv"):
        return []
    found: dict[str, Weight] = {}
    for path, weight in findings.weights.items():
        slot = slots[path]
        if slot.left or slot.parametrized or weight.node is None or "embedding" in weight.kinds:
            continue
        if scheme == "lsuv" or _is_plain(weight):
            found[path] = weight
    layers: list[tuple[int, Layer]] = []
    for path, weight in found.items():
        assert weight.node is not None
        assert weight.after is not None
        before = previous(weight.node)
        reads = [r.use.slot for r in weight.after.readers if r.use is not None]
        tail = not any(r in found for r in reads)
        chained = before is not None and before.use is not None and before.use.slot in found
        bias = slots.get(weight.use.bias or "")
        function = weight.after.function
        layer = Layer(
            path,
            slots[path].value,
            bias.value if bias is not None and not bias.left else None,
            hidden=chained and not tail and not weight.after.residual,
            working=1.0 if function is None else working_rms(function),
            tail=tail,
        )
        layers.append((weight.node.index, layer))
    return [layer for _, layer in sorted(layers, key=itemgetter(0))]


def _is_plain(weight: Weight) -> bool:
    """Whether the weight reads the model's input or another weight's output, through activations
    alone, and neither a norm nor a residual sum sets the size of what it makes."""
    assert weight.node is not None
    assert weight.after is not None
    if weight.norm or weight.sums:
        return False
    if not weight.node.parents or weight.node.parents[0].base.kind not in ("input", "weight"):
        return False
    return all(r.kind == "weight" for r in weight.after.readers) or weight.after.residual


def _whole(slot: Slot) -> torch.Tensor:
    value: Any = slot.value
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _row(slot: Slot, rule: Rule, before: float, weight: Weight | None, corrected: bool) -> InitRow:
    after = rms(_whole(slot))
    gain, why = rule.gain, rule.why
    if corrected and weight is not None:
        gain = after * math.sqrt(weight.use.fans.fan_in)
        why += "; corrected by data"
    if slot.parametrized:
        why += "; written through its parametrization"
    if slot.aliases:
        why += f"; tied to {', '.join(slot.aliases)}"
    return InitRow(slot.path, rule.text, gain, why, before, after)
