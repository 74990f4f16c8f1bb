"""Codes of activations (`quantize.cuh`, `quantize_nibbles.cuh`, `quantize_low_rank.cuh`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dcomp.kernels.blocked import in_memory_order, smoothed_where_channels_are_apart
from dcomp.kernels.cuda import arguments, nibbles
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.calls.launch import MOST_ROWS_OF_BLOCKS, blocks_for, launch
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.nibbles import NibbleRows

LOW_RANK_ROWS = 32  # of a block, as in quantize_low_rank.cuh
_SAMPLES_OF_LAUNCH = MOST_ROWS_OF_BLOCKS // 16 * 16  # so that each part of samples is aligned


def quantize_static(kernel: Kernel, x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return `qparams.quantize_static` for one range, in the memory format of `x`."""
    x, smooth = smoothed_where_channels_are_apart(x, smooth)
    values, codes = _with_codes(x)
    tensors = {"x": values, "codes": codes, "scale": scale.contiguous(), "zero": zero.contiguous(), "smooth": smooth}
    if x.numel():
        blocks = blocks_for(kernel, x.numel())
        sizes = {"count": x.numel(), "channels": _channels(smooth), "x_type": FLOAT_TYPE[x.dtype]}
        launch(kernel, (blocks,), arguments.QuantizeStaticArguments, tensors, **sizes)
    return codes


def quantize_sample(passes: Sequence[Kernel], x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return `qparams.quantize_sample` of tensors with elements, in the memory format of `x`."""
    x, smooth = smoothed_where_channels_are_apart(x, smooth)
    values, codes = _with_codes(x)
    samples, count = len(x), x[0].numel()
    scale = torch.empty(samples, device=x.device)
    zero = torch.empty(samples, dtype=torch.uint8, device=x.device)
    parts = -(-blocks_for(passes[-1], x.numel()) // samples)
    tensors = {
        "x": values,
        "codes": codes,
        "scale": scale,
        "zero": zero,
        "smooth": smooth,
        "ranges": torch.empty(samples, parts, 2, device=x.device),
    }
    sizes = {"count": count, "channels": _channels(smooth), "parts": parts, "x_type": FLOAT_TYPE[x.dtype]}
    for kernel in passes:
        launch(kernel, (parts, samples), arguments.QuantizeSampleArguments, tensors, **sizes)
    return codes, scale, zero


def quantize_token(
    kernel: Kernel, x: Tensor, smooth: Tensor | None = None, depth: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `qparams.quantize_token` of `[M, C]` with elements; codes are padded with 0 to `depth` channels."""
    rows, channels = x.shape
    codes = torch.empty(rows, depth or channels, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    tensors = {"x": x.contiguous(), "smooth": _factors(smooth), "codes": codes, "scale": scale}
    sizes = {"rows": rows, "channels": channels, "depth": codes.shape[1], "x_type": FLOAT_TYPE[x.dtype]}
    warps = kernel.threads // 32
    launch(kernel, (-(-rows // warps),), arguments.QuantizeTokenArguments, tensors, **sizes)
    return codes, scale


def quantize_group(
    passes: Sequence[Kernel], x: Tensor, group: int, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `qparams.quantize_group` of `[N, M, C]` with elements; one pass is enough if M is 1."""
    samples, rows, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(samples, device=x.device)
    warps = passes[-1].threads // 32
    parts = min(-(-rows // warps), -(-blocks_for(passes[-1], x.numel()) // samples))
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": channels,
        "group": max(1, min(group, channels)),
        "parts": parts,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    smooth = _factors(smooth)
    if len(passes) == 1:
        assert rows == 1
        tensors = {"x": x.contiguous(), "smooth": smooth, "codes": codes, "scale": scale, "peaks": None}
        grid = (-(-samples // warps),)
        launch(passes[0], grid, arguments.QuantizeGroupArguments, tensors, **sizes | {"rows": samples})
        return codes, scale
    blocks = (values.split(_SAMPLES_OF_LAUNCH) for values in (x.contiguous(), codes, scale))
    for some_x, some_codes, some_scale in zip(*blocks, strict=True):
        peaks = torch.empty(len(some_x), parts, device=x.device)
        tensors = {"x": some_x, "smooth": smooth, "codes": some_codes, "scale": some_scale, "peaks": peaks}
        for kernel in passes:
            launch(kernel, (parts, len(some_x)), arguments.QuantizeGroupArguments, tensors, **sizes)
    return codes, scale


def quantize_nibbles(
    kernel: Kernel, x: Tensor, group: int, block: int, smooth: Tensor | None = None
) -> tuple[NibbleRows, Tensor]:
    """Return `nibbles.input_rows` of `qparams.quantize_nibbles` of `[M, C]` with elements, and the scale."""
    rows, channels = x.shape
    codes = torch.empty(rows, nibbles.row_bytes(channels, block), dtype=torch.uint8, device=x.device)
    of_stages = (nibbles.stages(channels), -(-rows // 4) * 4, 4)
    multipliers = torch.empty(of_stages, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    tensors = {
        "x": x.contiguous(),
        "smooth": _factors(smooth),
        "codes": codes,
        "multipliers": multipliers,
        "scale": scale,
    }
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": codes.shape[1],
        "group": -(-min(group, channels) // block) * block,
        "block": block,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    warps = kernel.threads // 32
    launch(kernel, (-(-rows // warps),), arguments.QuantizeNibblesArguments, tensors, **sizes)
    return NibbleRows(codes, multipliers, nibbles.corrections(channels, block)), scale


def quantize_low_rank(
    kernel: Kernel, x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.quantize_low_rank` of `[M, C]` and fp16 `[r, C]`, both with elements."""
    (rows, channels), rank = x.shape, len(down)
    codes = torch.empty(rows, channels, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    hidden = torch.empty(rows, rank, device=x.device)
    tensors = {
        "x": x.contiguous(),
        "smooth": _factors(smooth),
        "down": down.contiguous(),
        "codes": codes,
        "scale": scale,
        "hidden": hidden,
    }
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": channels,
        "group": max(1, min(group or 1, channels)),
        "rank": rank,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    launch(kernel, (-(-rows // LOW_RANK_ROWS),), arguments.LowRankArguments, tensors, **sizes)
    return codes, scale, hidden


def _factors(smooth: Tensor | None) -> Tensor | None:
    return None if smooth is None else smooth.float().contiguous()


def _channels(smooth: Tensor | None) -> int:
    return 1 if smooth is None else len(smooth)


def _with_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dense tensor and the memory of uint8 codes for it, in the same order."""
    if in_memory_order(x) is None:
        x = x.contiguous()
    return x, torch.empty_like(x, dtype=torch.uint8)
