"""A layer that learns how much of its input it carries on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradfuse.nn.blocks.parts import check_count, check_number, draw_
from gradfuse.ops.batch_norm import check_activation
from gradfuse.reference import activate

__all__ = ["Highway"]


class _Gate(nn.Linear):
    """A linear layer whose bias begins at a value, which `gradfuse.init.initialize_` respects."""

    def __init__(self, dim: int, gate_bias: float) -> None:
        self.gate_bias = gate_bias
        super().__init__(dim, dim)

    def reset_parameters(self) -> None:
        draw_(self)
        nn.init.constant_(self.bias, self.gate_bias)


class Highway(nn.Module):
    """T(x) * act(transform(x)) + (1 - T(x)) * x with the gate T(x) = sigmoid(gate(x)).

    A gate's bias below 0 carries the input on at the start: a share of (1 - sigmoid(gate_bias))^L
    of it through a net of L such layers. At the default that is 0.28 for 10 layers and 3e-6 for
    100; -log(L) leaves more than a third at any depth.

    state_dict: transform.weight, transform.bias, gate.weight, gate.bias.

    Args:
        dim: size of the last dimension of the input [..., dim].
        gate_bias: first value of the gate's bias.
        activation: of the transform: None, "relu", "relu6", "leaky_relu", "silu", "gelu",
            "gelu_tanh", "hardswish", "sigmoid" or "tanh".

    Raises:
        TypeError, ValueError: dim is no int >= 1, gate_bias no finite number, or the activation is
            unknown.

    Source: Srivastava, Greff, Schmidhuber 2015, "Highway Networks", equation 3 and section 2.2;
    "Training Very Deep Networks" has nets of 900 layers.
    """

    def __init__(
        self, dim: int, *, gate_bias: float = -2.0, activation: str | None = "relu"
    ) -> None:
        super().__init__()
        dim = check_count("Highway", "dim", dim)
        check_activation("Highway", activation)
        self.activation = activation
        self.transform = nn.Linear(dim, dim)
        self.gate = _Gate(dim, check_number("Highway", "gate_bias", gate_bias))
        draw_(self.transform, activation)

    def reset_parameters(self) -> None:
        """Draws the weights anew, by He et al. 2015; the gate's bias is gate_bias again."""
        draw_(self.transform, self.activation)
        self.gate.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        transformed = activate(self.transform(input), self.activation)
        gate = self.gate(input).sigmoid()
        # Under autocast the layers' outputs are narrower than the stream, which stays as it is.
        return torch.lerp(input, transformed.to(input.dtype), gate.to(input.dtype))

    def extra_repr(self) -> str:
        return f"gate_bias={self.gate.gate_bias}, activation={self.activation!r}"
