"""Batch normalisation with a residual and an activation, as modules."""

from gradfuse.nn.batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]
