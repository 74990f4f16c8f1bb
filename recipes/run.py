"""Execute a recipe: a model in, a checked checkpoint out, every step resumable.

The only place that knows the order of things: open the model, fuse adapters, probe, show the plan, record the
calibration set, prune, quantize, write, search cache plans. Work that took time lies in a hidden folder beside the
output, under a name made of everything that it depends on; the next run goes on with it, a successful one removes it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from dcomp import UsageError
from dcomp.calibrate.adapters import FusedAdapter
from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.final_latents import FinalLatents
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.compress.checkpoint import ManifestFields, check_output, write_checkpoint
from dcomp.compress.foreign import ForeignResult, check_foreign, quantize_foreign
from dcomp.compress.manifest import Manifest
from dcomp.compress.quantize import LayerErrors
from dcomp.recipes.along import along_plan
from dcomp.recipes.bit_budget import check_budget
from dcomp.recipes.inputs import as_guided, check_set, guided_with, open_as_asked, record_set, with_set
from dcomp.recipes.layer_records import foreign_records, layer_records, timesteps_of
from dcomp.recipes.load import load_recipe
from dcomp.recipes.plan import Plan, make_plan, weight_bits
from dcomp.recipes.prune_stage import PruneResult, prune_stage
from dcomp.recipes.quantize_stage import StageResult, quantize_stage
from dcomp.recipes.schedule import ScheduleResult, search_schedule
from dcomp.recipes.schema import QuantizeStage, Recipe, ScheduleStage
from dcomp.recipes.settings import UNGUIDED, generation_of, learned_guidance
from dcomp.recipes.stage_rows import StageRow, StageRows
from dcomp.recipes.work_folder import work_folder

__all__ = ["RunResult", "default_output", "plan_recipe", "quantize", "record_calibration", "run_recipe"]


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        output: folder of the checkpoint.
        manifest: what was written into it.
        errors: of each quantized layer; empty for foreign formats and float recipes.
        seconds: wall time.
        notes: what a person should know, the plan's included.
        schedules: cache plans that were searched; None if the recipe asks for none.
        pruned: what was cut; None if the recipe asks for nothing of it.
        stages: what each stage made of the model, for a recipe that prunes.
    """

    output: Path
    manifest: Manifest
    errors: dict[str, LayerErrors]
    seconds: float
    notes: tuple[str, ...] = ()
    schedules: ScheduleResult | None = None
    pruned: PruneResult | None = None
    stages: tuple[StageRow, ...] = ()

    @property
    def load_line(self) -> str:
        """The Python that opens the result."""
        return f'import dcomp; pipe = dcomp.load("{self.output}")'

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {
            "schema_version": 1,
            "output": str(self.output),
            **self.manifest.totals.model_dump(),
            "layer_errors": {name: asdict(errors) for name, errors in self.errors.items()},
            "files": dict(self.manifest.files),
            "seconds": round(self.seconds, 1),
            "load": self.load_line,
            "schedules": None if self.schedules is None else self.schedules.to_dict(),
            "pruning": None if self.pruned is None else self.pruned.to_dict(),
            "stages": [asdict(row) for row in self.stages],
            "notes": list(self.notes),
        }


def quantize(
    model: str | Path, output: str | Path | None = None, recipe: str | Path | Recipe = "w4a8", **options: Any
) -> RunResult:
    """Quantize a pipeline and write the checkpoint; the Python form of `dcomp quantize`.

    Args:
        model: diffusers folder or hub id.
        output: folder to write; default: the model's name and the recipe's, in the working folder.
        recipe: built-in name, file or `Recipe`.
        options: see `run_recipe`.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return run_recipe(model, resolved, Path(output) if output else default_output(model, resolved), **options)


def default_output(model: str | Path, recipe: Recipe) -> Path:
    """Return the folder that a run writes when none is named."""
    return Path(f"{Path(model).resolve().name}-{recipe.name}")


def plan_recipe(
    model: str | Path,
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    device: str = "cpu",
    allow_mismatch: bool = False,
    low_memory: bool | None = None,
) -> Plan:
    """Probe a model and return what the recipe would do, or raise what `run_recipe` would; writes nothing."""
    given, recipe = with_set(as_guided(model, recipe), calibration, allow_mismatch)
    pipeline, _, prompts, notes = open_as_asked(model, recipe, device, low_memory)
    mismatch = check_set(given, pipeline, recipe, allow_mismatch)
    plan, _ = make_plan(pipeline, recipe, prompts, (*notes, *mismatch))
    check_budget(pipeline.denoiser, plan)
    return plan


def record_calibration(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    device: str = "cpu",
    low_memory: bool | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Record the calibration set of a recipe for reuse by `run_recipe(..., calibration=output)`; return its facts."""
    recipe = as_guided(model, recipe)
    pipeline, _, prompts, notes = open_as_asked(model, recipe, device, low_memory)
    recorded = record_set(pipeline, prompts, recipe.calibration, output, progress)
    return {
        "schema_version": 1,
        "folder": str(output),
        "calls": len(recorded),
        "prompts": len(recorded.prompts),
        "timesteps": len(recorded.timesteps),
        "bytes": recorded.nbytes,
        "sha256": recorded.hash,
        "notes": [*notes, *recorded.notes],
    }


def run_recipe(
    model: str | Path,
    recipe: Recipe,
    output: Path,
    *,
    calibration: Path | None = None,
    device: str = "cpu",
    fresh: bool = False,
    overwrite: bool = False,
    allow_mismatch: bool = False,
    low_memory: bool | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Run the stages of a recipe and write the checkpoint.

    Args:
        model: diffusers folder or hub id.
        recipe: what to do.
        output: folder to write; must not exist unless `overwrite`.
        calibration: a set that `record_calibration` made of this very model; none: recorded now.
        device: where the model runs.
        fresh: throw away the work of an interrupted run instead of going on with it.
        overwrite: replace an existing checkpoint, in one step at the end.
        allow_mismatch: use a calibration set of other weights or settings all the same, with a note of the distance.
        low_memory: leave the float weights in files, and read them when they are used; None: if they are large. It
            changes no bit of the result.
        on_plan: called with the plan before any weight is touched.
        progress: called with a text, the count done and the total.

    Raises:
        DcompError: anything that a person can solve; the output folder is then as it was.
    """
    started = time.perf_counter()
    report = progress or silent
    stage = recipe.quantize
    check_output(output, overwrite, Path(model))
    if stage and stage.format != "dcomp":
        _check_foreign(stage, device)
    given, recipe = with_set(as_guided(model, recipe), calibration, allow_mismatch)
    asked, learned = recipe, learned_guidance(model)
    with work_folder(output, fresh) as root:
        pipeline, adapters, prompts, notes = open_as_asked(model, recipe, device, low_memory, root / "fused")
        mismatch = check_set(given, pipeline, recipe, allow_mismatch)
        plan, probe = make_plan(pipeline, recipe, prompts, (*notes, *mismatch))
        check_budget(pipeline.denoiser, plan)
        if on_plan:
            on_plan(plan)
        along = recipe.calibration.along
        of_plan = along_plan(along, pipeline, recipe.calibration.steps).hash if along else ""
        work = root / _key(pipeline.fingerprint(), recipe.hash(), given.hash if given else "", of_plan, *prompts)
        changed = _changed_components(pipeline, recipe, adapters, work / "changed")
        recorded: CalibrationSet | None = None
        pruned: PruneResult | None = None
        stages: StageRows | None = None
        if plan.outlook:
            recorded = given or record_set(pipeline, prompts, recipe.calibration, work / "whole", progress)
            file = work / "whole-latents.safetensors"
            judge = FinalLatents(pipeline, prompts, generation_of(recipe.calibration), file, report)
            stages = StageRows(pipeline, judge, plan.macs)
            pruned = prune_stage(pipeline, recorded, plan.outlook, recipe, prompts, judge, work, report)
            given = None  # it is of the whole model
            if pruned.guidance is not None:
                learned, recipe = pruned.guidance, guided_with(recipe, UNGUIDED)
                judge.deploy(generation_of(recipe.calibration))
            plan, probe = make_plan(pipeline, recipe.without("prune"), prompts, plan.notes)
            stages.add("prune", plan.macs, pruned.error)
        schemes = {name: d.scheme for name, d in plan.decisions.items() if d.scheme is not None}
        result = StageResult(plan.decisions)
        foreign: ForeignResult | None = None
        if stage and stage.format != "dcomp":
            report(f"{stage.format} weights", 0, 1)
            foreign = quantize_foreign(pipeline, stage.format, weight_bits(stage), work / "foreign")
            changed[pipeline.denoiser_name] = foreign.folder
            report(f"{stage.format} weights", 1, 1)
        elif stage and schemes:
            recorded = given or record_set(pipeline, prompts, recipe.calibration, work / "calibration", progress)
            result = quantize_stage(pipeline, recorded, plan, stage, prompts, work, report)
            if stages:
                stages.add("quantize", plan.macs)
        found: list[ScheduleResult] = []

        def search(folder: Path) -> None:
            if recipe.schedule:
                original = None if adapters or pruned else model
                found.append(_search(recipe.schedule, folder, output, work, original, device, report))
                if stages:
                    stages.add_plans(found[0].plans, plan.macs)

        report("writing and checking", 0, 1)
        manifest = write_checkpoint(
            pipeline,
            output,
            ManifestFields(
                recipe=asked.to_dict(),
                layers=layer_records(plan, result, pipeline.denoiser)
                if foreign is None
                else foreign_records(plan, foreign),
                calibration_sha256=recorded.hash if recorded else None,
                loras=[asdict(adapter) for adapter in adapters],
                timesteps=timesteps_of(recorded, result),
                pruning=pruned.to_dict() if pruned else None,
                guidance=learned,
            ),
            overwrite=overwrite,
            replaced=changed,
            probe=probe,
            finish=search,
        )
        report("writing and checking", 1, 1)
        shutil.rmtree(root, ignore_errors=True)
    of_pruning = pruned.notes if pruned else ()
    all_notes = (*plan.notes, *of_pruning, *(recorded.notes if recorded else ()), *result.notes)
    seconds = time.perf_counter() - started
    rows = tuple(stages.rows) if stages else ()
    return RunResult(output, manifest, result.errors, seconds, all_notes, found[0] if found else None, pruned, rows)


def _search(
    stage: ScheduleStage,
    folder: Path,
    output: Path,
    work: Path,
    original: str | Path | None,
    device: str,
    report: Progress,
) -> ScheduleResult:
    """Search plans for a checkpoint that is written but for its name."""
    found = search_schedule(
        folder,
        budgets=stage.budgets,
        planner=stage.planner,
        against=original if stage.ladder else None,
        samples=stage.samples,
        unrounded_calls=stage.unrounded_calls,
        correct=stage.correct,
        one_context=stage.one_context,
        device=device,
        work=work,
        progress=report,
    )
    return replace(found, file=found.file and output / found.file.name)


def _check_foreign(stage: QuantizeStage, device: str) -> None:
    if stage.keep or stage.overrides or stage.preset not in ("w8a16", "w4a16"):
        raise UsageError(
            f"The format {stage.format} stores 8-bit or 4-bit weights of all linear layers, and nothing else",
            where=f"preset {stage.preset}, keep {list(stage.keep)}, overrides {stage.overrides}",
            remedy="Use --w8a16 or --w4a16, without --keep and overrides.",
        )
    check_foreign(stage.format, weight_bits(stage), device)


def _changed_components(
    pipeline: OpenPipeline, recipe: Recipe, adapters: Sequence[FusedAdapter], folder: Path
) -> dict[str, Path]:
    """Save components that are no longer what the source folder holds, the denoiser aside; name -> folder."""
    names = {name for adapter in adapters for name in adapter.components} - {pipeline.denoiser_name}
    if recipe.calibration.scheduler:
        names.add("scheduler")
    saved = {}
    for name in sorted(names):
        saved[name] = folder / name
        getattr(pipeline.pipe, name).save_pretrained(saved[name])
    return saved


def _key(*parts: str) -> str:
    return sha256("\n".join(parts).encode()).hexdigest()[:16]
