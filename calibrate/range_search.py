"""Scales of weights: the codes and scales that bring a weight nearest to its float values.

8 bits: `w ~ q * scale[o]`, `q` in -127..127. 4 bits: `w ~ q * multiplier[o, g] * scale[o]`, `q` in -8..7 and
`multiplier` in -15..15 without 0; its sign decides on which side of a group the lowest code lies. Letters: output
channels O, input channels I, groups g. Inputs play no part here; a weight that is not finite is refused.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from dcomp import DcompError
from dcomp.kernels.packing import MULTIPLIER_LIMIT, PackedWeight, pack_int4

RangeMethod = Literal["mse", "minmax"]

_CHUNK = 1 << 18  # weights times scales tried at once: a few temporaries of this size fit into the cache
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Near 1 a scale wins because many values happen to lie near its multiples, further down because outliers are clipped.
_FACTORS_8 = (1.0, *(1.02 - 0.004 * k for k in range(21) if k != 5), *(0.9 - 0.05 * k for k in range(11)))
# Base scales relative to that at which the group with the largest values just fits. Those above 1 serve its neighbours:
# they move the lattice of the 15 multiples, and the largest group often does better with its sign turned.
_BASES_4 = (1.0, 1.15, 1.12, 1.09, 1.06, 1.03, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82)
_MULTIPLIERS_TRIED = 9


class RangeError(DcompError):
    """A weight that has no range."""


def search_weight(
    weight: Tensor, bits: int, group_size: int | None, method: RangeMethod = "mse", *, name: str | None = None
) -> PackedWeight:
    """Quantize a weight to its nearest codes.

    `minmax` takes scales from the largest magnitudes. `mse` tries several scales per channel (and, for 4 bits, several
    multipliers of both signs per group), keeps those with the least squared error and fits the channel's scale to the
    codes by least squares. Multiplying a weight by a power of two changes no code.

    Args:
        weight: float32 `[O, *taps, I]`, input channels last.
        bits: 4 or 8.
        group_size: input channels that share a multiplier, for 4 bits; None for 8.
        method: how scales are chosen.
        name: the layer, for errors.

    Raises:
        RangeError: the weight is NaN or infinite somewhere.

    Source:
        Two-level scales: Dai et al. 2021, VS-Quant (section 4). Grid search of the range: Nagel et al. 2021, A White
        Paper on Neural Network Quantization (section 3.1).
    """
    channels, in_channels = weight.shape[0], weight.shape[-1]
    rows = weight.detach().float().reshape(channels, -1, in_channels)
    if bits == 4:
        assert group_size is not None
        rows = pad(rows, (0, -in_channels % group_size))
        rows = rows.reshape(channels, -1, group_size)
    codes, scales, multipliers = [], [], []
    tried = len(_BASES_4) if bits == 4 and method == "mse" else 1
    for chunk in rows.split(max(1, _CHUNK // max(1, tried * rows[0].numel()))):
        peak = chunk.abs().amax((1, 2))
        if not torch.isfinite(peak).all():
            raise RangeError("A weight is NaN or infinite", where=name, remedy="Repair the model or download it again.")
        # Searched with all rows scaled to 0.5..1 by a power of two, so that no square under- or overflows.
        exponent = torch.frexp(peak).exponent
        unit = torch.ldexp(chunk, -exponent[:, None, None])
        if bits == 4:
            scale, multiplier = _search_4(unit, method)
            multipliers.append(multiplier.to(torch.int8))
        else:
            scale, multiplier = _search_8(unit.flatten(1), method), torch.ones_like(unit[:, :, 0])
        scale = torch.where(peak > 0, torch.ldexp(scale, exponent).clamp(min=_SMALLEST_SCALE), torch.ones_like(peak))
        low, high = (-8, 7) if bits == 4 else (-127, 127)
        steps = scale[:, None, None] * multiplier[:, :, None]
        codes.append((chunk / steps).round_().clamp_(low, high).to(torch.int8))
        scales.append(scale)
    shape = weight.shape[:-1]
    code = torch.cat(codes).reshape(*shape, -1)
    if bits == 8:
        return PackedWeight(code, torch.cat(scales), None, bits=8, group_size=None, in_channels=in_channels)
    return PackedWeight(
        pack_int4(code),
        torch.cat(scales),
        torch.cat(multipliers).reshape(*shape, -1),
        bits=4,
        group_size=group_size,
        in_channels=in_channels,
    )


def _search_8(rows: Tensor, method: RangeMethod) -> Tensor:
    """Return the scale of each row `[O, K]`, whose largest magnitude is in 0.5..1 (or 0)."""
    full = (rows.abs().amax(1) / 127).clamp(min=_SMALLEST_SCALE)
    if method == "minmax":
        return full

    scale, least = full, torch.full_like(full, torch.inf)
    for factor in _FACTORS_8:
        tried = full * factor
        y = rows / tried[:, None]
        error = y.round().clamp_(-127, 127).sub_(y).square_().sum(1).mul_(tried.square())
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    codes = (rows / scale[:, None]).round_().clamp_(-127, 127)
    return _least_squares(rows, codes, scale)


def _search_4(groups: Tensor, method: RangeMethod) -> tuple[Tensor, Tensor]:
    """Return the scale `[O]` and the multipliers `[O, G]` of groups `[O, G, g]` scaled like the rows of `_search_8`."""
    high, low = groups.amax(2), groups.amin(2)
    peak = torch.maximum(high, -low) / 8
    full = (peak.amax(1) / MULTIPLIER_LIMIT).clamp(min=_SMALLEST_SCALE)
    if method == "minmax":
        multiplier = (peak / full[:, None]).round().clamp(1, MULTIPLIER_LIMIT)
        return full, torch.where(high > -low, -multiplier, multiplier)
    tried = full * torch.tensor(_BASES_4)[:, None]
    error, tried_multiplier = _best_multipliers(groups, peak, tried)
    best = error.sum(2).argmin(0, keepdim=True)
    scale = tried.gather(0, best)[0]
    multiplier = tried_multiplier.take_along_dim(best[:, :, None], 0)[0]
    steps = scale[:, None, None] * multiplier[:, :, None]
    codes = (groups / steps).round_().clamp_(-8, 7).mul_(multiplier[:, :, None])
    return _least_squares(groups.flatten(1), codes.flatten(1), scale), multiplier


def _best_multipliers(groups: Tensor, peak: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least squared error and its signed multiplier, both `[B, O, G]`, for each of some scales `[B, O]`.

    Of the 30 only the magnitudes from about 1.2 times down to 0.6 times the one that just fits are tried: outside, all
    levels are too coarse or too much is clipped.
    """
    start = (peak / scales[:, :, None] * 1.2).ceil()
    least, best = torch.full_like(start, torch.inf), torch.ones_like(start)
    # Values of a group first, so that sums run over whole tensors; buffers, because memory is what this waits for.
    values = groups.movedim(2, 0).contiguous()[:, None]
    y, rounded, off = (torch.empty(len(values), *start.shape) for _ in range(3))
    for j in range(_MULTIPLIERS_TRIED):
        magnitude = (start - j).clamp_(1, MULTIPLIER_LIMIT)
        step = magnitude * scales[:, :, None]
        torch.round(torch.div(values, step, out=y), out=rounded)
        # A negative multiplier turns the range -8..7 of the codes into -7..8 of the values.
        for sign, low, high in ((1, -8, 7), (-1, -7, 8)):
            error = torch.clamp(rounded, low, high, out=off).sub_(y).square_().sum(0).mul_(step.square())
            best = torch.where(error < least, magnitude * sign, best)
            least = torch.minimum(error, least)
    return least, best


def _least_squares(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Fit the scale to fixed codes; the error cannot grow, nor when each value then moves to its nearest code."""
    squares = codes.square().sum(1)
    return torch.where(squares > 0, (rows * codes).sum(1) / squares.clamp(min=1), scale)
