"""Attention, and keys and values as it takes them (`attention.cuh`, `key_value_tiles.cuh`)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dcomp.kernels.cuda import arguments, packing
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.calls.launch import launch
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.tiles import ENTRIES

_MOST_PARTS_OF_KEYS = 16  # each block reads what all of them found


def key_value_tiles(passes: Sequence[Kernel], k: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return `packing.pack_tiles` of keys less their mean and of values, `[B, H, M, C]` with elements."""
    samples, heads, keys, channels = k.shape
    rows, count = samples * heads, -(-keys // packing.TILE_KEYS)
    tiles = torch.empty(rows, count, packing.tile_bytes(width), dtype=torch.uint8, device=k.device)
    v_scale = torch.empty(rows, width, device=k.device)
    parts = min(count, _MOST_PARTS_OF_KEYS)
    tensors = {
        "k": k.transpose(1, 2).contiguous(),
        "v": v.transpose(1, 2).contiguous(),
        "moments": torch.empty(rows, parts, 2, channels, device=k.device),
        "tiles": tiles,
        "v_scale": v_scale,
    }
    sizes = {"keys": keys, "heads": heads, "channels": channels, "width": width, "parts": parts}
    for kernel, blocks in zip(passes, (parts, count), strict=True):
        grid = (blocks, rows)
        launch(kernel, grid, arguments.KeyValueArguments, tensors, **sizes, x_type=FLOAT_TYPE[k.dtype])
    return tiles, v_scale


def attention(
    kernel: Kernel,
    q: Tensor,
    q_scale: Tensor,
    tiles: Tensor,
    v_scale: Tensor,
    channels: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return attention `[B, H, N, C]` in some float dtype, heads of a token together.

    Args:
        kernel: for the width of `v_scale`.
        q: int8 codes `[B, N, H, packing.head_depth(width)]` with elements.
        q_scale: fp32 `[B, N, H]`.
        tiles: as `packing.pack_tiles` returns them with `v_scale`.
        v_scale: likewise.
        channels: C.
        scale: of scores.
        dtype: of the result.
    """
    samples, queries, heads, _ = q.shape
    out = torch.empty(samples, queries, heads, channels, dtype=dtype, device=q.device)
    tensors = {"q": q, "q_scale": q_scale, "tiles": tiles, "v_scale": v_scale, "out": out}
    sizes = {"queries": queries, "heads": heads, "channels": channels, "tile_count": tiles.shape[1]}
    grid = (-(-queries // ENTRIES[kernel.name].rows), samples * heads)
    type_and_scale = {"out_type": FLOAT_TYPE[dtype], "scale": scale * math.log2(math.e)}
    launch(kernel, grid, arguments.AttentionArguments, tensors, **sizes, **type_and_scale)
    return out.transpose(1, 2)
