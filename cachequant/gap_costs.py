"""What skipping calls costs in the final picture: the numbers that plans are made of, measured on the model that runs.

A *gap* is a run of calls between two that compute. Its error is measured call by call, on the latents of a trajectory
that computes everything: what is predicted from the calls before the gap, against the same call computed. What such an
error does to the final picture is measured apart, by whole trajectories with one call replaced: an early one becomes
another picture, a late one stays as small as it is. Errors within a gap point the same way and add up; those of
different gaps do not, and their squares add up. Letters: T calls, r and s the last two that compute before a gap, t a
call in it, N pictures.

Each earlier call is put in the place of t once. What the denoiser then returns is off by a vector, and a mixture of
two calls is off by the same mixture of their vectors: exactly where the denoiser itself is predicted, nearly for a zone
whose rest of the denoiser is run. So the best slope of a line through r and s, and its error, follow in closed form.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from dcomp.cachequant.executor import Unrounded
from dcomp.cachequant.plan import Actions, Reads
from dcomp.cachequant.trials import Branch, Trials
from dcomp.cachequant.zones import WHOLE
from dcomp.calibrate.progress import Progress, silent

_PROBES, _LAST = 8, 5  # calls whose sensitivity is measured, spread and at the end; that of the others lies between


@dataclass(frozen=True)
class Skip:
    """A call in which a zone is predicted.

    Attributes:
        error: relative error of the final latents.
        reads: what the zone is replaced by: calls before, with weights that add up to 1.
    """

    error: float
    reads: Reads


@dataclass(frozen=True)
class GapCosts:
    """Errors of predictions.

    Attributes:
        calls: T.
        longest: calls of a gap, at most.
        skips: zone, then t, then the calls that are read (`(s,)` or `(r, s)`).
        sensitivities: of the T calls: relative error of the final latents by that of the prediction.
        rounding: of the T calls: relative error of the prediction by rounding of inputs; None if it was not measured.
    """

    calls: int
    longest: int
    skips: Mapping[str, Sequence[Mapping[tuple[int, ...], Skip]]]
    sensitivities: tuple[float, ...] = field(repr=False)
    rounding: tuple[float, ...] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the costs as JSON data."""

        def rows(found: Mapping[tuple[int, ...], Skip]) -> list[Any]:
            return [[[*nodes], skip.error, [[*read] for read in skip.reads]] for nodes, skip in found.items()]

        return {
            "calls": self.calls,
            "longest": self.longest,
            "skips": {zone: [rows(found) for found in calls] for zone, calls in self.skips.items()},
            "sensitivities": [*self.sensitivities],
            "rounding": None if self.rounding is None else [*self.rounding],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote, in this run or in one before it; no file of somebody else's."""

        def found(rows: list[Any]) -> dict[tuple[int, ...], Skip]:
            return {
                tuple(nodes): Skip(error, tuple((c, weight) for c, weight in reads)) for nodes, error, reads in rows
            }

        skips = {zone: [found(rows) for rows in calls] for zone, calls in data["skips"].items()}
        rounding = None if data["rounding"] is None else tuple(data["rounding"])
        return cls(data["calls"], data["longest"], skips, tuple(data["sensitivities"]), rounding)

    def of_call(self, zone: str, before: int | None, start: int, call: int) -> Skip | None:
        """Return the best prediction of a zone in a call; None if the gap would be too long for it.

        Args:
            zone: its name.
            before: r; None if there is none.
            start: s.
            call: t.
        """
        found = self.skips[zone][call]
        both = found.get((before, start)) if before is not None else None
        return both or found.get((start,))

    def of_rounding(self, start: int, end: int) -> float:
        """Return the error of the final latents by rounding of inputs in a call that others read.

        They repeat its error, so that it adds up as within a gap.

        Args:
            start: the call that computes.
            end: the next one that does.
        """
        return self.rounding[start] * sum(self.sensitivities[start:end]) if self.rounding else 0.0


def measure_gap_costs(
    trials: Trials, longest: Mapping[str, int], sensitivities: Sequence[float], *, progress: Progress = silent
) -> GapCosts:
    """Measure all gaps.

    Args:
        trials: of the model that will run, with a window of `reach` of the longest gap.
        longest: zone -> calls of a gap up to whose end it may be predicted.
        sensitivities: of the T calls.
        progress: called with a text, the calls done and their total.
    """
    total = len(trials.timesteps)
    skips: dict[str, list[dict[tuple[int, ...], Skip]]] = {zone: [] for zone in longest}
    whole = Branch()
    for call in range(total):
        progress("costs of gaps", call, total)
        pairs = [(zone, node) for zone, gap in longest.items() for node in range(max(0, call - reach(gap)), call)]
        tries: list[tuple[Branch, Actions]] = [(whole, {}), *((whole, {zone: ((node, 1.0),)}) for zone, node in pairs)]
        whole, *replaced = trials.extend(tries)
        off: dict[str, dict[int, Tensor]] = {zone: {} for zone in longest}
        for (zone, node), branch in zip(pairs, replaced, strict=True):
            off[zone][node] = trials.difference(branch, whole)
        for zone, gap in longest.items():
            skips[zone].append(_skips(off[zone], call, gap, sensitivities[call]))
    progress("costs of gaps", total, total)
    return GapCosts(total, max(longest.values()), skips, tuple(sensitivities))


def measure_rounding(trials: Trials, unrounded: Unrounded) -> tuple[float, ...]:
    """Return for each of the T calls how far rounding of inputs moves its prediction, relatively.

    Args:
        trials: of the quantized model.
        unrounded: makes a `with` block in which it rounds no inputs.
    """
    whole, errors = Branch(), []
    for _ in trials.timesteps:
        with unrounded():
            (exact,) = trials.extend([(whole, {})])
        (whole,) = trials.extend([(whole, {})])
        errors.append(float(trials.difference(whole, exact).square().sum(1).mean().sqrt()))
    return tuple(errors)


def reach(longest: int) -> int:
    """Return how many calls before a skipped one the earlier of two that are read may lie."""
    return 2 * longest + 1


def measure_sensitivities(trials: Trials, *, progress: Progress = silent) -> list[float]:
    """Return for each call how much larger its error is in the final picture: relative error there by that here.

    The error is the one that caches make: the prediction of the call before, once, with all later calls computed. The
    mean over pictures is geometric: one that is about to become another picture would decide about all calls.
    """
    total = len(trials.timesteps)
    spread = {round(1 + i * (total - 2) / (_PROBES - 1)) for i in range(_PROBES)}
    # The last steps are not like those before: what is left of an error there is the error.
    probes = sorted((spread | {*range(total - _LAST, total)}) & {*range(1, total)})
    if not probes:
        return [1.0] * total
    (whole,) = trials.extend([(Branch(), {})])
    running: dict[int, Branch] = {}
    local: dict[int, Tensor] = {}
    for call in range(1, total):
        progress("sensitivities", call, total)
        tries: list[tuple[Branch, Actions]] = [(branch, {}) for branch in (whole, *running.values())]
        tries += [(whole, {WHOLE: "reuse"})] if call in probes else []
        whole, *others = trials.extend(tries)
        if call in probes:
            local[call] = trials.difference(others[-1], whole).norm(dim=1).clamp(min=1e-9)
        running = dict(zip([*running, *([call] if call in probes else [])], others, strict=True))
    progress("sensitivities", total, total)
    final = {call: torch.tensor(branch.errors).double().clamp(min=1e-9) for call, branch in running.items()}
    logs = {call: float((error / local[call]).log().mean()) for call, error in final.items()}
    return [math.exp(_between(probes, logs, call)) for call in range(total)]


def _skips(off: Mapping[int, Tensor], call: int, longest: int, weight: float) -> dict[tuple[int, ...], Skip]:
    """Return what predicting a call from each s, and from each r and s, costs.

    Args:
        off: for each call before: how far its tensors move the prediction.
        call: t.
        longest: calls of a gap.
        weight: sensitivity of the call.
    """
    found: dict[tuple[int, ...], Skip] = {}
    if not off:
        return found
    nodes = list(off)
    vectors = torch.stack([off[node].flatten() for node in nodes])
    products = (vectors @ vectors.T / len(off[nodes[0]])).tolist()  # means over pictures
    for j, s in enumerate(nodes):
        if s < call - longest:
            continue
        found[s,] = Skip(weight * math.sqrt(products[j][j]), ((s, 1.0),))
        for i, r in enumerate(nodes[:j]):
            if r >= s - longest - 1:
                slope, error = _line(products[i][i], products[i][j], products[j][j])
                found[r, s] = Skip(weight * error, ((r, -slope), (s, 1 + slope)))
    return found


def _line(rr: float, rs: float, ss: float) -> tuple[float, float]:
    """Return the a for which `s + a (s - r)` is least off, and how far, from inner products of how far r and s are."""
    spread = rr - 2 * rs + ss
    slope = (rs - ss) / spread if spread > 1e-9 * (rr + ss) else 0.0
    return slope, math.sqrt(max(0.0, ss + slope * (2 * (ss - rs) + slope * spread)))


def _between(probes: Sequence[int], known: Mapping[int, float], call: int) -> float:
    place = bisect.bisect_left(probes, call)
    if place in (0, len(probes)):
        return known[probes[min(place, len(probes) - 1)]]
    low, high = probes[place - 1], probes[place]
    part = (call - low) / (high - low)
    return (1 - part) * known[low] + part * known[high]
