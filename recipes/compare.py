"""Two folders of samples reduced to figures, a chunk at a time, and the pictures that are worth a look."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from numpy.typing import NDArray
from torch import Tensor

from dcomp.calibrate import quality
from dcomp.calibrate.progress import Progress
from dcomp.recipes.trajectories import Chunk, SampleFolder
from dcomp.recipes.verdict import PicturePair, PromptResult, StepError

MAX_PICTURES = 16
MAX_SHOWN_SIDE = 512  # pixels of a picture in the report


@dataclass(frozen=True)
class Comparison:
    """How far apart two sides are.

    Attributes:
        figures: `latent_rel_error`, `psnr_db`, `psnr_db_of_mean_mse` and `ssim` of `ValidationResult`.
        distance: FID and KID; None without a feature extractor.
        health: of the compressed pictures.
        blanked: pictures that a safety checker replaced on either side; only their latents were compared.
        unseen: timesteps of the compressed side that its calibration had not seen, counted once a batch.
        finite: all latents and pictures of the compressed side are finite.
    """

    per_prompt: list[PromptResult]
    error_by_step: list[StepError]
    figures: dict[str, float | None]
    distance: quality.FeatureDistance | None
    health: quality.Health
    blanked: int
    unseen: int
    finite: bool


def compare(
    original: SampleFolder,
    compressed: SampleFolder,
    extractor: quality.FeatureExtractor | None,
    report: Progress,
) -> Comparison:
    """Reduce two sample folders to figures, a chunk at a time."""
    errors, psnrs, mses, ssims, curves, shown = [], [], [], [], [], []
    features: tuple[list[Tensor], list[Tensor]] = ([], [])
    health, unseen = quality.Health(), 0
    total = len(original.prompts)
    for number, indices in enumerate(original.ranges):
        report("comparing", indices.start, total)
        a, b = original.read(number), compressed.read(number)
        kept = ~(a.blanked | b.blanked)
        shown.append(kept)
        errors.append(quality.relative_errors(a.latents, b.latents))
        mses.append(quality.mean_squared_errors(a.images, b.images))
        psnrs.append(quality.decibels(mses[-1]))
        ssims.append(quality.structural_similarities(a.images, b.images))
        health += quality.examine(b.images[kept])
        unseen += b.unseen
        if a.step_latents is not None and b.step_latents is not None:
            curves.append(_step_errors(a.step_latents, b.step_latents))
        if extractor:
            for side, chunk in zip(features, (a, b), strict=True):
                side.append(extractor(chunk.images[kept]))
    report("comparing", total, total)
    kept, latent_errors, mse, psnr = torch.cat(shown), torch.cat(errors), torch.cat(mses), torch.cat(psnrs)
    ssim = torch.cat([torch.full((len(k),), torch.nan) if s is None else s for s, k in zip(ssims, shown, strict=True)])
    psnr[~kept] = ssim[~kept] = torch.nan
    value = quality.finite_or_none
    return Comparison(
        per_prompt=[
            PromptResult(
                index=i,
                prompt=prompt,
                latent_rel_error=value(latent_errors[i]),
                psnr_db=value(psnr[i]),
                ssim=value(ssim[i]),
            )
            for i, prompt in enumerate(original.prompts)
        ],
        error_by_step=[
            StepError(step=step, mean=value(column.mean()), low=value(column.min()), high=value(column.max()))
            for step, column in enumerate(torch.cat(curves).unbind(1) if curves else ())
        ],
        figures={
            "latent_rel_error": value(latent_errors.mean()),
            "psnr_db": value(psnr[kept].mean()),
            "psnr_db_of_mean_mse": value(quality.decibels(mse[kept].mean())),
            "ssim": value(ssim[kept].mean()),
        },
        distance=quality.feature_distance(
            torch.cat(features[0]), torch.cat(features[1]), extractor.id, original.settings.seed
        )
        if extractor
        else None,
        health=health,
        blanked=int((~kept).sum()),
        unseen=unseen,
        finite=health.non_finite == 0 and bool(latent_errors.isfinite().all()),
    )


def _step_errors(original: Tensor, compressed: Tensor) -> Tensor:
    """Return the relative error of each sample after each step, fp64 [n, S]."""
    return torch.stack(
        [quality.relative_errors(a, b) for a, b in zip(original.unbind(1), compressed.unbind(1), strict=True)], 1
    )


def choose_pictures(
    results: Sequence[PromptResult], original: SampleFolder, compressed: SampleFolder
) -> list[PicturePair]:
    """Take the worst pictures for half of the places and an even selection of all others for the rest."""
    ranked = sorted(results, key=lambda r: -np.inf if r.psnr_db is None else r.psnr_db)
    worst = min(MAX_PICTURES // 2, len(ranked))
    others = min(MAX_PICTURES - worst, len(ranked) - worst)
    places = [*range(worst), *(round(p) for p in np.linspace(worst, len(ranked) - 1, others))]
    wanted = {ranked[place].index: place + 1 for place in sorted(set(places))}
    found: list[PicturePair] = []
    by_index = {r.index: r for r in results}
    for number, indices in enumerate(original.ranges):
        mine = [i for i in indices if i in wanted]
        if mine:
            a, b = original.read(number), compressed.read(number)
            found += [
                PicturePair(by_index[i], wanted[i], *(_pixels(c, i - indices.start) for c in (a, b))) for i in mine
            ]
    return sorted(found, key=lambda pair: pair.rank)


def _pixels(chunk: Chunk, place: int) -> NDArray[np.uint8]:
    image = chunk.images[place : place + 1].nan_to_num(nan=0.0)
    if max(image.shape[-2:]) > MAX_SHOWN_SIDE:
        scale = MAX_SHOWN_SIDE / max(image.shape[-2:])
        image = F.interpolate(image, scale_factor=scale, mode="area")
    pixels: NDArray[np.uint8] = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels
