"""Swaps gradfuse's batch norms into existing models, and out again."""

from gradfuse.fuse.report import FuseReport, Site, fuse_report
from gradfuse.fuse.swap import fuse, unfuse

__all__ = ["FuseReport", "Site", "fuse", "fuse_report", "unfuse"]
