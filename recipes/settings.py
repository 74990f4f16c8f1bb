"""Which settings a picture is made with: given ones, else those of the checkpoint's calibration, else defaults."""

from pathlib import Path
from typing import Any

from dcomp.calibrate.pipeline import Generation
from dcomp.compress.manifest import MANIFEST, read_manifest
from dcomp.recipes.load import parse_recipe
from dcomp.recipes.schema import Calibration


def calibration_of(model: str | Path) -> Calibration | None:
    """Return what a checkpoint was calibrated with; None for a model that dcomp did not make."""
    if not (Path(model) / MANIFEST).is_file():
        return None
    return parse_recipe(read_manifest(model).recipe, where=str(Path(model) / MANIFEST)).calibration


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
        guidance: guidance scale.
        seed: base seed.
        batch_size: samples made together.
    """
    known = calibration_of(model) or Calibration()
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size}
    values = {key: getattr(known, key) if value is None else value for key, value in given.items()}
    return Generation(**values, height=known.height, width=known.width)
