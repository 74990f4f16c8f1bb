"""What planners may look at of a model: costs, drifts and whole trajectories, each measured when one asks for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dcomp.cachequant.drift import Drift, record_reference
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.evolution import EVALUATIONS, evolve
from dcomp.cachequant.executor import following
from dcomp.cachequant.gap_costs import GapCosts, measure_gap_costs, measure_rounding, measure_sensitivities, reach
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import Actions
from dcomp.cachequant.planners import PlanningTask
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import WHOLE, Zone, single_modules
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.quality import geometric_mean, relative_errors
from dcomp.compress.split import quantized_layers
from dcomp.compress.unrounded import unrounded
from dcomp.compress.unrounded import unrounded_calls as repeatedly_unrounded
from dcomp.recipes.kept_results import KeptResults, digest

LONGEST_GAP = 6
WINDOW = 24  # calls over which rules of the literature know the drift of a zone
_BRED = 2  # pictures that every plan is followed on which evolution tries
_CHEAP, _VERY_CHEAP = 0.6, 0.3  # of a call: a zone that leaves more to compute is not worth a search
_ALIKE = 0.2  # of a call: of two zones, one within the other, that differ by less, one is worth a search


def planning_task(
    pipeline: OpenPipeline,
    zones: Sequence[Zone],
    prices: CallPrices,
    prompts: Sequence[str],
    indices: Sequence[int],
    settings: Generation,
    progress: Progress = silent,
    kept: KeptResults | None = None,
) -> tuple[PlanningTask, Trials]:
    """Return what planners may look at, measured when one asks for it, and the trials of its trajectories.

    Args:
        pipeline: the model that will run.
        zones: all that it has.
        prices: of its calls.
        prompts: of the pictures to measure on.
        indices: of their noise.
        settings: of the trajectories, as deployed.
        progress: called with a text, the count done and the total.
        kept: what an interrupted run has measured.
    """
    kept = kept or KeptResults()
    trials = Trials(pipeline, (), prompts, indices, settings)
    used, modules = useful_zones(zones, prices), single_modules(zones)
    menu = different_zones(used, prices)

    def measure_costs() -> GapCosts:
        # A model that rounds no inputs is asked: rounding makes of small errors large ones, and of all errors the same.
        quantized = bool(quantized_layers(pipeline.denoiser))
        with unrounded(pipeline.denoiser):
            with Trials(pipeline, (), prompts, indices, settings) if quantized else trials as smooth:
                sensitivities = kept.get(
                    "sensitivities",
                    lambda: measure_sensitivities(smooth, progress=progress),
                    lambda data: [float(value) for value in data],
                )
            few = max(1, len(prompts) // 2)  # errors differ less from picture to picture than what becomes of them
            about = pipeline, menu, prompts[:few], indices[:few], settings
            with Trials(*about, window=reach(LONGEST_GAP)) as of_zones:
                costs = measure_gap_costs(of_zones, _gaps_of(menu, prices), sensitivities, progress=progress)
        if quantized:
            with Trials(*about) as rounded:
                costs = replace(costs, rounding=measure_rounding(rounded, repeatedly_unrounded(pipeline.denoiser)))
        return costs

    def known_costs() -> GapCosts:
        def read(data: Mapping[str, Any]) -> GapCosts:
            costs = GapCosts.from_dict(data)
            calls = len(trials.timesteps)
            fits = costs.calls == len(costs.sensitivities) == calls and costs.skips.keys() == {z.name for z in menu}
            if not fits or any(len(row) != calls for row in costs.skips.values()):
                raise ValueError("costs of something else")
            return costs

        return kept.get("costs", lambda: measure_costs().to_dict(), read)

    def measure_drifts(names: Sequence[str]) -> Mapping[str, Drift]:
        watched = [zone for zone in (*used, *modules) if zone.name in names]
        found = record_reference(pipeline, watched, prompts, indices, settings, window=WINDOW, progress=progress)
        return found.drifts

    def breed(shares: Mapping[str, float], seeds: Sequence[Sequence[Actions]]) -> list[Schedule]:
        def latents() -> Tensor:
            return pipeline.run(prompts[:_BRED], indices[:_BRED], settings, decode=False).latents

        whole = latents()

        def follow(rows: Sequence[Actions]) -> float:
            with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(trials.plan(rows, zones))):
                return geometric_mean(relative_errors(whole, latents()))

        def known(rows: Sequence[Actions]) -> float:
            plan = trials.plan(rows, zones)
            return kept.get(f"bred-{digest(plan.to_dict())}", lambda: follow(rows), float)

        return evolve(len(trials.timesteps), shares, known, seeds, evaluations=EVALUATIONS, progress=progress)

    useful, single = (tuple(zone.name for zone in group) for group in (used, modules))
    return PlanningTask(len(trials.timesteps), useful, single, known_costs, measure_drifts, breed), trials


def useful_zones(zones: Sequence[Zone], prices: CallPrices) -> tuple[Zone, ...]:
    """Return the zones that are worth a search, because little of a call is left where they are predicted."""
    return tuple(zone for zone in zones if prices.macs([zone.name]) <= _CHEAP * prices.macs())


def different_zones(zones: Sequence[Zone], prices: CallPrices) -> tuple[Zone, ...]:
    """Return zones without those that lie within one another and save about the same; the one that saves more is left.

    The denoiser itself has no like, because its costs are measured for nothing. Zones of many tensors are not like
    those of one: what is between their modules is computed at every call.
    """
    chosen: list[Zone] = []
    for zone in sorted(zones, key=lambda zone: prices.macs([zone.name])):
        alike = (
            other.name != WHOLE
            and (_tensors(other) > 1) == (_tensors(zone) > 1)
            and (other.encloses(zone) or zone.encloses(other))
            and prices.macs([zone.name]) - prices.macs([other.name]) < _ALIKE * prices.macs()
            for other in chosen
        )
        if not any(alike):
            chosen.append(zone)
    return tuple(zone for zone in zones if zone in chosen)


def _gaps_of(zones: Sequence[Zone], prices: CallPrices) -> dict[str, int]:
    """Return how long gaps of each zone are tried: where much of a call is left, long ones never pay."""
    cheap = _VERY_CHEAP * prices.macs()
    return {zone.name: LONGEST_GAP if prices.macs([zone.name]) <= cheap else LONGEST_GAP // 2 for zone in zones}


def _tensors(zone: Zone) -> int:
    """How many modules' outputs are kept."""
    return 1 if zone.streams else len(zone.predicted)
