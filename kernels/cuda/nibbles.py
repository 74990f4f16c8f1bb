"""Rows of 4-bit inputs and 4-bit weights as `nibble_products.cuh` multiplies them.

Channels come in blocks of 32 or 64, each with one multiplier on both sides: those of a group, or the next finer ones
that both sides have. A row is bytes: corrections, 64 for each 16 blocks, then codes, two a byte, the even channel low,
padded to 32 channels. Its multipliers lie apart, by stages of 128 channels.

What a row's zeros take away is a product of numbers of 7 bits and a sign. Of block b an input has P = multiplier *
zero and Y = multiplier * sum of codes, a weight V = multiplier * sum of codes and N. A multiplier of a weight is
positive for the tensor core: where it is -N, codes are stored as ~q = -q - 1, so `-N * q = N * ~q + N`, and Y * N is
what is missing. Else N is 0. The image's product is then

    sum over blocks of multipliers * (sum of stored codes) + Y * N - P * V

with Y and V cut into an upper part, which counts 128 times, and the lower 7 bits. The first 32 bytes of a stage of
corrections are pairs (P, Y upper) against (-V upper, N), the other 32 (P, Y lower) against (-V lower, N).

Letters: M rows, O output and I input channels, G groups, K bytes of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels.packing import Stored, pack_int4, unpack_int4

BLOCKS = (64, 32)  # channels, best first
_UNIT, _UNITS = 32, 4  # channels with a byte for their multiplier, of a stage
_CORRECTIONS = 16  # blocks of a stage of corrections


@dataclass(frozen=True)
class NibbleRows:
    """Rows in the memory of the kernel.

    Attributes:
        data: uint8 `[M, K]`.
        multipliers: uint8. Of inputs `[stages, M rounded up to 4, 4]`, one for each 32 channels. Of weights `[stages,
            O / 2 rounded up to even, blocks of a stage, 4]`: of two neighbours in bytes 0 and 2, of blocks with an odd
            number in 1 and 3.
        corrections: stages before those of codes.
    """

    data: Tensor
    multipliers: Tensor
    corrections: int


def block_of(input_group: int, weight: Stored, in_channels: int) -> int:
    """Return the channels of a block that suits groups of inputs and weights, or 0; one group suits all."""
    if weight.multiplier is None:
        return 0
    groups = weight.multiplier.shape[-1]
    sizes = (input_group, in_channels if groups == 1 else 2 * weight.qweight.shape[-1] // groups)
    fits = (block for block in BLOCKS if all(size >= in_channels or size % block == 0 for size in sizes))
    return next(fits, 0)


def corrections(in_channels: int, block: int) -> int:
    """Return the stages before those of codes."""
    return -(-in_channels // (block * _CORRECTIONS))


def row_bytes(in_channels: int, block: int) -> int:
    """Return K."""
    return 64 * corrections(in_channels, block) + -(-in_channels // _UNIT) * _UNIT // 2


def stages(in_channels: int) -> int:
    """Return the stages of codes."""
    return -(-in_channels // (_UNIT * _UNITS))


def input_rows(codes: Tensor, zeros: Tensor, multipliers: Tensor, group: int, block: int) -> NibbleRows:
    """Lay out codes uint8 `[M, I]`, zeros and multipliers `[M, G]` of `qparams.quantize_nibbles`."""
    in_channels = codes.shape[1]
    factors, zeros = (_by_block(part.int(), group, block, in_channels) for part in (multipliers, zeros))
    sums = factors * _block_sums(codes, block)
    upper, lower = ((factors * zeros, part) for part in (sums >> 7, sums & 127))
    units = _by_block(multipliers, group, _UNIT, in_channels)
    by_stage = functional.pad(units, (0, -units.shape[1] % _UNITS, 0, -len(units) % 4))
    words = by_stage.unflatten(1, (-1, _UNITS)).transpose(0, 1).contiguous()
    return NibbleRows(_rows(codes.view(torch.int8), upper, lower), words, corrections(in_channels, block))


def weight_rows(weight: Stored, in_channels: int, block: int) -> tuple[NibbleRows, Tensor | None]:
    """Lay out a weight `[O, I]` with groups that suit the block.

    Returns:
        The rows, and by what the scale of the weight is multiplied, fp32 `[O]`: the multiplier of a row that has but
        one, which is 1 in the rows then.
    """
    codes = unpack_int4(weight.qweight)[:, :in_channels]
    assert weight.multiplier is not None
    multiplier, factor = weight.multiplier.int(), None
    if multiplier.shape[1] == 1:
        multiplier, factor = torch.ones_like(multiplier), multiplier[:, 0].float()
    group = 2 * weight.qweight.shape[1] // multiplier.shape[1]
    factors = _by_block(multiplier, group, block, in_channels)
    sums, missing = factors * _block_sums(codes, block), (-factors).clamp(min=0)
    upper, lower = ((-part, missing) for part in (sums >> 7, sums & 127))
    is_negative = (factors < 0).repeat_interleave(block, 1)[:, :in_channels]
    data = _rows(torch.where(is_negative, ~codes, codes), upper, lower)
    of_stage = _UNIT * _UNITS // block
    sizes = functional.pad(factors.abs(), (0, -factors.shape[1] % of_stage, 0, -len(factors) % 4)).to(torch.uint8)
    pairs = sizes.view(len(sizes) // 2, 2, -1, of_stage).permute(2, 0, 3, 1)
    words = torch.zeros(*pairs.shape, 2, dtype=torch.uint8, device=pairs.device)
    words[:, :, 0::2, :, 0], words[:, :, 1::2, :, 1] = pairs[:, :, 0::2], pairs[:, :, 1::2]
    return NibbleRows(data, words.flatten(3), corrections(in_channels, block)), factor


def _by_block(of_groups: Tensor, group: int, block: int, in_channels: int) -> Tensor:
    """Return for each block, `[rows, blocks]`, what its group has of `[rows, G]`."""
    starts = torch.arange(0, in_channels, block, device=of_groups.device)
    return of_groups[:, (starts // group).clamp_(max=of_groups.shape[1] - 1)]


def _block_sums(codes: Tensor, block: int) -> Tensor:
    padded = functional.pad(codes.int(), (0, -codes.shape[1] % block))
    return padded.view(len(codes), -1, block).sum(2, dtype=torch.int32)


def _rows(codes: Tensor, upper: tuple[Tensor, Tensor], lower: tuple[Tensor, Tensor]) -> Tensor:
    """Put corrections, two numbers of 8 bits for each block and part, before int8 codes, of which four bits count."""
    parts = torch.stack([torch.stack(pair, -1) for pair in (upper, lower)], 1).to(torch.int8)
    parts = functional.pad(parts, (0, 0, 0, -parts.shape[2] % _CORRECTIONS)).unflatten(2, (-1, _CORRECTIONS))
    corrections = parts.transpose(1, 2).flatten(1).view(torch.uint8)
    return torch.cat([corrections, pack_int4(functional.pad(codes, (0, -codes.shape[1] % _UNIT)).contiguous())], 1)
