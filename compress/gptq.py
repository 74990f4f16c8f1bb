"""Second-order rounding: codes of a weight chosen by what they do to the layer's output, on a grid that is given.

With `H = X^T X / rows` of the layer's inputs X, a channel's mean squared output error is `d^T H d`, where d is what its
weights are off. Columns are those of the canonical weight `[O, *taps, I]` flattened, input channels fastest; a row of X
is what one output position reads. Letters: O output channels, I input channels, K columns. Grids come from
`calibrate/range_search.py`; here the codes are chosen anew, and at the end the scale of each channel.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp import DcompError
from dcomp.compress.code_grid import CodeGrid
from dcomp.kernels.packing import PackedWeight

WIDEST = 4608  # columns of one block of H: 512 channels of a 3x3 convolution, 81 MiB
ROWS_PER_COLUMN, FEWEST_ROWS = 8, 4096

_COLUMNS = 128  # between two updates of all later columns; the paper's block size
_PATCH_ELEMENTS = 1 << 22  # of X in memory at once
_STRIPE = 256  # columns of H computed at once, from the diagonal down: the rest follows from its symmetry
_IMAGE_ELEMENTS = 1 << 24  # of the input copied at once, to cut patches from


class MomentsError(DcompError):
    """Inputs whose second moments cannot be taken."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs.

    Attributes:
        blocks: fp32 `[K_b, K_b]` for consecutive sets of input channels, each with all of its taps. One set if K is at
            most `WIDEST`; else what lies between two sets is left out.
        rows: how many rows of X they are the mean of.
    """

    blocks: tuple[Tensor, ...]
    rows: int


def input_moments(
    layer: nn.Linear | nn.Conv2d, x: Tensor, part: slice | None = None, *, max_rows: int | None = None
) -> Moments:
    """Measure the second moments of a layer's inputs. Equal inputs give equal moments; temporaries are bounded.

    Args:
        layer: gives the geometry; its weight is not read. A convolution pads by zeros and has one group.
        x: float `[..., I]` of a linear layer, `[N, I, H, W]` of a convolution.
        part: the input channels to look at, a slice of step 1; None for all.
        max_rows: rows of X that are used, spread over all; by default 8 for each column of a block, at least 4096.

    Raises:
        MomentsError: there are no inputs, or one is NaN, infinite, or too large to be squared.
    """
    taps = 1
    if isinstance(layer, nn.Conv2d):
        assert layer.groups == 1
        assert layer.padding_mode == "zeros"
        taps = math.prod(layer.kernel_size)
        x = x.movedim(1, -1)
    x = x.detach()[..., part or slice(None)]
    channels = x.shape[-1]
    width = -(-channels // -(-channels * taps // WIDEST))
    wanted = max_rows or max(FEWEST_ROWS, ROWS_PER_COLUMN * width * taps)
    blocks = []
    for channel_set in x.split(width, -1):
        rows, columns = 0, taps * channel_set.shape[-1]
        total = torch.zeros(columns, columns, device=x.device)
        for chunk in _rows(layer, channel_set, wanted):
            for first in range(0, columns, _STRIPE):
                stripe = slice(first, first + _STRIPE)
                total[first:, stripe].addmm_(chunk[:, first:].t(), chunk[:, stripe])
            rows += len(chunk)
        blocks.append((total.tril() + total.tril(-1).t()).div_(rows))
    if not all(block.isfinite().all() for block in blocks):
        raise MomentsError(
            "The inputs of a layer are missing, not finite, or too large to be squared",
            where=str(layer),
            remedy="Run the model in float32 and find the first layer whose output is not finite.",
        )
    return Moments(tuple(blocks), rows)


def metric_error(weight: Tensor, packed: PackedWeight, moments: Moments) -> Tensor:
    """Return the mean squared output error of each output channel, fp64 `[O]`.

    Args:
        weight: fp32 `[O, *taps, I]`.
        packed: what stands for it.
        moments: of the layer's inputs.
    """
    difference = packed.dequantize().double() - weight.double()
    return _products(difference, moments, difference)[0]


def round_gptq(weight: Tensor, start: PackedWeight, moments: Moments, damp: float = 0.01) -> PackedWeight:
    """Choose codes column by column, each column making up for the errors of those before it.

    Columns with the largest inputs come first; a dead one, whose input is always 0, is rounded to nearest. Then the
    scale of each channel is fitted to its codes by least squares. Of the start, the new codes, and the new codes with
    the new scale a channel keeps what is best, so `metric_error` of no channel is above that of the start.

    Args:
        weight: fp32 `[O, *taps, I]`.
        start: the grid, that is scales and multipliers, and the codes to beat.
        moments: of the layer's inputs.
        damp: part of the mean of H's diagonal that is added to it; more where H is too near to singular.

    Source:
        Frantar et al. 2023, GPTQ (algorithm 1); the order of columns is that of its reference code.
    """
    weight = weight.detach().float()
    grid = CodeGrid.of(start)
    steps = grid.values(torch.ones_like(grid.codes), start.scale)
    chosen = [
        _choose_codes(w, s, grid.low, grid.high, h.double(), damp)
        for w, s, h in zip(_by_block(weight, moments), _by_block(steps, moments), moments.blocks, strict=True)
    ]
    new_codes = torch.cat([c.view(*weight.shape[:-1], -1) for c in chosen], -1)
    new_scale = _fitted_scale(weight, grid.values(new_codes, torch.ones_like(start.scale)), start.scale, moments)

    codes, scale = grid.codes, start.scale
    least = metric_error(weight, start, moments)
    for tried in (start.scale, new_scale):
        error = metric_error(weight, grid.repack(new_codes, tried), moments)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(_per_channel(better, codes), new_codes, codes)
        scale = torch.where(better, tried, scale)
    return grid.repack(codes, scale)


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor, wanted: int) -> Iterator[Tensor]:
    """Yield chunks of at most `wanted` rows of X, fp32 `[rows, K]`; channels of `x` are last."""
    if isinstance(layer, nn.Conv2d):
        yield from _patches(layer, x, wanted)
        return
    flat = x.reshape(-1, x.shape[-1])
    for rows in _spread(len(flat), wanted).split(max(1, _PATCH_ELEMENTS // x.shape[-1])):
        yield flat[rows.to(x.device)].float()


def _patches(conv: nn.Conv2d, x: Tensor, wanted: int) -> Iterator[Tensor]:
    """Likewise of inputs `[N, H, W, I]`, cut out at output positions only that are wanted."""
    samples, height, width, channels = x.shape
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    height, width = height + top + bottom, width + left + right
    out_height, out_width = (
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, dilation, taps, stride in zip(
            (height, width), conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    )
    positions = out_height * out_width
    down, across = (torch.arange(k) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    taps = (down[:, None] * width + across).flatten()
    chosen = _spread(samples * positions, wanted)
    together = max(1, _IMAGE_ELEMENTS // (height * width * channels))
    for first in range(0, samples, together):
        image = functional.pad(x[first : first + together].float(), (0, 0, left, right, top, bottom))
        image = image.reshape(-1, channels)
        here = chosen[(chosen >= first * positions) & (chosen < (first + together) * positions)] - first * positions
        for place in here.split(max(1, _PATCH_ELEMENTS // (len(taps) * channels))):
            sample, row, column = place // positions, place % positions // out_width, place % out_width
            corner = (sample * height + row * conv.stride[0]) * width + column * conv.stride[1]
            yield image[(corner[:, None] + taps).to(x.device)].flatten(1)


def _spread(total: int, count: int) -> Tensor:
    """Return `min(count, total)` ascending numbers below `total`: one at random, always the same, of each equal part.

    Equal distances would meet the same columns of every picture.
    """
    if total <= count:
        return torch.arange(total)
    edges = torch.arange(count + 1) * total // count
    share = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return edges[:-1] + (share * edges.diff()).long()


def _by_block(tensor: Tensor, moments: Moments) -> list[Tensor]:
    """Cut `[O, *taps, I]` into the columns `[O, K_b]` of each block."""
    taps = math.prod(tensor.shape[1:-1])
    return [part.flatten(1) for part in tensor.split([len(block) // taps for block in moments.blocks], -1)]


def _products(a: Tensor, moments: Moments, *others: Tensor) -> list[Tensor]:
    """Return `a^T H b` of each output channel, `[O]`, for fp64 tensors `[O, *taps, I]`."""
    images = [part @ block.double() for part, block in zip(_by_block(a, moments), moments.blocks, strict=True)]
    return [
        torch.stack([(i * part).sum(1) for i, part in zip(images, _by_block(b, moments), strict=True)]).sum(0)
        for b in others
    ]


def _choose_codes(weight: Tensor, steps: Tensor, low: int, high: int, h: Tensor, damp: float) -> Tensor:
    """Return the codes `[O, K]`, as floats, of a weight `[O, K]` on a grid of steps `[O, K]`."""
    order = h.diagonal().argsort(descending=True, stable=True)
    factor = _error_factor(h[order][:, order], damp).float()
    # Transposed, so that a column of all channels is contiguous.
    w, s = weight.t()[order].contiguous(), steps.t()[order].contiguous()
    codes = torch.empty_like(w)
    for first in range(0, len(w), _COLUMNS):
        last = min(first + _COLUMNS, len(w))
        errors = torch.empty_like(w[first:last])
        for i in range(first, last):
            codes[i] = (w[i] / s[i]).round_().clamp_(low, high)
            error = torch.addcmul(w[i], codes[i], s[i], value=-1, out=errors[i - first])
            w[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
        w[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return torch.empty_like(codes).index_copy_(0, order, codes).t()


def _error_factor(h: Tensor, damp: float) -> Tensor:
    """Return U `[K, K]`, upper triangular with ones on the diagonal: `w_j -= error_i * U_ij` for all j > i.

    Its rows are those of the upper Cholesky factor of the inverse of H, each divided by its diagonal element. With
    `H = R R^T` and R upper triangular that factor is the inverse of R, so that H itself is never inverted.
    """
    diagonal = h.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while True:
        damped = h + torch.diag(torch.where(live, damp * mean, mean))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and lower.isfinite().all():
            break
        damp = max(10 * damp, 1e-6)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    factor: Tensor = upper / upper.diagonal()[:, None]
    return factor


def _fitted_scale(weight: Tensor, image: Tensor, scale: Tensor, moments: Moments) -> Tensor:
    """Return `w^T H c / c^T H c` for codes c times multipliers, or the old scale where that is no scale."""
    image = image.double()
    cross, square = _products(image, moments, weight.double(), image)
    fitted = (cross / square).float()
    return torch.where(fitted.isfinite() & (fitted >= torch.finfo(torch.float32).tiny), fitted, scale)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
