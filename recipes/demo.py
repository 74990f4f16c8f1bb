"""The embedded pipeline, compressed and validated with one command and no network."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from dcomp import UsageError
from dcomp.calibrate.progress import Progress
from dcomp.recipes.load import load_recipe
from dcomp.recipes.methods import QUALITIES
from dcomp.recipes.plan import Plan
from dcomp.recipes.report import write_html, write_json
from dcomp.recipes.run import run_recipe
from dcomp.recipes.validate import ValidationResult, validate

GUIDANCE = 4.0  # what the embedded pipeline looks best with
# Below this something is broken, not merely different.
THRESHOLDS = {"min_psnr": 24.0}


def embedded_model() -> Path:
    """Return the folder of the pipeline that comes with the package.

    Raises:
        UsageError: this installation was made without it.
    """
    folder = Path(str(files("dcomp") / "examples" / "emoji-sd"))
    if not (folder / "model_index.json").is_file():
        raise UsageError(
            "The embedded pipeline is not part of this installation",
            where=str(folder),
            remedy="Install the released wheel, or run from a checkout.",
        )
    return folder


def run_demo(
    output: Path,
    *,
    quick: bool = False,
    fresh: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
) -> tuple[ValidationResult, Path]:
    """Quantize the embedded pipeline to W4A8 with the quality `fast`, validate it and write the report page.

    Args:
        output: folder that receives `emoji-sd-w4a8/` and `report/`.
        quick: few samples and steps, nearest codes; checks that everything works, not how good it is.
        fresh: throw away the work of an interrupted run.
        on_plan: called with the plan before weights are touched.
        progress: see `run_recipe`.

    Returns:
        The validation's result and the folder of the page.
    """
    model = embedded_model()
    values: dict[str, Any] = {"calibration.guidance": GUIDANCE, "calibration.samples": 32}
    values |= {f"stages.0.{key}": value for key, value in QUALITIES["fast"].items()}
    if quick:
        values |= {"calibration.samples": 4, "calibration.steps": 6}
        values |= {"stages.0.rows": 32, "stages.0.rounding": "nearest"}
    recipe = load_recipe("w4a8", (), values)
    compressed = output / "emoji-sd-w4a8"
    run_recipe(model, recipe, compressed, fresh=fresh, overwrite=True, on_plan=on_plan, progress=progress)
    result = validate(
        compressed,
        model,
        samples=2 if quick else 16,
        thresholds={} if quick else THRESHOLDS,
        bench=not quick,
        record=True,
        progress=progress,
    )
    page = output / "report"
    write_html(result, page)
    write_json(result, page / "report.json")
    return result, page
