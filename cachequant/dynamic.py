"""Plans by dynamic programming: for every cost the least error that gaps and computing calls can add up to.

A state is a pair of calls that compute one after the other, because a prediction may read both; what came before them
is its cost and its error alone. Within a gap each call may predict another zone, and the call before it may leave its
inputs unrounded. Labels that another one of their state beats in both are dropped, and of those that are nearer in cost
than can matter the better one is kept, so that the time is bounded. Letters: T calls, r, s and t as in `gap_costs`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dcomp.cachequant.gap_costs import GapCosts
from dcomp.cachequant.plan import Actions

GRID = 0.02  # of a call that computes everything: labels nearer in cost than this are one
_GRID_OF_GAP = 0.05  # likewise, of the choices within one gap

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """What each call does, with what is expected of it.

    Attributes:
        rows: of the T calls.
        cost: sum of their prices, 1 for a call that computes everything.
        error: relative error of the final latents; None where a planner does not know it.
        unrounded: calls in which quantized layers multiply their inputs as they are.
    """

    rows: tuple[Actions, ...]
    cost: float
    error: float | None
    unrounded: frozenset[int] = frozenset()


def best_schedules(
    costs: GapCosts, prices: Mapping[str, float], *, unrounded: float | None = None, grid: float | None = None
) -> list[Schedule]:
    """Return the schedules that no other one beats in cost and expected error, cheapest first.

    Args:
        costs: of all gaps.
        prices: zone -> part of a call that is left where it is predicted.
        unrounded: price of a call that computes everything without rounding of inputs; None: all round them.
        grid: labels of one state nearer in cost than this are one; 0 for an exact front.
    """
    grid, of_gap = (GRID, _GRID_OF_GAP) if grid is None else (grid, grid)
    total = costs.calls
    history = _History()
    waiting: dict[tuple[int | None, int], list[_Labels]] = {(None, 0): [history.first()]}
    ends: list[_Labels] = []
    for start in range(total):
        for before in (None, *range(start)):
            if (before, start) not in waiting:
                continue
            own = _joined(waiting.pop((before, start)))
            ids = history.add(own := own.take(_unbeaten(own.cost, own.loss, grid)))
            for end, gaps in _gaps(costs, prices, before, start, of_gap):
                grown = [
                    _Labels(
                        own.cost + gap.cost + gap.surcharge + (end < total),
                        own.loss + gap.error**2 + gap.rounding**2,
                        ids,
                        np.full(len(ids), history.gap(gap)),
                    )
                    for plain in gaps
                    for gap in _both_precisions(plain, costs, start, end, unrounded)
                ]
                (waiting.setdefault((start, end), []) if end < total else ends).extend(grown)
    last = _joined(ends)
    return [
        Schedule(
            history.rows(last.before[i], last.gap[i], total),
            float(last.cost[i]),
            float(last.loss[i]) ** 0.5,
            history.unrounded(last.before[i], last.gap[i]),
        )
        for i in _unbeaten(last.cost, last.loss, grid)
    ]


@dataclass(frozen=True)
class _Gap:
    """Calls between two that compute.

    Attributes:
        actions: call -> what it does.
        cost: of these calls.
        error: of these calls together.
        rounding: error by rounding of inputs in the call before them, which they repeat.
        unrounded: that call, if it does not round.
        surcharge: what it costs more then.
    """

    actions: Mapping[int, Actions]
    cost: float
    error: float
    rounding: float = 0.0
    unrounded: int | None = None
    surcharge: float = 0.0


@dataclass(frozen=True)
class _Labels:
    """Ways to get to a state.

    Attributes:
        cost: sum of prices.
        loss: square of the error.
        before: number of the label that each came from.
        gap: number of the gap that it came through.
    """

    cost: Floats
    loss: Floats
    before: Ints
    gap: Ints

    def take(self, places: Ints) -> "_Labels":
        """Return some of them."""
        return _Labels(self.cost[places], self.loss[places], self.before[places], self.gap[places])


@dataclass
class _History:
    """All labels that were kept, by number, and all gaps."""

    _before: list[int] = field(default_factory=list)
    _gap: list[int] = field(default_factory=list)
    _gaps: list[_Gap] = field(default_factory=list)

    def first(self) -> _Labels:
        """The label of the first call, which computes."""
        self._gaps.append(_Gap({}, 0.0, 0.0))
        return _Labels(np.ones(1), np.zeros(1), np.array([-1]), np.array([0]))

    def add(self, labels: _Labels) -> Ints:
        """Keep labels; return their numbers."""
        first = len(self._before)
        self._before += labels.before.tolist()
        self._gap += labels.gap.tolist()
        return np.arange(first, len(self._before))

    def gap(self, gap: _Gap) -> int:
        """Keep a gap; return its number."""
        self._gaps.append(gap)
        return len(self._gaps) - 1

    def rows(self, before: int, gap: int, total: int) -> tuple[Actions, ...]:
        """Return what all calls do on the way that ends with a gap after a label."""
        actions: dict[int, Actions] = {}
        for each in self._way(before, gap):
            actions.update(each.actions)
        return tuple(actions.get(call, {}) for call in range(total))

    def unrounded(self, before: int, gap: int) -> frozenset[int]:
        """Return the calls on that way that do not round their inputs."""
        return frozenset(each.unrounded for each in self._way(before, gap) if each.unrounded is not None)

    def _way(self, before: int, gap: int) -> Iterator[_Gap]:
        yield self._gaps[gap]
        while before >= 0:
            yield self._gaps[self._gap[before]]
            before = self._before[before]


def _both_precisions(gap: _Gap, costs: GapCosts, start: int, end: int, price: float | None) -> Iterator[_Gap]:
    """Yield a gap after a call that rounds its inputs, and after one that does not, if there are such."""
    yield replace(gap, rounding=costs.of_rounding(start, end))
    if price is not None:
        yield replace(gap, unrounded=start, surcharge=price - 1)


def _gaps(
    costs: GapCosts, prices: Mapping[str, float], before: int | None, start: int, grid: float
) -> Iterator[tuple[int, list[_Gap]]]:
    """Yield each call that may compute next, or T for none, with the unbeaten choices for the calls between."""
    found = [_Gap({}, 0.0, 0.0)]
    for end in range(start + 1, min(costs.calls, start + costs.longest + 1) + 1):
        yield end, found
        if end == costs.calls:
            return
        skips = [(zone, costs.of_call(zone, before, start, end)) for zone in prices]
        longer = [
            _Gap({**gap.actions, end: {zone: skip.reads}}, gap.cost + prices[zone], gap.error + skip.error)
            for gap in found
            for zone, skip in skips
            if skip is not None
        ]
        if not longer:
            return
        cost, error = (np.array([getattr(gap, name) for gap in longer]) for name in ("cost", "error"))
        found = [longer[i] for i in _unbeaten(cost, error, grid)]


def _joined(labels: list[_Labels]) -> _Labels:
    return _Labels(*(np.concatenate([getattr(x, name) for x in labels]) for name in ("cost", "loss", "before", "gap")))


def _unbeaten(cost: Floats, loss: Floats, grid: float) -> Ints:
    """Return the places of what has less loss than all that cost less, in the order of cost."""
    order = np.lexsort((loss, cost.round(9)))  # sums in another order are the same cost
    ranked = loss[order]
    order = order[np.r_[True, ranked[1:] < np.minimum.accumulate(ranked)[:-1]]]
    if grid:
        cell = np.floor(cost[order] / grid)
        kept = np.r_[cell[1:] != cell[:-1], True]  # the last of a cell costs a little more, and is the best of it
        kept[0] = True
        order = order[kept]
    return order
