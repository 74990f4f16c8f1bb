"""What a run begins with: the model as its recipe wants it, and the calibration set."""

from collections.abc import Sequence
from pathlib import Path

from dcomp import UsageError
from dcomp.calibrate.adapters import FusedAdapter, fuse_lora
from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.mismatch import check_matches
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.calibrate.progress import Progress
from dcomp.calibrate.prompts import read_prompts
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.sampling import Sampling
from dcomp.calibrate.stored_weights import StoredWeight, is_large, move_to_files
from dcomp.compress.pruning.adapter import fit_lora
from dcomp.recipes.along import along_plan
from dcomp.recipes.console import value_text
from dcomp.recipes.schema import Calibration, Recipe
from dcomp.recipes.settings import generation_of, guided_by_itself


def open_as_asked(
    model: str | Path, recipe: Recipe, device: str, low_memory: bool | None, fused: Path | None = None
) -> tuple[OpenPipeline, tuple[FusedAdapter, ...], list[str], tuple[str, ...]]:
    """Open a model as a recipe wants it; `fused` is a folder for the weights that adapters changed."""
    options = recipe.calibration
    if recipe.quantize and recipe.quantize.format != "dcomp":
        low_memory = False  # other packages read tensors by their address
    # Adapters are added to weights in memory, and what is cut is copied.
    in_files = False if recipe.lora or recipe.prune else low_memory
    pipeline = open_pipeline(model, scheduler=options.scheduler, device=device, low_memory=in_files)
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
        classes=pipeline.classes,
    )
    notes: tuple[str, ...] = ()
    if len(prompts) < options.samples:
        notes = (f"There are only {len(prompts)} prompts; {options.samples} samples were asked for.",)
    pipeline.check(prompts, generation_of(options))
    if options.along:
        along_plan(options.along, pipeline, options.steps)  # a plan that cannot be followed is refused now
    adapters = fuse_lora(pipeline.pipe, recipe.lora, fit_lora)
    if adapters and fused and device == "cpu":
        nbytes = sum(parameter.nbytes for parameter in pipeline.denoiser.parameters())
        if is_large(nbytes) if low_memory is None else low_memory:
            move_to_files(pipeline.denoiser, fused)
    stored = sum(p.nbytes for p in pipeline.denoiser.parameters() if isinstance(p, StoredWeight))
    if stored:
        notes += (f"Float weights of {stored / 1e9:.1f} GB stay in files, and are read when they are used.",)
    notes += tuple(
        f"{adapter.ignored} matrix pairs of {adapter.name} belong to no layer of this model and were left out."
        for adapter in adapters
        if adapter.ignored
    )
    return pipeline, adapters, prompts, notes


def record_set(
    pipeline: OpenPipeline, prompts: Sequence[str], options: Calibration, folder: Path, progress: Progress | None
) -> CalibrationSet:
    """Record the calibration set that a recipe asks for."""
    return record_calibration_set(
        pipeline,
        prompts,
        generation_of(options),
        folder,
        max_calls=options.max_calls,
        max_bytes=options.max_megabytes << 20,
        progress=(lambda done, total: progress("calibration set", done, total)) if progress else None,
        sampling=Sampling(options.sampling, options.mu, options.sigma),
        along=along_plan(options.along, pipeline, options.steps) if options.along else None,
    )


def as_guided(model: str | Path, recipe: Recipe) -> Recipe:
    """Return the recipe for a model that may have learned its guidance."""
    guidance = guided_by_itself(model, recipe.calibration.guidance)
    return recipe if guidance == recipe.calibration.guidance else guided_with(recipe, guidance)


def guided_with(recipe: Recipe, guidance: float | None) -> Recipe:
    """Return the recipe with another guidance."""
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"guidance": guidance})})


def with_set(recipe: Recipe, calibration: Path | None, allow_mismatch: bool) -> tuple[CalibrationSet | None, Recipe]:
    """Open a calibration set that was recorded before, and put its settings into the recipe."""
    if calibration is None:
        return None, recipe
    if recipe.calibration.along:
        raise UsageError(
            "A calibration set that was recorded before follows no other plan now",
            where=f"--along {recipe.calibration.along}",
            remedy="Record one along the plan with `dcomp calibrate --along`, or leave one of both out.",
        )
    given = CalibrationSet.open(calibration)
    return given, recipe.model_copy(update={"calibration": _settings_of(given, recipe.calibration, allow_mismatch)})


def check_set(given: CalibrationSet | None, pipeline: OpenPipeline, recipe: Recipe, allow_mismatch: bool) -> list[str]:
    """Compare a set that was recorded before with what will be deployed; foreign formats and no stage need none."""
    if given is None or not recipe.quantize or recipe.quantize.format != "dcomp":
        return []
    return check_matches(given, pipeline, generation_of(recipe.calibration), allow_mismatch)


def _settings_of(recorded: CalibrationSet, asked: Calibration, allow_mismatch: bool) -> Calibration:
    """Return the settings that a set was recorded with; what was asked for by name must agree, or is kept."""
    known = {key: recorded.settings[key] for key in ("steps", "guidance", "seed", "height", "width", "batch_size")}
    known["samples"] = len(recorded.prompts)
    other = {key for key in asked.model_fields_set & known.keys() if getattr(asked, key) != known[key]}
    deployed = {"steps", "guidance", "height", "width"}
    if other - (deployed if allow_mismatch else set()):
        texts = (
            f"{key} {_or_default(known[key])} instead of {_or_default(getattr(asked, key))}" for key in sorted(other)
        )
        ways = ["Leave these options out", "record another set with `dcomp calibrate`"]
        fixed = sorted(other - deployed)
        if not fixed:
            ways.append("pass --allow-mismatch to deploy with them all the same")
        elif other & deployed:
            ways.append(f"leave {' and '.join(fixed)} out and pass --allow-mismatch")
        raise UsageError(
            f"The calibration set was recorded with {', '.join(texts)}",
            where=str(recorded.folder),
            remedy=f"{', '.join(ways[:-1])}, or {ways[-1]}.",
        )
    return asked.model_copy(update={key: value for key, value in known.items() if key not in other})


def _or_default(value: object) -> str:
    return "the pipeline's default" if value is None else value_text(value)
