"""Planners: each proposes plans under a budget, in the one form that all plans have.

What a planner may look at is measured when the first one asks for it. The plans that it proposes are followed to the
end before one of them is chosen, so that a rule of the literature is judged by its best zone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from dcomp.cachequant.blockwise import calls_of_modules
from dcomp.cachequant.drift import Drift
from dcomp.cachequant.dynamic import Schedule, best_schedules
from dcomp.cachequant.gap_costs import GapCosts
from dcomp.cachequant.plan import Actions
from dcomp.cachequant.predict import PREDICTORS
from dcomp.cachequant.schedules import SCHEDULES, ScheduleError, ScheduleTask
from dcomp.cachequant.zones import SUBLAYERS, SUBMODULES, WHOLE

BEST = 2  # plans of a front that are proposed
_INTERVALS = (2, 3, 4, 5)  # of the plans that evolution begins with
_FORECASTS = {"taylor": "taylor1", "hermite": "hermite1"}  # planner -> predictor
_PLAIN = ("uniform", "power", *_FORECASTS)  # planners that measure nothing


@dataclass
class PlanningTask:
    """What planners may look at.

    Attributes:
        calls: T.
        zones: that are cheap enough to be worth a plan.
        modules: zones of one attention or feed-forward each, in the order in which they run.
        measure_costs: see `costs`.
        measure_drifts: see `drifts_of`.
        breed: makes plans of plans, at some prices; see `evolved`.
        unrounded: returns the price of a call that computes everything and rounds no inputs; None: there are none.
    """

    calls: int
    zones: tuple[str, ...]
    modules: tuple[str, ...]
    measure_costs: Callable[[], GapCosts]
    measure_drifts: Callable[[Sequence[str]], Mapping[str, Drift]]
    breed: Callable[[Mapping[str, float], Sequence[Sequence[Actions]]], list[Schedule]]
    unrounded: Callable[[], float] | None = None
    _drifts: dict[tuple[str, ...], Mapping[str, Drift]] = field(default_factory=dict)
    _fronts: dict[tuple[tuple[str, float], ...], list[Schedule]] = field(default_factory=dict)
    _bred: dict[tuple[tuple[str, float], ...], list[Schedule]] = field(default_factory=dict)

    @cached_property
    def costs(self) -> GapCosts:
        """What skipping does to the final latents."""
        return self.measure_costs()

    def drifts_of(self, zones: tuple[str, ...]) -> Mapping[str, Drift]:
        """Return how far the tensors of each of some zones move from call to call."""
        if zones not in self._drifts:
            self._drifts[zones] = self.measure_drifts(zones)
        return self._drifts[zones]

    def zones_for(self, planner: str) -> tuple[str, ...]:
        """Return the zones that a planner makes use of."""
        return self.modules if PLANNERS[planner] is blockwise else self.zones

    def front(self, prices: Mapping[str, float]) -> list[Schedule]:
        """Return all plans that no other one beats, cheapest first."""
        key = tuple(sorted(prices.items()))
        if key not in self._fronts:
            price = None if self.unrounded is None else self.unrounded()
            measured = {zone: prices[zone] for zone in prices if zone in self.costs.skips}
            self._fronts[key] = best_schedules(self.costs, measured, unrounded=price)
        return self._fronts[key]

    def evolved(self, prices: Mapping[str, float], seeds: Sequence[Sequence[Actions]]) -> list[Schedule]:
        """Return what evolution made of some plans, cheapest first; once for all budgets."""
        key = tuple(sorted(prices.items()))
        if key not in self._bred:
            self._bred[key] = self.breed(prices, seeds)
        return self._bred[key]


Planner = Callable[[PlanningTask, Mapping[str, float], float], Sequence[Schedule]]
"""Task, zone -> part of a call that is left where it is predicted, the most that all calls may cost -> plans."""


def joint(task: PlanningTask, prices: Mapping[str, float], limit: float) -> list[Schedule]:
    """Place of every gap and zone of every call in it together, by what they do to the final latents.

    Errors of zones that are mixed add up less well than those of one, so that the best plans without sublayers, and of
    the whole denoiser alone, are proposed beside the best of all: pictures decide. Plain plans of the whole denoiser,
    and of all its attentions and feed-forwards, are proposed too: they need no costs, and where few calls are left to
    compute, errors that add up no longer tell which of two plans is better.
    """
    menus = [prices, {zone: price for zone, price in prices.items() if zone != SUBLAYERS}, {WHOLE: prices[WHOLE]}]
    able = [
        [one for one in task.front(menu) if one.cost <= limit + 1e-9 and any(one.rows)][::-1]  # the dearer, the better
        for menu in menus
    ]
    best = [plans[0] for plans in able if plans] + able[0][1:BEST]
    simple = {zone: prices[zone] for zone in (WHOLE, SUBLAYERS) if zone in prices}
    plain = [one for name in _PLAIN for one in PLANNERS[name](task, simple, limit)]
    found: list[Schedule] = []
    for one in (*best, *plain):  # with few calls rules agree, and without sublayers menus do
        if one.rows not in [each.rows for each in found]:
            found.append(one)
    return found


def _by_rule(name: str) -> Planner:
    rule = SCHEDULES[name]

    def plan(task: PlanningTask, prices: Mapping[str, float], limit: float) -> list[Schedule]:
        found = []
        for zone, price in prices.items():
            count = _affordable(task.calls, price, limit)
            drift = partial(_drift_of, task, zone)
            try:
                computing = rule(ScheduleTask(task.calls, count, drift)) if count else []
            except ScheduleError:
                continue
            if computing:
                found.append(_placed(task.calls, computing, zone, "reuse", price))
        return found

    plan.__doc__ = rule.__doc__
    return plan


def _by_interval(predictor: str) -> Planner:
    def plan(task: PlanningTask, prices: Mapping[str, float], limit: float) -> list[Schedule]:
        found: list[Schedule] = []
        for zone in (WHOLE, SUBLAYERS):
            count = _affordable(task.calls, prices[zone], limit) if zone in prices else 0
            equal = [i * task.calls // count for i in range(count)]
            # A line needs two calls: with the second at once, nothing but the first gap is reused.
            early = [0, *(1 + i * (task.calls - 1) // (count - 1) for i in range(count - 1))] if count > 2 else equal
            for computing in (equal, early):
                one = _placed(task.calls, computing, zone, predictor, prices[zone]) if count else None
                found += [one] if one and one not in found else []
        return found

    plan.__doc__ = f"Equal distances, the prediction or all attentions and feed-forwards forecast by `{predictor}`."
    return plan


def stage(task: PlanningTask, prices: Mapping[str, float], limit: float) -> list[Schedule]:
    """Equal distances; the rear half of the blocks is reused in the first half of the calls, the front half then.

    Outlines, which are made first, are said to come from the front blocks, and details from the rear ones.

    Source: Chen et al. 2024, Delta-DiT, section 3.3.
    """
    found = []
    for front in task.zones:
        half = re.fullmatch(r"(blocks\d*)\[0:(\d+)\]", front)
        rear = next((zone for zone in task.zones if half and zone.startswith(f"{half[1]}[{half[2]}:")), None)
        if rear is None:
            continue
        both = (prices[front] + prices[rear]) / 2
        count = _affordable(task.calls, both, limit)
        computing = {i * task.calls // count for i in range(count)} if count else set()
        zones = [rear if call < task.calls / 2 else front for call in range(task.calls)]
        rows: list[Actions] = [{} if call in computing else {zones[call]: "reuse"} for call in range(task.calls)]
        cost = sum(prices[zone] if row else 1.0 for row, zone in zip(rows, zones, strict=True))
        if computing and cost <= limit + 1e-9:
            found.append(Schedule(tuple(rows), cost, None))
    return found


def blockwise(task: PlanningTask, prices: Mapping[str, float], limit: float) -> list[Schedule]:
    """Each attention and feed-forward at times of its own, and volatile ones also with feed-forwards after them.

    The union of these times computes more than was asked for, so that less is asked for until a plan can be afforded.

    Source: Ji et al. 2026, Block-wise Adaptive Caching (BAC).
    """
    if not task.modules:
        return []
    saved = {zone: 1 - prices[zone] for zone in task.modules}
    drifts = task.drifts_of(task.modules)
    feed_forwards = {zone for zone in task.modules if zone.rpartition(".")[2] in SUBMODULES["feed_forward"]}
    for count in range(_affordable(task.calls, max(0.0, 1 - sum(saved.values())), limit), 0, -1):
        try:
            computing = calls_of_modules(drifts, feed_forwards, count)
        except ScheduleError:  # so few calls are further apart than distances are known
            return []
        rows: list[Actions] = [
            {zone: "reuse" for zone in task.modules if call not in computing[zone]} for call in range(task.calls)
        ]
        cost = sum(1 - sum(saved[zone] for zone in row) for row in rows)
        if cost <= limit + 1e-9:
            return [Schedule(tuple(rows), cost, None)]
    return []


def evolve(task: PlanningTask, prices: Mapping[str, float], limit: float) -> list[Schedule]:
    """Bred from equal distances, each child judged by whole trajectories.

    Source: Aggarwal et al. 2025, ECAD.
    """
    equal = [
        _placed(task.calls, range(0, task.calls, interval), zone, "reuse", prices[zone]).rows
        for interval in _INTERVALS
        for zone in task.zones
    ]
    able = [one for one in task.evolved(prices, equal) if one.cost <= limit + 1e-9 and any(one.rows)]
    return able[: -BEST - 1 : -1]


PLANNERS: dict[str, Planner] = {
    "joint": joint,
    **{name: _by_rule(name) for name in SCHEDULES},
    **{name: _by_interval(predictor) for name, predictor in _FORECASTS.items()},
    "stage": stage,
    "blockwise": blockwise,
    "evolve": evolve,
}
"""Name -> planner: `uniform` and `power` of DeepCache, `partition` of CacheQuant, `cosine` of DDT, `taylor` of
TaylorSeer, `hermite` of HiCache, `evolve` of ECAD, and for transformers `stage` of Delta-DiT and `blockwise` of BAC."""


def _drift_of(task: PlanningTask, zone: str) -> Drift:
    return task.drifts_of(task.zones)[zone]


def _affordable(calls: int, price: float, limit: float) -> int:
    """Return how many of T calls can compute everything where the others cost a price each."""
    count = int((limit - calls * price) / (1 - price) + 1e-9)
    return max(0, min(calls, count))


def _placed(calls: int, computing: Sequence[int], zone: str, predictor: str, price: float) -> Schedule:
    """Return the plan in which all calls but some predict a zone; the first gap of a forecast reuses."""
    needed = PREDICTORS[predictor].nodes
    rows: list[Actions] = []
    for call in range(calls):
        before = sum(other < call for other in computing)
        name = predictor if before >= needed else "reuse"
        rows.append({} if call in computing else {zone: name})
    cost = sum(price if row else 1.0 for row in rows)
    return Schedule(tuple(rows), cost, None)
