"""Operands of products in the order in which lanes of a warp hold them: int4 weights, keys and values of attention.

Of weights, which `Int4Weight` of `products.cuh` reads, 16 output channels x 64 k lie together: 512 bytes of codes, 16
for each lane, and with groups 64 bytes of multipliers. k runs over taps and channels of a tap. Letters are those of
`kernels/packing.py`; K is the number of k. Of keys and values, which `attention.cuh` reads, 64 tokens lie together.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams
from dcomp.kernels.packing import unpack_int4

COLUMNS, STEP = 16, 64  # that lie together
HALF = 32  # of k: one product of a tensor core, which has one multiplier
CODE_BYTES, MULTIPLIER_BYTES = 512, 64
TILE_KEYS = 64
SUM_BIAS = 1.5 * 2**23  # sums of products of keys begin here, as bits: so they are floats


def padded_channels(in_channels: int, *, grouped: bool) -> int:
    """Return the channels of a tap in fragments, which activations must have: a tap never shares a multiplier."""
    unit = HALF if grouped else 16
    return -(-in_channels // unit) * unit


def is_packable(group_size: int, groups: int) -> bool:
    """Whether fragments can hold such groups of a tap: each 32 channels have one multiplier."""
    return groups == 1 or group_size % HALF == 0


def pack_fragments(qweight: Tensor, multiplier: Tensor | None, in_channels: int) -> Tensor:
    """Return int4 codes in fragment order, with the multipliers of their groups if there are any.

    A code q of a group with multiplier m is stored so that its image q * m is `u * |m| - c`: where m is positive, u is
    q + 8 and c is 8 m; where it is negative, u is 7 - q and c is 7 |m|. Without multipliers q itself is stored.

    Args:
        qweight: uint8 `[O, *taps, I_pad / 2]`.
        multiplier: int8 `[O, *taps, G]` of groups that `is_packable`, or None, if one for a whole row is part of its
            scale.
        in_channels: I; what `padded_channels` adds is 0 in the image.

    Returns:
        uint8 `[O / 16, K / 64, 576]`, without multipliers 512, both quotients rounded up. Byte i of lane l's word
        (tile t, half h), at `16 l + 8 t + 4 h + i`, belongs to channel `8 t + l / 4` and holds k `32 h + l % 4 * 4 + i`
        in the low nibble and 16 k more in the high one. Behind them come |m| and 128 - c of (channel `8 t + g`, half
        h), at `512 + 8 g + 4 t + 2 h`.
    """
    codes = unpack_int4(qweight)[..., :in_channels]
    missing = padded_channels(in_channels, grouped=multiplier is not None) - in_channels
    codes = functional.pad(codes, (0, missing))
    if multiplier is None:
        return _fragments(codes.flatten(1))
    group_size = 2 * qweight.shape[-1] // multiplier.shape[-1]
    assert is_packable(group_size, multiplier.shape[-1])
    of_half = torch.arange(0, codes.shape[-1], HALF, device=codes.device) // group_size
    factors = multiplier[..., of_half.clamp_(max=multiplier.shape[-1] - 1)]
    is_negative = (factors < 0).repeat_interleave(HALF, -1)
    nibbles = torch.where(is_negative, 7 - codes, codes + 8)
    sizes = factors.abs()
    shifts = 128 - torch.where(factors < 0, 7, 8) * sizes.int()
    pairs = torch.stack([sizes.to(torch.uint8), shifts.to(torch.uint8)], -1).flatten(1, -2)
    return torch.cat([_fragments(nibbles.flatten(1)), _multipliers(pairs)], -1)


def _fragments(nibbles: Tensor) -> Tensor:
    """Order integers `[O, K]`, of which four bits count."""
    rows = functional.pad(nibbles, (0, -nibbles.shape[1] % STEP, 0, -len(nibbles) % COLUMNS)) & 15
    tiles = rows.to(torch.uint8).view(len(rows) // COLUMNS, 2, 8, rows.shape[1] // STEP, 2, 2, 4, 4)
    low, high = tiles.unbind(5)
    # block of columns, tile, g, step, half, t, i  ->  block, step, lane (g, t), tile, half, i
    return (low | high << 4).permute(0, 3, 2, 5, 1, 4, 6).reshape(len(tiles), -1, CODE_BYTES)


def _multipliers(pairs: Tensor) -> Tensor:
    """Order |m| and 128 - c `[O, K / 32, 2]`."""
    pairs = functional.pad(pairs, (0, 0, 0, -pairs.shape[1] % 2, 0, -len(pairs) % COLUMNS))
    tiles = pairs.view(len(pairs) // COLUMNS, 2, 8, pairs.shape[1] // 2, 2, 2)
    return tiles.permute(0, 3, 2, 1, 4, 5).reshape(len(tiles), -1, MULTIPLIER_BYTES)


def tile_bytes(width: int) -> int:
    """Return the bytes of 64 keys and values of heads of `width` channels, a multiple of 16."""
    return TILE_KEYS * (head_depth(width) + 8 + 2 * width)


def head_depth(width: int) -> int:
    """Return the codes of a query and of a key in heads of `width` channels."""
    return -(-width // HALF) * HALF


def quantize_keys(k: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of keys `[..., M, C]` less their mean `[..., 1, C]`, and the scales fp32 `[..., M]`.

    A scale is that of `qparams.token_scale` without its last two bits, so that `SUM_BIAS * scale` is exact.
    """
    centred = k.float() - mean
    scale = (qparams.token_scale(centred).view(torch.int32) & -4).view(torch.float32)
    limit = qparams.TOKEN_LIMIT
    codes = (centred * (1 / scale).unsqueeze(-1)).round().clamp(-limit, limit).nan_to_num(0.0)
    return codes.to(torch.int8), scale


def value_scale(v: Tensor) -> Tensor:
    """Return the fp32 scale `[..., C]` of values `[..., M, C]`: the power of two at or below the largest magnitude."""
    peak = torch.maximum(v.float().amax(-2), -v.float().amin(-2))
    scale = (peak.view(torch.int32) & 0x7F800000).view(torch.float32)
    return scale.masked_fill(scale == 0, 1.0)


def pack_tiles(codes: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of heads in tiles of 64 tokens, and the scales of values, padded.

    In a tile come codes of keys, then pairs of fp32 for each key, then float16 values over their scale. Both operands
    are 16 bytes for each lane: of 16 keys (tiles t of 8) x 32 channels, byte i of lane l's word (t, half h), at
    `16 l + 8 t + 4 h + i`, is channel `16 h + l % 4 * 4 + i` of key `8 t + l / 4`; of 16 keys x 16 channels (t),
    float16 i of word (t, h) is key `8 h + l % 4 * 2 + i` of channel `8 t + l / 4`. A pair is the scale s and
    -1.5 * 2^23 s; of a key that is not there, 0 and -infinity.

    Args:
        codes: int8 `[B, H, M, C]`, of keys.
        k_scale: fp32 `[B, H, M]`.
        v: any float dtype `[B, H, M, C]`.
        v_scale: fp32 `[B, H, C]`.
        width: C, padded to a multiple of 16.

    Returns:
        uint8 `[B * H, M / 64, tile_bytes(width)]`, the quotient rounded up, and fp32 `[B * H, width]`.
    """
    (*_, keys, channels), heads = codes.shape, len(codes) * codes.shape[1]
    tokens, depth = -keys % TILE_KEYS, head_depth(width)
    pairs = torch.stack([k_scale, -SUM_BIAS * k_scale], -1).flatten(0, 1)
    missing = torch.tensor([0.0, -torch.inf], device=pairs.device).expand(heads, tokens, 2)
    pairs = torch.cat([pairs, missing], 1).view(heads, -1, 2 * TILE_KEYS).view(torch.uint8)
    codes = functional.pad(codes, (0, depth - channels, 0, tokens)).view(heads, -1, 4, 2, 8, depth // 32, 2, 4, 4)
    # head, tile, 16 keys, t, g, 32 channels, h, l, i  ->  head, tile, 16 keys, 32 channels, lane (g, l), t, h, i
    codes = codes.permute(0, 1, 2, 5, 4, 7, 3, 6, 8).reshape(heads, pairs.shape[1], -1)
    values = (v.float() * (1 / v_scale).unsqueeze(-2)).half()
    values = functional.pad(values, (0, width - channels, 0, tokens)).view(heads, -1, 4, 2, 4, 2, width // 16, 2, 8)
    # head, tile, 16 keys, h, l, i, 16 channels, t, g  ->  head, tile, 16 keys, 16 channels, lane (g, l), t, h, i
    values = values.permute(0, 1, 2, 6, 8, 4, 7, 3, 5).reshape(heads, pairs.shape[1], -1)
    tiles = torch.cat([codes.view(torch.uint8), pairs, values.view(torch.uint8)], -1)
    return tiles, functional.pad(v_scale, (0, width - channels), value=1.0).view(heads, width)
