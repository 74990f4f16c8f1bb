"""Quantizers and unpacking in the emulator, from tensors as a layer has them."""

import torch
from torch import Tensor

from dcomp.kernels.cuda.arguments import (
    LowRankArguments,
    QuantizeGroupArguments,
    QuantizeSampleArguments,
    QuantizeStaticArguments,
    QuantizeTokenArguments,
    UnpackArguments,
)
from dcomp.kernels.cuda.calls.quantizers import LOW_RANK_ROWS
from tests.support.emulated import Emulator, type_of, untouched

WARPS = 8  # of a block, a row each


def quantize_static(
    emulator: Emulator, x: Tensor, scale: Tensor, zero: Tensor, blocks: int = 2, smooth: Tensor | None = None
) -> Tensor:
    """Return uint8 codes; channels are the last axis."""
    codes = untouched(*x.shape, dtype=torch.uint8)
    tensors = {"x": x, "codes": codes, "scale": scale, "zero": zero, "smooth": smooth}
    shape = {"count": x.numel(), "channels": x.shape[-1], "x_type": type_of(x)}
    emulator.launch("quantize_static", (blocks, 1), QuantizeStaticArguments, **tensors, **shape)
    return codes


def quantize_sample(
    emulator: Emulator, x: Tensor, parts: int = 3, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of `[N, ..., C]`, and scales and zeros `[N]`."""
    codes = untouched(*x.shape, dtype=torch.uint8)
    scale, zero = untouched(len(x)), untouched(len(x), dtype=torch.uint8)
    tensors = {"x": x, "codes": codes, "scale": scale, "zero": zero, "smooth": smooth}
    tensors["ranges"] = untouched(len(x), parts, 2)
    for name in ("sample_range", "quantize_sample"):
        shape = {"count": x[0].numel(), "channels": x.shape[-1], "parts": parts, "x_type": type_of(x)}
        emulator.launch(name, (parts, len(x)), QuantizeSampleArguments, **tensors, **shape)
    return codes, scale, zero


def quantize_token(
    emulator: Emulator, x: Tensor, depth: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[M, K]` of `[M, C]` and scales `[M]`."""
    rows, channels = x.shape
    codes, scale = untouched(rows, depth or channels, dtype=torch.int8), untouched(rows)
    shape = {"rows": rows, "channels": channels, "depth": codes.shape[1], "x_type": type_of(x)}
    tensors = {"x": x, "smooth": smooth, "codes": codes, "scale": scale}
    emulator.launch("quantize_token", (-(-rows // WARPS), 1), QuantizeTokenArguments, **tensors, **shape)
    return codes, scale


def quantize_group(
    emulator: Emulator,
    x: Tensor,
    group: int,
    depth: int | None = None,
    parts: int = 2,
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the int8 image `[N, M, K]` of `[N, M, C]` and scales `[N]`: in one launch if M and `parts` are 1."""
    samples, rows, channels = x.shape
    codes = untouched(samples, rows, depth or channels, dtype=torch.int8)
    scale, peaks = untouched(samples), untouched(samples, parts)
    shape = {"rows": rows, "channels": channels, "depth": codes.shape[2], "group": max(1, min(group, channels))}
    if rows == parts == 1:
        tensors = {"x": x, "smooth": smooth, "codes": codes, "scale": scale}
        shape |= {"rows": samples, "x_type": type_of(x)}
        emulator.launch("quantize_group_token", (-(-samples // WARPS), 1), QuantizeGroupArguments, **tensors, **shape)
        return codes, scale
    for name in ("group_peak", "quantize_group"):
        tensors = {"x": x, "smooth": smooth, "codes": codes, "scale": scale, "peaks": peaks}
        emulator.launch(
            name, (parts, samples), QuantizeGroupArguments, **tensors, **shape, parts=parts, x_type=type_of(x)
        )
    return codes, scale


def quantize_low_rank(
    emulator: Emulator, x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes `[M, C]` of `[M, C]`, scales `[M]`, and `x @ down.t()` `[M, r]`."""
    (rows, channels), rank = x.shape, len(down)
    codes, scale, hidden = untouched(rows, channels, dtype=torch.int8), untouched(rows), untouched(rows, rank)
    tensors = {"x": x, "smooth": smooth, "down": down, "codes": codes, "scale": scale, "hidden": hidden}
    shape = {"rows": rows, "channels": channels, "depth": channels, "rank": rank, "x_type": type_of(x)}
    name = "low_rank_token" if group is None else "low_rank_group"
    grid = (-(-rows // LOW_RANK_ROWS), 1)
    emulator.launch(name, grid, LowRankArguments, **tensors, **shape, group=max(1, min(group or 1, channels)))
    return codes, scale, hidden


def unpack(
    emulator: Emulator, qweight: Tensor, multiplier: Tensor | None, scale: Tensor, in_channels: int, dtype: torch.dtype
) -> Tensor:
    """Return the float weight `[O, taps, I]` of one with a single axis of taps."""
    outputs, taps, _ = qweight.shape
    out = untouched(outputs, taps, in_channels, dtype=dtype)
    groups = 1 if multiplier is None else multiplier.shape[-1]
    shape = {
        "rows": outputs * taps,
        "taps": taps,
        "channels": in_channels,
        "groups": groups,
        "group": in_channels if multiplier is None else 2 * qweight.shape[-1] // groups,
        "out_type": type_of(out),
    }
    name = "unpack_int8" if multiplier is None else "unpack_int4"
    tensors = {"qweight": qweight, "multiplier": multiplier, "scale": scale, "out": out}
    emulator.launch(name, (3, 1), UnpackArguments, **tensors, **shape)
    return out
