"""Swaps gradfuse's batch norms into existing models, and out again."""

from gradfuse.fuse.backend import compile_backend
from gradfuse.fuse.graph import fuse_graph
from gradfuse.fuse.report import FuseReport, Site, fuse_report
from gradfuse.fuse.swap import fuse, unfuse

__all__ = [
    "FuseReport",
    "Site",
    "compile_backend",
    "fuse",
    "fuse_graph",
    "fuse_report",
    "unfuse",
]
