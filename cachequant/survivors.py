"""Search by survivors: histories go through the trajectory side by side, and at each call the best for its cost remain.

What a skipped call gets wrong is measured where it happens, on the latents that the history really has, against the
same call computed. What that does to the final picture is not seen there: an error of the first calls becomes another
picture, one of the last calls stays as small as it is. So it is weighted by a sensitivity of that call, which whole
trajectories measure before the search. Errors of one gap point the same way and add up; those of different gaps do not.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.trials import Actions, Branch, Trials
from dcomp.cachequant.zones import WHOLE
from dcomp.calibrate.progress import Progress, silent

_CHEAPEST = 1 / 12  # of what computing everything costs: plans below are not looked for
_PROBES = 12  # calls whose sensitivity is measured; that of the others lies between


@dataclass(frozen=True, eq=False)
class Survivor:
    """A history with its cost, as a part of what the same calls cost when they compute everything.

    Attributes:
        branch: the history.
        cost: sum of the prices of its calls.
        age: calls since the last one that computed everything.
        closed: square of the final error that is expected of its gaps but the last.
        gap: the final error that is expected of the last gap.
    """

    branch: Branch
    cost: float = 0.0
    age: int = 0
    closed: float = 0.0
    gap: float = 0.0

    @property
    def loss(self) -> float:
        """Square of the final error that is expected of what was skipped so far."""
        return self.closed + self.gap**2

    def beats(self, other: "Survivor") -> bool:
        """Whether it is at least as good in all of loss, cost and age, and better in one."""
        own, its = ((s.loss, s.cost, s.age) for s in (self, other))
        return own != its and all(a <= b for a, b in zip(own, its, strict=True))


def search(
    trials: Trials,
    menu: Sequence[Actions],
    price: Callable[[Actions], float],
    *,
    survivors: int = 16,
    progress: Progress = silent,
) -> list[Survivor]:
    """Return the histories of whole trajectories that no other one beats in cost and error, cheapest first.

    Args:
        trials: of the model that will run.
        menu: what a call may do; computing everything (no action) is always tried.
        price: of a call, 1 for one that computes everything.
        survivors: histories that go on from call to call.
        progress: called with a text, the calls done and their total.
    """
    total = len(trials.timesteps)
    choices = [actions for actions in menu if actions]
    weights = measure_sensitivities(trials, progress)
    alive = [Survivor(Branch())]
    for call in range(total):
        progress("search", call, total)
        computed = trials.extend([(one.branch, {}) for one in alive])
        tries = [(i, actions) for i, one in enumerate(alive) for actions in choices if one.branch.allows(actions)]
        skipped = trials.extend([(alive[i].branch, actions) for i, actions in tries]) if tries else []
        found = [
            Survivor(branch, one.cost + 1.0, 0, one.loss, 0.0) for one, branch in zip(alive, computed, strict=True)
        ]
        for (i, actions), branch in zip(tries, skipped, strict=True):
            one, off = alive[i], weights[call] * trials.difference(branch, computed[i])
            found.append(Survivor(branch, one.cost + price(actions), one.age + 1, one.closed, one.gap + off))
        alive = thinned(found, survivors, call + 1)
    progress("search", total, total)
    front: list[Survivor] = []
    for one in sorted(alive, key=lambda s: (s.cost, s.branch.error)):
        if not front or one.branch.error < front[-1].branch.error:
            front.append(one)
    return front


def measure_sensitivities(trials: Trials, progress: Progress = silent) -> list[float]:
    """Return for each call how much larger its error is in the final picture: relative error there by that here.

    The error is the one that caches make: the prediction of the call before, once, with all later calls computed.
    """
    total = len(trials.timesteps)
    probes = sorted({round(1 + i * (total - 2) / (_PROBES - 1)) for i in range(_PROBES)} & set(range(1, total)))
    if not probes:
        return [1.0] * total
    reuse: Actions = {WHOLE: "reuse"}
    (whole,) = trials.extend([(Branch(), {})])
    running: dict[int, Branch] = {}
    local: dict[int, float] = {}
    for call in range(1, total):
        progress("sensitivities", call, total)
        tries: list[tuple[Branch, Actions]] = [(branch, {}) for branch in (whole, *running.values())]
        tries += [(whole, reuse)] if call in probes else []
        whole, *others = trials.extend(tries)
        if call in probes:
            local[call] = trials.difference(others[-1], whole)
        running = dict(zip([*running, *([call] if call in probes else [])], others, strict=True))
    known = {call: math.log(max(1e-9, branch.error) / max(1e-9, local[call])) for call, branch in running.items()}
    return [math.exp(_between(probes, known, call)) for call in range(total)]


def _between(probes: Sequence[int], known: dict[int, float], call: int) -> float:
    place = bisect.bisect_left(probes, call)
    if place == 0 or place == len(probes):
        return known[probes[min(place, len(probes) - 1)]]
    low, high = probes[place - 1], probes[place]
    part = (call - low) / (high - low)
    return (1 - part) * known[low] + part * known[high]


def thinned(found: Sequence[Survivor], count: int, calls: int) -> list[Survivor]:
    """Choose which histories go on: of those that no other one beats, the best of each range of cost.

    Ranges are equal parts of the logarithm of cost per call, so that cheap plans, which differ by few calls, are told
    apart as well as dear ones. Where a range has nothing, those with the least loss elsewhere take its place.

    Args:
        found: of the same number of calls.
        count: at most.
        calls: that number.
    """
    left = [one for one in found if not any(other.beats(one) for other in found)]
    if len(left) <= count:
        return left
    ranges: dict[int, list[Survivor]] = {}
    for one in sorted(left, key=lambda s: s.loss):
        rate = min(1.0, max(_CHEAPEST, one.cost / calls))
        place = int((math.log(rate) - math.log(_CHEAPEST)) / -math.log(_CHEAPEST) * (count - 1) + 0.5)
        ranges.setdefault(place, []).append(one)
    chosen: list[Survivor] = []
    for round_ in range(count):
        for place in sorted(ranges):
            if round_ < len(ranges[place]) and len(chosen) < count:
                chosen.append(ranges[place][round_])
    return chosen


def plan_of(trials: Trials, branch: Branch, contexts: int = 1) -> CachePlan:
    """Return the plan that makes this history, with the zones that it names."""
    used = {zone for actions in branch.rows for zone in actions}
    zones = tuple(zone for zone in trials.zones if zone.name in used or zone.name == WHOLE)
    return CachePlan(zones, trials.timesteps, trials.places, branch.rows, contexts)
