"""Channels and ranges that carry no information, found in what a layer was quantized with; remarks, not errors.

An input channel that never changes cannot show how its weights should be rounded, and one that is always 0 hides them
altogether: if it comes to life after calibration, its codes were chosen blindly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dcomp.compress.scheme import QScheme
from dcomp.compress.split import part_slices

SHOWN = 4  # numbers of channels that a remark lists


def find_remarks(layer: nn.Linear | nn.Conv2d, x: Tensor, scheme: QScheme, row_bins: Tensor | None) -> tuple[str, ...]:
    """Say in words which channels are dead or constant, and which static ranges have no width.

    Args:
        layer: in float.
        x: its inputs on N rows, finite: `[N, ..., I]`, or `[N, I, H, W]` of a convolution.
        scheme: what is done with the inputs.
        row_bins: step bin of each row, int64 `[N]`; None: all rows belong to bin 0.
    """
    last = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
    remarks = []
    if last.numel() > last.shape[-1]:  # one value of a channel says nothing about others
        low, high = _extremes(last)
        zero, constant = (low == 0) & (high == 0), (low == high) & (low != 0)
        remarks += [
            _words(zero, "input channels", "always 0"),
            _words(constant, "input channels", "constant"),
        ]
    weight = layer.weight.detach()
    remarks.append(_words((weight == 0).flatten(1).all(1), "output channels", "made with weights that are all 0"))
    unread = (weight == 0).transpose(0, 1).flatten(1).all(1)
    remarks.append(_words(unread, "input channels", "met by weights that are all 0") if not _grouped(layer) else "")
    if scheme.input_granularity == "tensor":
        remarks += _flat_ranges(last, scheme, row_bins)
    return tuple(filter(None, remarks))


def _flat_ranges(last: Tensor, scheme: QScheme, row_bins: Tensor | None) -> Iterator[str]:
    bins = torch.zeros(len(last), dtype=torch.int64) if row_bins is None else row_bins
    seen = bins.unique().tolist()
    for number, own in enumerate(part_slices(last.shape[-1], scheme.boundaries)):
        part = last[..., own]
        flat = [b for b in seen if bool((part[bins == b] == part[bins == b].flatten()[0]).all())]
        if flat:
            place = f" of part {number}" if scheme.boundaries else ""
            yield f"the static range{place} has no width in {len(flat)} of {len(seen)} step bins: {_some(flat)}"


def _extremes(last: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(range(last.ndim - 1))
    return last.amin(axes), last.amax(axes)


def _grouped(layer: nn.Module) -> bool:
    return int(getattr(layer, "groups", 1)) != 1


def _words(found: Tensor, what: str, how: str) -> str:
    numbers = found.nonzero().flatten().tolist()
    if not numbers:
        return ""
    return f"{len(numbers)} of {len(found)} {what} {'is' if len(numbers) == 1 else 'are'} {how}: {_some(numbers)}"


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
