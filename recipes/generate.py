"""Pictures from a pipeline, compressed or not, one file a prompt."""

import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dcomp import UsageError
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.components import local_folder
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import open_pipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.compress.loader import run_layers_ahead
from dcomp.recipes.follow import FollowedPlan
from dcomp.recipes.plan_fit import fit_plan
from dcomp.recipes.settings import generation_settings


def generate(
    model: str | Path,
    prompts: Sequence[str],
    output: Path,
    *,
    plan: str | None = None,
    ahead: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make one picture for each prompt and write PNG files.

    Settings that are not given are those that the checkpoint was calibrated with, or the pipeline's own.

    Args:
        model: a checkpoint, or any pipeline folder or hub id.
        prompts: one a picture.
        output: folder of the files; made if it is not there.
        plan: name of a cache plan of the checkpoint, or `FILE.json:NAME`; None computes every call.
        ahead: what becomes of layers that read the timestep and conditions of the whole picture, see `dcomp.load`.
        steps: scheduler steps.
        guidance: guidance scale.
        scheduler: class to sample with.
        seed: base seed.
        batch_size: pictures that are made together.
        device: where to run.
        progress: called with a text, the count done and the total.

    Returns:
        The files, the seconds that making them took, how many timesteps the calibration had not seen, of a plan its
        speedup in multiply-accumulates, the most memory that its kept tensors took and the calls that computed although
        it says otherwise, and what is to be known of a plan that was made for something else.

    Raises:
        UsageError: an empty prompt, a folder that cannot be made, a plan of another class of denoiser, or a model that
            has no layers to run ahead.
    """
    if not prompts or not all(p.strip() for p in prompts):
        raise UsageError("A prompt is empty", remedy="Write what the picture should show.")
    pipeline = open_pipeline(model, scheduler=scheduler, device=device)
    settings = generation_settings(model, steps=steps, guidance=guidance, seed=seed, batch_size=batch_size)
    pipeline.check(prompts, settings)
    run_layers_ahead(pipeline.denoiser, ahead, check_model_folder(pipeline.source, match_weights=False).denoiser)
    fitted = fit_plan(plan, local_folder(model), pipeline, prompts, settings, progress or silent) if plan else None
    chosen = fitted.plan if fitted else None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The folder of the pictures cannot be made: {error.strerror}", where=str(output), remedy="Use --output."
        ) from error
    files: list[str] = []
    started = time.perf_counter()
    followed = FollowedPlan(chosen, pipeline.denoiser, pipeline.scheduler) if chosen else None
    with followed or nullcontext():
        for first in range(0, len(prompts), settings.batch_size):
            if progress:
                progress("pictures", first, len(prompts))
            indices = range(first, min(first + settings.batch_size, len(prompts)))
            images = pipeline.run([prompts[i] for i in indices], indices, settings).images
            assert images is not None  # run() decodes unless told not to
            for i, image in zip(indices, images, strict=True):
                file = output / f"{i:04d}-{_slug(prompts[i])}.png"
                to_picture(image).save(file)
                files.append(str(file))
    if progress:
        progress("pictures", len(prompts), len(prompts))
    clock: StepClock | None = getattr(pipeline.denoiser, "dcomp_clock", None)
    return {
        "schema_version": 1,
        "files": files,
        "seconds": round(time.perf_counter() - started, 2),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": settings.seed,
        "unseen_timesteps": clock.unseen if clock else 0,
        "plan": chosen.name if chosen else None,
        "plan_speedup": chosen.speedup if chosen else None,
        "plan_cache_bytes": followed.stats.peak_bytes if followed else 0,
        "plan_fallbacks": sum(followed.stats.fallbacks.values()) if followed else 0,
        "notes": list(fitted.notes) if fitted else [],
    }


def to_picture(image: Tensor) -> Image.Image:
    """Turn `[3, H, W]` (or `[1, H, W]`) in [0, 1] into an 8-bit picture."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
