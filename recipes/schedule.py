"""Search cache plans for a model, compare them with fewer steps, and write those that are better."""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from dcomp import UsageError
from dcomp.cachequant.budget import Budget, Measure
from dcomp.cachequant.drift import Drift, record_reference
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.executor import following
from dcomp.cachequant.gap_costs import GapCosts, measure_gap_costs, measure_sensitivities, reach
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet, Trajectory
from dcomp.cachequant.planners import PLANNERS, PlanningTask
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import Zone, find_zones
from dcomp.calibrate.components import local_folder
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import Generation, OpenPipeline, num_classes, open_pipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.prompts import read_prompts
from dcomp.calibrate.quality import decibels, mean_squared_errors, relative_errors
from dcomp.compress.checkpoint import hash_model
from dcomp.compress.manifest import MANIFEST, read_manifest
from dcomp.recipes.bench import fill_prompts, record_calls
from dcomp.recipes.settings import calibration_of, generation_settings

BUDGETS = ("1.5x", "2x", "3x", "4x")
FRONT = ("1.2x", "1.35x", "1.5x", "1.75x", "2x", "2.5x", "3x", "3.5x", "4x", "5x", "6x", "7x")
SAMPLES = 8
LONGEST_GAP = 6
WINDOW = 24  # calls over which rules of the literature know the drift of a zone
_FIRST_INDEX, _HELD_OUT_INDEX = 600_000, 700_000  # of noise, where neither calibration nor validation goes
_CHEAP, _VERY_CHEAP = 0.6, 0.3  # of a call: a zone that leaves more to compute is not worth a search


@dataclass(frozen=True)
class ScheduleResult:
    """What a search found.

    Attributes:
        file: the plans; None if none was better than fewer steps.
        plans: those that were written, slowest first.
        fewer_steps: name of a plan -> scheduler steps that take as long as its calls do here, and their PSNR in dB on
            the same pictures.
        measured_speedups: name of a plan -> time of calls that compute everything by that of its calls, here.
        calls: of a trajectory.
        notes: what a person should know.
        seconds: that the search took.
    """

    file: Path | None
    plans: tuple[MeasuredPlan, ...]
    fewer_steps: Mapping[str, tuple[int, float]]
    measured_speedups: Mapping[str, float]
    calls: int
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {
            "schema_version": 1,
            "file": None if self.file is None else str(self.file),
            "calls": self.calls,
            "plans": [
                {
                    "name": each.name,
                    "speedup": each.speedup,
                    "measured_speedup": round(self.measured_speedups[each.name], 3),
                    "computed_calls": sum(not row for row in each.plan.actions),
                    "expected_error": each.expected_error,
                    "error": each.error,
                    "psnr": each.psnr,
                    "fewer_steps": self.fewer_steps[each.name][0],
                    "psnr_of_fewer_steps": self.fewer_steps[each.name][1],
                }
                for each in self.plans
            ],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }


def search_schedule(
    model: str | Path,
    *,
    budgets: Sequence[str] = BUDGETS,
    planner: str = "joint",
    output: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    samples: int = SAMPLES,
    device: str = "cpu",
    progress: Progress = silent,
) -> ScheduleResult:
    """Find for each budget the cache plan with the least error in the final picture, and write them to a file.

    Costs are measured on the model that will run, quantized if it is. Plans are compared on pictures that the search
    did not see; one that is no better than fewer scheduler steps in the same time is not written.

    Args:
        model: a checkpoint of dcomp, or any pipeline folder or hub id.
        budgets: such as `2x` for half of the denoiser's multiply-accumulates, `800ms`, `150GMACs` or `20calls`: what a
            picture's calls may take together.
        planner: key of `PLANNERS`.
        output: JSON file; default: `dcomp_cache.json` in a checkpoint of dcomp.
        steps: scheduler steps, as deployed; default, like `guidance` and `seed`: as the checkpoint was calibrated.
        guidance: guidance scale.
        scheduler: class to sample with; default: the checkpoint's.
        seed: base seed of the noise.
        samples: pictures of the search, and as many others to compare plans on.
        device: where to run.
        progress: called with a text, the count done and the total.

    Raises:
        UsageError: a budget that is none, no such planner, or no place to write to.
    """
    started = time.perf_counter()
    asked = sorted({Budget.parse(text) for text in budgets}, key=lambda budget: (budget.unit, budget.amount))
    if not asked or samples < 1:
        raise UsageError(
            "There is nothing to search without a budget and a picture",
            where=f"{len(asked)} budgets, {samples} samples",
            remedy="Give at least one of each.",
        )
    if planner not in PLANNERS:
        raise UsageError(f"There is no planner {planner!r}", where="--planner", remedy=f"Choose {', '.join(PLANNERS)}.")
    folder = local_folder(model)
    if output is None and not (folder / MANIFEST).is_file():
        raise UsageError(
            "This pipeline was not made by dcomp, and is left as it is",
            where=str(folder),
            remedy="Say where the plans shall go: --output plans.json.",
        )
    file = output or folder / FILE
    if file.is_dir() or not os.access(file.parent, os.W_OK):  # now, not after minutes of work
        raise UsageError(
            "The plans cannot be written there",
            where=str(file),
            remedy="Name a file in a folder that can be written to.",
        )
    known = calibration_of(model)
    scheduler = scheduler or (known.scheduler if known else None)
    pipeline = open_pipeline(model, scheduler=scheduler, device=device)
    settings = generation_settings(model, steps=steps, guidance=guidance, seed=seed)
    source, column = (known.prompts, known.column) if known else (None, None)
    found = read_prompts(
        source, 2 * samples, pipeline.kind, column, model=pipeline.source, classes=num_classes(pipeline.denoiser)
    )
    prompts = fill_prompts(found, 2 * samples)
    pipeline.check(prompts, settings)
    args, kwargs = record_calls(pipeline, prompts[:1], settings)[0]
    zones = find_zones(pipeline.denoiser, args, kwargs)
    prices = CallPrices(pipeline.denoiser, args, kwargs, zones)
    used = useful_zones(zones, prices)
    indices = range(_FIRST_INDEX, _FIRST_INDEX + samples)
    task, trials = planning_task(pipeline, used, prices, prompts[:samples], indices, settings, progress)
    choice = _Choice(task, prices, _Judge(pipeline, used, trials, prompts[samples:], settings))
    for number, budget in enumerate(asked):
        choice.add(budget, planner)
        progress("plans followed to the end", number + 1, len(asked))
    plans = tuple(sorted(choice.plans, key=lambda plan: plan.speedup))
    if plans:
        PlanSet(trajectory_of(folder, pipeline, settings.steps), plans).write(file)
    seconds = time.perf_counter() - started
    return ScheduleResult(
        file if plans else None, plans, choice.fewer_steps, choice.faster, task.calls, tuple(choice.notes), seconds
    )


def trajectory_of(folder: Path, pipeline: OpenPipeline, steps: int) -> Trajectory:
    """Return what plans of this pipeline are made for."""
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return Trajectory(
        _weights_hash(folder, pipeline.denoiser_name),
        type(pipeline.denoiser).__name__,
        type(pipeline.scheduler).__name__,
        hashlib.sha256(text.encode()).hexdigest(),
        steps,
    )


def useful_zones(zones: Sequence[Zone], prices: CallPrices) -> tuple[Zone, ...]:
    """Return the zones that are worth a search, because little of a call is left where they are predicted."""
    return tuple(zone for zone in zones if prices.macs([zone.name]) <= _CHEAP * prices.macs())


def planning_task(
    pipeline: OpenPipeline,
    zones: Sequence[Zone],
    prices: CallPrices,
    prompts: Sequence[str],
    indices: Sequence[int],
    settings: Generation,
    progress: Progress = silent,
) -> tuple[PlanningTask, Trials]:
    """Return what planners may look at, measured when one asks for it, and the trials of its trajectories.

    Args:
        pipeline: the model that will run.
        zones: that are worth a search.
        prices: of its calls.
        prompts: of the pictures to measure on.
        indices: of their noise.
        settings: of the trajectories, as deployed.
        progress: called with a text, the count done and the total.
    """
    trials = Trials(pipeline, (), prompts, indices, settings)

    def measure_costs() -> GapCosts:
        with trials:
            sensitivities = measure_sensitivities(trials, progress=progress)
        few = max(1, len(prompts) // 2)  # errors differ less from picture to picture than what becomes of them
        window = reach(LONGEST_GAP)
        with Trials(pipeline, zones, prompts[:few], indices[:few], settings, window=window) as trials_of_zones:
            return measure_gap_costs(trials_of_zones, _gaps_of(zones, prices), sensitivities, progress=progress)

    def measure_drifts() -> Mapping[str, Drift]:
        found = record_reference(pipeline, zones, prompts, indices, settings, window=WINDOW, progress=progress)
        return found.drifts

    names = tuple(zone.name for zone in zones)
    return PlanningTask(len(trials.timesteps), names, measure_costs, measure_drifts), trials


def _gaps_of(zones: Sequence[Zone], prices: CallPrices) -> dict[str, int]:
    """Return how long gaps of each zone are tried: where much of a call is left, long ones never pay."""
    cheap = _VERY_CHEAP * prices.macs()
    return {zone.name: LONGEST_GAP if prices.macs([zone.name]) <= cheap else LONGEST_GAP // 2 for zone in zones}


def _weights_hash(folder: Path, denoiser: str) -> str:
    """Hash what plans depend on; a manifest has the hashes of its files already."""
    if not (folder / MANIFEST).is_file():
        return hash_model(check_model_folder(folder)).sha256
    files = {name: found for name, found in read_manifest(folder).files.items() if name.startswith(f"{denoiser}/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class _Judge:
    """Follows plans on pictures that no search saw."""

    def __init__(
        self,
        pipeline: OpenPipeline,
        zones: Sequence[Zone],
        trials: Trials,
        prompts: Sequence[str],
        settings: Generation,
    ) -> None:
        self._pipeline, self._zones, self._trials = pipeline, tuple(zones), trials
        self._prompts, self._settings = prompts, settings
        self._indices = range(_HELD_OUT_INDEX, _HELD_OUT_INDEX + len(prompts))
        self._latents, self._images = self._run(settings)
        self.of_steps = cache(self._of_steps)

    @property
    def steps(self) -> int:
        """Scheduler steps of the trajectory."""
        return self._settings.steps

    def plan(self, schedule: Schedule) -> CachePlan:
        """Return the plan of a schedule."""
        names = {zone for row in schedule.rows for zone in row}
        zones = tuple(zone for zone in self._zones if zone.name in names)
        return CachePlan(zones, self._trials.timesteps, self._trials.places, schedule.rows)

    def of_plan(self, plan: CachePlan) -> tuple[float, float]:
        """Return the relative error of the final latents and the PSNR of the pictures, means over pictures."""
        with following(self._pipeline.denoiser, self._pipeline.scheduler, PlanGuide(plan)):
            return self._compare(*self._run(self._settings))

    def _of_steps(self, steps: int) -> tuple[float, float]:
        """Return the same of as many scheduler steps without a plan."""
        return self._compare(*self._run(replace(self._settings, steps=steps)))

    def _run(self, settings: Generation) -> tuple[Tensor, Tensor]:
        made = self._pipeline.run(self._prompts, self._indices, settings)
        assert made.images is not None
        return made.latents, made.images

    def _compare(self, latents: Tensor, images: Tensor) -> tuple[float, float]:
        error = relative_errors(self._latents, latents).mean()
        return float(error), float(decibels(mean_squared_errors(self._images, images)).mean())


class _Choice:
    """Follows what a planner proposes for each budget to the end, and keeps the best that beats fewer steps.

    Attributes:
        plans: that were kept.
        fewer_steps, faster: as in `ScheduleResult`.
        notes: why a budget has no plan.
    """

    def __init__(self, task: PlanningTask, prices: CallPrices, judge: _Judge) -> None:
        self._task, self._prices, self._judge = task, prices, judge
        self.plans: list[MeasuredPlan] = []
        self.fewer_steps: dict[str, tuple[int, float]] = {}
        self.faster: dict[str, float] = {}
        self.notes: list[str] = []

    def add(self, budget: Budget, planner: str) -> None:
        """Choose a plan for a budget."""
        task, prices = self._task, {zone: self._price(zone, budget.measure) for zone in self._task.zones}
        about = task.calls, self._prices.macs(), self._prices.whole_seconds if budget.measure == "seconds" else 1.0
        proposed = PLANNERS[planner](task, prices, budget.limit(*about))
        if not proposed:
            why = ""
            if planner == "joint":
                front = task.front(prices)
                nearest = budget.at(front[0].cost, *about)
                why = f": with gaps of {task.costs.longest} calls {nearest.amount:.3g}{nearest.unit} is the nearest"
            self.notes.append(f"No plan keeps {budget.name}{why}.")
            return
        tried = [self._measured(budget.name, schedule) for schedule in proposed]
        best = max(tried, key=lambda one: one.psnr)  # errors of latents would be those of the one worst picture
        part = self._prices.seconds_of(best.plan)
        steps = max(1, math.ceil(self._judge.steps * part))
        if steps >= self._judge.steps:
            self.notes.append(f"At {budget.name} nothing is saved: its calls take {part:.2f} of the time, here.")
            return
        _, psnr = self._judge.of_steps(steps)
        if best.psnr <= psnr:
            beaten = f"the best plan {best.psnr:.1f} dB"
            self.notes.append(f"At {budget.name} {steps} steps are better ({psnr:.1f} dB, {beaten}).")
            return
        self.plans.append(best)
        self.fewer_steps[best.name], self.faster[best.name] = (steps, psnr), 1 / part

    def _price(self, zone: str, measure: Measure) -> float:
        if measure == "calls":
            return 0.0
        return self._prices.seconds([zone]) if measure == "seconds" else self._prices.macs([zone]) / self._prices.macs()

    def _measured(self, name: str, schedule: Schedule) -> MeasuredPlan:
        plan = self._judge.plan(schedule)
        error, psnr = self._judge.of_plan(plan)
        return MeasuredPlan(name, plan, 1 / self._prices.macs_of(plan), schedule.error, error, psnr)
