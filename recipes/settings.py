"""Which settings a picture is made with: given ones, else those of the checkpoint's calibration, else defaults."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dcomp import UsageError
from dcomp.calibrate.pipeline import Generation
from dcomp.compress.manifest import MANIFEST, read_manifest
from dcomp.recipes.load import parse_recipe
from dcomp.recipes.schema import Calibration

UNGUIDED = 1.0  # scale at which pipelines run one context


def calibration_of(model: str | Path) -> Calibration | None:
    """Return what a checkpoint was calibrated with; None for a model that dcomp did not make."""
    if not (Path(model) / MANIFEST).is_file():
        return None
    return parse_recipe(read_manifest(model).recipe, where=str(Path(model) / MANIFEST)).calibration


def learned_guidance(model: str | Path) -> float | None:
    """Return the scale of guidance that a checkpoint's denoiser has learned; None: its pipeline guides it."""
    return read_manifest(model).guidance if (Path(model) / MANIFEST).is_file() else None


def guided_by_itself(model: str | Path, guidance: float | None) -> float | None:
    """Return the scale that a pipeline shall guide with, which is 1 if the denoiser has learned to guide itself.

    Raises:
        UsageError: it has, and another scale was asked for.
    """
    learned = learned_guidance(model)
    if learned is not None and guidance not in (None, UNGUIDED):
        raise UsageError(
            f"The denoiser has learned a guidance of {learned:g} and cannot be guided again by {guidance:g}",
            where=str(model),
            remedy="Leave the guidance out.",
        )
    return guidance if learned is None else UNGUIDED


def generation_of(options: Calibration) -> Generation:
    """Return how the pictures of a calibration are made, which is how the model is deployed."""
    return Generation(
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
    )


def generation_settings(
    model: str | Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
) -> Generation:
    """Return the settings to run a model with.

    Args:
        model: a checkpoint, or any pipeline folder or hub id.
        steps: given value; None, here and below, asks for the calibration's, then for the default.
        guidance: guidance scale; of a denoiser that has learned one, the pipeline's is 1.
        seed: base seed.
        batch_size: samples made together.

    Raises:
        UsageError: a guidance for a denoiser that has learned another.
    """
    known = calibration_of(model) or Calibration()
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size}
    given["guidance"] = guided_by_itself(model, guidance)
    values = {key: getattr(known, key) if value is None else value for key, value in given.items()}
    return Generation(**values, height=known.height, width=known.width)


def settings_of_original(compressed: str | Path, settings: Generation) -> Generation:
    """Return the settings that a checkpoint's original makes the same pictures with: its pipeline guides it."""
    learned = learned_guidance(compressed)
    return settings if learned is None else replace(settings, guidance=learned)
