"""Search cache plans for a model, compare them with fewer steps, and write those that are better."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import dcomp
from dcomp import UsageError
from dcomp.cachequant.budget import Budget
from dcomp.cachequant.correction_fit import FITS, fit_corrections
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet, Trajectory
from dcomp.cachequant.planners import PLANNERS
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.rows import count_rows
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import find_zones, single_modules
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.components import local_folder
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.prompts import read_prompts
from dcomp.compress.checkpoint import hash_model
from dcomp.compress.manifest import MANIFEST, read_manifest
from dcomp.compress.split import quantized_layers
from dcomp.compress.unrounded import unrounded_calls as repeatedly_unrounded
from dcomp.recipes.bench import fill_prompts, record_calls
from dcomp.recipes.kept_results import KeptResults, digest
from dcomp.recipes.ladder import Rung, climb
from dcomp.recipes.plan_choice import Additivity, PlanChoice, PlanJudge
from dcomp.recipes.planning import planning_task
from dcomp.recipes.settings import calibration_of, generation_settings, settings_of_original
from dcomp.recipes.work_folder import work_folder

BUDGETS = ("1.5x", "2x", "3x", "4x")
FRONT = ("1.25x", "1.5x", "1.75x", "2x", "2.5x", "3x", "4x", "5x", "6x")
SAMPLES = 6
_FIRST_INDEX, _HELD_OUT_INDEX = 600_000, 700_000  # of noise, where neither calibration nor validation goes


@dataclass(frozen=True)
class ScheduleResult:
    """What a search found.

    Attributes:
        file: the plans; None if none was better than fewer steps.
        plans: those that were written, slowest first.
        fewer_steps: name of a plan -> scheduler steps that take as long as its calls do here, and their PSNR in dB on
            the same pictures.
        measured_speedups: name of a plan -> time of calls that compute everything by that of its calls, here.
        time_ratios: name of a plan -> time that its pictures took by what was expected of its calls.
        cache_bytes: name of a plan -> the most that its kept tensors took for one picture.
        calls: of a trajectory.
        additivity: whether expected errors were right; None if the planner expects none.
        ladder: what bits and cache cost alone and together; empty without an original.
        notes: what a person should know.
        seconds: that the search took.
    """

    file: Path | None
    plans: tuple[MeasuredPlan, ...]
    fewer_steps: Mapping[str, tuple[int, float]]
    measured_speedups: Mapping[str, float]
    time_ratios: Mapping[str, float]
    cache_bytes: Mapping[str, int]
    calls: int
    additivity: Additivity | None
    ladder: tuple[Rung, ...]
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
                    "time_ratio": _rounded(self.time_ratios.get(each.name)),
                    "cache_bytes": self.cache_bytes[each.name],
                    "computed_calls": sum(not row for row in each.plan.actions),
                    "unrounded_calls": len(each.plan.unrounded),
                    "corrected_calls": len(each.plan.corrections),
                    "expected_error": each.expected_error,
                    "error": each.error,
                    "psnr": each.psnr,
                    "fewer_steps": self.fewer_steps[each.name][0],
                    "psnr_of_fewer_steps": self.fewer_steps[each.name][1],
                }
                for each in self.plans
            ],
            "additivity": None if self.additivity is None else asdict(self.additivity),
            "ladder": [asdict(rung) for rung in self.ladder],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }


def search_schedule(
    model: str | Path,
    *,
    budgets: Sequence[str] = BUDGETS,
    planner: str = "joint",
    output: Path | None = None,
    against: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    samples: int = SAMPLES,
    unrounded_calls: bool = False,
    correct: str | None = None,
    one_context: bool = False,
    device: str = "cpu",
    fresh: bool = False,
    work: Path | None = None,
    progress: Progress = silent,
) -> ScheduleResult:
    """Find for each budget the cache plan with the least error in the final picture, and write them to a file.

    Costs are measured on the weights that will run, quantized if they are. Plans are compared on pictures that the
    search did not see, with those of a trajectory that computes everything and rounds no inputs; one that is no better
    than fewer scheduler steps in the same time is not written.

    Args:
        model: a checkpoint of dcomp, or any pipeline folder or hub id.
        budgets: such as `2x` for half of the denoiser's multiply-accumulates, `800ms`, `150GMACs` or `20calls`: what a
            picture's calls may take together.
        planner: key of `PLANNERS`.
        output: JSON file; default: `dcomp_cache.json` in a checkpoint of dcomp.
        against: the original of a checkpoint: plans are searched for it too, and the result has the ladder of bits and
            cache, alone and together.
        steps: scheduler steps, as deployed; default, like `guidance` and `seed`: as the checkpoint was calibrated.
        guidance: guidance scale.
        scheduler: class to sample with; default: the checkpoint's.
        seed: base seed of the noise.
        samples: pictures of the search, and as many others to compare plans on.
        unrounded_calls: let calls of a quantized model multiply their inputs as they are, where that is worth its time;
            for the planner joint.
        correct: key of `FITS`: predictions are corrected as they were wrong in the search's pictures, where that makes
            other pictures better.
        one_context: let calls run one of guidance's two contexts, and predict how far the other one is from it.
        device: where to run.
        fresh: throw away what an interrupted search has measured.
        work: folder of what is measured, kept; default: one beside the plans, removed after success.
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
    if unrounded_calls and planner != "joint":
        raise UsageError(
            f"The planner {planner} knows nothing of rounding",
            where="--unrounded-calls",
            remedy="Use the planner joint, or leave this option out.",
        )
    if correct is not None and correct not in FITS:
        raise UsageError(f"There is no correction {correct!r}", where="--correct", remedy=f"Use {' or '.join(FITS)}.")
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
    settings = generation_settings(model, steps=steps, guidance=guidance, seed=seed)
    source, column = (known.prompts, known.column) if known else (None, None)
    pipeline = open_pipeline(model, scheduler=scheduler, device=device)
    found = read_prompts(source, 2 * samples, pipeline.kind, column, model=pipeline.source, classes=pipeline.classes)
    prompts = fill_prompts(found, 2 * samples)
    pipeline.check(prompts, settings)
    trajectory = trajectory_of(folder, pipeline, settings.steps)
    question = [dcomp.__version__, str(device), asdict(settings), prompts]
    rungs: tuple[Rung, ...] = ()
    with work_folder(file, fresh) if work is None else nullcontext(work) as root:
        kept = KeptResults(root, [*question, asdict(trajectory)])
        about = planner, prompts, settings, progress
        more: dict[str, Any] = {"correct": correct, "one_context": one_context}
        choice, judge = _choose(pipeline, asked, *about, kept, unrounded_calls=unrounded_calls, **more)
        choice.leave_out_beaten()
        plans = tuple(sorted(choice.plans, key=lambda plan: plan.speedup))
        if plans:
            PlanSet(trajectory, plans).write(file)
        if against is not None and plans:
            original = open_pipeline(against, scheduler=scheduler or type(pipeline.scheduler).__name__, device=device)
            theirs = settings_of_original(model, settings)
            original.check(prompts, theirs)
            also = [budget for budget in asked if budget.name in choice.fewer_steps]
            own = trajectory_of(local_folder(against), original, settings.steps)
            kept = KeptResults(root, [*question, asdict(theirs), asdict(own)])
            alone = _choose(original, also, planner, prompts, theirs, progress, kept, **more)
            rungs = climb(plans, judge, {plan.name: plan for plan in alone[0].plans}, alone[1])
        if work is None:
            for entry in root.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
    return ScheduleResult(
        file if plans else None,
        plans,
        choice.fewer_steps,
        choice.faster,
        choice.time_ratios,
        choice.cache_bytes,
        judge.calls,
        choice.additivity,
        rungs,
        tuple(choice.notes),
        time.perf_counter() - started,
    )


def _choose(
    pipeline: OpenPipeline,
    budgets: Sequence[Budget],
    planner: str,
    prompts: Sequence[str],
    settings: Generation,
    progress: Progress,
    kept: KeptResults,
    *,
    unrounded_calls: bool = False,
    correct: str | None = None,
    one_context: bool = False,
) -> tuple[PlanChoice, PlanJudge]:
    """Search plans with the first half of the prompts and choose among them with the second."""
    exact = repeatedly_unrounded(pipeline.denoiser) if quantized_layers(pipeline.denoiser) else None
    args, kwargs = record_calls(pipeline, prompts[:1], settings)[0]
    pairs = one_context and runs_pairs(pipeline, prompts[0], settings)
    if one_context and not pairs:
        raise UsageError(
            "Guidance does not run two contexts in one batch here",
            where=f"{type(pipeline.pipe).__name__}, guidance {settings.guidance}",
            remedy="Leave out --one-context, or set --guidance above 1.",
        )
    zones = find_zones(pipeline.denoiser, args, kwargs, guidance=pairs)
    every = (*zones, *single_modules(zones))
    prices = CallPrices(pipeline.denoiser, args, kwargs, every, exact)
    samples = len(prompts) // 2
    indices = range(_FIRST_INDEX, _FIRST_INDEX + samples)
    task, trials = planning_task(pipeline, zones, prices, prompts[:samples], indices, settings, progress, kept)
    if unrounded_calls and exact is not None:
        task.unrounded = lambda: prices.unrounded
    held_out = range(_HELD_OUT_INDEX, _HELD_OUT_INDEX + samples)
    judge = PlanJudge(pipeline, every, trials, prompts[samples:], held_out, settings, exact, kept)

    def corrected(plan: CachePlan) -> CachePlan:
        def fit() -> dict[str, Any]:
            with Trials(pipeline, plan.zones, prompts[:samples], indices, settings) as on_plan:
                return fit_corrections(plan, on_plan, str(correct), progress=progress).to_dict()

        return kept.get(f"corrected-{correct}-{digest(plan.to_dict())}", fit, CachePlan.from_dict)

    choice = PlanChoice(task, prices, judge, corrected if correct else None)
    for number, budget in enumerate(budgets):
        choice.add(budget, planner)
        progress("plans followed to the end", number + 1, len(budgets))
    return choice, judge


def trajectory_of(folder: Path, pipeline: OpenPipeline, steps: int) -> Trajectory:
    """Return what plans of this pipeline are made for."""
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    text = json.dumps(config, sort_keys=True, default=str)
    return Trajectory(
        weights_hash(folder, pipeline.denoiser_name),
        type(pipeline.denoiser).__name__,
        type(pipeline.scheduler).__name__,
        hashlib.sha256(text.encode()).hexdigest(),
        steps,
    )


def runs_pairs(pipeline: OpenPipeline, prompt: str, settings: Generation) -> bool:
    """Return whether guidance makes two rows of each picture, of which the scheduler gets one."""
    clock = StepClock()
    rows: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(count_rows(args, kwargs))

    hook = pipeline.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        pipeline.run([prompt], [0], replace(settings, steps=2), decode=False, clock=clock)
    finally:
        hook.remove()
    return clock.last_sample is not None and {*rows} == {2 * len(clock.last_sample)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def weights_hash(folder: Path, denoiser: str) -> str:
    """Hash what plans depend on; a manifest has the hashes of its files already."""
    if not (folder / MANIFEST).is_file():
        return hash_model(check_model_folder(folder)).sha256
    files = {name: found for name, found in read_manifest(folder).files.items() if name.startswith(f"{denoiser}/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
