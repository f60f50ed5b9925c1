"""adapt_statistics: runs the model, watches its batch norms, writes what they saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from gradfuse.adapt.report import AdaptReport
from gradfuse.adapt.watch import Watch
from gradfuse.init.probe import call, undisturbed
from gradfuse.ops.checks import is_number

__all__ = ["adapt_statistics"]

_OP = "adapt_statistics"


def adapt_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    momentum: float | None = None,
    reset: bool = True,
) -> AdaptReport:
    """Estimates running mean and variance of every batch norm anew, from other data.

    The model runs on each batch without gradients and in eval mode, dropout is off, but each batch
    norm normalises by its batch, as in training: so later norms see what they would after this one
    was adapted. Nothing else of the run remains: weights, gradients, other buffers, modes, hooks
    and torch's random numbers are as before; num_batches_tracked counts the batches.

    With momentum=None the statistics are those of all samples in one batch, to rounding: counts,
    means and squared deviations are merged in float64. The mean of the batches' variances, which
    torch.optim.swa_utils.update_bn takes, leaves out what differs between batches.

    Args:
        model: an nn.Module with torch.nn.BatchNorm1d, 2d, 3d, SyncBatchNorm, gradfuse.nn's or
            timm's BatchNormAct, fused or not. Compiled ones run eagerly; a SyncBatchNorm sees all
            ranks.
        loader: iterable of batches on the model's device: Tensors; tuples or lists, whose first
            item is the input; or mappings of keywords.
        momentum: None, or the weight in (0, 1] of each batch in an exponential average.
        reset: begin with the first batch. Else with the statistics that are there: with
            momentum=None they weigh as many batches of mean size as they average, (2 - m) / m for a
            norm's own momentum m (19 for 0.1), or num_batches_tracked where that is None.

    Returns:
        AdaptReport: of each norm how far mean and variance moved.

    Raises:
        TypeError: model is no nn.Module, or loader no iterable of batches.
        ValueError: momentum is out of range, the model has no batch norm with running statistics or
            a lazy one or one on the meta device, or the loader gave no batch.
        RuntimeError: a norm saw a value that is not finite, or could not run; the message names it.
            After any error all statistics are as they were.

    Source: Li, Wang, Shi, Liu, Hou 2016, "Revisiting Batch Normalization For Practical Domain
    Adaptation" (AdaBN).
    """
    norms = _norms(model, loader, momentum)
    watch = Watch(norms, momentum, reset)
    batches = 0
    inner = model.module if isinstance(model, nn.DataParallel) else model
    # Compiled code would pass by the hooks. Batches are made in the block too: a loader draws.
    with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), watch:
        for batches, batch in enumerate(loader, 1):
            watch.batch = batches
            call(inner, batch[:1] if isinstance(batch, (tuple, list)) else batch)
    if not batches:
        raise ValueError(f"{_OP}: loader must give at least one batch, got none")
    results = watch.results(batches)
    rows = [watch.row(path, results.get(path)) for path in norms]
    with torch.no_grad():
        for path, new in results.items():
            bn: Any = norms[path]
            bn.running_mean.copy_(new.mean)
            bn.running_var.copy_(new.var)
            if bn.num_batches_tracked is not None:
                bn.num_batches_tracked.mul_(0 if reset else 1).add_(batches)
    return AdaptReport(rows, batches)


def _norms(model: Any, loader: Any, momentum: Any) -> dict[str, Any]:
    """The batch norms by path; an error for what adapt_statistics does not take."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, (Tensor, Mapping, str)):
        got = type(loader).__name__
        raise TypeError(f"{_OP}: loader must be an iterable of batches, got {got}")
    if momentum is not None and (not is_number(momentum) or not 0.0 < momentum <= 1.0):
        raise ValueError(f"{_OP}: momentum must be None or in (0, 1], got {momentum!r}")
    norms: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise ValueError(f"{_OP}: model must have a batch norm with running statistics, got none")
    for path, bn in norms.items():
        where = "a lazy module" if is_lazy(bn.running_mean) else "one on the meta device"
        if is_lazy(bn.running_mean) or bn.running_mean.is_meta:
            raise ValueError(f"{_OP}: {path or 'model'} must hold statistics, got {where}")
    return norms
