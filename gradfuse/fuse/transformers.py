"""The RMS norms of transformers. Needs transformers."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from gradfuse.fuse.norms import SwappedNorm

__all__ = ["swapped_norm"]

# What they multiply by is rounded to the input's dtype first; the op rounds once.
_LIKE_LLAMA = {"name_of_eps": "variance_epsilon"}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaRMSNorm": ("llama", _LIKE_LLAMA),
    "MistralRMSNorm": ("mistral", _LIKE_LLAMA),
    "Qwen2RMSNorm": ("qwen2", _LIKE_LLAMA),
    "T5LayerNorm": ("t5", _LIKE_LLAMA),
    "GemmaRMSNorm": ("gemma", {"weight_offset": 1.0, "mixes_dtypes": True}),
}


def swapped_norm(plain: type) -> type[SwappedNorm] | None:
    """The class in the place of one of transformers; None if there is none."""
    model, _ = _MODELS.get(plain.__name__, ("", {}))
    if plain.__module__ != _module(model):
        return None
    found: type[SwappedNorm] = getattr(sys.modules[__name__], f"Swapped{plain.__name__}")
    return found


def _module(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}"


def __getattr__(name: str) -> Any:
    """The class of that name, which pickle looks up; no other model is imported for it."""
    if not name.startswith("Swapped") or name.removeprefix("Swapped") not in _MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model, options = _MODELS[name.removeprefix("Swapped")]
    plain = getattr(importlib.import_module(_module(model)), name.removeprefix("Swapped"))
    made = type(name, (SwappedNorm, plain), {"plain": plain, "__module__": __name__, **options})
    globals()[name] = made
    return made
