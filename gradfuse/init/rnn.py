"""Recurrent layers and attention: weights that are several matrices in one tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradfuse.init.draws import Draw, constant
from gradfuse.init.rule import Rule

__all__ = ["GATES", "forget_bias", "gates_of", "rnn_rule"]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def gates_of(module: nn.Module) -> int:
    """Gates of a recurrent layer or cell; 0 for any other module."""
    if isinstance(module, nn.RNNBase):
        return GATES.get(module.mode.partition("_")[0], 1)
    if isinstance(module, nn.RNNCellBase):
        return module.weight_hh.shape[0] // module.hidden_size
    return 0


def rnn_rule(
    module: nn.Module, name: str, shape: torch.Size, scheme: str, distribution: str
) -> Rule:
    """The rule of one parameter of a recurrent layer.

    Each gate is drawn by itself. `orthogonal_` of the whole weight makes the columns orthonormal
    across the gates, and leaves a gate with singular values from 0.004. The forget gate's bias is 1
    (Jozefowicz et al. 2015): torch adds bias_ih and bias_hh, so bias_ih has it and bias_hh is 0.
    """
    gates = gates_of(module)
    rows = shape[0] // gates
    parts = (1.0,) * gates
    each = "" if gates == 1 else f" by gate, {gates}"
    if name.startswith("bias"):
        if gates == 4 and name.startswith("bias_ih"):
            why = "Jozefowicz 2015: what a cell holds stays at first; bias_hh adds 0"
            draw = Draw("constant", 1.0, (0.0, 1.0, 0.0, 0.0))
            return Rule(draw, "0, forget gate 1", math.nan, why)
        return Rule(constant(0.0), "0", math.nan, "bias of a recurrent layer")
    if name.startswith("weight_hh") or scheme == "orthogonal":
        why = "Saxe 2014: a recurrent product keeps its length"
        return Rule(Draw("orthogonal", 1.0, parts), "orthogonal" + each, 1.0, why)
    if name.startswith("weight_hr"):
        parts, rows, each = (1.0,), shape[0], ""
    if scheme == "gpt2":
        return Rule(Draw("normal", 0.02), "normal, std 0.02", 0.02 * math.sqrt(shape[1]), "GPT-2")
    fan = (shape[1] + rows) / 2 if scheme == "xavier" else shape[1]
    why = "sigmoid and tanh are read near 0: gain 1"
    rule = f"{distribution}{each}, fan {fan:g}"
    return Rule(Draw(distribution, 1 / math.sqrt(fan), parts), rule, 1.0, why)


def forget_bias(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Sum of both biases of each forget gate, by the name of the first."""
    if gates_of(module) != 4:
        return []
    found = []
    for name, p in module.named_parameters(recurse=False):
        if name.startswith("bias_ih"):
            other = getattr(module, name.replace("bias_ih", "bias_hh"))
            rows = p.shape[0] // 4
            found.append((name, (p + other).detach()[rows : 2 * rows]))
    return found
