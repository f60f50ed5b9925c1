"""Clipping for a training loop: the clipper, its report, and the base of all policies."""

from gradfuse.clipping.clipper import GradClipper
from gradfuse.clipping.policy import Decision, Policy, to_at_most
from gradfuse.clipping.report import GradReport, ParameterGrad

__all__ = ["Decision", "GradClipper", "GradReport", "ParameterGrad", "Policy", "to_at_most"]
