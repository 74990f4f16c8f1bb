"""The same seeds, prompts, scheduler and steps through two pipelines, and how far apart the results are.

The verdict is paired: final latents and decoded pictures of the same noise, sample by sample. The noise is held out:
sample numbers start at `FIRST_INDEX`, where no calibration goes. Thresholds that are given decide `passed`; pictures
that are not finite never pass.

Nothing is changed in either folder. The compressed side may be any diffusers pipeline; what only a dcomp manifest knows
(layers, what stayed in float) is then empty.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from dcomp import UsageError
from dcomp.calibrate import quality
from dcomp.calibrate.components import local_folder
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.prompts import read_prompts
from dcomp.compress.checkpoint import update_quality
from dcomp.compress.manifest import MANIFEST, read_manifest
from dcomp.recipes import console
from dcomp.recipes.bench import bench as run_bench
from dcomp.recipes.bench import fill_prompts, macs_of, tensor_bytes
from dcomp.recipes.compare import Comparison, choose_pictures, compare
from dcomp.recipes.follow import FollowedPlan
from dcomp.recipes.plan_fit import FittedPlan, fit_plan
from dcomp.recipes.plan_summary import summaries
from dcomp.recipes.settings import calibration_of, generation_settings, settings_of_original
from dcomp.recipes.trajectories import SampleFolder
from dcomp.recipes.verdict import ValidationResult, check, check_thresholds

__all__ = ["ValidationResult", "validate"]

FIRST_INDEX = 1_000_000
MAX_SAMPLES = 100_000


def validate(
    compressed: str | Path,
    against: str | Path,
    *,
    prompts: str | Sequence[str] | None = None,
    column: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    plan: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    features: str | None = None,
    bench: bool = True,
    repeats: int = 5,
    device: str = "cpu",
    record: bool = False,
    work: Path | None = None,
    progress: Progress | None = None,
) -> ValidationResult:
    """Compare a compressed pipeline with its original on the same seeds.

    Args:
        compressed: folder that dcomp wrote, or any pipeline with the original's architecture.
        against: folder or hub id of the original.
        prompts: a list, a file or dataset that `read_prompts` takes; default: as the checkpoint was calibrated.
        column: of a table of prompts.
        samples: pictures of each side; default: 16.
        steps: default, like `guidance`, `seed` and `batch_size`: as the checkpoint was calibrated.
        guidance: guidance scale.
        scheduler: class to run both sides with; default: their own, which must be of one class.
        seed: base seed of the noise.
        batch_size: samples that are made together, and the unit that an interrupted run loses.
        plan: name of a cache plan that the compressed side follows, or `FILE.json:NAME`; None computes every call.
        thresholds: name from `verdict.RULES` -> limit.
        features: extractor for FID and KID, one of `quality.EXTRACTORS`.
        bench: measure speed and peak memory too.
        repeats: pairs of timed runs.
        device: where to run.
        record: write the headline figures into the checkpoint's manifest.
        work: folder of finished samples, kept; default: one beside `compressed`, removed after success.
        progress: called with a text, the count done and the total.

    Raises:
        UsageError: thresholds that are unknown or cannot be reached, pipelines that cannot be compared, a plan of
            another class of denoiser.
    """
    limits = check_thresholds(thresholds or {}, features=features, bench=bench)
    count = 16 if samples is None else samples
    if not 1 <= count <= MAX_SAMPLES:
        raise UsageError(f"{count} samples", remedy=f"Ask for 1 to {MAX_SAMPLES:,}.")
    if features and count < 2:
        raise UsageError("FID and KID need at least 2 samples", where="--samples", remedy="Ask for more samples.")
    if record:
        read_manifest(compressed)  # refuses what is no checkpoint before the work
    check_model_folder(local_folder(compressed), match_weights=False)  # before the original's pictures are made
    plans = summaries(local_folder(compressed))
    extractor = quality.open_extractor(features) if features else None
    report = progress or silent
    settings = generation_settings(compressed, steps=steps, guidance=guidance, seed=seed, batch_size=batch_size)
    calibration = calibration_of(compressed)
    if calibration:
        scheduler = scheduler or calibration.scheduler
    if calibration and prompts is None:
        prompts, column = calibration.prompts, column or calibration.column
    followed: FollowedPlan | None = None
    fitted = FittedPlan(None)
    with _work_folder(work, compressed) as root:
        sides: list[_Side] = []
        texts: list[str] | None = None
        theirs = settings_of_original(compressed, settings)
        for name, model, own in (("original", against, theirs), ("compressed", compressed, settings)):
            report(f"opening the {name} pipeline", 0, 1)
            pipeline = open_pipeline(model, scheduler=scheduler, device=device)
            report(f"opening the {name} pipeline", 1, 1)
            if texts is None:
                texts = _prompts(prompts, column, count, pipeline)
            if sides:
                _check_comparable(sides[0], pipeline)
            if plan and sides:
                fitted = fit_plan(plan, local_folder(model), pipeline, texts, settings, report)
                followed = FollowedPlan(fitted.plan, pipeline.denoiser, pipeline.scheduler) if fitted.plan else None
            facts = followed.plan.plan.to_dict() if followed else None
            folder = SampleFolder(root / name, pipeline, texts, own, FIRST_INDEX, facts)
            with followed or nullcontext():
                folder.make(pipeline, functools.partial(report, f"{name} pictures"))
            short = texts[: settings.batch_size]
            if "min_ssim" in limits and min(folder.read(0).images.shape[-2:]) < quality.SSIM_WINDOW:
                raise UsageError(
                    f"Pictures of fewer than {quality.SSIM_WINDOW} pixels a side have no SSIM",
                    where="min_ssim",
                    remedy="Use another threshold, such as min_psnr.",
                )
            sides.append(_Side.of(pipeline, folder, macs_of(pipeline, short, own)))
            del pipeline  # one model at a time: the original may need all the memory there is
        original, other = sides
        comparison = compare(original.folder, other.folder, extractor, report)
        pictures = choose_pictures(comparison.per_prompt, original.folder, other.folder)
    measured = None
    if bench:
        measured = run_bench(
            compressed,
            against,
            repeats=repeats,
            steps=settings.steps,
            guidance=settings.guidance,
            scheduler=scheduler,
            seed=settings.seed,
            prompts=texts,
            device=device,
            progress=progress,
        )
    distance = comparison.distance
    figures: dict[str, Any] = {
        **comparison.figures,
        "fid": quality.finite_or_none(distance.fid) if distance else None,
        "kid": quality.finite_or_none(distance.kid) if distance else None,
        "kid_std": quality.finite_or_none(distance.kid_std) if distance else None,
        "extractor": distance.extractor if distance else None,
        "bits_per_param": 8 * other.tensor_bytes / original.parameters,
        "bytes_original": original.file_bytes,
        "bytes_compressed": other.file_bytes,
        "denoiser_bytes_original": original.tensor_bytes,
        "denoiser_bytes_compressed": other.tensor_bytes,
        "denoiser_bytes_ratio": other.tensor_bytes / original.tensor_bytes,
        "macs_ratio": other.macs / original.macs / (followed.plan.speedup if followed else 1),
    }
    for key in ("speedup", "speedup_min", "speedup_max", "peak_bytes", "peak_bytes_original"):
        figures[key] = getattr(measured, key) if measured else None
    checks = {name: check(name, limit, figures) for name, limit in limits.items()}
    layers, left = _manifest_layers(compressed)
    result = ValidationResult(
        compressed=str(compressed),
        original=str(against),
        samples=count,
        seed=settings.seed,
        flat_images=comparison.health.flat,
        non_finite_images=comparison.health.non_finite,
        passed=all(check.passed for check in checks.values()) and comparison.finite,
        thresholds=checks,
        warnings=[
            *_warnings(original, other, comparison),
            *fitted.notes,
            *_plan_warnings(followed, measured is not None),
        ],
        per_prompt=comparison.per_prompt,
        error_by_step=comparison.error_by_step,
        layers=layers,
        left_in_float=left,
        plans=plans,
        settings={
            **asdict(settings),
            "scheduler": other.scheduler,
            "prompts": prompts if isinstance(prompts, str) else None,
            "column": column,
            "device": device,
            "first_index": FIRST_INDEX,
            "plan": followed.plan.name if followed else None,
        },
        speed=measured.to_dict() if measured else None,
        **figures,
    )
    result._pictures.extend(pictures)
    if record:
        update_quality(Path(compressed), result.headline())
    return result


@dataclass(frozen=True)
class _Side:
    """What is left of a pipeline after it was closed again."""

    folder: SampleFolder
    kind: str
    scheduler: str
    scheduler_config: dict[str, Any]
    parameters: int
    tensor_bytes: int
    file_bytes: int
    macs: int

    @classmethod
    def of(cls, pipeline: OpenPipeline, folder: SampleFolder, macs: int) -> Self:
        return cls(
            folder=folder,
            kind=pipeline.kind,
            scheduler=type(pipeline.scheduler).__name__,
            scheduler_config=dict(pipeline.scheduler.config),
            parameters=sum(p.numel() for p in pipeline.denoiser.parameters()),
            tensor_bytes=tensor_bytes(pipeline.denoiser),
            file_bytes=check_model_folder(pipeline.source, match_weights=False).nbytes,
            macs=macs,
        )


def _prompts(prompts: str | Sequence[str] | None, column: str | None, count: int, pipeline: OpenPipeline) -> list[str]:
    if prompts is None or isinstance(prompts, str):
        prompts = read_prompts(prompts, count, pipeline.kind, column, model=pipeline.source, classes=pipeline.classes)
    if not prompts:
        raise UsageError("The list of prompts is empty", where="prompts", remedy="Give at least one.")
    return fill_prompts(prompts, count)


def _check_comparable(original: _Side, compressed: OpenPipeline) -> None:
    name = type(compressed.scheduler).__name__
    if original.kind != compressed.kind:
        raise UsageError(
            f"One pipeline is driven by {original.kind}, the other by {compressed.kind}",
            remedy="Compare a compressed pipeline with the one that it was made from.",
        )
    if original.scheduler != name:
        raise UsageError(
            f"The two folders use different schedulers, {original.scheduler} and {name}",
            remedy="Run both with one: --scheduler CLASS.",
        )


def _warnings(original: _Side, compressed: _Side, comparison: Comparison) -> list[str]:
    """Return what a reader must know to judge the figures."""
    warnings = []
    keys = {key for key in (*original.scheduler_config, *compressed.scheduler_config) if not key.startswith("_")}
    unlike = sorted(k for k in keys if original.scheduler_config.get(k) != compressed.scheduler_config.get(k))
    if unlike:
        warnings.append(f"The two schedulers are configured differently: {', '.join(unlike)}.")
    if comparison.unseen:
        warnings.append(
            f"{comparison.unseen} times the compressed denoiser met a timestep that it has no tables for, and used "
            "the nearest ranges, or temporal features between two timesteps."
        )
    distance = comparison.distance
    if distance and distance.samples < 1000:
        warnings.append(f"FID of {distance.samples} samples is biased upwards; compare it at equal numbers only.")
    if comparison.blanked:
        warnings.append(
            f"{comparison.blanked} pictures were replaced by a safety checker and are compared as latents only."
        )
    if comparison.health.flat:
        warnings.append(f"{comparison.health.flat} compressed pictures are flat: one colour, no content.")
    if not comparison.finite:
        warnings.append(f"{comparison.health.non_finite} compressed pictures, or latents, are not finite.")
    return warnings


def _plan_warnings(followed: FollowedPlan | None, timed: bool) -> list[str]:
    """Return what a reader must know of the cache plan."""
    if followed is None:
        return []
    warnings = [f"The pictures follow the plan {followed.plan.name}: {followed.plan.speedup:.2f} times fewer MACs."]
    if timed:
        warnings.append("The speed is that of calls that compute everything.")
    if followed.stats.fallbacks:
        reasons = ", ".join(f"{count} for {reason}" for reason, count in followed.stats.fallbacks.items())
        warnings.append(f"Some calls computed although the plan says otherwise: {reasons}.")
    return warnings


def _manifest_layers(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the layers of a dcomp checkpoint and those left in float; nothing for another pipeline."""
    if not (Path(folder) / MANIFEST).is_file():
        return [], []
    records = read_manifest(folder).layers
    layers = [{"name": name, **record.model_dump()} for name, record in records.items()]
    left = [{key: layer[key] for key in ("name", "role", "reason")} for layer in layers if layer["scheme"] is None]
    return layers, left


@contextmanager
def _work_folder(work: Path | None, compressed: str | Path) -> Iterator[Path]:
    """Give the folder of samples; say how to go on when the block is interrupted, clean up when it is done."""
    beside = Path(compressed).resolve()
    temporary = None
    if work is not None:
        root = work
    elif beside.is_dir() and os.access(beside.parent, os.W_OK):
        root = beside.parent / f".{beside.name}.dcomp-validation"
    else:
        temporary = tempfile.mkdtemp(prefix="dcomp-validation-")
        root = Path(temporary)
    try:
        yield root
    except KeyboardInterrupt:
        if temporary is None:
            console.say(f"Interrupted. Finished samples are in {root}; the same command goes on from there.")
        raise
    else:
        if work is None:
            shutil.rmtree(root, ignore_errors=True)
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
