"""Each scheme's rule for the weight of a matrix, a convolution or an embedding."""

from __future__ import annotations

import math

from gradfuse.init.draws import Draw, constant
from gradfuse.init.findings import Findings, Weight
from gradfuse.init.residual import Residual
from gradfuse.init.rule import Rule

__all__ = ["NEEDS_RUN", "SCHEMES", "Options", "check_structure", "weight_rule"]

SCHEMES = (
    "auto", "xavier", "he", "lecun", "orthogonal", "lsuv", "fixup", "skipinit", "deepnorm", "gpt2",
)  # fmt: skip
NEEDS_RUN = ("lsuv", "fixup", "skipinit", "deepnorm", "gpt2")
COHERENT = 0.05  # share of the mean in the second moment of a branch from which on it adds up


class Options:
    """The arguments of initialize_ that rules depend on."""

    def __init__(self, scheme: str, residual: str | None, distribution: str, mode: str) -> None:
        self.scheme = scheme
        self.residual = residual
        self.distribution = distribution
        self.mode = mode


def weight_rule(weight: Weight, options: Options, findings: Findings) -> Rule:
    """The rule of one weight, residual branches included."""
    scheme, use = options.scheme, weight.use
    if use.kind == "embedding":
        return _embedding(weight, scheme)
    gain = weight.moments.gain
    reader = (
        f"{weight.activation} follows" if weight.activation != "linear" else "no activation follows"
    )
    if weight.source == "modules":
        reader += ", by the modules' order"
    if scheme == "gpt2":
        rule = _sized(options, 0.02, use.fans.fan_in, "normal, std 0.02", "Radford 2019", "normal")
        return _scaled(rule, weight, options, findings)
    if scheme in ("orthogonal", "lsuv"):
        size = gain if scheme == "orthogonal" else 1.0
        rows, columns = use.fans.fan_out, use.fans.fan_in
        draw = Draw("orthogonal", size, groups=use.groups)
        text = f"orthogonal {int(rows)} x {int(columns)}"
        if use.groups > 1:
            text += f", by group, {use.groups}"
        return _scaled(Rule(draw, text, size, f"{reader}; Saxe 2014"), weight, options, findings)
    if scheme in ("xavier", "deepnorm"):
        beta, why = 1.0, "Glorot 2010"
        if scheme == "deepnorm":
            beta, why = _beta(weight, findings)
        fan = use.fans.of("fan_avg")
        rule = _sized(options, beta / math.sqrt(fan), fan, f"xavier, fan_avg {fan:g}", why)
        return _scaled(rule, weight, options, findings)
    if scheme == "lecun":
        fan = use.fans.fan_in
        rule = _sized(options, 1 / math.sqrt(fan), fan, f"lecun, fan_in {fan:g}", "LeCun 1998")
        return _scaled(rule, weight, options, findings)
    fan = use.fans.of(options.mode)
    text = f"{'he' if scheme == 'fixup' else scheme}, {options.mode} {fan:g}"
    rule = _sized(options, gain / math.sqrt(fan), fan, text, f"{reader}; He 2015")
    if scheme == "fixup":
        return _fixup(rule, weight, findings)
    return _scaled(rule, weight, options, findings)


def _sized(
    options: Options, std: float, fan: float, text: str, why: str, distribution: str = ""
) -> Rule:
    kind = distribution or options.distribution
    if kind == "uniform":
        text += ", uniform"
    return Rule(Draw(kind, std), text, std * math.sqrt(fan), why)


def _embedding(weight: Weight, scheme: str) -> Rule:
    width = weight.use.fans.fan_out
    if scheme == "gpt2":
        return Rule(Draw("normal", 0.02), "normal, std 0.02", math.nan, "Radford 2019")
    if "matrix" in weight.kinds:
        std = 1 / math.sqrt(width)
        why = "tied to a head: logits of rms 1 for inputs of rms 1"
        return Rule(Draw("normal", std), f"normal, std {std:.3g}", math.nan, why)
    return Rule(Draw("normal", 1.0), "normal, std 1", math.nan, "a row is read as it is: rms 1")


def _scaled(rule: Rule, weight: Weight, options: Options, findings: Findings) -> Rule:
    """The rule with what the end of a residual branch asks for."""
    if options.residual is None or not weight.sums or options.scheme in ("deepnorm", "lsuv"):
        return rule
    assert rule.draw is not None
    worst = max(weight.sums, key=lambda s: s.depth)
    depth = worst.depth
    if worst.normalised or worst.post_norm:
        place = "the branch" if worst.normalised else "the sum"
        return rule._replace(why=f"{rule.why}; a norm follows {place}")
    coherent = is_coherent(weight)
    # Behind a weight of 0 a factor of 0 that learns, as ReZero's, would never have a gradient.
    if options.residual == "zero" and not coherent and not findings.scales_of(worst):
        text = "0, end of a residual branch"
        return Rule(constant(0.0), text, 0.0, f"residual='zero': {depth} branches of one stream")
    if coherent:
        factor, how = 1 / depth, f"1/{depth}"
        why = f"end of 1 of {depth} branches, which add up coherently after {weight.activation}"
        if options.residual == "zero":
            why += "; 0 would have no gradient there"
    else:
        factor, how = 1 / math.sqrt(depth), f"1/sqrt({depth})"
        why = f"end of 1 of {depth} residual branches"
    draw = rule.draw.times(factor)
    return Rule(draw, f"{rule.text}, {how}", rule.gain * factor, f"{rule.why}; {why}")


def is_coherent(weight: Weight) -> bool:
    """Whether the branch ends in an activation whose outputs have a mean, so that branches add
    in proportion to their number, not to its root."""
    m = weight.moments
    ends_here = weight.after is not None and weight.after.residual
    return ends_here and not m.linear and m.mean**2 > COHERENT * m.square


def _fixup(rule: Rule, weight: Weight, findings: Findings) -> Rule:
    """Zhang, Dauphin, Ma 2019, rules 1 and 2. Its scalar biases and multipliers are the model's."""
    if weight.sums:
        return Rule(constant(0.0), "0, end of a branch", 0.0, "Zhang 2019, rule 1")
    if is_head(weight):
        return Rule(constant(0.0), "0, classifier", 0.0, "Zhang 2019, rule 1")
    for residual in findings.sums:
        if weight.node in residual.inner:
            layers, depth = len(residual.inner) + len(residual.ends), residual.depth
            factor = depth ** (-1 / (2 * layers - 2))
            text = f"{rule.text}, {depth}^(-1/{2 * layers - 2})"
            assert rule.draw is not None
            why = f"{rule.why}; Zhang 2019, rule 2: {depth} branches of {layers} layers"
            return Rule(rule.draw.times(factor), text, rule.gain * factor, why)
    return rule


def is_head(weight: Weight) -> bool:
    """Whether the weight's output is the model's: nothing reads it."""
    return weight.after is not None and not weight.after.readers


def _beta(weight: Weight, findings: Findings) -> tuple[float, str]:
    """Wang et al. 2022, table of section 3: (8 N)^(-1/4) for the feed-forward, value and output
    weights of N layers of two branches each; 1 for queries and keys."""
    inside = [s for s in findings.sums if weight.node in (*s.inner, *s.ends)]
    if not inside:
        return 1.0, "Wang 2022: outside the branches"
    layers = len(findings.sums) / 2
    if not any(_reaches(s, weight) for s in inside):
        return 1.0, "Wang 2022: queries and keys"
    alpha = (2 * layers) ** 0.25
    why = f"Wang 2022: beta of {layers:g} layers; the shortcut must be times {alpha:.4g}"
    return (8 * layers) ** -0.25, why


def _reaches(residual: Residual, weight: Weight) -> bool:
    """Whether the weight reaches the branch's end other than through a softmax."""
    seen, stack = set(), [residual.branch]
    while stack:
        node = stack.pop()
        if node in seen or node.index <= residual.source.index:
            continue
        seen.add(node)
        if node is weight.node:
            return True
        if "softmax" in node.name:
            continue
        stack += node.parents[2:] if "dot_product_attention" in node.name else node.parents
    return False


def check_structure(findings: Findings, scheme: str) -> None:
    """Raises ValueError where the model lacks what the scheme is about."""

    def refuse(expected: str, got: str) -> None:
        raise ValueError(
            f"initialize_: model must have {expected} for scheme {scheme!r}, got {got}"
        )

    norms = sum(n.kind == "norm" for n in findings.nodes)
    if scheme == "fixup" and norms:
        refuse("no norms", f"{norms} of them")
    if scheme in ("fixup", "skipinit", "deepnorm", "gpt2") and not findings.sums:
        refuse("residual branches", "none")
    if scheme == "skipinit" and not multipliers(findings):
        refuse("a learned multiplier at the end of each residual branch", "none")
    if scheme == "deepnorm" and not all(s.post_norm for s in findings.sums):
        got = sum(not s.post_norm for s in findings.sums)
        refuse("a norm behind each residual sum", f"{got} sums without one")


def multipliers(findings: Findings) -> set[str]:
    """Paths of parameters that a residual branch is multiplied with at its end."""
    return {slot for residual in findings.sums for slot in findings.scales_of(residual)}
