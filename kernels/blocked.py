"""Rows of the dispatch table for processors in torch's own operations, in blocks.

Results are those of `qparams` and `reference`. Temporaries of a block stay in the second-level cache, because fresh
memory of a large tensor costs more than the arithmetic on it.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams, reference
from dcomp.kernels.reference import GroupNorm, LayerNorm

_BLOCK_ELEMENTS = 1 << 18  # of a float32 temporary: 1 MiB
_FLOAT_WEIGHT_ELEMENTS = 1 << 20  # of a dequantized weight: 4 MiB, far below what is given back to the system


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return the bytes of `qparams.quantize_static`, in the memory format of `x`."""
    x = qparams.smoothed(x, smooth)
    codes = torch.empty_like(x, dtype=torch.uint8)
    values, out = in_memory_order(x), in_memory_order(codes)
    if values is None or out is None:
        return codes.copy_(qparams.quantize_static(x, scale, zero))
    inverse, shift = 1 / scale, zero.float() - 128
    scratch = torch.empty(min(_BLOCK_ELEMENTS, len(values)))
    for block, target in zip(values.split(_BLOCK_ELEMENTS), out.split(_BLOCK_ELEMENTS), strict=True):
        _write_codes(block, inverse, shift, target, scratch[: len(block)])
    return codes


def _write_codes(block: Tensor, inverse: Tensor, shift: Tensor, target: Tensor, scratch: Tensor) -> None:
    rounded = torch.mul(block, inverse, out=scratch).round_().add_(shift).clamp_(-128, 127)
    # Conversion to int8 is four times as fast as to uint8.
    target.view(torch.int8).copy_(rounded)
    target.bitwise_xor_(0x80)


def quantize_sample(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_sample`, in the memory format of `x`."""
    x = qparams.smoothed(x, smooth)
    codes = torch.empty_like(x, dtype=torch.uint8)
    values, out = in_memory_order(x), in_memory_order(codes)
    if values is None or out is None or x.numel() == 0:
        found, scale, zero = qparams.quantize_sample(x)
        return codes.copy_(found), scale, zero
    values, out = values.view(len(x), -1), out.view(len(x), -1)
    scale, zero = torch.empty(len(x)), torch.empty(len(x), dtype=torch.uint8)
    # Either some whole samples are a block, or some blocks are a sample.
    samples, length = max(1, _BLOCK_ELEMENTS // values.shape[1]), min(_BLOCK_ELEMENTS, values.shape[1])
    scratch = torch.empty(min(samples, len(x)), length)
    for start in range(0, len(x), samples):
        part = slice(start, start + samples)
        blocks = values[part].split(length, 1)
        extremes = torch.stack([torch.stack([block.amin(1), block.amax(1)]) for block in blocks]).float()
        scale[part], zero[part] = qparams.sample_range(extremes[:, 0].amin(0), extremes[:, 1].amax(0))
        inverse, shift = (1 / scale[part]).unsqueeze(1), (zero[part].float() - 128).unsqueeze(1)
        for block, target in zip(blocks, out[part].split(length, 1), strict=True):
            _write_codes(block, inverse, shift, target, scratch[: len(block), : block.shape[1]])
    return codes, scale, zero


def quantize_group(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_group`."""
    x = qparams.smoothed(x, smooth)
    if x.numel() == 0:
        return qparams.quantize_group(x, group)
    batch, length, channels = x.shape
    image = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(batch)
    # Either some whole samples are a block, or some blocks of rows are a sample.
    samples, rows = max(1, _BLOCK_ELEMENTS // (length * channels)), max(1, _BLOCK_ELEMENTS // channels)
    for start in range(0, batch, samples):
        part = slice(start, start + samples)
        blocks = x[part].split(rows, 1)
        grids = [qparams.group_grids(qparams.in_groups(block, group)) for block in blocks]
        scale[part] = qparams.group_scale(*(torch.cat(values, 1) for values in zip(*grids, strict=True)))
        for block, grid, target in zip(blocks, grids, image[part].split(rows, 1), strict=True):
            target.copy_(qparams.group_image(block, group, *grid, scale[part]))
    return image, scale


def group_norm_quantize(
    x: Tensor, norm: GroupNorm, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.group_norm_quantize`."""
    weight, bias = (None if part is None else part.to(x.dtype) for part in (norm.weight, norm.bias))
    y = functional.group_norm(x, norm.groups, weight, bias, norm.eps)
    y = functional.silu(y, inplace=True) if norm.silu else y
    if scale is None or zero is None:
        return quantize_sample(y)
    return quantize_static(y, scale, zero), scale.clone(), zero.clone()


def layer_norm_quantize(x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `reference.layer_norm_quantize`."""
    weight, bias = (None if part is None else part.to(x.dtype) for part in (norm.weight, norm.bias))
    y = functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    y = y if norm.gain is None else y * (1 + norm.gain.unsqueeze(1))
    y = y if norm.shift is None else y + norm.shift.unsqueeze(1)
    codes, scales = quantize_token(y.flatten(0, 1))
    return codes.view(x.shape), scales.view(x.shape[:-1])


def quantize_token(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_token` for `x` `[M, I]`."""
    x = qparams.smoothed(x, smooth)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(len(x))
    rows = max(1, _BLOCK_ELEMENTS // max(1, x.shape[-1]))
    scratch = torch.empty(min(rows, len(x)), x.shape[-1])
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        scales = qparams.token_scale(block)
        scale[start : start + rows] = scales
        # No clamp: the largest magnitude gives 127 with an error of about 1e-5 before rounding.
        rounded = torch.mul(block, (1 / scales).unsqueeze(-1), out=scratch[: len(block)]).round_()
        codes[start : start + rows] = rounded
    return codes, scale


quantize_low_rank = functools.partial(reference.quantize_low_rank, by_token=quantize_token, by_group=quantize_group)


def in_memory_order(tensor: Tensor) -> Tensor | None:
    """View a contiguous or channels-last tensor as one axis; None for any other."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return None


def smoothed_where_channels_are_apart(x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return `x` and the factors of its channels; multiplied, and None, where channels are not neighbours in memory."""
    if smooth is None:
        return x, None
    is_image = x.ndim == 4
    last = x.is_contiguous(memory_format=torch.channels_last) if is_image else x.is_contiguous()
    return (x, smooth.float().contiguous()) if last else (qparams.smoothed(x, smooth), None)


def linear_a16(x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `reference.linear_a16`, with the weight dequantized for a block of output channels at a time."""
    blocks = _output_blocks(codes)
    if len(blocks) == 1:
        return reference.linear_a16(x, codes, weight_scale, bias)
    out = x.new_empty((*x.shape[:-1], len(codes)))
    for part in blocks:
        out[..., part] = reference.linear_a16(x, codes[part], weight_scale[part], None if bias is None else bias[part])
    return out


def conv2d_a16(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return `reference.conv2d_a16`, with the weight dequantized for a block of output channels at a time."""
    blocks = _output_blocks(codes)
    shape = (stride, padding, dilation, groups)
    if len(blocks) == 1 or groups > 1:
        return reference.conv2d_a16(x, codes, weight_scale, bias, *shape)
    x = x.contiguous(memory_format=torch.channels_last)
    parts = (
        reference.conv2d_a16(x, codes[part], weight_scale[part], None if bias is None else bias[part], *shape)
        for part in blocks
    )
    return torch.cat([*parts], 1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `reference.attention` by torch's own function."""
    return functional.scaled_dot_product_attention(q, k, v, scale=scale)


def _output_blocks(codes: Tensor) -> list[slice]:
    """Cut the output channels so that the float weight of a block is memory that the allocator hands out again."""
    rows = max(16, _FLOAT_WEIGHT_ELEMENTS * len(codes) // max(1, codes.numel()) // 16 * 16)
    return [slice(start, start + rows) for start in range(0, max(1, len(codes)), rows)]
