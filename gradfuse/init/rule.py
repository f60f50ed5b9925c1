"""One parameter's rule."""

from __future__ import annotations

import math
from typing import NamedTuple

from gradfuse.init.draws import Draw

__all__ = ["Rule", "left"]


class Rule(NamedTuple):
    """What a parameter is filled with, and why. No draw: it is left as it is."""

    draw: Draw | None
    text: str
    gain: float
    why: str


def left(why: str) -> Rule:
    return Rule(None, "left", math.nan, why)
