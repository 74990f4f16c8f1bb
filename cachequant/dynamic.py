"""Plans by dynamic programming: for every cost the least error that gaps and computing calls can add up to.

A state is a pair of calls that compute one after the other, because a prediction may read both; what came before them
is its cost and its error alone. Labels that another one of their state beats in both are dropped, and of those nearer
in cost than can matter one is kept, so that the time is bounded. Letters: T calls, r and s as in `gap_costs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcomp.cachequant.gap_costs import GapCosts, Way
from dcomp.cachequant.trials import Actions

_GRID = 0.02  # of a call that computes everything: labels nearer in cost than this are one


@dataclass(frozen=True)
class Schedule:
    """What each call does, with what is expected of it.

    Attributes:
        rows: of the T calls.
        cost: sum of their prices, 1 for a call that computes everything.
        error: relative error of the final latents; None where a planner does not know it.
    """

    rows: tuple[Actions, ...]
    cost: float
    error: float | None


@dataclass(frozen=True)
class _Label:
    cost: float
    loss: float  # square of the error
    before: "_Label | None"
    way: Way | None  # of the gap before this label's call
    call: int


def best_schedules(costs: GapCosts, prices: Mapping[Way, float], *, grid: float = _GRID) -> list[Schedule]:
    """Return the schedules that no other one beats in cost and expected error, cheapest first.

    Args:
        costs: of all gaps.
        prices: of a call that is predicted in each way.
        grid: labels of one state nearer in cost than this are one; 0 for an exact front.
    """
    total = costs.calls
    labels: dict[tuple[int | None, int], list[_Label]] = {(None, 0): [_Label(1.0, 0.0, None, None, 0)]}
    ends: list[_Label] = []
    for start in range(total):
        for before in (None, *range(start)):
            state = (before, start)
            if state not in labels:
                continue
            own = _unbeaten(labels.pop(state), grid)
            for end in range(start + 1, min(total, start + costs.longest + 1) + 1):
                for way, gap in _ways(costs, prices, before, start, end):
                    price = (prices[way] if way else 0.0) * (end - start - 1) + (end < total)
                    grown = [_Label(x.cost + price, x.loss + gap * gap, x, way, end) for x in own]
                    (labels.setdefault((start, end), []) if end < total else ends).extend(grown)
    return [Schedule(_rows(label, total), label.cost, label.loss**0.5) for label in _unbeaten(ends, grid)]


def _ways(
    costs: GapCosts, prices: Mapping[Way, float], before: int | None, start: int, end: int
) -> list[tuple[Way | None, float]]:
    if end == start + 1:
        return [(None, 0.0)]
    found = ((way, costs.of_gap(way, before, start, end)) for way in prices)
    return [(way, gap) for way, gap in found if gap is not None]


def _unbeaten(labels: Sequence[_Label], grid: float) -> list[_Label]:
    """Return labels in the order of their cost, each with less loss than all that cost less."""
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda x: (x.cost, x.loss)):
        if kept and label.loss >= kept[-1].loss:
            continue
        if len(kept) > 1 and label.cost - kept[-2].cost < grid:
            kept[-1] = label
        else:
            kept.append(label)
    return kept


def _rows(label: _Label, total: int) -> tuple[Actions, ...]:
    rows: list[Actions] = [{} for _ in range(total)]
    step: _Label | None = label
    while step is not None and step.before is not None:
        if step.way is not None:
            zone, name = step.way
            for call in range(step.before.call + 1, step.call):
                rows[call] = {zone: name}
        step = step.before
    return tuple(rows)
