"""Attention in the emulator, from tensors as a layer has them and from codes."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels.cuda import packing
from dcomp.kernels.cuda.arguments import AttentionArguments, KeyValueArguments
from dcomp.kernels.cuda.tiles import ENTRIES
from tests.support.emulated import Emulator, type_of, untouched

LOG2_E = math.log2(math.e)


def width_of(channels: int) -> int:
    """Return the narrowest head that there is a kernel for."""
    widths = (int(name.split("_")[1]) for name in ENTRIES if name.startswith("attention"))
    return next(width for width in sorted(widths) if channels <= width)


def key_value_tiles(
    emulator: Emulator, k: Tensor, v: Tensor, width: int, parts: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tiles and scales of values as `packing.pack_tiles`, and the mean of keys `[B, H, 1, C]` that was used."""
    samples, heads, keys, channels = k.shape
    rows, count = samples * heads, -(-keys // packing.TILE_KEYS)
    moments = untouched(rows, parts, 2, channels)
    tiles, v_scale = untouched(rows, count, packing.tile_bytes(width), dtype=torch.uint8), untouched(rows, width)
    tensors = {"k": k.transpose(1, 2).contiguous(), "v": v.transpose(1, 2).contiguous()}
    tensors |= {"moments": moments, "tiles": tiles, "v_scale": v_scale}
    sizes = {"keys": keys, "heads": heads, "channels": channels, "width": width, "parts": parts}
    for name, blocks in {"key_value_moments": parts, "key_value_tiles": count}.items():
        emulator.launch(name, (blocks, rows), KeyValueArguments, **tensors, **sizes, x_type=type_of(k))
    mean = torch.zeros(rows, channels)
    for part in moments[:, :, 0].unbind(1):
        mean = mean + part
    return tiles, v_scale, mean.view(samples, heads, 1, channels)


def attend(
    emulator: Emulator,
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    width: int | None = None,
) -> Tensor:
    """Return attention `[B, H, N, C]` of int8 codes `[B, H, N, C]` and `[B, H, M, C]` with scales `[B, H, N]`, ..."""
    (samples, heads, queries, channels), width = q.shape, width or width_of(q.shape[-1])
    tiles, v_scale = packing.pack_tiles(k, k_scale, v, packing.value_scale(v), width)
    out = untouched(samples, queries, heads, channels, dtype=dtype)
    rows = functional.pad(q, (0, packing.head_depth(width) - channels)).transpose(1, 2).contiguous()
    tensors = {"q": rows, "q_scale": q_scale.transpose(1, 2).contiguous(), "tiles": tiles, "v_scale": v_scale}
    sizes = {"queries": queries, "heads": heads, "channels": channels, "tile_count": tiles.shape[1]}
    name = f"attention_{width}"
    grid = (-(-queries // ENTRIES[name].rows), samples * heads)
    fields = {**tensors, "out": out, **sizes, "scale": scale * LOG2_E, "out_type": type_of(out)}
    emulator.launch(name, grid, AttentionArguments, **fields)
    return out.transpose(1, 2)
