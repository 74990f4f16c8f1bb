"""Carry a cache plan over to a trajectory of other timesteps: another number of steps, or another scheduler.

What a plan knows is where on the trajectory calls may be skipped, and that place is a noise level. So calls are matched
by their places, which are log-SNRs, and lines through two calls keep how much of the exact slope they take. What the
new plan does to the picture is not known; it has to be looked at. Letters: s and r the last two calls that compute
before a call t.
"""

import bisect
from collections.abc import Sequence

from dcomp.cachequant.plan import Action, Actions, CachePlan

_MOST_OF_SLOPE = 1.5


def carry_over(plan: CachePlan, timesteps: Sequence[float], places: Sequence[float]) -> CachePlan:
    """Return a plan for another trajectory of the same denoiser.

    The call that is nearest to a computing one of the plan computes; others do what the nearest skipping one does, with
    what the last computing calls before them have computed.

    Args:
        plan: the plan. Where its places are no noise levels but numbers of calls, so must the new ones be, and both
            trajectories are taken to be equally long.
        timesteps: of the new trajectory's calls, as the denoiser is told them.
        places: of these calls, on the axis of the plan's own.
    """
    if plan.places == tuple(map(float, range(plan.calls))):
        places = [place * (plan.calls - 1) / max(1, len(places) - 1) for place in map(float, range(len(places)))]
    computing = [call for call, row in enumerate(plan.actions) if not row]
    skipping = [call for call, row in enumerate(plan.actions) if row]
    chosen = {0, *(_nearest(places, plan.places[call]) for call in computing)}
    own_places = [plan.places[call] for call in skipping]
    rows: list[Actions] = []
    for call, place in enumerate(places):
        if call in chosen or not skipping:
            rows.append({})
            continue
        model = skipping[_nearest(own_places, place)]
        before = [other for other in sorted(chosen) if other < call]
        part = {zone: _part_of_slope(plan, model, zone) for zone in plan.actions[model]}
        rows.append({zone: _line(before, places, call, share) for zone, share in part.items()})
    unrounded = frozenset(call for call, place in enumerate(places) if _nearest(plan.places, place) in plan.unrounded)
    return CachePlan(plan.zones, tuple(timesteps), tuple(places), tuple(rows), plan.contexts, unrounded)


def _nearest(places: Sequence[float], place: float) -> int:
    """Return the index of the nearest of ascending places; of two, the one before."""
    after = bisect.bisect_left(places, place)
    around = [i for i in (after - 1, after) if 0 <= i < len(places)]
    return min(around, key=lambda i: abs(places[i] - place))


def _part_of_slope(plan: CachePlan, call: int, zone: str) -> float:
    """Return how much of the exact line through the last two calls that it reads a prediction takes; 0 is reuse."""
    prediction = plan.predictions[call][zone]
    if len(prediction.calls) < 2:
        return 0.0
    r, s = (plan.places[node] for node in prediction.calls[-2:])
    exact = (plan.places[call] - s) / (s - r)
    return min(max(0.0, (prediction.weights[-1] - 1) / exact), _MOST_OF_SLOPE)


def _line(before: Sequence[int], places: Sequence[float], call: int, share: float) -> Action:
    if len(before) == 1 or not share:
        return ((before[-1], 1.0),)
    r, s = before[-2:]
    slope = share * (places[call] - places[s]) / (places[s] - places[r])
    return ((r, -slope), (s, 1 + slope))
