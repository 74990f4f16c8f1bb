"""Exact changes of a layer's coordinates that make it easier to quantize.

Each keeps the float function. Smoothing: `y = (x / sigma) (sigma W)`. Rotation: `y = (x H) (W H)^T` with H orthonormal
and symmetric. Directions: `y = (x - x D^T D) W^T + (x D^T) P^T`, the part of the input along D in float. Low-rank
branch: `W = up down + residual`. Weights are canonical, `[O, *taps, I]` with input channels last. What is applied to
inputs while running is the business of the layers; what makes the inputs, that of `folding.py`; nothing here keeps
anything.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.compress.moments import spread_rows
from dcomp.kernels import qparams, reference

Quantizer = Callable[[Tensor], Tensor]
"""Quantizes and dequantizes; the shape stays."""

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTOR_LIMIT = 256.0  # a factor lies between 1 / limit and limit

LEAST_GAIN = 0.01  # of the squared error: less is not worth a product for each input
_SMALL = 256  # rows or columns up to which a whole singular value decomposition is cheap
_ROWS = 4096  # of inputs, or 8 for each channel if that is more, by which directions are found


def smoothing_factors(x_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Return sigma `[I]`, fp32: inputs are divided by it and weights multiplied.

    `sigma = x_absmax^alpha / weight_absmax^(1 - alpha)`, scaled to a geometric mean of 1, then limited. A channel whose
    inputs or weights are all zero has the factor 1.

    Args:
        x_absmax: largest magnitude of each input channel, `[I]`.
        weight_absmax: likewise of the weights that meet it.
        alpha: 0 to 1; how much of the input's range goes to the weight.

    Source:
        Xiao et al. 2023, SmoothQuant (equation 4).
    """
    x_absmax, weight_absmax = x_absmax.double(), weight_absmax.double()
    live = (x_absmax > 0) & (weight_absmax > 0)
    exponent = alpha * x_absmax[live].log() - (1 - alpha) * weight_absmax[live].log()
    sigma = torch.ones(x_absmax.shape, device=x_absmax.device)
    sigma[live] = (exponent - exponent.mean()).exp().clamp(1 / FACTOR_LIMIT, FACTOR_LIMIT).float()
    return sigma


@dataclass(frozen=True)
class Reader:
    """A layer that reads a tensor, as the choice of smoothing factors sees it.

    Attributes:
        layer: gives the geometry; its weight is not read.
        weight: float `[O, *taps, I]`.
        quantize_input: simulates the input's quantizer, with what else happens to inputs before it.
        quantize_weight: likewise for weights.
    """

    layer: nn.Linear | nn.Conv2d
    weight: Tensor
    quantize_input: Quantizer
    quantize_weight: Quantizer

    def error(self, x: Tensor, sigma: Tensor | None) -> float:
        """Return the squared error of the layer's output when its input `x` is divided by sigma."""
        exact = _output(self.layer, self.weight, x)
        weight = self.weight if sigma is None else self.weight * sigma
        inputs = x if sigma is None else x * (1 / sigma).view(-1, *[1] * (x.ndim - 2 if self.channel_axis == 1 else 0))
        y = _output(self.layer, self.quantize_weight(weight), self.quantize_input(inputs))
        return float((y - exact).double().square().sum())

    @property
    def channel_axis(self) -> int:
        """Where the channels of an input are."""
        return 1 if isinstance(self.layer, nn.Conv2d) else -1


def choose_smoothing(readers: Sequence[Reader], x: Tensor, grid: Sequence[float] = ALPHAS) -> Tensor | None:
    """Choose the smoothing factors of a tensor with the least squared error of what is made of it.

    The errors of several layers are added up, each in units of what it is without smoothing.

    Args:
        readers: all layers that read the tensor with these factors.
        x: a sample of it, `[..., I]`, or `[N, I, H, W]` of convolutions.
        grid: values of alpha; 0 stands for no smoothing, which is always tried.

    Returns:
        sigma, fp32 `[I]`; None where no factors lower the error by 1 %.
    """
    x = x.detach().float()
    unsmoothed = [reader.error(x, None) for reader in readers]

    def relative(errors: Iterable[float]) -> float:
        return sum(error / max(own, sys.float_info.min) for error, own in zip(errors, unsmoothed, strict=True))

    x_absmax = x.abs().movedim(readers[0].channel_axis, -1).flatten(0, -2).amax(0)
    weight_absmax = torch.stack([reader.weight.abs().flatten(0, -2).amax(0) for reader in readers]).amax(0)
    best, least = None, (1 - LEAST_GAIN) * relative(unsmoothed)
    for alpha in grid:
        if alpha:
            sigma = smoothing_factors(x_absmax, weight_absmax, alpha)
            found = relative(reader.error(x, sigma) for reader in readers)
            if found < least:
                best, least = sigma, found
    return best


def rotate_weight(weight: Tensor, block: int) -> Tensor:
    """Rotate the input channels of a weight `[O, *taps, I]`, in blocks along them, as its inputs will be."""
    return qparams.hadamard(weight, block)


def principal_directions(x: Tensor, count: int) -> Tensor:
    """Return the directions that hold most of the energy of inputs `[..., I]`: orthonormal rows, fp16 `[count, I]`.

    The mean of the inputs is part of what they hold. Without it and its like, what is left to round is small: a
    quantizer's error is a part of the values that it sees. Directions beyond those that the inputs have are zeros.

    Source:
        Ours; it does to inputs what the low-rank branch of SVDQuant does to weights.
    """
    rows = x.detach().float().reshape(-1, x.shape[-1])
    rows = rows[spread_rows(len(rows), max(_ROWS, 8 * rows.shape[1])).to(x.device)]  # enough to tell them apart
    largest = rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    _, _, v = _decomposed(rows / largest, count)
    return functional.pad(v[:, :count].t(), (0, 0, 0, count - min(count, v.shape[1]))).half()


def carried_weight(weight: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a weight between the directions of its input and the rest.

    With D as it is stored, not quite orthonormal, `P = W D^T (2 - D D^T)` and `W - W D^T D` give the function of W.

    Args:
        weight: float `[O, *taps, I]`.
        directions: D, fp16 `[d, I]`.

    Returns:
        P as int8 codes `[O, *taps, d]` and a scale for each direction, fp32 `[d]`; and what is left of the weight for
        the rest of the input, fp32.
    """
    d = directions.float()
    along = weight @ d.t()
    p = along @ (2 * torch.eye(len(d), device=d.device) - d @ d.t())
    codes, scale = qparams.quantize_token(p.flatten(0, -2).t())
    return codes.t().reshape(p.shape).contiguous(), scale, weight - along @ d


def low_rank_branch(
    weight: Tensor, rank: int, quantize: Quantizer, iterations: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into a branch of low rank and a residual that loses least when it is quantized.

    The branch starts as the best approximation of the weight, then of the weight without the quantized residual, and so
    on until the error grows; the best of all is returned.

    Args:
        weight: float `[O, *taps, I]`.
        rank: of the branch; one beyond what the weight can have is filled up with zeros.
        quantize: quantizes and dequantizes a residual.
        iterations: most branches tried.

    Returns:
        down (fp16 `[rank, *taps, I]`), up (fp16 `[O, rank]`), and the residual (fp32, like the weight): what the branch
        as it is stored leaves of the weight.

    Source:
        Li et al. 2025, SVDQuant (section 4.2); the alternation is that of its reference code.
    """
    rows = weight.detach().float().flatten(1)
    quantized = torch.zeros_like(rows)
    least = math.inf
    for _ in range(max(1, iterations)):
        down, up = _factors(rows - quantized, rank)
        residual = rows - up.float() @ down.float()
        quantized = quantize(residual.view(weight.shape)).flatten(1)
        error = float((residual - quantized).double().square().sum())
        if not error < least:
            break
        best, least = (down, up, residual), error
    down, up, residual = best
    return down.view(rank, *weight.shape[1:]), up, residual.view(weight.shape)


def _output(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    shape: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return reference.float_conv2d(x, weight.permute(0, 3, 1, 2), None, *shape)


def _factors(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return down (fp16 `[rank, K]`) and up (fp16 `[O, rank]`) of the best approximation of `rows` `[O, K]`.

    Both carry the square roots of the singular values, so that neither leaves the range of fp16.
    """
    u, s, v = _decomposed(rows, rank)
    root = s[:rank].sqrt()
    missing = rank - len(root)
    up, down = u[:, :rank] * root, (v[:, :rank] * root).t()
    return functional.pad(down, (0, 0, 0, missing)).half(), functional.pad(up, (0, missing)).half()


def _decomposed(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition `u, s, v` of a matrix, of a large one little more than its first part."""
    if min(rows.shape) > max(_SMALL, 4 * rank):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(rows, q=rank + 16, niter=4)
            return u, s, v
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    return u, s, vh.t()
