"""The running statistics of batch norms, estimated anew from data."""

from gradfuse.adapt.report import AdaptReport, AdaptRow
from gradfuse.adapt.statistics import adapt_statistics

__all__ = ["AdaptReport", "AdaptRow", "adapt_statistics"]
