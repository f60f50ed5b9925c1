"""What is known of a model without running it: its modules, and the order of their registration."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gradfuse.init.fans import conv_fans, matrix_fans
from gradfuse.init.gains import Moments, moments
from gradfuse.init.graph import Use

__all__ = ["NORMS", "activation_after", "is_norm", "use_of"]

NOT_ELEMENTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def is_norm(module: nn.Module) -> bool:
    """A norm of torch, or a class that is named like one."""
    return isinstance(module, NORMS) or "norm" in type(module).__name__.lower()


def use_of(module: nn.Module, name: str, path: str) -> Use | None:
    """How a module of torch uses its weight; None for any other parameter."""
    if name != "weight":
        return None
    bias = path[: -len("weight")] + "bias" if getattr(module, "bias", None) is not None else None
    if isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        fans = conv_fans(module.weight.shape, module.groups, transposed, module.stride)
        return Use(path, "convolution", fans, bias, module.groups)
    if isinstance(module, nn.Linear):
        return Use(path, "matrix", matrix_fans(module.in_features, module.out_features), bias)
    if isinstance(module, nn.Bilinear):
        inputs = module.in1_features * module.in2_features
        return Use(path, "matrix", matrix_fans(inputs, module.out_features), bias)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Use(path, "embedding", matrix_fans(1, module.embedding_dim))
    return None


def _is_activation(module: nn.Module) -> bool:
    known = type(module).__module__ == "torch.nn.modules.activation"
    attention = isinstance(module, nn.MultiheadAttention)
    return known and not attention and not isinstance(module, NOT_ELEMENTWISE)


def _passes(module: nn.Module) -> bool:
    """Whether an activation may follow behind this module."""
    kinds = ("pool", "dropout", "flatten", "identity", "pad", "upsample", "unflatten")
    name = type(module).__name__.lower()
    return is_norm(module) or any(kind in name for kind in kinds)


def activation_after(model: nn.Module) -> dict[nn.Module, tuple[str, Moments, bool]]:
    """Of each module with a weight: the activation that is registered next to it, with its moments,
    and whether a norm comes between. Only in a Sequential that order is sure to be the order of
    the forward pass."""
    found: dict[nn.Module, tuple[str, Moments, bool]] = {}
    for parent in model.modules():
        children = list(parent.children())
        for i, module in enumerate(children):
            if use_of(module, "weight", "weight") is None:
                continue
            norm = False
            for following in children[i + 1 :]:
                if _is_activation(following):
                    found[module] = type(following).__name__, _moments(following), norm
                    break
                if not _passes(following):
                    break
                norm = norm or is_norm(following)
    return found


def _moments(module: nn.Module) -> Moments:
    slopes = next(module.parameters(), None)
    if slopes is not None:  # PReLU: one slope, or one for each channel
        slope = 0.0 if slopes.is_meta else float(slopes.detach().double().mean())
        return moments(lambda z: nn.functional.leaky_relu(z, slope))
    return moments(module)
