"""A packed weight taken apart, for whoever chooses its codes anew: the grid stays, the codes move on it.

A weight is `codes * multiplier * scale`, with codes in `low..high`; letters as in `kernels/packing.py`.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dcomp.kernels.packing import PackedWeight, pack_weight, unpack_int4


@dataclass(frozen=True)
class CodeGrid:
    """The values that the codes of one packed weight may stand for.

    Attributes:
        packed: the weight as it is stored.
        codes: fp32 `[O, *taps, I]`, whole numbers.
        multiplier: int8 `[O, *taps, I]`; None for 8 bits.
        low: lowest code.
        high: highest code.
    """

    packed: PackedWeight
    codes: Tensor
    multiplier: Tensor | None
    low: int
    high: int

    @classmethod
    def of(cls, packed: PackedWeight) -> Self:
        """Take a stored weight apart."""
        if packed.multiplier is None or packed.group_size is None:
            return cls(packed, packed.codes().float(), None, -127, 127)
        multiplier = packed.multiplier.repeat_interleave(packed.group_size, -1)[..., : packed.in_channels]
        codes = unpack_int4(packed.qweight)[..., : packed.in_channels]
        return cls(packed, codes.float(), multiplier.contiguous(), -8, 7)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the weight of codes (any float) and scales `[O]`, fp32 `[O, *taps, I]`.

        Differentiable. With the stored codes and scales it is the stored weight, bit for bit.
        """
        image = codes if self.multiplier is None else codes * self.multiplier
        return image * scale.view(-1, *[1] * (image.ndim - 1))

    def to_codes(self, weight: Tensor) -> Tensor:
        """Return a float weight `[O, *taps, I]` in units of the steps: fractional, not clamped."""
        step = self.values(torch.ones_like(self.codes), self.packed.scale)
        return weight.to(step) / step

    def repack(self, codes: Tensor, scale: Tensor) -> PackedWeight:
        """Store whole codes within the range, with scales fp32 `[O]`."""
        whole = codes.detach().to(torch.int8)
        return pack_weight(whole, scale.detach().clone(), self.packed.multiplier, group_size=self.packed.group_size)
