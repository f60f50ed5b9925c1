"""A rule for every parameter of a model."""

from __future__ import annotations

import math

from torch import nn

from gradfuse.init.draws import Draw, constant
from gradfuse.init.findings import Findings
from gradfuse.init.rnn import gates_of, rnn_rule
from gradfuse.init.rule import Rule, left
from gradfuse.init.schemes import Options, multipliers, weight_rule
from gradfuse.init.slots import Slot
from gradfuse.init.structure import NORMS, is_norm

__all__ = ["plan"]


def plan(slots: dict[str, Slot], findings: Findings, options: Options) -> dict[str, Rule]:
    """The rule of each slot. Nothing is drawn or written."""
    biases = findings.biases
    zero_norms = _norms_at_ends(findings) if options.residual == "zero" else set()
    scales = multipliers(findings) if options.scheme == "skipinit" else set()
    return {
        path: _rule(slot, findings, options, biases, zero_norms, scales)
        for path, slot in slots.items()
    }


def _rule(
    slot: Slot,
    findings: Findings,
    options: Options,
    biases: set[str],
    zero_norms: set[str],
    scales: set[str],
) -> Rule:
    path, owner, name = slot.path, slot.owner, slot.name
    if slot.left:
        return left(slot.left)
    if path in scales:
        return Rule(constant(0.0), "0, residual multiplier", math.nan, "De 2020: SkipInit")
    if gates_of(owner):
        return rnn_rule(owner, name, slot.value.shape, options.scheme, options.distribution)
    if isinstance(owner, nn.MultiheadAttention) and name in ("in_proj_weight", "in_proj_bias"):
        return _attention(slot, findings, options)
    gate_bias = getattr(owner, "gate_bias", None)
    if isinstance(gate_bias, float):
        return _gate(slot, gate_bias, options)
    roles = findings.roles.get(path, set())
    if is_norm(owner) and slot.value.dim() <= 1:
        return _norm(slot, zero_norms)
    if path in findings.weights:
        return weight_rule(findings.weights[path], options, findings)
    if path in biases or ("bias" in name and slot.value.dim() == 1 and "add" in roles):
        return Rule(constant(0.0), "0", math.nan, "bias")
    if isinstance(owner, nn.MultiheadAttention) and name.endswith("proj_weight"):
        fan = slot.value.shape[1]
        draw = Draw(options.distribution, 1 / math.sqrt(fan))
        return Rule(draw, f"lecun, fan_in {fan}", 1.0, "queries, keys or values")
    if roles & {"mul", "slope"}:
        return left("a learned scale or slope")
    if findings.nodes and not roles:
        return left("the run did not use it")
    return left("no op takes it as a weight")


def _attention(slot: Slot, findings: Findings, options: Options) -> Rule:
    """Queries, keys and values are three matrices, each with its own fans."""
    if slot.name == "in_proj_bias":
        return Rule(constant(0.0), "0", math.nan, "bias")
    width = slot.value.shape[1]
    parts, text = (1.0, 1.0, 1.0), f"lecun, by q, k and v, fan_in {width}"
    std, why = 1 / math.sqrt(width), "queries, keys and values are three matrices"
    kind = options.distribution
    if options.scheme == "gpt2":
        std, text, kind = 0.02, "normal, std 0.02", "normal"
    elif options.scheme in ("orthogonal", "lsuv"):
        std, text, kind = 1.0, "orthogonal by q, k and v", "orthogonal"
    elif options.scheme == "deepnorm":
        beta = (4 * len(findings.sums)) ** -0.25
        parts = (1.0, 1.0, beta)
        text, why = f"xavier, by q, k and v, v times {beta:.3g}", "Wang 2022"
    elif options.scheme == "xavier":
        text = f"xavier, by q, k and v, fan_avg {width}"
    return Rule(Draw(kind, std, parts), text, std * math.sqrt(width), why)


def _gate(slot: Slot, gate_bias: float, options: Options) -> Rule:
    """A gate that says itself how far it is open at the start."""
    if slot.name == "bias":
        return Rule(
            constant(gate_bias), f"{gate_bias:g}", math.nan, "bias of a gate (Srivastava 2015)"
        )
    fan = slot.value.shape[1]
    draw = Draw(options.distribution, 1 / math.sqrt(fan))
    return Rule(draw, f"lecun, fan_in {fan}", 1.0, "a gate, whose bias opens it")


def _norm(slot: Slot, zero_norms: set[str]) -> Rule:
    if slot.path in zero_norms:
        why = "residual='zero': a norm ends the branch (Goyal 2017)"
        return Rule(constant(0.0), "0, end of a residual branch", math.nan, why)
    if slot.name == "bias":
        return Rule(constant(0.0), "0", math.nan, "bias of a norm")
    if slot.name != "weight":
        return left("a norm's own parameter")
    if (
        not isinstance(slot.owner, NORMS)
        and not slot.value.is_meta
        and not bool(slot.value.detach().any())
    ):
        return left("a norm of its own kind, whose weight is 0: it may add 1")
    return Rule(constant(1.0), "1", math.nan, "scale of a norm")


def _norms_at_ends(findings: Findings) -> set[str]:
    """Paths of the scales of norms that come last in a branch."""
    found: set[str] = set()
    for residual in findings.sums:
        if findings.scales_of(residual):  # which may be 0 itself: neither would have a gradient
            continue
        if residual.normalised and residual.norm is not None and residual.norm.params:
            found.add(residual.norm.params[0])
    return found
