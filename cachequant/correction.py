"""What a prediction is multiplied by, and what is added to it: for each channel, or one number for all."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dcomp import UsageError

MAX_CHANNELS, MAX_NUMBER = 16_384, 1e4
_IMAGE = 4  # dimensions of `[N, C, H, W]`; tensors of fewer are `[N, ..., C]`


@dataclass(frozen=True)
class Correction:
    """An affine map of a prediction.

    Attributes:
        scale: one number, or one for each of C channels.
        shift: likewise.

    Raises:
        ValueError: numbers that are none, too large, or too many.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = (*self.scale, *self.shift)
        good = (
            0 < len(self.scale) == len(self.shift) <= MAX_CHANNELS
            and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
            and max(map(abs, numbers)) <= MAX_NUMBER
        )
        if not good:
            raise ValueError(f"{len(self.scale)} scales and {len(self.shift)} shifts are no correction")

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the corrected tensor.

        Raises:
            UsageError: it has another number of channels, as in a plan that was edited.
        """
        place, channels = channel_place(tensor), len(self.scale)
        if channels not in (1, tensor.shape[place]):
            raise UsageError(
                f"A correction of the cache plan has {channels} channels, and what it corrects has "
                f"{tensor.shape[place]}",
                remedy="Make the plan again with `dcomp search-schedule`.",
            )
        wide = torch.promote_types(tensor.dtype, torch.float32)
        shape = [channels if axis == place else 1 for axis in range(tensor.ndim)]
        scale, shift = (
            torch.tensor(numbers, dtype=wide, device=tensor.device).view(shape) for numbers in (self.scale, self.shift)
        )
        return torch.addcmul(shift, tensor.to(wide), scale).to(tensor.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the correction as JSON data."""
        return {"scale": [*self.scale], "shift": [*self.shift]}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: the data has another form.
        """
        good = (
            isinstance(data, dict)
            and {*data} == {"scale", "shift"}
            and all(isinstance(numbers, list) and len(numbers) <= MAX_CHANNELS for numbers in data.values())
        )
        if not good:
            raise ValueError("no scales and shifts")
        return cls(tuple(data["scale"]), tuple(data["shift"]))


def channel_place(tensor: Tensor) -> int:
    """Return which dimension of a tensor is its channels: the second of pictures, the last of tokens."""
    return 1 if tensor.ndim >= _IMAGE else tensor.ndim - 1
