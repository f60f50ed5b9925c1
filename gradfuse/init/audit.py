"""audit_init: what is wrong with the weights that a model has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfuse.init.findings import Findings, Weight
from gradfuse.init.graph import Node
from gradfuse.init.probe import call, floats, one_thread, recorded, undisturbed
from gradfuse.init.rnn import forget_bias, gates_of
from gradfuse.init.slots import Slot, seen_tensors, slots_of
from gradfuse.init.structure import is_norm
from gradfuse.init.watch import rms

__all__ = ["AuditFinding", "AuditReport", "audit_init"]

LARGE, SMALL = 8.0, 0.015  # times 1 / sqrt(fan_in), where no norm sets the size of what comes out
DEAD, FLAT = 0.9, 0.5  # shares of a layer's units
GROWTH = 1e3  # of a signal's rms through the model, either way
GRADIENT = 1e6  # the same for the gradients of weights
LOGITS = 10.0
SHALLOW = 8  # residual branches, up to which a stream may grow as it likes


class AuditFinding(NamedTuple):
    """One thing that is wrong."""

    path: str
    fault: str
    figure: float
    remedy: str


@dataclass
class AuditReport:
    """The outcome of `gradfuse.init.audit_init`: its findings, worst of their kind first."""

    findings: list[AuditFinding]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def of(self, fault: str) -> list[AuditFinding]:
        """The findings of one fault."""
        return [f for f in self.findings if f.fault == fault]

    def __str__(self) -> str:
        if self.ok:
            return "audit_init: nothing found"
        lines = [f"audit_init: {len(self.findings)} findings"]
        for f in self.findings:
            lines.append(f"{f.path}: {f.fault} ({f.figure:.3g}): {f.remedy}")
        return "\n".join(lines)


@dataclass
class Case:
    """What the checks look at."""

    model: nn.Module
    slots: dict[str, Slot]
    values: dict[str, Tensor]
    findings: Findings
    gradients: dict[str, float]

    def weights(self) -> Iterator[tuple[str, Weight, Tensor]]:
        """Weights of matrices and convolutions, in the order they run."""
        for path, weight in self.findings.weights.items():
            if "embedding" not in weight.kinds:
                yield path, weight, self.values[path]

    def last(self) -> Weight | None:
        """The head: the last weight, if nothing reads its output."""
        heads = [w for _, w, _ in self.weights() if w.after is not None and not w.after.readers]
        return heads[-1] if heads else None


def audit_init(model: nn.Module, batch: Any = None) -> AuditReport:
    """Looks for faults in a model's weights as they are, before training. It changes nothing.

    Args:
        model: an nn.Module with data, as it would be trained.
        batch: what the model is called with: a Tensor, a tuple of arguments or a mapping of
            keywords; a real batch of some samples. None: weights are looked at alone, and what
            shows only in a run is not found.

    Returns:
        AuditReport: for each finding the path, the fault, its figure and the remedy. The faults:
        not finite, all zero, constant, identical units, gain too large, gain too small, fans
        swapped, groups ignored, dead units, saturated, growth with depth, decay with depth,
        gradient explodes, gradient vanishes, residual branches unscaled, norm scale zero, forget
        bias below 0.5, gate rank deficient, logits far from uniform, embedding too large for its
        tied head.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: a parameter is on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit_init: model must be an nn.Module, got {type(model).__name__}")
    slots = slots_of(model)
    for slot in slots.values():
        if slot.left == "lazy" or slot.value.is_meta:
            raise ValueError(f"audit_init: model must hold data, got {slot.path} without")
    with one_thread(), torch.no_grad():
        values = {path: slot.value.detach() for path, slot in slots.items()}
        broken = list(_not_finite(values))
        if broken:
            return AuditReport(broken)
        recorder = recorded(model, slots, batch, measure=True) if batch is not None else None
        findings = Findings(model, slots, recorder)
        gradients = _gradients(model, slots, batch) if batch is not None else {}
        case = Case(model, slots, values, findings, gradients)
        found = [finding for check in CHECKS for finding in check(case)]
    return AuditReport(found)


def _gradients(model: nn.Module, slots: dict[str, Slot], batch: Any) -> dict[str, float]:
    """rms of each weight's gradient for a random cotangent of the output."""
    with undisturbed(model), torch.enable_grad(), seen_tensors(slots) as seen:
        outputs = [o for o in floats(call(model, batch)) if o.requires_grad]
        if not outputs:
            return {}
        random = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(o.shape, generator=random).to(o) for o in outputs]
        wanted = {path: t for path, t in seen.items() if t.requires_grad}
        grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        pairs = zip(wanted, grads, strict=True)
        return {path: rms(g) for path, g in pairs if g is not None}


def _not_finite(values: dict[str, Tensor]) -> Iterator[AuditFinding]:
    for path, value in values.items():
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            yield AuditFinding(path, "not finite", bad, "draw it again: initialize_(model, batch)")


def _values(case: Case) -> Iterator[AuditFinding]:
    """Weights that break no symmetry."""
    head = case.last()
    for path, weight, value in case.weights():
        flat = value.flatten(1).double() if value.dim() > 1 else value.double()[None]
        if not bool(flat.any()):
            # Zero ends a branch, or is a head, on purpose: gradients reach it at the first step.
            if not weight.sums and weight is not head and case.gradients.get(path) == 0:
                yield AuditFinding(path, "all zero", 0.0, "initialize_(model, batch)")
        elif flat.numel() > 1 and float(flat.std()) <= 1e-6 * rms(flat):
            figure = float(flat.flatten()[0])
            yield AuditFinding(path, "constant", figure, "draw it: initialize_(model, batch)")
        elif flat.shape[0] > 1 and flat.shape[1] > 1:
            same = flat.shape[0] - len(torch.unique(flat, dim=0))
            if same > flat.shape[0] // 20:
                remedy = "units that start the same stay the same: initialize_(model, batch)"
                yield AuditFinding(path, "identical units", same, remedy)


def _gains(case: Case) -> Iterator[AuditFinding]:
    """Weights of a size that fits neither fan."""
    head = case.last()
    for path, weight, value in case.weights():
        size = rms(value)
        if weight.norm or size == 0 or weight.use.fans.fan_in < 2:
            continue
        fans = weight.use.fans
        gain, other = size * math.sqrt(fans.fan_in), size * math.sqrt(fans.fan_out)
        groups = weight.use.groups
        small = gain < SMALL and not weight.sums and weight is not head and _is_faint(weight)
        if gain > LARGE or small:
            if 0.4 < other < 2.5:
                fault = "fans swapped"
            elif gain < SMALL and 0.4 < gain * math.sqrt(groups) < 2.5:
                fault = "groups ignored"
            else:
                fault = "gain too large" if gain > LARGE else "gain too small"
            yield AuditFinding(path, fault, gain, "initialize_(model, batch) draws by the fans")


def _is_faint(weight: Weight) -> bool:
    """Whether the op's output is small beside its input: a bias may make up for a small weight, as
    in the gate of a gated linear unit that starts open."""
    node = weight.node
    if node is None or node.figures is None or not node.parents:
        return True
    source = node.parents[0].figures
    sizes = [n.figures.rms for n in (node, *_biased(node)) if n.figures is not None]
    return source is None or max(sizes) < SMALL * source.rms


def _biased(node: Node) -> list[Node]:
    """Sums of the op's output and a parameter, where the bias is added by itself."""
    found: list[Node] = []
    stack = [node]
    while stack:
        for child in stack.pop().children:
            if child.base is node:
                stack.append(child)
                if child.params and child.name.startswith("add"):
                    found.append(child)
    return found


def _units(case: Case) -> Iterator[AuditFinding]:
    """Activations at a bound."""
    for node in case.findings.nodes:
        if node.figures is None or node.kind != "pointwise":
            continue
        source = _weight_before(node)
        if source is None or source.use is None:
            continue
        if node.figures.dead > DEAD and (source.figures is None or source.figures.dead < DEAD):
            remedy = "set the bias to 0: initialize_(model, batch)"
            yield AuditFinding(source.use.slot, "dead units", node.figures.dead, remedy)
        if node.figures.flat > FLAT:
            remedy = "a smaller gain or bias: initialize_(model, batch)"
            yield AuditFinding(source.use.slot, "saturated", node.figures.flat, remedy)


def _weight_before(node: Node) -> Node | None:
    """The weight's op that the node is made of, through one norm at most."""
    source = node.base
    if source.kind == "norm":
        source = source.parents[0].base
    return source if source.kind == "weight" else None


def _depth(case: Case) -> Iterator[AuditFinding]:
    """Signals and gradients that change their size through the model."""
    remedy = "correct by data: initialize_(model, batch)"
    run, sizes = [], []
    for path, weight, _ in case.weights():
        if weight.node is not None and weight.node.figures:
            run.append((path, weight))
            sizes.append(weight.node.figures.rms)
    if len(run) > 2:
        start = sizes[0]
        worst = max(range(len(run)), key=lambda i: sizes[i] if sizes[i] == sizes[i] else math.inf)
        if start > 0 and not sizes[worst] / start < GROWTH:
            growth = sizes[worst] / start
            yield AuditFinding(run[worst][0], "growth with depth", growth, remedy)
        inner = [i for i in range(len(run)) if not run[i][1].sums and run[i][1] is not case.last()]
        least = min(inner, key=lambda i: sizes[i], default=0)
        zero = not bool(case.values[run[least][0]].any())
        if start > 0 and sizes[least] / start < 1 / GROWTH**2 and not zero:
            decay = sizes[least] / start
            yield AuditFinding(run[least][0], "decay with depth", decay, remedy)
    grads = [(p, case.gradients[p]) for p, _ in run if case.gradients.get(p, 0) > 0]
    if len(grads) > 2:
        first, last = grads[0], grads[-1]
        ratio = first[1] / last[1]
        if not ratio < GRADIENT:
            yield AuditFinding(first[0], "gradient explodes", ratio, remedy)
        elif ratio < 1 / GRADIENT:
            yield AuditFinding(first[0], "gradient vanishes", ratio, remedy)


def _residuals(case: Case) -> Iterator[AuditFinding]:
    """Streams without a norm that grow with each branch."""
    seen: set[int] = set()
    for residual in case.findings.sums:
        stream = residual.stream
        if id(stream) in seen:
            continue
        seen.add(id(stream))
        if any(s.normed or s.post_norm for s in stream):
            continue  # a norm bounds what such a branch adds
        first, last = stream[0].source.figures, stream[-1].node.figures
        if len(stream) < SHALLOW or first is None or last is None or not first.rms > 0:
            continue
        growth = last.rms / first.rms
        if not growth < 4 * math.sqrt(len(stream)) and stream[-1].ends:
            use = stream[-1].ends[-1].use
            assert use is not None
            remedy = f"scale the {len(stream)} branches: initialize_(model, batch)"
            yield AuditFinding(use.slot, "residual branches unscaled", growth, remedy)


def _norms(case: Case) -> Iterator[AuditFinding]:
    """Scales of norms that are 0 elsewhere than at the end of a branch."""
    ends = {p for s in case.findings.sums if s.norm is not None for p in s.norm.params}
    for path, slot in case.slots.items():
        zero = slot.name == "weight" and is_norm(slot.owner) and not bool(case.values[path].any())
        used = "norm" in case.findings.roles.get(path, ()) or not case.findings.nodes
        if zero and path not in ends and used and case.gradients.get(path, 1.0) >= 0:
            yield AuditFinding(path, "norm scale zero", 0.0, "torch.nn.init.ones_ on it")


def _recurrent(case: Case) -> Iterator[AuditFinding]:
    """Gates of recurrent layers."""
    for prefix, module in case.model.named_modules():
        dot = prefix + "." if prefix else ""
        for name, bias in forget_bias(module):
            mean = float(bias.double().mean())
            if mean < 0.5:
                remedy = "bias_ih 1 and bias_hh 0 there: initialize_(model)"
                yield AuditFinding(dot + name, "forget bias below 0.5", mean, remedy)
        gates = gates_of(module)
        for name, p in module.named_parameters(recurse=False) if gates else ():
            if not name.startswith("weight_hh"):
                continue
            for gate in p.detach().double().chunk(gates):
                singular = torch.linalg.svdvals(gate)
                ratio = float(singular[-1] / singular[0].clamp_min(1e-300))
                if ratio < 1e-6:
                    remedy = "orthogonal by gate: initialize_(model)"
                    yield AuditFinding(dot + name, "gate rank deficient", ratio, remedy)
                    break


def _output(case: Case) -> Iterator[AuditFinding]:
    """Logits at the start."""
    for path, weight in case.findings.weights.items():
        if weight.kinds >= {"embedding", "matrix"}:
            size = rms(case.values[path]) * math.sqrt(weight.use.fans.fan_out)
            if size > LARGE:
                remedy = "standard deviation 1/sqrt(width), or GPT-2's 0.02"
                yield AuditFinding(path, "embedding too large for its tied head", size, remedy)
    head = case.last()
    if head is not None and head.node is not None and head.node.figures is not None:
        size = head.node.figures.rms
        if not size < LOGITS and head.use.kind == "matrix":
            remedy = "a smaller head: its loss starts far above the log of the classes"
            yield AuditFinding(head.use.slot, "logits far from uniform", size, remedy)


CHECKS: tuple[Callable[[Case], Iterator[AuditFinding]], ...] = (
    _values, _gains, _units, _depth, _residuals, _norms, _recurrent, _output,
)  # fmt: skip
