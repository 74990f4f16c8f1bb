"""What a call costs when zones of it are predicted: products exactly, by counting them; time by measuring it.

Products of a call depend neither on its place in the trajectory nor on how a prediction is made, so that a plan's cost
is a sum over its calls. What a prediction itself costs, a weighted sum of kept tensors, is in the measured time alone.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dcomp.cachequant.executor import CacheExecutor, Unrounded
from dcomp.cachequant.guide import CallOrder
from dcomp.cachequant.plan import CachePlan, Prediction
from dcomp.cachequant.rows import count_rows
from dcomp.cachequant.zones import Zone
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.cost import count_macs
from dcomp.calibrate.timing import time_in_turns

PAIRS, MIN_SECONDS = 5, 0.05  # of runs, in turns


class CallPrices:
    """Costs of one call of a denoiser, by the zones that are predicted in it.

    Args:
        denoiser: float or quantized, in eval mode, and with no plan attached.
        args: positional arguments of a recorded call.
        kwargs: its keyword arguments.
        zones: that may be predicted.
        unrounded: makes a `with` block without rounding of inputs; None for a float denoiser.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        zones: Sequence[Zone],
        unrounded: Unrounded | None = None,
    ) -> None:
        self._unrounded_calls = unrounded
        self._denoiser, self._args, self._kwargs = denoiser, args, kwargs
        self._zones = tuple(zones)
        self._whole: float | None = None
        self._macs: dict[frozenset[str], int] = {}
        self._seconds: dict[frozenset[str], float] = {frozenset(): 1.0}

    def macs(self, predicted: Iterable[str] = ()) -> int:
        """Return the multiply-accumulates of a call in which these zones are predicted."""
        key = frozenset(predicted)
        if key not in self._macs:
            with self._repeating(key):
                self._macs[key] = count_macs(self._denoiser, self._args, self._kwargs).total
        return self._macs[key]

    def seconds(self, predicted: Iterable[str]) -> float:
        """Return the time of a call in which these zones are predicted, as a part of one that computes everything."""
        key = frozenset(predicted)
        if key not in self._seconds:
            with self._repeating(key) as guide:

                def run(predicting: bool, times: int = 1) -> None:
                    guide.predicting = predicting
                    for _ in range(times):
                        self._denoiser(*self._args, **self._kwargs)

                # A call that predicts all of it is a thousand times as fast: as long a run of such calls is timed.
                first = time_in_turns(lambda: run(False), lambda: run(True), 1, warm_ups=1, min_seconds=0)[0]
                times = max(1, round(first[0] / first[1]))
                pairs = time_in_turns(lambda: run(False), lambda: run(True, times), PAIRS, min_seconds=MIN_SECONDS)
            self._seconds[key] = statistics.median(cached / whole for whole, cached in pairs) / times
            self._whole = self._whole or statistics.median(whole for whole, _ in pairs)
        return self._seconds[key]

    @cached_property
    def unrounded(self) -> float:
        """Time of a call without rounding of inputs as a part of one with it, both computing everything; at least 1."""
        if self._unrounded_calls is None:
            return 1.0
        unrounded = self._unrounded_calls

        def run(exact: bool) -> None:
            with unrounded() if exact else nullcontext(), torch.no_grad():
                self._denoiser(*self._args, **self._kwargs)

        pairs = time_in_turns(lambda: run(False), lambda: run(True), PAIRS, min_seconds=MIN_SECONDS)
        return max(1.0, statistics.median(exact / whole for whole, exact in pairs))

    @property
    def whole_seconds(self) -> float:
        """Time of a call that computes everything."""
        if self._whole is None:
            self.seconds([self._zones[0].name])
        assert self._whole is not None
        return self._whole

    def macs_of(self, plan: CachePlan) -> float:
        """Return the products of a plan's calls as a part of those of calls that compute everything."""
        return sum(self.macs(actions) for actions in plan.actions) / (plan.calls * self.macs())

    def seconds_of(self, plan: CachePlan) -> float:
        """Return the time of a plan's calls as a part of that of calls that compute everything."""
        surcharge = (self.unrounded - 1) * len(plan.unrounded) if plan.unrounded else 0.0
        return (sum(self.seconds(actions) for actions in plan.actions) + surcharge) / plan.calls

    @contextmanager
    def _repeating(self, predicted: frozenset[str]) -> Iterator["_Repeating"]:
        """Within a `with` block, let each call predict zones from what a first call computed."""
        guide, clock = _Repeating(self._zones, predicted), StepClock()
        clock.last_sample = torch.empty(count_rows(self._args, self._kwargs) // 2)  # for zones of half a batch
        with clock.attach(self._denoiser), CacheExecutor(self._denoiser, guide, clock), torch.no_grad():
            self._denoiser(*self._args, **self._kwargs)
            yield guide


class _Repeating:
    """A guide for one call that is made again and again.

    Attributes:
        zones: that may be predicted.
        predicting: whether calls after the first predict, or compute.
    """

    def __init__(self, zones: tuple[Zone, ...], predicted: frozenset[str]) -> None:
        self.zones, self.predicting = zones, True
        self._first = CallOrder(keep=predicted)
        self._later = CallOrder({zone: Prediction((0,), (1.0,)) for zone in predicted})

    def place(self, timestep: float, before: int | None) -> int:
        """Every call follows the one before it."""
        return 0 if before is None else before + 1

    def order(self, call: int) -> CallOrder:
        """Compute and keep at first; then predict, if asked to."""
        return self._first if call == 0 else self._later if self.predicting else CallOrder()
