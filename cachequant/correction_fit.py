"""Fit corrections to a plan: each predicted call against the same call computed, on the trajectory that the plan makes.

A call is corrected before the next one is fitted, so that what a correction does to later calls is in their fits.
Letters: p what is predicted, c what is computed, both over pictures, guidance contexts and positions.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dcomp.cachequant.correction import Correction, channel_place
from dcomp.cachequant.plan import Actions, CachePlan
from dcomp.cachequant.trials import Branch, Trials
from dcomp.calibrate.progress import Progress, silent

_DIGITS = 5  # of the numbers in a file: an error of 1e-5 of what is corrected
_TINY = 1e-12


def fit_corrections(plan: CachePlan, trials: Trials, kind: str, *, progress: Progress = silent) -> CachePlan:
    """Return the plan with a correction of every call that predicts one tensor of one zone.

    Args:
        plan: without corrections.
        trials: of the model that will run, on the plan's trajectory and with its zones.
        kind: key of `FITS`.
        progress: called with a text, the calls done and their total.
    """
    history = Branch()
    found: dict[tuple[int, str], Correction] = {}
    for call, predictions in enumerate(plan.predictions):
        progress("corrections", call, plan.calls)
        row: Actions = {zone: tuple(zip(each.calls, each.weights, strict=True)) for zone, each in predictions.items()}
        if len(row) == 1:
            (zone,) = row
            (computed,) = trials.extend([(history, {})])
            read = zip(*(history.tensors(zone, node) for node in predictions[zone].calls), strict=True)
            predicted = [[predictions[zone].of(each) for each in zip(*nodes, strict=True)] for nodes in read]
            true = computed.tensors(zone, call)
            if all(len(each) == 1 and each[0].ndim > 1 for each in (*predicted, *true)):
                p, c = (torch.cat([_by_channel(each[0]) for each in group], 1) for group in (predicted, true))
                found[call, zone] = FITS[kind](p, c)
        own = {zone: found[call, zone] for zone in row if (call, zone) in found}
        (history,) = trials.extend([(history, row)], own)
    progress("corrections", plan.calls, plan.calls)
    return replace(plan, corrections=found)


def fit_affine(p: Tensor, c: Tensor) -> Correction:
    """Return the scale and the shift of each channel with the least squares.

    Source: Liu et al. 2025, CacheQuant, section 3.3: the half of its decoupled correction that is about the cache.

    Args:
        p: `[C, n]`.
        c: `[C, n]`.
    """
    mean_p, mean_c = p.mean(1), c.mean(1)
    off = p - mean_p[:, None]
    variance = off.square().mean(1)
    constant = variance <= _TINY * p.square().mean(1).clamp(min=_TINY)
    scale = torch.where(constant, 1.0, (off * (c - mean_c[:, None])).mean(1) / variance.clamp(min=_TINY))
    return _correction(scale, mean_c - scale * mean_p)


def fit_scale(p: Tensor, c: Tensor) -> Correction:
    """Return the one scale that gives what is predicted the variance of what is computed.

    Source: Q&C 2025, variance compensation.

    Args:
        p: `[C, n]`.
        c: `[C, n]`.
    """
    scale = c.std() / p.std().clamp(min=_TINY)
    return _correction(scale[None], torch.zeros(1))


FITS: dict[str, Callable[[Tensor, Tensor], Correction]] = {"affine": fit_affine, "scale": fit_scale}
"""Name -> fit of one call."""


def _by_channel(tensor: Tensor) -> Tensor:
    """Return a tensor as fp64 `[C, n]`."""
    return tensor.double().movedim(channel_place(tensor), 0).flatten(1)


def _correction(scale: Tensor, shift: Tensor) -> Correction:
    rounded = (tuple(float(f"{n:.{_DIGITS}g}") for n in numbers.tolist()) for numbers in (scale, shift))
    return Correction(*rounded)
