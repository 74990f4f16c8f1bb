"""How far two sets of latents or pictures are apart.

Two kinds of number. *Paired* ones compare what two denoisers made of the same noise and prompt, sample by sample: they
need no network and tens of samples are enough, so they are the verdict. *Distances of distributions* (FID, KID) compare
the sets as wholes through a feature extractor, and mean something only beside its id, the number of samples and the
seed: numbers of two extractors are never compared, nor with published ones, which use Inception.

Letters: N samples, D features, H and W pixels. Pictures are [N, 3, H, W] in [0, 1]. Nothing here opens a model or draws
from a global random generator. A value that cannot be computed because a picture or latent is not finite is NaN, and
`finite_or_none` turns it into the null of a report.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor, nn

from dcomp import UsageError

MAX_DB = 100.0  # PSNR of identical pictures. 8-bit rounding alone makes 59 dB, so nothing visible lies above the cap
SSIM_WINDOW = 11  # side of the Gaussian window, and so of the smallest picture that has an SSIM
FLAT_RANGE = 1 / 255  # a picture whose channels each span less than one 8-bit level shows nothing
ExtractorName = Literal["random-conv", "pixel"]
EXTRACTORS: tuple[ExtractorName, ...] = get_args(ExtractorName)


def relative_errors(original: Tensor, compressed: Tensor) -> Tensor:
    """Return ||compressed - original|| / ||original|| of each sample, fp64 [N].

    A sample of zeros has error 0 when matched and infinity otherwise; one that is not finite on either side has NaN.
    """
    _same_shape(original, compressed)
    a, b = original.double().flatten(1), compressed.double().flatten(1)
    distance, size = (b - a).norm(dim=1), a.norm(dim=1)
    return torch.where(distance == 0, distance, distance / size)


def geometric_mean(errors: Tensor) -> float:
    """Return the geometric mean of errors, those below 1e-12 as 1e-12: in a mean, the few worst would decide alone."""
    return float(errors.clamp(min=1e-12).log().mean().exp())


def mean_squared_errors(original: Tensor, compressed: Tensor) -> Tensor:
    """Return the mean squared error of each picture, fp64 [N]."""
    _same_shape(original, compressed)
    return (compressed.double() - original.double()).square().flatten(1).mean(1)


def decibels(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB for pictures in [0, 1], at most `MAX_DB`.

    The mean of `decibels(mse)` is the headline PSNR: every picture counts the same. `decibels(mse.mean())` is another
    number, that of the worst pictures in effect, and reports name it apart.
    """
    return (-10 * mse.double().log10()).clamp(max=MAX_DB)


def structural_similarities(original: Tensor, compressed: Tensor) -> Tensor | None:
    """Return the SSIM of each picture, fp64 [N], or None for pictures smaller than its window.

    Source:
        Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity; Gaussian window of
        11 pixels with sigma 1.5.
    """
    _same_shape(original, compressed)
    if min(original.shape[-2:]) < SSIM_WINDOW:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    # fp64: in fp32 the variances of near-constant windows cancel, and identical pictures get less than 1.
    value = structural_similarity_index_measure(
        compressed.double(), original.double(), data_range=1.0, reduction="none", sigma=1.5, kernel_size=SSIM_WINDOW
    )
    assert isinstance(value, Tensor)
    return value.double().reshape(-1)


@dataclass(frozen=True)
class Health:
    """Pictures that are broken in a way that averages hide.

    Attributes:
        flat: number of pictures without content: every channel spans less than one 8-bit level.
        non_finite: number of pictures with a NaN or an infinity.
    """

    flat: int = 0
    non_finite: int = 0

    def __add__(self, other: "Health") -> "Health":
        return Health(self.flat + other.flat, self.non_finite + other.non_finite)


def examine(images: Tensor) -> Health:
    """Count flat and non-finite pictures; one that is not finite is not also flat."""
    pixels = images.flatten(2)
    finite = pixels.isfinite().all(2).all(1)
    spans = pixels.amax(2) - pixels.amin(2)
    flat = finite & (spans < FLAT_RANGE).all(1)
    return Health(flat=int(flat.sum()), non_finite=int((~finite).sum()))


class FeatureExtractor(nn.Module):
    """Pictures -> features, the same on every machine.

    Attributes:
        id: name, version and seed: what makes two numbers comparable.
        num_features: D.
    """

    def __init__(self, extractor_id: str, num_features: int) -> None:
        super().__init__()
        self.id = extractor_id
        self.num_features = num_features


class RandomConv(FeatureExtractor):
    """A convolution net with fixed random weights: channel means at four scales, D = 64.

    Responds to edges, texture and colour, not to meaning. Good for noticing that a set of pictures has changed, no
    substitute for a trained network.
    """

    widths = (8, 16, 16, 24)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(f"random-conv/1?seed={seed}", sum(self.widths))
        # The legacy generator: its stream is frozen by numpy's policy, that of torch is not.
        random = np.random.RandomState(seed)
        inputs = 3
        for number, outputs in enumerate(self.widths):
            weight = random.standard_normal((outputs, inputs, 3, 3)) * math.sqrt(2 / (inputs * 9))
            self.register_buffer(f"weight{number}", torch.from_numpy(weight).float())
            inputs = outputs

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features [N, 64] of pictures [N, 3, H, W] in [0, 1]."""
        x = images.float() * 2 - 1
        means = []
        for number in range(len(self.widths)):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.get_buffer(f"weight{number}")).relu()
            means.append(x.mean((2, 3)))
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(means, 1)


class PixelStatistics(FeatureExtractor):
    """Colour on a 4 x 4 grid, spread and gradient of each channel: D = 57."""

    def __init__(self) -> None:
        super().__init__("pixel/1", 4 * 4 * 3 + 3 + 6)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features [N, 57] of pictures [N, 3, H, W] in [0, 1]."""
        x = images.float()
        grid = F.adaptive_avg_pool2d(x, 4).flatten(1)
        spread = x.flatten(2).std(2, unbiased=False)
        across = x.diff(dim=3).abs().mean((2, 3))
        down = x.diff(dim=2).abs().mean((2, 3))
        return torch.cat([grid, spread, across, down], 1)


def open_extractor(name: str) -> FeatureExtractor:
    """Return the feature extractor of that name."""
    if name == "random-conv":
        return RandomConv()
    if name == "pixel":
        return PixelStatistics()
    raise UsageError(f"There is no feature extractor '{name}'", remedy=f"Choose one of {', '.join(EXTRACTORS)}.")


@dataclass(frozen=True)
class FeatureDistance:
    """Distance of two sets of pictures, with all that it depends on.

    Attributes:
        fid: Fréchet distance of two Gaussians fitted to the features; biased upwards when N is not far above D.
        kid, kid_std: kernel distance, mean and standard deviation over subsets; unbiased, so it may be below zero.
        subset_size: samples of each of KID's subsets.
        extractor: id of the feature extractor.
        samples: N of each set.
        seed: draws KID's subsets.
    """

    fid: float
    kid: float
    kid_std: float
    subset_size: int
    extractor: str
    samples: int
    seed: int


def feature_distance(original: Tensor, compressed: Tensor, extractor: str, seed: int = 0) -> FeatureDistance:
    """Compute FID and KID from features [N, D], however many pieces they were computed in.

    Source:
        Heusel et al. 2017 (FID); Binkowski et al. 2018 (KID, cubic polynomial kernel).
    """
    samples = min(len(original), len(compressed))
    if samples < 2:
        raise UsageError(f"FID and KID need at least 2 samples, not {samples}", remedy="Ask for more samples.")
    if not (original.isfinite().all() and compressed.isfinite().all()):
        return FeatureDistance(math.nan, math.nan, math.nan, 0, extractor, samples, seed)
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    subset_size = min(1000, max(2, samples // 2))
    features = _Features(original.shape[1])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        torch.manual_seed(seed)  # KID draws its subsets from the global generator
        fid = FrechetInceptionDistance(feature=features)
        kid = KernelInceptionDistance(feature=features, subsets=50, subset_size=subset_size)
        for metric in (fid, kid):
            metric.update(original.double(), real=True)
            metric.update(compressed.double(), real=False)
        kid_mean, kid_std = kid.compute()
        # A distance: the square roots of eigenvalues that are zero but for rounding can make it -1e-8.
        return FeatureDistance(
            max(0.0, float(fid.compute())), float(kid_mean), float(kid_std), subset_size, extractor, samples, seed
        )


def finite_or_none(value: float | Tensor) -> float | None:
    """Return a float for a report, None when it is NaN or infinite (JSON has neither)."""
    number = float(value)
    return number if math.isfinite(number) else None


class _Features(nn.Module):
    """Passes features through, for metrics that insist on computing them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _same_shape(original: Tensor, compressed: Tensor) -> None:
    if original.shape != compressed.shape:
        raise UsageError(
            f"The two sides made results of different shapes, {list(original.shape)} and {list(compressed.shape)}",
            remedy="Compare a compressed pipeline with the one that it was made from, at the same picture size.",
        )
