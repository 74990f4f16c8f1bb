"""Storage layouts of integer weights: int8 rows, int4 nibbles with group multipliers, convolution taps, padding.

Letters: O output channels, I input channels (of one convolution group), I_pad = I rounded up to whole groups,
G = I_pad / group_size. The taps (Kh, Kw) of a convolution lie between O and I, and a linear layer has none, so input
channels always run fastest and a group never crosses taps. This is the layout of the checkpoint and the only one in
memory; what a kernel wants otherwise it makes for itself. No scale is computed here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dcomp import DcompError
from dcomp.kernels.qparams import MULTIPLIER_LIMIT as MULTIPLIER_LIMIT
from dcomp.kernels.qparams import dequantize_weight

# Two int4 codes of a byte are spread over an int16, whose passes run over chunks of this many elements: half a MiB with
# the scratch buffer stays in the second-level cache. Measured twice as fast as shifting into two int8 tensors and
# stacking them, and than a 256-entry table.
_CHUNK = 1 << 18


class PackingError(DcompError):
    """Codes or buffers that do not form a packed weight."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight as it is stored: `w = codes * scale`, where int4 codes come with a multiplier per group.

    Attributes:
        qweight: 8 bits: int8 `[O, *taps, I]`. 4 bits: uint8 `[O, *taps, I_pad / 2]`, two's complement, the low nibble
            holds the even input channel.
        scale: fp32 `[O]`.
        multiplier: 4 bits: int8 `[O, *taps, G]`, -15 to 15 but 0. 8 bits: None.
        bits: 4 or 8.
        group_size: input channels that share a multiplier; None for 8 bits.
        in_channels: I, without padding.
    """

    qweight: Tensor
    scale: Tensor
    multiplier: Tensor | None
    bits: int
    group_size: int | None
    in_channels: int

    def __post_init__(self) -> None:
        if self.qweight.ndim not in (2, 4):
            raise _wrong("is neither a linear nor a convolution weight", f"qweight {_show(self.qweight)}")
        out_channels, *taps = self.qweight.shape[:-1]
        expected = storage(out_channels, tuple(taps), self.in_channels, self.bits, self.group_size)
        found = {"qweight": self.qweight, "scale": self.scale}
        if self.multiplier is not None:
            found["multiplier"] = self.multiplier
        if {name: (t.shape, t.dtype) for name, t in found.items()} != expected:
            wanted = ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in expected.items())
            raise _wrong(f"should hold {wanted}", ", ".join(f"{name} {_show(t)}" for name, t in found.items()))

    def codes(self) -> Tensor:
        """Return the int8 image `[O, *taps, I]`; a view of `qweight` when it is stored as such."""
        return int8_image(self.qweight, self.multiplier, self.in_channels)

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, fp32 `[O, *taps, I]`."""
        return dequantize_weight(self.codes(), self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.nbytes for t in (self.qweight, self.scale, self.multiplier) if t is not None)


class Stored(NamedTuple):
    """A weight as a checkpoint has it, for kernels that unpack it themselves."""

    qweight: Tensor
    multiplier: Tensor | None

    def by_taps(self) -> tuple[Tensor, Tensor | None]:
        """View both as `[O, taps, ...]`."""
        qweight = self.qweight.reshape(len(self.qweight), -1, self.qweight.shape[-1])
        if self.multiplier is None:
            return qweight, None
        return qweight, self.multiplier.reshape(*qweight.shape[:2], -1)


def stored(qweight: Tensor, multiplier: Tensor | None, in_channels: int) -> Stored:
    """Return the weight as it is, in the place of `int8_image`."""
    return Stored(qweight, multiplier)


def storage(
    out_channels: int, taps: tuple[int, ...], in_channels: int, bits: int, group_size: int | None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of each buffer of a packed weight.

    Raises:
        PackingError: there is no layout with these bits and this group size.
    """
    scale = (torch.Size((out_channels,)), torch.float32)
    if bits == 8 and group_size is None:
        return {"qweight": (torch.Size((out_channels, *taps, in_channels)), torch.int8), "scale": scale}
    if bits == 4 and group_size is not None and group_size > 0 and group_size % 2 == 0:
        groups = -(-in_channels // group_size)
        return {
            "qweight": (torch.Size((out_channels, *taps, groups * group_size // 2)), torch.uint8),
            "scale": scale,
            "multiplier": (torch.Size((out_channels, *taps, groups)), torch.int8),
        }
    raise _wrong(
        "needs 8 bits without groups, or 4 bits with an even group size", f"bits {bits}, group size {group_size}"
    )


def pack_weight(
    codes: Tensor, scale: Tensor, multiplier: Tensor | None = None, *, group_size: int | None = None
) -> PackedWeight:
    """Store integer codes.

    Args:
        codes: integers `[O, *taps, I]`; -127 to 127, or -8 to 7 when there is a multiplier.
        scale: fp32 `[O]`.
        multiplier: integers `[O, *taps, G]`; makes it a 4-bit weight.
        group_size: input channels of one multiplier.

    Raises:
        PackingError: a code or multiplier is out of range, or shapes disagree.
    """
    in_channels = codes.shape[-1]
    storage(len(codes), tuple(codes.shape[1:-1]), in_channels, 8 if multiplier is None else 4, group_size)
    if multiplier is None:
        _check_range("codes", codes, -127, 127)
        return PackedWeight(codes.to(torch.int8).contiguous(), scale, None, 8, group_size, in_channels)
    _check_range("codes", codes, -8, 7)
    _check_range("multipliers", multiplier, -MULTIPLIER_LIMIT, MULTIPLIER_LIMIT)
    if (multiplier == 0).any():
        raise _wrong("has a group with multiplier 0, which would lose the group", "multipliers")
    assert group_size is not None
    qweight = pack_int4(functional.pad(codes.to(torch.int8), (0, -in_channels % group_size)))
    return PackedWeight(qweight, scale, multiplier.to(torch.int8).contiguous(), 4, group_size, in_channels)


def pack_int4(codes: Tensor) -> Tensor:
    """Put neighbours of the last axis, int8 -8 to 7 and even in number, into bytes; the even index goes low."""
    low, high = codes[..., 0::2].view(torch.uint8), codes[..., 1::2].view(torch.uint8)
    return (low & 0xF) | (high << 4)


def unpack_int4(qweight: Tensor) -> Tensor:
    """Return the int8 codes whose `pack_int4` is `qweight`; the last axis is twice as long."""
    return _spread_nibbles(qweight, None)


def int8_image(qweight: Tensor, multiplier: Tensor | None, in_channels: int) -> Tensor:
    """Return a weight's codes as int8 `[O, *taps, I]`, contiguous.

    Args:
        qweight: as in `PackedWeight`; an int8 one is returned as it is.
        multiplier: as in `PackedWeight`.
        in_channels: I; padding beyond it is cut off.
    """
    if qweight.dtype == torch.int8:
        return qweight.contiguous()
    return _spread_nibbles(qweight, multiplier)[..., :in_channels].contiguous()


def _spread_nibbles(qweight: Tensor, multiplier: Tensor | None) -> Tensor:
    """Codes, times the multiplier of their group if there is one: int8, twice as many as bytes."""
    image = torch.empty(qweight.shape, dtype=torch.int16, device=qweight.device)
    if image.numel():
        rows = max(1, _CHUNK // image[0].numel())
        scratch = torch.empty_like(image[:rows])
        for start in range(0, len(image), rows):
            chunk = image[start : start + rows]
            chunk.copy_(qweight[start : start + rows])
            spare = scratch[: len(chunk)]
            # The high nibble moves to the high byte: x + 15 * (16 * h) = l + 256 * h. Then both are sign-extended at
            # once: (n ^ 8) - 8 is the two's complement value of a nibble n, and the borrow makes l + 256 * h of them.
            chunk.add_(torch.bitwise_and(chunk, 0xF0, out=spare), alpha=15).bitwise_xor_(0x0808).sub_(0x0808)
            if multiplier is not None:
                factor = multiplier[start : start + rows].to(torch.int16).unsqueeze(-1)
                chunk.view(*factor.shape[:-1], -1).mul_(factor)
            # A negative low byte has borrowed 1 from the high byte; 2 * 0x80 gives it back.
            chunk.add_(torch.bitwise_and(chunk, 0x80, out=spare), alpha=2)
    return image.view(torch.int8)


def _check_range(what: str, integers: Tensor, low: int, high: int) -> None:
    if integers.is_floating_point():
        raise _wrong("takes integers only", f"{what} of {integers.dtype}")
    if integers.numel() and not (low <= integers.min() and integers.max() <= high):
        raise _wrong(f"takes integers from {low} to {high}", f"{what} from {integers.min()} to {integers.max()}")


def _show(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _wrong(problem: str, where: str) -> PackingError:
    return PackingError(f"A packed weight {problem}", where=where, remedy="Compress the model again.")
