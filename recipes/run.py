"""Execute a recipe: a model in, a checked checkpoint out, every step resumable.

The only place that knows the order of things: open the model, fuse adapters, probe, show the plan, record the
calibration set, quantize, write. Work that took time lies in a hidden folder beside the output, under a name made of
everything that it depends on; the next run goes on with it, and a successful one removes it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from dcomp import UsageError
from dcomp.calibrate.adapters import FusedAdapter, fuse_lora
from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.mismatch import check_matches
from dcomp.calibrate.pipeline import Generation, OpenPipeline, num_classes, open_pipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.prompts import read_prompts
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.sampling import Sampling
from dcomp.compress.checkpoint import ManifestFields, check_output, write_checkpoint
from dcomp.compress.foreign import ForeignResult, check_foreign, quantize_foreign
from dcomp.compress.manifest import LayerRecord, Manifest
from dcomp.compress.quantize import LayerErrors
from dcomp.compress.time_table import Absent, TimeTable
from dcomp.recipes.load import load_recipe
from dcomp.recipes.plan import Plan, make_plan, weight_bits
from dcomp.recipes.quantize_stage import StageResult, quantize_stage
from dcomp.recipes.schema import Calibration, QuantizeStage, Recipe
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
    """

    output: Path
    manifest: Manifest
    errors: dict[str, LayerErrors]
    seconds: float
    notes: tuple[str, ...] = ()

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


def plan_recipe(model: str | Path, recipe: Recipe, *, device: str = "cpu") -> Plan:
    """Probe a model and return what the recipe would do; writes nothing."""
    pipeline, _, prompts, notes = _open(model, recipe, device)
    return make_plan(pipeline, recipe, prompts, notes)[0]


def record_calibration(
    model: str | Path, recipe: Recipe, output: Path, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Record the calibration set of a recipe for reuse by `run_recipe(..., calibration=output)`; return its facts."""
    pipeline, _, prompts, notes = _open(model, recipe, device)
    recorded = _record(pipeline, prompts, recipe.calibration, output, progress)
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
        on_plan: called with the plan before any weight is touched.
        progress: called with a text, the count done and the total.

    Raises:
        DcompError: anything that a person can solve; the output folder is then as it was.
    """
    started = time.perf_counter()
    report = progress or silent
    stage = recipe.stages[0] if recipe.stages else None
    check_output(output, overwrite, Path(model))
    if stage and stage.format != "dcomp":
        _check_foreign(stage, device)
    given = CalibrationSet.open(calibration) if calibration else None
    if given:
        recipe = recipe.model_copy(update={"calibration": _settings_of(given, recipe.calibration, allow_mismatch)})
    with work_folder(output, fresh) as root:
        pipeline, adapters, prompts, notes = _open(model, recipe, device)
        plan, probe = make_plan(pipeline, recipe, prompts, notes)
        if on_plan:
            on_plan(plan)
        schemes = {name: d.scheme for name, d in plan.decisions.items() if d.scheme is not None}
        work = root / _key(pipeline.fingerprint(), recipe.hash(), given.hash if given else "", *prompts)
        changed = _changed_components(pipeline, recipe, adapters, work / "changed")
        recorded: CalibrationSet | None = None
        mismatch: list[str] = []
        result = StageResult(plan.decisions)
        foreign: ForeignResult | None = None
        if stage and stage.format != "dcomp":
            report(f"{stage.format} weights", 0, 1)
            foreign = quantize_foreign(pipeline, stage.format, weight_bits(stage), work / "foreign")
            changed[pipeline.denoiser_name] = foreign.folder
            report(f"{stage.format} weights", 1, 1)
        elif stage and schemes:
            if given:
                mismatch = check_matches(given, pipeline, _generation(recipe.calibration), allow_mismatch)
            recorded = given or _record(pipeline, prompts, recipe.calibration, work / "calibration", progress)
            result = quantize_stage(pipeline, recorded, plan, stage, prompts, work, report)
        report("writing and checking", 0, 1)
        manifest = write_checkpoint(
            pipeline,
            output,
            ManifestFields(
                recipe=recipe.to_dict(),
                layers=_records(plan, result, pipeline.denoiser)
                if foreign is None
                else _foreign_records(plan, foreign),
                calibration_sha256=recorded.hash if recorded else None,
                loras=[asdict(adapter) for adapter in adapters],
            ),
            overwrite=overwrite,
            replaced=changed,
            probe=probe,
        )
        report("writing and checking", 1, 1)
        shutil.rmtree(root, ignore_errors=True)
    all_notes = (*plan.notes, *mismatch, *(recorded.notes if recorded else ()), *result.notes)
    return RunResult(output, manifest, result.errors, time.perf_counter() - started, all_notes)


def _check_foreign(stage: QuantizeStage, device: str) -> None:
    if stage.keep or stage.overrides or stage.preset not in ("w8a16", "w4a16"):
        raise UsageError(
            f"The format {stage.format} stores 8-bit or 4-bit weights of all linear layers, and nothing else",
            where=f"preset {stage.preset}, keep {list(stage.keep)}, overrides {stage.overrides}",
            remedy="Use --w8a16 or --w4a16, without --keep and overrides.",
        )
    check_foreign(stage.format, weight_bits(stage), device)


def _open(
    model: str | Path, recipe: Recipe, device: str
) -> tuple[OpenPipeline, tuple[FusedAdapter, ...], list[str], tuple[str, ...]]:
    options = recipe.calibration
    pipeline = open_pipeline(model, scheduler=options.scheduler, device=device)
    if getattr(pipeline.denoiser, "is_quantized", False):
        raise UsageError(
            "The model is quantized already", where=str(model), remedy="Start from the original, unquantized model."
        )
    prompts = read_prompts(
        options.prompts,
        options.samples,
        pipeline.kind,
        options.column,
        model=pipeline.source,
        classes=num_classes(pipeline.denoiser),
    )
    notes: tuple[str, ...] = ()
    if len(prompts) < options.samples:
        notes = (f"There are only {len(prompts)} prompts; {options.samples} samples were asked for.",)
    pipeline.check(prompts, _generation(options))
    adapters = fuse_lora(pipeline.pipe, recipe.lora)
    notes += tuple(
        f"{adapter.ignored} matrix pairs of {adapter.name} belong to no layer of this model and were left out."
        for adapter in adapters
        if adapter.ignored
    )
    return pipeline, adapters, prompts, notes


def _generation(options: Calibration) -> Generation:
    return Generation(
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
    )


def _record(
    pipeline: OpenPipeline, prompts: Sequence[str], options: Calibration, folder: Path, progress: Progress | None
) -> CalibrationSet:
    return record_calibration_set(
        pipeline,
        prompts,
        _generation(options),
        folder,
        max_calls=options.max_calls,
        max_bytes=options.max_megabytes << 20,
        progress=(lambda done, total: progress("calibration set", done, total)) if progress else None,
        sampling=Sampling(options.sampling, options.mu, options.sigma),
    )


def _settings_of(recorded: CalibrationSet, asked: Calibration, allow_mismatch: bool) -> Calibration:
    """Return the settings that a set was recorded with; what was asked for by name must agree, or is kept."""
    known = {key: recorded.settings[key] for key in ("steps", "guidance", "seed", "height", "width", "batch_size")}
    known["samples"] = len(recorded.prompts)
    other = [key for key in asked.model_fields_set & known.keys() if getattr(asked, key) != known[key]]
    deployed = {"steps", "guidance", "height", "width"} if allow_mismatch else set()
    if set(other) - deployed:
        raise UsageError(
            "The calibration set was recorded with " + ", ".join(f"{key} {known[key]}" for key in sorted(other)),
            where=str(recorded.folder),
            remedy="Leave these options out, record another set with `dcomp calibrate`, or pass --allow-mismatch.",
        )
    return asked.model_copy(update={key: value for key, value in known.items() if key not in other})


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


def _records(plan: Plan, result: StageResult, denoiser: nn.Module) -> dict[str, LayerRecord]:
    records = {}
    for name, decision in result.decisions.items():
        module = denoiser.get_submodule(name)
        scheme, error = decision.scheme, result.errors.get(name)
        table = isinstance(module, TimeTable | Absent)
        records[name] = LayerRecord(
            role=str(plan.structure.layers[name].role),
            scheme=scheme.label if scheme else "table" if table else None,
            weight_bits=scheme.weight_bits if scheme else 16 if table else 32,
            input_bits=scheme.input_bits if scheme else 32,
            bytes_before=plan.layer_bytes[name][0],
            bytes_after=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
            weight_error=error.weight if error else None,
            output_error=error.output if error else None,
            error_by_step=list(error.by_step) if error else [],
            reason=decision.reason,
        )
    return records


def _foreign_records(plan: Plan, foreign: ForeignResult) -> dict[str, LayerRecord]:
    records = {}
    for name, facts in plan.structure.layers.items():
        before, _ = plan.layer_bytes[name]
        kept = name in foreign.left_float
        records[name] = LayerRecord(
            role=str(facts.role),
            scheme=None if kept else f"{foreign.format} W{foreign.weight_bits}A16",
            weight_bits=32 if kept else foreign.weight_bits,
            input_bits=32 if kept else 16,
            bytes_before=before,
            bytes_after=before if kept else before * foreign.weight_bits // 32,
            reason=f"diffusers' {foreign.format} quantizer left it" if kept else f"in the format of {foreign.format}",
        )
    return records


def _key(*parts: str) -> str:
    return sha256("\n".join(parts).encode()).hexdigest()[:16]
