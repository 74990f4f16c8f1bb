"""Affine arithmetic between floats and integer codes: quantize, dequantize, rescale; inputs turned and taken apart.

One rule for all backends: `q = clamp(rint(x * (1 / scale)) + zero)` in float32, ties to even, where `1 / scale` is
rounded before it is used. Weights are `codes * scale`. Finding a scale for a layer is not done here; only scales that
are known when the values are: of a token, a sample, or the groups of a token or sample. NaN turns into an arbitrary
code of a static range, and into a scale of NaN, hence outputs of NaN, of that token or sample alone; an infinity makes
them infinite or NaN.

Letters: N tokens or samples with a scale each, M rows in each, I channels, G = I / group rounded up.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

TOKEN_LIMIT = 127  # symmetric: -128 is never a token's code
MULTIPLIER_LIMIT = 15  # 8 * 15 = 120: a code times its multiplier is again an int8 code
CODE_STEPS = 15  # between the 16 codes of 4 bits
LARGEST_ROTATION = 128

# Steps are this part of what the range of a group calls for: what clipping its tips costs is won back by finer steps
# for all others. With normal values, or SiLU's or GELU's of them, in groups of 32 the best parts are 0.95 to 1, and a
# multiplier of 1 is best for steps of up to 1.1 to 1.4.
_REACH = 0.97
_SLACK = 0.2
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the inverse of anything smaller may be infinite


def smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    """Return `x` in fp32 with each channel multiplied by its factor, or `x` itself if there are none.

    Args:
        x: images `[N, I, H, W]`, or anything else with channels last; any float dtype.
        smooth: fp32 `[I]`.
    """
    if smooth is None:
        return x
    return x.float() * (smooth.view(-1, 1, 1) if x.ndim == 4 else smooth)


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return uint8 codes of a float tensor.

    Args:
        x: any shape and float dtype.
        scale: fp32, broadcasts against `x`.
        zero: uint8, the code of real 0; broadcasts against `x`.
        smooth: fp32 `[I]`, see `smoothed`.
    """
    x = smoothed(x, smooth)
    return x.float().mul(1 / scale).round_().add_(zero).clamp_(0, 255).to(torch.uint8)


def dequantize_static(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the fp32 values that uint8 codes stand for."""
    return codes.float().sub_(zero).mul_(scale)


def token_scale(x: Tensor) -> Tensor:
    """Return the fp32 scale of each row of the last axis: its largest magnitude over 127.

    A row of zeros, or so small that the inverse scale would not be finite, has scale 1 and codes 0.
    """
    if x.shape[-1] == 0:
        return torch.ones(x.shape[:-1], device=x.device)
    x = x.float()
    scale = torch.maximum(x.amax(-1), -x.amin(-1)) / TOKEN_LIMIT
    return scale.masked_fill_(scale < _SMALLEST_SCALE, 1.0)


def quantize_token(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 codes of a float tensor, smoothed, and the scale of each of its rows, fp32 `x.shape[:-1]`."""
    x = x if smooth is None else x.float() * smooth
    scale = token_scale(x)
    codes = x.float().mul((1 / scale).unsqueeze(-1)).round_().clamp_(-TOKEN_LIMIT, TOKEN_LIMIT)
    return codes.to(torch.int8), scale


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of `x`: channels-last where it is that, else contiguous."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def sample_range(lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale fp32 and zero uint8 of ranges, widened to hold 0 and cut into 255 steps.

    A range of zeros, or so small that the inverse scale would not be finite, has scale 1 and zero 0.

    Args:
        lowest: fp32, any shape; the smallest value of each range.
        highest: fp32, likewise; the largest.
    """
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    # Divided first: the width of a range of finite values may be infinite.
    scale = highest / 255 - lowest / 255
    scale.masked_fill_(scale < _SMALLEST_SCALE, 1.0)
    zero = lowest.neg().mul_(1 / scale).round_().nan_to_num_(nan=0.0)
    return scale, zero.to(torch.uint8)


def quantize_sample(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of `x` `[N, ...]` in its memory format, and scale fp32 and zero uint8 `[N]` of its samples.

    A sample's range is that of its values, smoothed, and 0, so real 0 has a code of its own.
    """
    values = smoothed(x, smooth).float()
    if x.shape[1:].numel() == 0:
        lowest = highest = torch.zeros(len(x), device=x.device)
    else:
        axes = tuple(range(1, x.ndim))
        lowest, highest = values.amin(axes), values.amax(axes)
    scale, zero = sample_range(lowest, highest)
    return quantize_static(values, along_first(scale, x.ndim), along_first(zero, x.ndim)), scale, zero


def dequantize_sample(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the fp32 values that uint8 codes `[N, ...]` stand for."""
    return dequantize_static(codes, along_first(scale, codes.ndim), along_first(zero, codes.ndim))


def along_first(values: Tensor, ndim: int) -> Tensor:
    """View `[N]` as `[N, 1, ...]` with `ndim` axes."""
    return values.view(-1, *[1] * (ndim - 1))


def in_groups(x: Tensor, group: int) -> Tensor:
    """Return `[..., I]` as fp32 `[..., G, group]`, with zeros beyond I; a group is never longer than I."""
    x, group = x.float(), max(1, min(group, x.shape[-1]))
    missing = -x.shape[-1] % group
    groups: Tensor = (functional.pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, group))
    return groups


def group_grids(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the grid of 16 evenly spaced values, 0 among them, that holds all but the tips of each group.

    Args:
        groups: fp32 `[..., G, group]`.

    Returns:
        The step between neighbours and the number of them below 0, a whole number from 0 to 15: fp32 `[..., G]`.
    """
    highest, lowest = groups.amax(-1).clamp_(min=0), groups.amin(-1).clamp_(max=0)
    # Divided first: the width of a range of finite values may be infinite.
    step = highest / CODE_STEPS - lowest / CODE_STEPS
    below = (-lowest / step.clamp(min=_SMALLEST_SCALE)).round_().nan_to_num_(nan=0.0).clamp_(max=CODE_STEPS)
    return step.mul_(_REACH), below


def group_limits(below: Tensor) -> Tensor:
    """Return the largest multiplier of a group: all codes, from `-below` to `15 - below`, times it are within 127."""
    return (TOKEN_LIMIT / torch.maximum(below, CODE_STEPS - below)).floor_()


def group_scale(steps: Tensor, below: Tensor) -> Tensor:
    """Return the outer scale fp32 `[N]` of grids `[N, M, G]`: each step is a multiplier of it, or it is 1 of zeros."""
    scale = (steps / group_limits(below)).amax((1, 2))
    return scale.masked_fill_(scale < _SMALLEST_SCALE, 1.0)


def group_multipliers(steps: Tensor, below: Tensor, scale: Tensor) -> Tensor:
    """Return the whole numbers, 1 at least, that times the outer scale are about the steps or above: fp32."""
    multipliers = (steps / scale).sub_(_SLACK).ceil_().clamp_(min=1)
    return torch.minimum(multipliers, group_limits(below))


def quantize_group(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return an int8 image of `x` and the scale of each leading index: `x ~ image * scale`.

    The image is a 4-bit code less its zero, `0..15 - below`, times a multiplier. `group` neighbouring channels share
    zero and multiplier, which are whole numbers found while running and not stored.

    Args:
        x: `[N, M, I]`, any float dtype.
        group: channels that share a grid.
        smooth: fp32 `[I]`, see `smoothed`.

    Returns:
        The image `[N, M, I]`, -127 to 127, and the scale fp32 `[N]`. Zeros have scale 1.

    Source:
        Two-level scales: Dai et al. 2021, VS-Quant (section 4).
    """
    if x.shape[1:].numel() == 0:
        return x.to(torch.int8), torch.ones(len(x), device=x.device)
    x = smoothed(x, smooth)
    steps, below = group_grids(in_groups(x, group))
    scale = group_scale(steps, below)
    return group_image(x, group, steps, below, scale).to(torch.int8), scale


def quantize_nibbles(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the image of `quantize_group` of rows with a scale each is made of: `(codes - zero) * multiplier`.

    Args:
        x: `[M, I]`, any float dtype, with elements.
        group: channels that share a grid.

    Returns:
        Codes, 0 to 15, `[M, I]`, zeros and multipliers `[M, G]`, 0 to 15, all uint8, and the scale fp32 `[M]`. A
        multiplier of 0 is that of a scale that is not finite.
    """
    rows = x.unsqueeze(1)
    image, scale = quantize_group(rows, group)
    steps, below = group_grids(in_groups(rows, group))
    multipliers = group_multipliers(steps, below, along_first(scale, 3)).nan_to_num_(nan=0.0)
    codes = in_groups(image, group) / multipliers.clamp(min=1).unsqueeze(-1) + below.unsqueeze(-1)
    codes = codes.flatten(-2)[..., : x.shape[-1]]
    codes, below, multipliers = (part.squeeze(1).to(torch.uint8) for part in (codes, below, multipliers))
    return codes, below, multipliers, scale


def group_image(x: Tensor, group: int, steps: Tensor, below: Tensor, scale: Tensor) -> Tensor:
    """Return the integers of `quantize_group`, fp32 `[N, M, I]`, for grids `[N, M, G]` and an outer scale `[N]`."""
    multipliers = group_multipliers(steps, below, along_first(scale, 3)).unsqueeze(-1)
    lowest = -below.unsqueeze(-1)
    codes = (in_groups(x, group) * (1 / (multipliers * along_first(scale, 4)))).round_()
    image = torch.minimum(torch.maximum(codes, lowest), lowest + CODE_STEPS).mul_(multipliers)
    return image.flatten(-2)[..., : x.shape[-1]]


def dequantize_group(image: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values that an int8 image `[N, M, I]` stands for."""
    return image.float().mul_(along_first(scale, image.ndim))


def dequantize_token(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values that int8 codes stand for."""
    return codes.float().mul_(scale.unsqueeze(-1))


def fake_quant_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Quantize and dequantize, fp32; the gradient passes straight through."""
    return _straight_through(x, dequantize_static(quantize_static(x.detach(), scale, zero), scale, zero))


def fake_quant_token(x: Tensor) -> Tensor:
    """Quantize and dequantize, fp32; the gradient passes straight through."""
    return _straight_through(x, dequantize_token(*quantize_token(x.detach())))


def fake_quant_sample(x: Tensor) -> Tensor:
    """Quantize and dequantize, fp32; the gradient passes straight through."""
    return _straight_through(x, dequantize_sample(*quantize_sample(x.detach())))


def fake_quant_group(x: Tensor, group: int) -> Tensor:
    """Quantize and dequantize `[N, M, I]`, fp32; the gradient passes straight through."""
    return _straight_through(x, dequantize_group(*quantize_group(x.detach(), group)))


def _straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Return `values` with the gradient of `x`."""
    return _StraightThrough.apply(x, values) if x.requires_grad else values  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight of integer codes `[O, ...]` with a scale for each output channel `[O]`."""
    return codes.float().mul_(along_first(scale, codes.ndim))


def rotation_block(channels: int) -> int:
    """Return the block in which `hadamard` rotates channels: the largest power of two that divides them, at most 128.

    It is 1 for an odd number, where the rotation changes nothing.
    """
    return min(channels & -channels, LARGEST_ROTATION)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each block of neighbours of the last axis by the orthonormal Hadamard matrix, which is its own inverse.

    Args:
        x: `[..., I]`, any float dtype.
        block: a power of two that divides I.

    Returns:
        fp32 of the same shape; gradients pass.

    Source:
        Sylvester's construction; rotation of activations: Ashkboos et al. 2024, QuaRot (section 3).
    """
    assert block > 0
    assert block & (block - 1) == 0
    if block == 1:
        return x.float()
    blocks: Tensor = x.float().unflatten(-1, (-1, block))
    # What is made while tracing is no tensor to keep.
    kept = type(blocks) is Tensor and not torch.compiler.is_compiling()
    matrix = _kept_sylvester(block, x.device) if kept else _sylvester(block, x.device)
    return (blocks @ matrix).flatten(-2)


def take_out(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what directions `[d, I]` leave of inputs `[..., I]`, and how far these reach along them, `[..., d]`."""
    values, directions = x.float(), directions.float()
    along = functional.linear(values, directions)
    return values - along @ directions, along


def _sylvester(block: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(block)


@functools.cache
def _kept_sylvester(block: int, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be used where gradients are needed later.
    with torch.inference_mode(False):
        return _sylvester(block, device)


def rescale_(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Turn exact integer sums into a layer's output: `bias + (sums * weight_scale) * x_scale`.

    Args:
        sums: fp32 `[M, O]`, overwritten.
        x_scale: fp32 `[M]`, `[1]` for a static range, or `[N]` for N samples that M / N neighbouring rows belong to.
        weight_scale: fp32 `[O]`.
        bias: fp32 `[O]`.

    Returns:
        `sums`.
    """
    sums.mul_(weight_scale)
    if len(x_scale) not in (1, len(sums)):
        x_scale = x_scale.repeat_interleave(len(sums) // len(x_scale))
    if bias is None:
        return sums.mul_(x_scale.unsqueeze(-1))
    return torch.addcmul(bias, sums, x_scale.unsqueeze(-1), out=sums)
