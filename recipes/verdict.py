"""What a validation found, and whether it is good enough: the result, its stable JSON keys, the thresholds.

None stands everywhere for "not measured" or "not finite"; a threshold on such a value is missed.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PrivateAttr

from dcomp import UsageError
from dcomp.calibrate import quality
from dcomp.recipes import console
from dcomp.recipes.plan_summary import PlanSummary

# threshold -> key of the result, relation, smallest and largest value that can be reached
RULES: dict[str, tuple[str, Literal[">=", "<="], float, float]] = {
    "min_psnr": ("psnr_db", ">=", -math.inf, quality.MAX_DB),
    "min_ssim": ("ssim", ">=", -1.0, 1.0),
    "max_latent_error": ("latent_rel_error", "<=", 0.0, math.inf),
    "max_fid_change": ("fid", "<=", 0.0, math.inf),
    "max_bytes_ratio": ("denoiser_bytes_ratio", "<=", 0.0, math.inf),
    "min_speedup": ("speedup", ">=", 0.0, math.inf),
}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Check(_Data):
    """A threshold and what was measured against it; `value` is None when there was no finite value."""

    relation: Literal[">=", "<="]
    limit: float
    value: float | None
    passed: bool


class PromptResult(_Data):
    """The paired figures of one sample; None where a value is not finite or, for SSIM, the picture too small."""

    index: int
    prompt: str
    latent_rel_error: float | None
    psnr_db: float | None
    ssim: float | None


class StepError(_Data):
    """Relative error of the latents after a scheduler step: mean, lowest and highest over the first samples."""

    step: int
    mean: float | None
    low: float | None
    high: float | None


class ValidationResult(_Data):
    """All that a validation found. None stands for "not measured" or "not finite".

    Attributes:
        latent_rel_error: mean over samples of ||compressed - original|| / ||original|| of the final latents.
        psnr_db: mean over pictures of the PSNR, each capped at `quality.MAX_DB`.
        psnr_db_of_mean_mse: the PSNR of the mean squared error over all pictures: what the worst ones cost.
        ssim: mean over pictures; None for pictures smaller than its window.
        fid, kid, kid_std: distance of the compressed pictures from the original's as sets; None without a feature
            extractor. `fid` is what `max_fid_change` bounds: 0 means no change.
        extractor: id of the feature extractor; numbers of different ones must not be compared.
        bits_per_param: bits of the compressed denoiser in memory for each parameter of the original one.
        bytes_original, bytes_compressed: all files of the two pipelines on disk.
        denoiser_bytes_original, denoiser_bytes_compressed, denoiser_bytes_ratio: parameters and buffers in memory; what
            kernels keep beside them, such as reordered weights, is in `peak_bytes` alone.
        macs_ratio: multiply-accumulates of the same denoiser calls, compressed over original.
        speedup, speedup_min, speedup_max, peak_bytes, peak_bytes_original: see `bench`.
        flat_images, non_finite_images: broken pictures of the compressed side.
        passed: every threshold is met and all results of the compressed side are finite.
        per_prompt: in sample order.
        error_by_step: over the first samples of the run.
        layers, left_in_float: what the checkpoint's manifest says; empty for other pipelines.
        plans: cache plans of the checkpoint, slowest first.
        settings: all that the samples depend on, besides the two pipelines.
        speed: the whole `BenchResult`, if there was one.
    """

    schema_version: Literal[1] = 1
    compressed: str
    original: str
    latent_rel_error: float | None
    psnr_db: float | None
    psnr_db_of_mean_mse: float | None
    ssim: float | None
    fid: float | None
    kid: float | None
    kid_std: float | None
    extractor: str | None
    samples: int
    seed: int
    bits_per_param: float
    bytes_original: int
    bytes_compressed: int
    denoiser_bytes_original: int
    denoiser_bytes_compressed: int
    denoiser_bytes_ratio: float
    macs_ratio: float
    speedup: float | None
    speedup_min: float | None
    speedup_max: float | None
    peak_bytes: int | None
    peak_bytes_original: int | None
    flat_images: int
    non_finite_images: int
    passed: bool
    thresholds: dict[str, Check]
    warnings: list[str]
    per_prompt: list[PromptResult]
    error_by_step: list[StepError]
    layers: list[dict[str, Any]]
    left_in_float: list[dict[str, Any]]
    plans: list[PlanSummary]
    settings: dict[str, Any]
    speed: dict[str, Any] | None
    _pictures: list["PicturePair"] = PrivateAttr(default_factory=list)

    @property
    def pictures(self) -> "list[PicturePair]":
        """Pictures to show, worst first; not part of the JSON."""
        return self._pictures

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return self.model_dump(mode="json")

    def headline(self) -> dict[str, Any]:
        """Return the figures that a checkpoint's manifest keeps, with what they were measured on."""
        keys = ("latent_rel_error", "psnr_db", "ssim", "fid", "extractor", "samples", "seed", "settings", "speedup")
        data = self.to_dict()
        return {key: data[key] for key in keys}

    def figures(self) -> list[tuple[str, str, str]]:
        """Return (name, value, explanation) of the headline figures, as a person wants to read them."""
        number, size = console.value_text, console.bytes_text
        rows = [
            ("Latent error", number(self.latent_rel_error), "relative, last step, mean"),
            ("PSNR", f"{number(self.psnr_db)} dB", f"mean over {self.samples} pictures"),
            ("SSIM", number(self.ssim), "mean over pictures"),
        ]
        if self.extractor:
            rows.append(("FID", number(self.fid), f"against the original's pictures, {self.extractor}"))
            rows.append(("KID", f"{number(self.kid)} ± {number(self.kid_std)}", self.extractor))
        rows += [
            ("Bits per parameter", number(self.bits_per_param), "the whole denoiser, float layers included"),
            ("Denoiser in memory", size(self.denoiser_bytes_compressed), f"of {size(self.denoiser_bytes_original)}"),
            ("Denoiser bytes ratio", number(self.denoiser_bytes_ratio), "compressed / original"),
            ("Pipeline on disk", size(self.bytes_compressed), f"of {size(self.bytes_original)}"),
            ("MACs ratio", number(self.macs_ratio), "compressed / original"),
        ]
        if self.speedup is not None:
            spread = f"{number(self.speedup_min)} to {number(self.speedup_max)}"
            threads = (self.speed or {}).get("threads")
            rows.append(("Denoiser speed", f"{self.speedup:.2f} x", f"{spread} over pairs, {threads} thread(s)"))
        if self.peak_bytes is not None:
            rows.append(("Peak memory", size(self.peak_bytes), f"of {size(self.peak_bytes_original)}, whole process"))
        if self.flat_images or self.non_finite_images:
            rows.append(("Broken pictures", f"{self.flat_images + self.non_finite_images}", "flat or not finite"))
        return rows


@dataclass(frozen=True, eq=False)
class PicturePair:
    """One sample to look at; pixels are uint8 [H, W, 3], `rank` 1 is the lowest PSNR of all."""

    result: PromptResult
    rank: int
    original: NDArray[np.uint8]
    compressed: NDArray[np.uint8]


def check_thresholds(thresholds: Mapping[str, float], *, features: str | None, bench: bool) -> dict[str, float]:
    """Return the thresholds as numbers.

    Raises:
        UsageError: one is unknown, is no number, or cannot be reached by any pipeline or with these options.
    """
    problems = []
    for name, limit in thresholds.items():
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            problems.append(f"there is no threshold '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
            continue
        _, relation, lowest, highest = RULES[name]
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            problems.append(f"{name} is {limit!r}, not a number")
        elif relation == ">=" and limit > highest:
            problems.append(f"{name} {limit:g} cannot be reached: the largest value is {highest:g}")
        elif relation == "<=" and limit < lowest:
            problems.append(f"{name} {limit:g} cannot be reached: the smallest value is {lowest:g}")
        if name == "max_fid_change" and features is None:
            problems.append(f"{name} needs a feature extractor: give --features {' or '.join(quality.EXTRACTORS)}")
        if name == "min_speedup" and not bench:
            problems.append(f"{name} needs the speed measurement, which is switched off")
    if problems:
        raise UsageError(
            "The thresholds cannot be used: " + "; ".join(problems),
            where="thresholds",
            remedy=f"Known thresholds are {', '.join(RULES)}.",
        )
    return {name: float(limit) for name, limit in thresholds.items()}


def check(name: str, limit: float, figures: Mapping[str, Any]) -> Check:
    """Hold a figure against its threshold."""
    key, relation, _, _ = RULES[name]
    value = figures[key]
    passed = value is not None and (value >= limit if relation == ">=" else value <= limit)
    return Check(relation=relation, limit=limit, value=value, passed=passed)
