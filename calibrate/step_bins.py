"""Which timesteps share their static activation ranges: optimal contiguous bins, by dynamic programming.

A bin of many steps has one range for all of them, as wide as all of theirs together; each step then leaves a part of
the codes unused. `range_drift_bins` makes the sum of these parts as small as it can be; `log_snr_bins` needs no ranges
and keeps steps of similar noise together. Letters: T steps, noisiest first; B bins; L layers.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.clock import StepBins, StepBinsError, log_snr_function
from dcomp.calibrate.replay import RowBatch

CHUNK_ROWS = 16  # rows that run at once


def range_drift_bins(
    ranges: Tensor, timesteps: Sequence[float], count: int, scheduler: Any = None, *, others: Iterable[float] = ()
) -> StepBins:
    """Put the steps into `count` bins with the least `range_drift`.

    Args:
        ranges: lowest and highest input of each layer at each step, `[T, L, 2]`, as `step_ranges` finds them.
        timesteps: of these steps, strictly descending, in the units that the denoiser is told.
        count: wanted number of bins; fewer when there are fewer steps.
        scheduler: gives the log-SNR of a timestep; without one the timestep is taken for a flow time.
        others: timesteps of the same schedule without ranges; they join the nearest bin in log-SNR.

    Raises:
        StepBinsError: no timestep, not descending, `count` below 1, or ranges that are not of these steps.
    """
    _check(timesteps, count)
    costs = _drift_costs(_checked(ranges, len(timesteps)))
    return StepBins.beginning_at(_cuts(costs, count), timesteps, scheduler, others=others)


def log_snr_bins(
    timesteps: Sequence[float], count: int, scheduler: Any = None, *, others: Iterable[float] = ()
) -> StepBins:
    """Put the steps into `count` bins whose log-SNRs are, in squares, nearest to the means of their bins.

    Args:
        timesteps: strictly descending, in the units that the denoiser is told.
        count: wanted number of bins; fewer when there are fewer steps.
        scheduler: gives the log-SNR of a timestep; without one the timestep is taken for a flow time.
        others: timesteps of the same schedule that were not observed; they join the nearest bin.

    Raises:
        StepBinsError: no timestep, not descending, or `count` below 1.
    """
    _check(timesteps, count)
    log_snr = log_snr_function(scheduler, max(*timesteps, *others, timesteps[0]))
    values = torch.tensor([log_snr(t) for t in timesteps], dtype=torch.float64)
    return StepBins.beginning_at(_cuts(_variance_costs(values), count), timesteps, scheduler, others=others)


def range_drift(ranges: Tensor, bin_of: Sequence[int]) -> float:
    """Return how much of the codes steps leave unused because they share ranges, summed over steps and layers.

    That is `1 - own width / width of the bin's range` for each layer at each step: 0 where a bin is one step or where
    ranges do not change, and below 1. It never grows when a bin is divided.

    Args:
        ranges: `[T, L, 2]`.
        bin_of: the bin of each step, in ascending order.

    Raises:
        StepBinsError: the ranges are not of these steps, are not finite, or end before they begin.
    """
    costs = _drift_costs(_checked(ranges, len(bin_of)))
    edges = [*(i for i, b in enumerate(bin_of) if i == 0 or bin_of[i - 1] != b), len(bin_of)]
    return float(sum(costs[first, end - 1] for first, end in pairwise(edges)))


def step_ranges(denoiser: nn.Module, rows: RowBatch, layers: Sequence[str]) -> tuple[tuple[float, ...], Tensor]:
    """Run a denoiser over rows and return the lowest and the highest input of some layers at each timestep.

    Args:
        denoiser: in eval mode; left as it is.
        rows: of the calibration set; every timestep that a bin shall have needs some.
        layers: names of layers whose input has one entry for each row along axis 0.

    Returns:
        The timesteps, descending, and ranges fp32 `[T, L, 2]`.

    Raises:
        StepBinsError: a layer was not called, or its input has no row axis.
    """
    timesteps = rows.timesteps.unique().flip(0)
    low, high = (torch.full((len(timesteps), len(layers)), sign * torch.inf) for sign in (1, -1))
    which = torch.empty(0, dtype=torch.int64)

    def watch(column: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if len(x) != len(which):
                raise _refused("The input of a layer has no row axis", layers[column])
            flat = x.detach().float().flatten(1).cpu()
            low[:, column] = low[:, column].scatter_reduce(0, which, flat.amin(1), "amin")
            high[:, column] = high[:, column].scatter_reduce(0, which, flat.amax(1), "amax")

        return before

    with ExitStack() as stack, torch.no_grad():
        for column, name in enumerate(layers):
            layer = denoiser.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(watch(column), with_kwargs=True).remove)
        for chunk in rows.chunks(CHUNK_ROWS):
            which = (chunk.timesteps[:, None] == timesteps).int().argmax(1)
            denoiser(*chunk.args, **chunk.kwargs)
    never = [name for name, column in zip(layers, high.T, strict=True) if not torch.isfinite(column).all()]
    if never:
        raise _refused("A layer was not called, or its input is not finite", never[0])
    return tuple(timesteps.tolist()), torch.stack([low, high], -1)


def _refused(problem: str, layer: str) -> StepBinsError:
    return StepBinsError(problem, where=layer, remedy="Give it dynamic ranges, or leave it in float.")


def _check(timesteps: Sequence[float], count: int) -> None:
    if not timesteps or count < 1 or any(a <= b for a, b in pairwise(timesteps)):
        raise StepBinsError(
            "Step bins need descending timesteps and at least one bin",
            where=f"{len(timesteps)} timesteps, {count} bins",
            remedy="Record a calibration set with at least one call and ask for one bin or more.",
        )


def _checked(ranges: Tensor, steps: int) -> Tensor:
    shape = tuple(ranges.shape)
    good = len(shape) == 3 and shape[::2] == (steps, 2) and bool(torch.isfinite(ranges).all())
    if not good or bool((ranges[..., 0] > ranges[..., 1]).any()):
        raise StepBinsError(
            "The ranges are no finite (low, high) for each layer at each step",
            where=f"shape {list(shape)}, {steps} steps",
            remedy="Make them with step_ranges from rows of every step.",
        )
    return ranges.double()


def _drift_costs(ranges: Tensor) -> Tensor:
    """Return the drift of the bin of the steps a to b, both included, `[T, T]`; infinite below the diagonal."""
    low, high = ranges.unbind(-1)
    costs = torch.full((len(ranges), len(ranges)), torch.inf, dtype=torch.float64)
    for first in range(len(ranges)):
        shared = high[first:].cummax(0).values - low[first:].cummin(0).values
        own = (high[first:] - low[first:]).cumsum(0)
        steps = torch.arange(1, len(shared) + 1)[:, None]
        costs[first, first:] = torch.where(shared > 0, steps - own / shared, 0.0).clamp_min(0).sum(1)
    return costs


def _variance_costs(values: Tensor) -> Tensor:
    """Return the summed squared distance from their mean of the values a to b, `[T, T]`; infinite below."""
    costs = torch.full((len(values), len(values)), torch.inf, dtype=torch.float64)
    for first in range(len(values)):
        part = values[first:] - values[first]
        steps = torch.arange(1, len(part) + 1)
        costs[first, first:] = (part.square().cumsum(0) - part.cumsum(0).square() / steps).clamp_min(0)
    return costs


def _cuts(costs: Tensor, count: int) -> list[int]:
    """Return the first step of each bin but the first, so that the costs of the bins add up to the least.

    Among equal sums the one with the least sum of squared sizes is taken, so that no bin has steps to spare.
    """
    steps = len(costs)
    count = min(count, steps)
    position = torch.arange(steps, dtype=torch.float64)
    squared_sizes = (position[None, :] - position[:, None] + 1).square()
    best, sizes = costs[0].clone(), squared_sizes[0].clone()  # of the steps 0 to b, in one bin
    before: list[Tensor] = []
    for _ in range(1, count):
        # Row a, column b: steps 0 to a - 1 in the bins so far, a to b in a new one.
        sums = torch.cat([torch.full((1,), torch.inf, dtype=torch.float64), best[:-1]])[:, None] + costs
        squares = torch.cat([sizes[:1] * 0, sizes[:-1]])[:, None] + squared_sizes
        least = sums.amin(0)
        first = torch.where(sums == least, squares, torch.inf).argmin(0)
        before.append(first)
        best, sizes = least, squares.gather(0, first[None]).squeeze(0)
    cuts: list[int] = []
    end = steps - 1
    for firsts in reversed(before):
        cuts.insert(0, int(firsts[end]))
        end = cuts[0] - 1
    return cuts
