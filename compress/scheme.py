"""How one layer is quantized: bits, groups, ranges and transforms, as one value that can be compared and stored."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

from dcomp import UsageError

GROUP_SIZE = 64  # of weights
INPUT_GROUP = 32
DIRECTIONS = 8  # of a 4-bit input
MAX_BOUNDARIES = 63  # a checkpoint's word is not taken for more; layers that read a concatenation of 64 are not known

RangeName = Literal["mse", "minmax"]
Granularity = Literal["tensor", "sample", "token"]
Rounding = Literal["nearest", "gptq", "adaround"]

_GRANULARITIES: dict[int, tuple[Granularity | None, ...]] = {
    4: ("sample", "token"),
    8: ("tensor", "sample", "token"),
    16: (None,),
}


class SchemeError(UsageError):
    """A scheme that has no kernel, or a pattern or preset that names nothing."""


@dataclass(frozen=True)
class QScheme:
    """How one layer is quantized.

    Attributes:
        weight_bits: 4 or 8.
        group_size: input channels that share a multiplier, for 4 bits; None for 8 bits (a scale per output channel).
        weight_range: how scales of weights are chosen.
        input_bits: 4, 8, or 16 for an input that stays float.
        input_granularity: "tensor" has static scales, one for each step bin; "sample" finds a range for each sample
            while running, "token" one for each row or pixel; None with 16 bits.
        input_range: how static scales of inputs are chosen.
        input_group: input channels that share a multiplier, for 4-bit inputs; None otherwise.
        boundaries: input channels at which a part with quantizers of its own begins, ascending; empty for one part.
        smooth: a factor for each input channel is moved from the input to the weight.
        rotate: input and weight are rotated by Hadamard matrices over blocks of input channels.
        rank: of a float branch beside the integer weight of each part; 0 for none.
        rounding: how codes of weights are chosen; no matter for execution.
        folded: its inputs or outputs have other units than in the float model, because factors of inputs are part of
            what makes them; no matter for execution, but an adapter for the float model does not fit.
        corrected: the output has a scale and a bias of its own in each step bin.
        directions: of the input of each part, which are taken out before it is rounded and multiplied in float; 0 for
            none.

    Raises:
        SchemeError: there is no layer with such a combination.
    """

    weight_bits: int
    group_size: int | None = None
    weight_range: RangeName = "mse"
    input_bits: int = 16
    input_granularity: Granularity | None = None
    input_range: RangeName = "mse"
    input_group: int | None = None
    boundaries: tuple[int, ...] = ()
    smooth: bool = False
    rotate: bool = False
    rank: int = 0
    rounding: Rounding = "nearest"
    folded: bool = False
    corrected: bool = False
    directions: int = 0

    def __post_init__(self) -> None:
        granularities = _GRANULARITIES.get(self.input_bits, (None,)) if type(self.input_bits) is int else (None,)
        problems = [
            text
            for text, good in (
                ("weight_bits is 4 or 8", type(self.weight_bits) is int and self.weight_bits in (4, 8)),
                ("group_size is a positive even number with 4 bits", self.weight_bits != 4 or _even(self.group_size)),
                ("group_size is None with 8 bits", self.weight_bits != 8 or self.group_size is None),
                ("input_bits is 4, 8 or 16", type(self.input_bits) is int and self.input_bits in _GRANULARITIES),
                (f"input_granularity is one of {granularities}", self.input_granularity in granularities),
                ("input_group is a positive even number with 4 bits", self.input_bits != 4 or _even(self.input_group)),
                ("input_group is None with 8 or 16 bits", self.input_bits == 4 or self.input_group is None),
                (f"boundaries are at most {MAX_BOUNDARIES} ascending positive numbers", _ascending(self.boundaries)),
                ("smooth is true or false", type(self.smooth) is bool),
                ("rotate is true or false", type(self.rotate) is bool),
                ("folded is true or false", type(self.folded) is bool),
                ("corrected is true or false", type(self.corrected) is bool),
                ("rank is a whole number, 0 for none", type(self.rank) is int and self.rank >= 0),
                ("directions is a whole number, 0 for none", type(self.directions) is int and self.directions >= 0),
                ("weight_range is mse or minmax", self.weight_range in ("mse", "minmax")),
                ("input_range is mse or minmax", self.input_range in ("mse", "minmax")),
                ("rounding is nearest, gptq or adaround", self.rounding in ("nearest", "gptq", "adaround")),
            )
            if not good
        ]
        if problems:
            raise SchemeError(f"Impossible scheme {asdict(self)}", remedy=f"Change it so that {', '.join(problems)}.")

    @property
    def label(self) -> str:
        """Short name, such as "W4A8"."""
        return f"W{self.weight_bits}A{self.input_bits}"

    def __str__(self) -> str:
        weights = "8-bit weights" if self.group_size is None else f"4-bit weights in groups of {self.group_size}"
        each = {"tensor": "", "sample": " per sample", "token": " per token", None: ""}[self.input_granularity]
        inputs = "float input" if self.input_bits == 16 else f"{self.input_bits}-bit input{each}"
        options = (
            (self.input_group, f" in groups of {self.input_group}"),
            (self.boundaries, f", split at {', '.join(map(str, self.boundaries))}"),
            (self.smooth, ", smoothed"),
            (self.rotate, ", rotated"),
            (self.directions, f", {self.directions} directions in float"),
            (self.rank, f", with a branch of rank {self.rank}"),
            (self.corrected, ", corrected at each step"),
        )
        return f"{weights}, {inputs}{''.join(text for chosen, text in options if chosen)}"

    def to_dict(self) -> dict[str, Any]:
        """Return a form for JSON."""
        return asdict(self) | {"boundaries": list(self.boundaries)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned; keys with a default may be missing.

        Raises:
            SchemeError: a key is unknown or missing, or the scheme is impossible.
        """
        boundaries = values.get("boundaries")
        given = {**values, "boundaries": tuple(boundaries)} if isinstance(boundaries, list) else values
        try:
            return cls(**given)
        except TypeError as error:
            raise SchemeError(
                f"Not a scheme: {error}", remedy=f"Use the keys {', '.join(cls.__dataclass_fields__)}."
            ) from error

    @classmethod
    def from_label(cls, label: str, *, group_size: int = GROUP_SIZE) -> Self:
        """Read a label such as "W4A8"; inputs are per token, which `choose_schemes` changes for convolutions.

        Args:
            label: bits of weights and inputs.
            group_size: of 4-bit weights; 4-bit inputs have groups of `INPUT_GROUP`.

        Raises:
            SchemeError: the label is not W4 or W8 and A4, A8 or A16, in upper or lower case.
        """
        match = re.fullmatch(r"[wW]([48])[aA](4|8|16)", label)
        if not match:
            raise SchemeError(f"Unknown precision {label!r}", remedy="Use W4A4, W4A8, W4A16, W8A4, W8A8 or W8A16.")
        weight_bits, input_bits = int(match[1]), int(match[2])
        return cls(
            weight_bits,
            group_size if weight_bits == 4 else None,
            input_bits=input_bits,
            input_granularity=None if input_bits == 16 else "token",
            input_group=INPUT_GROUP if input_bits == 4 else None,
        )


def _even(size: Any) -> bool:
    return type(size) is int and size > 0 and size % 2 == 0


def _ascending(boundaries: Any) -> bool:
    if type(boundaries) is not tuple or len(boundaries) > MAX_BOUNDARIES:
        return False
    if not all(type(boundary) is int for boundary in boundaries):
        return False
    return all(before < after for before, after in pairwise((0, *boundaries)))
