"""A transformer's block, and its feed-forward part alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfuse.nn.blocks.parts import add_branch, check_count, check_number, check_share, draw_
from gradfuse.nn.layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from gradfuse.ops.batch_norm import check_activation
from gradfuse.reference import activate

__all__ = ["ResidualMLP", "TransformerBlock"]

_NORMS: dict[str, tuple[Any, Any]] = {
    "rms": (RMSNorm, AddRMSNorm),
    "layer": (LayerNorm, AddLayerNorm),
}


def _norms(block: str, norm: str) -> tuple[Any, Any]:
    """The classes of the norm and of the norm of a sum."""
    if not isinstance(norm, str) or norm not in _NORMS:
        raise ValueError(f"{block}: norm must be 'rms' or 'layer', got {norm!r}")
    return _NORMS[norm]


class _MLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.fc2 = nn.Linear(hidden, dim, bias)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_(self.fc1, self.activation)
        draw_(self.fc2)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.fc2(activate(self.fc1(input), self.activation))
        return output


class _Attention(nn.Module):
    """Self-attention of several heads by torch's scaled_dot_product_attention."""

    def __init__(self, dim: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.proj = nn.Linear(dim, dim, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_(self.qkv)
        draw_(self.proj)

    def forward(self, input: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if is_causal and attn_mask is not None:
            attn_mask, is_causal = _causal(attn_mask, input.shape[-2]), False
        qkv = self.qkv(input).unflatten(-1, (3, self.num_heads, -1))  # [N, L, 3, heads, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        output: Tensor = self.proj(heads.transpose(1, 2).flatten(-2))
        return output


def _causal(attn_mask: Tensor, length: int) -> Tensor:
    """The mask without what lies ahead."""
    past = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device).tril()
    if attn_mask.dtype == torch.bool:
        return attn_mask & past
    return attn_mask.masked_fill(~past, float("-inf"))


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each with norm, dropout and residual, for [N, L, dim].

    prenorm: h = x + drop(attn(norm1(x))), y = h + drop(mlp(norm2(h))); the signal passes any number
    of blocks unchanged. Else h = norm1(x + drop(attn(x))), y = norm2(h + drop(mlp(h))). drop is the
    dropout with the dropped path. Dropout, sum and the norm that reads the sum run in one pass.

    state_dict: that of timm's vision transformer: norm1, attn.qkv, attn.proj, norm2, mlp.fc1,
    mlp.fc2. Rows of attn.qkv are queries, keys, values, each of them head by head.

    Args:
        dim: size of the last dimension of the input.
        num_heads: heads of the attention, of dim / num_heads each.
        norm: "rms" or "layer".
        prenorm: normalise the branches' inputs, else the sums.
        causal: no position attends to later ones.
        dropout: probability that an element of a branch's output is dropped, in training.
        attention_dropout: the same of the attention's weights.
        drop_path: probability that a sample's branch is dropped, in training.
        mlp_ratio: units of the perceptron's hidden layer over dim, rounded down.
        activation: of the perceptron, one of `BatchNormAct1d`'s.
        bias: of the four linear layers.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range, num_heads does not divide dim, or the input is
            not [N, L, dim].

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3; prenorm: Xiong et al. 2020,
    "On Layer Normalization in the Transformer Architecture", figure 1(b); norm="rms": Zhang,
    Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        norm: str = "rms",
        prenorm: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        name = "TransformerBlock"
        dim, num_heads = check_count(name, "dim", dim), check_count(name, "num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"{name}: num_heads must divide dim {dim}, got {num_heads}")
        alone, of_sum = _norms(name, norm)
        check_activation(name, activation)
        hidden = int(dim * check_number(name, "mlp_ratio", mlp_ratio))
        if hidden < 1:
            raise ValueError(f"{name}: mlp_ratio must give a hidden unit or more, got {mlp_ratio}")
        options = {
            "p": check_share(name, "dropout", dropout),
            "drop_prob": check_share(name, "drop_path", drop_path),
            "prenorm": prenorm,
        }
        share = check_share(name, "attention_dropout", attention_dropout)
        self.prenorm, self.causal = prenorm, causal
        self.norm1 = alone(dim) if prenorm else of_sum(dim, **options)
        self.attn = _Attention(dim, num_heads, share, bias)
        self.norm2 = of_sum(dim, **options)
        self.mlp = _MLP(dim, hidden, activation, bias)

    def reset_parameters(self) -> None:
        """Draws all weights anew: He et al. 2015; norms begin with a scale of 1."""
        for module in (self.norm1, self.attn, self.norm2, self.mlp):
            module.reset_parameters()

    def forward(
        self, input: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The block's output.

        Args:
            input: [N, L, dim] Tensor.
            attn_mask: as of torch's scaled_dot_product_attention: a Tensor that broadcasts to [N,
                num_heads, L, L]; bool, True where a position may be attended to, or numbers that
                are added to the scores. With a causal block both hold.
            is_causal: causal for this call.

        Returns:
            Tensor of input's shape.
        """
        for name, value in (("input", input), ("attn_mask", attn_mask)):
            if not isinstance(value, Tensor) and (value is not None or name == "input"):
                raise TypeError(f"TransformerBlock: {name} must be a Tensor, got {value!r}")
        dim = self.attn.proj.in_features
        if input.ndim != 3 or input.shape[-1] != dim:
            raise ValueError(
                f"TransformerBlock: input must be [N, L, {dim}], got {list(input.shape)}"
            )
        is_causal = is_causal or self.causal
        if not self.prenorm:
            h = self.norm1(self.attn(input, attn_mask, is_causal), input)
            output: Tensor = self.norm2(self.mlp(h), h)
            return output
        attended = self.attn(self.norm1(input), attn_mask, is_causal)
        h, total = self.norm2(attended, input)
        p, drop_path = (self.norm2.p, self.norm2.drop_prob) if self.training else (0.0, 0.0)
        return add_branch("TransformerBlock", total, self.mlp(h), p=p, drop_path=drop_path)


class ResidualMLP(nn.Module):
    """x + drop(fc2(act(fc1(norm(x))))): a perceptron with norm, dropout and residual.

    state_dict: norm, mlp.fc1, mlp.fc2.

    Args:
        dim: size of the last dimension of the input [..., dim].
        hidden: units of the hidden layer.
        norm: "rms" or "layer".
        dropout: probability that an element of the branch is dropped, in training. Settable.
        drop_path: probability that a sample's branch is dropped, in training. Settable.
        activation: one of `BatchNormAct1d`'s.
        bias: of the two linear layers.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an argument is out of its range.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.3, with the norm of Xiong et
    al. 2020, "On Layer Normalization in the Transformer Architecture", figure 1(b); for tables of
    numbers Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data", section 3.2.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        norm: str = "rms",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__()
        name = "ResidualMLP"
        dim, hidden = check_count(name, "dim", dim), check_count(name, "hidden", hidden)
        alone, _ = _norms(name, norm)
        check_activation(name, activation)
        self.dropout = check_share(name, "dropout", dropout)
        self.drop_path = check_share(name, "drop_path", drop_path)
        self.norm = alone(dim)
        self.mlp = _MLP(dim, hidden, activation, bias)

    def reset_parameters(self) -> None:
        """Draws all weights anew: He et al. 2015; the norm begins with a scale of 1."""
        self.norm.reset_parameters()
        self.mlp.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        p, drop_path = (self.dropout, self.drop_path) if self.training else (0.0, 0.0)
        branch = self.mlp(self.norm(input))
        return add_branch("ResidualMLP", input, branch, p=p, drop_path=drop_path)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, drop_path={self.drop_path}"
