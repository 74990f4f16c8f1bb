"""What skipping calls costs in the final picture: the numbers that plans are made of, measured on the model that runs.

A *gap* is a run of calls between two that compute. Its error is measured call by call, on the latents of a trajectory
that computes everything: what is predicted from the calls before the gap, against the same call computed. What such an
error does to the final picture is measured apart, by whole trajectories with one call replaced: an early one becomes
another picture, a late one stays as small as it is. Errors within a gap point the same way and add up; those of
different gaps do not, and their squares add up. Letters: T calls, r and s the last two that compute before a gap.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcomp.cachequant.predict import PREDICTORS
from dcomp.cachequant.trials import Actions, Branch, Trials
from dcomp.cachequant.zones import WHOLE
from dcomp.calibrate.progress import Progress, silent

_PROBES = 12  # calls whose sensitivity is measured; that of the others lies between
_MOST_NODES = 2  # a prediction from three calls is too seldom the best to be measured for all triples

Way = tuple[str, str]  # zone and predictor


@dataclass(frozen=True)
class GapCosts:
    """Errors of predictions, as relative errors of the final latents.

    Attributes:
        calls: T.
        longest: calls of a gap, at most.
        errors: way, then the calls that are read (`(s,)` or `(r, s)`), then the skipped call -> its error.
        sensitivities: of the T calls: relative error of the final latents by that of the prediction.
    """

    calls: int
    longest: int
    errors: Mapping[Way, Mapping[tuple[int, ...], Mapping[int, float]]]
    sensitivities: tuple[float, ...]

    def of_gap(self, way: Way, before: int | None, start: int, end: int) -> float | None:
        """Return the error of a gap after call `start`, up to `end`, which computes again; None if it cannot be.

        Args:
            way: how its calls are predicted.
            before: the call before `start` that computes; None if there is none.
            start: s.
            end: T for a gap that ends the trajectory.
        """
        if end == start + 1:
            return 0.0
        nodes: tuple[int, ...] = (start,)
        if PREDICTORS[way[1]].nodes == _MOST_NODES:
            if before is None:
                return None
            nodes = (before, start)
        found = self.errors[way].get(nodes)
        if found is None or any(call not in found for call in range(start + 1, end)):
            return None
        return sum(found[call] for call in range(start + 1, end))


def measure_gap_costs(trials: Trials, ways: Sequence[Way], longest: int, *, progress: Progress = silent) -> GapCosts:
    """Measure all gaps of up to `longest` calls.

    Args:
        trials: of the model that will run.
        ways: zone and predictor, of at most two nodes.
        longest: calls of a gap.
        progress: called with a text, the calls done and their total.
    """
    total = len(trials.timesteps)
    weights = measure_sensitivities(trials, progress)
    errors: dict[Way, dict[tuple[int, ...], dict[int, float]]] = {way: {} for way in ways}
    whole = Branch()
    for call in range(total):
        progress("costs of gaps", call, total)
        tries: list[tuple[Branch, Actions]] = [(whole, {})]
        about: list[tuple[Way, tuple[int, ...]]] = []
        for way in ways:
            zone, name = way
            for nodes in _node_choices(call, PREDICTORS[name].nodes, longest):
                tries.append((whole.reading(nodes), {zone: name}))
                about.append((way, nodes))
        computed, *skipped = trials.extend(tries)
        for (way, nodes), branch in zip(about, skipped, strict=True):
            errors[way].setdefault(nodes, {})[call] = weights[call] * trials.difference(branch, computed)
        whole = computed
    progress("costs of gaps", total, total)
    return GapCosts(total, longest, errors, tuple(weights))


def measure_sensitivities(trials: Trials, progress: Progress = silent) -> list[float]:
    """Return for each call how much larger its error is in the final picture: relative error there by that here.

    The error is the one that caches make: the prediction of the call before, once, with all later calls computed.
    """
    total = len(trials.timesteps)
    probes = sorted({round(1 + i * (total - 2) / (_PROBES - 1)) for i in range(_PROBES)} & {*range(1, total)})
    if not probes:
        return [1.0] * total
    (whole,) = trials.extend([(Branch(), {})])
    running: dict[int, Branch] = {}
    local: dict[int, float] = {}
    for call in range(1, total):
        progress("sensitivities", call, total)
        tries: list[tuple[Branch, Actions]] = [(branch, {}) for branch in (whole, *running.values())]
        tries += [(whole, {WHOLE: "reuse"})] if call in probes else []
        whole, *others = trials.extend(tries)
        if call in probes:
            local[call] = trials.difference(others[-1], whole)
        running = dict(zip([*running, *([call] if call in probes else [])], others, strict=True))
    known = {call: math.log(max(1e-9, branch.error) / max(1e-9, local[call])) for call, branch in running.items()}
    return [math.exp(_between(probes, known, call)) for call in range(total)]


def _node_choices(call: int, count: int, longest: int) -> list[tuple[int, ...]]:
    """Return which calls a prediction of `call` may read, if no gap is longer than that."""
    last = range(max(0, call - longest), call)
    if count == 1:
        return [(s,) for s in last]
    return [(r, s) for s in last for r in range(max(0, s - longest - 1), s)]


def _between(probes: Sequence[int], known: Mapping[int, float], call: int) -> float:
    place = bisect.bisect_left(probes, call)
    if place in (0, len(probes)):
        return known[probes[min(place, len(probes) - 1)]]
    low, high = probes[place - 1], probes[place]
    part = (call - low) / (high - low)
    return (1 - part) * known[low] + part * known[high]
