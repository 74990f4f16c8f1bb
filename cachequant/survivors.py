"""Search by survivors: histories go through the trajectory side by side, and at each call the best for its cost remain.

A plan's error is not a sum of its parts: what one call leaves out, a later one that computes may repair or not. So the
search carries real latents instead of costs that were measured one by one, and one search gives plans for all budgets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.trials import Actions, Branch, Trials
from dcomp.cachequant.zones import WHOLE
from dcomp.calibrate.progress import Progress, silent

_CHEAPEST = 1 / 12  # of what computing everything costs: plans below are not looked for


@dataclass(frozen=True)
class Survivor:
    """A history with its cost, as a part of what the same calls cost when they compute everything.

    Attributes:
        branch: the history.
        cost: sum of the prices of its calls.
        age: calls since the last one that computed everything.
    """

    branch: Branch
    cost: float
    age: int

    def beats(self, other: "Survivor") -> bool:
        """Whether it is at least as good in all of error, cost and age, and better in one."""
        own, its = ((s.branch.error, s.cost, s.age) for s in (self, other))
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
    choices = [{}, *(actions for actions in menu if actions)]
    alive = [Survivor(Branch(), 0.0, 0)]
    for call in range(total):
        progress("search", call, total)
        tries = [(survivor, actions) for survivor in alive for actions in choices if survivor.branch.allows(actions)]
        branches = trials.extend([(survivor.branch, actions) for survivor, actions in tries])
        alive = thinned(
            [
                Survivor(branch, survivor.cost + price(actions), survivor.age + 1 if actions else 0)
                for (survivor, actions), branch in zip(tries, branches, strict=True)
            ],
            survivors,
            call + 1,
        )
    progress("search", total, total)
    front: list[Survivor] = []
    for survivor in sorted(alive, key=lambda s: (s.cost, s.branch.error)):
        if not front or survivor.branch.error < front[-1].branch.error:
            front.append(survivor)
    return front


def thinned(found: Sequence[Survivor], count: int, calls: int) -> list[Survivor]:
    """Choose which histories go on: of those that no other one beats, the best of each range of cost.

    Ranges are equal parts of the logarithm of cost per call, so that cheap plans, which differ by few calls, are told
    apart as well as dear ones. Where a range has nothing, those with the least error elsewhere take its place.

    Args:
        found: of the same number of calls.
        count: at most.
        calls: that number.
    """
    left = [one for one in found if not any(other.beats(one) for other in found)]
    if len(left) <= count:
        return left
    ranges: dict[int, list[Survivor]] = {}
    for one in sorted(left, key=lambda s: s.branch.error):
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
