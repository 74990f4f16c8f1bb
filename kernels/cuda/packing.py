"""int4 weights in the order in which lanes of a warp hold them: what `Int4Weight` of `products.cuh` reads.

16 output channels x 64 k lie together: 512 bytes of codes, 16 for each lane, and with groups 64 bytes of multipliers.
k runs over taps and channels of a tap. Letters are those of `kernels/packing.py`; K is the number of k.
"""

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels.packing import unpack_int4

COLUMNS, STEP = 16, 64  # that lie together
HALF = 32  # of k: one product of a tensor core, which has one multiplier
CODE_BYTES, MULTIPLIER_BYTES = 512, 64


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
