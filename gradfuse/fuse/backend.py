"""The backend `gradfuse` of torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from gradfuse.fuse.graph import rewrite

__all__ = ["compile_backend", "default_backend"]


@functools.cache  # a function compiled again with the same backend is found compiled
def compile_backend(inner: str | Callable[..., Any] = "inductor") -> Callable[..., Any]:
    """A backend of torch.compile that fuses norms and hands the graph on.

    In the graphs of fused and of plain models alike, batch norm, residual add and activation become
    one op, forward and backward, and so do dropout, residual add and layer norm or RMS norm. Batch
    norms in eval mode stay: they are elementwise there, and the inner backend fuses them with what
    surrounds them. `torch.compile(model, backend="gradfuse")` is the short form for "inductor".

    Args:
        inner: the backend that compiles the graph; a name that torch.compile knows, or a callable.
            torch.compile's mode and options go to it.

    Returns:
        Callable for torch.compile's argument `backend`; the same one for the same inner.

    Raises:
        TypeError: inner is neither a name nor callable.
        torch._dynamo.exc.InvalidBackend: there is no backend of that name.
    """
    from torch._dynamo.backends.registry import lookup_backend  # which takes seconds to import

    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(
            f"compile_backend: inner must be a backend's name or a callable, got {inner!r}"
        )
    compiler = _inductor if inner == "inductor" else lookup_backend(inner)

    def gradfuse(graph_module: GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        rewrite(graph_module, eval_too=False)
        return compiler(graph_module, example_inputs, **options)

    return gradfuse


def _inductor(
    graph_module: GraphModule,
    example_inputs: list[Any],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """torch's inductor, which takes a mode by another way than other backends do."""
    from torch import _inductor

    of_mode = _inductor.list_mode_options(mode) if mode else {}
    return _inductor.compile(graph_module, example_inputs, {**of_mode, **(options or {})})


def default_backend(graph_module: GraphModule, example_inputs: list[Any], **options: Any) -> Any:
    """What the name "gradfuse" stands for."""
    return compile_backend()(graph_module, example_inputs, **options)
