"""Search cache plans for a model, compare them with fewer steps, and write those that are better."""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dcomp import UsageError
from dcomp.cachequant.dynamic import Schedule, best_schedules
from dcomp.cachequant.executor import following
from dcomp.cachequant.gap_costs import Way, measure_gap_costs
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet, Trajectory
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import WHOLE, Zone, find_zones
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

BUDGETS = (1.5, 2.0, 3.0, 4.0)  # times fewer multiply-accumulates
SAMPLES = 4
LONGEST_GAP = 6
_FIRST_INDEX, _HELD_OUT_INDEX = 600_000, 700_000  # of noise, where neither calibration nor validation goes
_CHEAP = 0.6  # of a call: a zone that leaves more to compute is not worth a search
_CANDIDATES = 3  # plans of a budget that are followed to the end before one is chosen


@dataclass(frozen=True)
class ScheduleResult:
    """What a search found.

    Attributes:
        file: the plans; None if none was better than fewer steps.
        plans: those that were written, slowest first.
        fewer_steps: name of a budget -> PSNR in dB of as many fewer scheduler steps, on the same pictures.
        measured_speedups: name of a plan -> time of calls that compute everything by that of its calls, here.
        calls: of a trajectory.
        notes: what a person should know.
        seconds: that the search took.
    """

    file: Path | None
    plans: tuple[MeasuredPlan, ...]
    fewer_steps: Mapping[str, float]
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
                    "psnr_of_fewer_steps": self.fewer_steps[each.name],
                }
                for each in self.plans
            ],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }


def search_schedule(
    model: str | Path,
    *,
    budgets: Sequence[float] = BUDGETS,
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
    did not see; one that is no better than as many fewer scheduler steps is not written.

    Args:
        model: a checkpoint of dcomp, or any pipeline folder or hub id.
        budgets: times fewer multiply-accumulates of the denoiser, each above 1.
        output: JSON file; default: `dcomp_cache.json` in a checkpoint of dcomp.
        steps: scheduler steps, as deployed; default, like `guidance` and `seed`: as the checkpoint was calibrated.
        guidance: guidance scale.
        scheduler: class to sample with; default: the checkpoint's.
        seed: base seed of the noise.
        samples: pictures of the search, and as many others to compare plans on.
        device: where to run.
        progress: called with a text, the count done and the total.

    Raises:
        UsageError: a budget that is none, or no place to write to.
    """
    started = time.perf_counter()
    if any(budget <= 1 for budget in budgets) or not budgets or samples < 1:
        raise UsageError("A budget is not above 1x", where="--budget", remedy="Write for example --budget 2x.")
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
    ways = _ways(zones, prices)
    used = tuple(zone for zone in zones if zone.name in {name for name, _ in ways})
    indices = range(_FIRST_INDEX, _FIRST_INDEX + samples)
    with Trials(pipeline, used, prompts[:samples], indices, settings, window=LONGEST_GAP) as trials:
        costs = measure_gap_costs(trials, [*ways], LONGEST_GAP, progress=progress)
    front = best_schedules(costs, ways)
    judge = _Judge(pipeline, used, trials, prompts[samples:], settings)
    plans, fewer, notes = _chosen(front, budgets, judge, progress)
    if plans:
        PlanSet(trajectory_of(folder, pipeline, settings.steps), tuple(plans)).write(file)
    faster = {each.name: 1 / prices.seconds_of(each.plan) for each in plans}
    calls, seconds = len(trials.timesteps), time.perf_counter() - started
    return ScheduleResult(file if plans else None, tuple(plans), fewer, faster, calls, tuple(notes), seconds)


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


def read_speed(text: str) -> float:
    """Return the number of a budget such as `3x`.

    Raises:
        UsageError: the text is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?x", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{text!r} is no budget", where="--budget", remedy="Write for example --budget 2x.")
    return float(match[1])


def _weights_hash(folder: Path, denoiser: str) -> str:
    """Hash what plans depend on; a manifest has the hashes of its files already."""
    if not (folder / MANIFEST).is_file():
        return hash_model(check_model_folder(folder)).sha256
    files = {name: found for name, found in read_manifest(folder).files.items() if name.startswith(f"{denoiser}/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _ways(zones: Sequence[Zone], prices: CallPrices) -> dict[Way, float]:
    """Return what a call may do instead of computing everything, each with the part of its products that is left."""
    found: dict[Way, float] = {}
    for zone in zones:
        price = prices.macs([zone.name]) / prices.macs()
        if zone.name == WHOLE:
            found[zone.name, "linear"] = price
        if price <= _CHEAP:
            found[zone.name, "reuse"] = price
    return found


class _Judge:
    """Follows plans on pictures that no search saw.

    Attributes:
        calls: T.
    """

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
        self.calls = len(trials.timesteps)

    def plan(self, schedule: Schedule) -> CachePlan:
        """Return the plan of a schedule."""
        names = {zone for row in schedule.rows for zone in row}
        zones = tuple(zone for zone in self._zones if zone.name in names)
        return CachePlan(zones, self._trials.timesteps, self._trials.places, schedule.rows)

    def of_plan(self, plan: CachePlan) -> tuple[float, float]:
        """Return the relative error of the final latents and the PSNR of the pictures, means over pictures."""
        with following(self._pipeline.denoiser, self._pipeline.scheduler, PlanGuide(plan)):
            return self._compare(*self._run(self._settings))

    def of_steps(self, steps: int) -> tuple[float, float]:
        """Return the same of as many scheduler steps without a plan."""
        return self._compare(*self._run(replace(self._settings, steps=steps)))

    @property
    def steps(self) -> int:
        """Scheduler steps of the trajectory."""
        return self._settings.steps

    def _run(self, settings: Generation) -> tuple[Tensor, Tensor]:
        made = self._pipeline.run(self._prompts, self._indices, settings)
        assert made.images is not None
        return made.latents, made.images

    def _compare(self, latents: Tensor, images: Tensor) -> tuple[float, float]:
        error = relative_errors(self._latents, latents).mean()
        return float(error), float(decibels(mean_squared_errors(self._images, images)).mean())


def _chosen(
    front: Sequence[Schedule], budgets: Sequence[float], judge: _Judge, progress: Progress
) -> tuple[list[MeasuredPlan], dict[str, float], list[str]]:
    """Follow the best few plans of each budget to the end; return those that beat fewer steps."""
    plans: list[MeasuredPlan] = []
    fewer: dict[str, float] = {}
    notes: list[str] = []
    for number, budget in enumerate(sorted(set(budgets))):
        progress("plans followed to the end", number, len(set(budgets)))
        name = f"{budget:g}x"
        able = [one for one in front if one.cost <= judge.calls / budget + 1e-9 and any(one.rows)]
        if not able:
            fastest = judge.calls / front[0].cost
            notes.append(f"No plan is {name} as fast: gaps of {LONGEST_GAP} calls give {fastest:.2f}x at most.")
            continue
        tried = []
        for schedule in sorted(able, key=lambda one: one.error)[:_CANDIDATES]:
            plan = judge.plan(schedule)
            error, psnr = judge.of_plan(plan)
            tried.append(MeasuredPlan(name, plan, judge.calls / schedule.cost, schedule.error, error, psnr))
        best = min(tried, key=lambda one: one.error)
        error, psnr = judge.of_steps(max(1, round(judge.steps / budget)))
        fewer[name] = psnr
        if best.error < error:
            plans.append(best)
        else:
            notes.append(f"At {name} fewer steps are better ({psnr:.1f} dB, the best plan {best.psnr:.1f} dB).")
    progress("plans followed to the end", len(set(budgets)), len(set(budgets)))
    return plans, fewer, notes
