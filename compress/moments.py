"""Second moments of a layer's inputs: what its output errors are measured by without running it again.

A row of X is what one output position of the layer reads, in the order of the canonical weight `[O, *taps, I]`, input
channels fastest. Letters: O output channels, I input channels, K columns of X.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp import DcompError

WIDEST = 4608  # columns of one block: 512 channels of a 3x3 convolution, 81 MiB
ROWS_PER_COLUMN, FEWEST_ROWS = 8, 4096
SHRINKAGE = 0.1  # of what two columns have in common

_PATCH_ELEMENTS = 1 << 22  # of X in memory at once
_STRIPE = 256  # columns computed at once, from the diagonal down: the rest follows from the symmetry
_IMAGE_ELEMENTS = 1 << 24  # of the input copied at once, to cut patches from


class MomentsError(DcompError):
    """Inputs whose second moments cannot be taken."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs, `X^T X / rows`.

    Attributes:
        blocks: fp32 `[K_b, K_b]` for consecutive sets of input channels, each with all of its taps. One set if K is at
            most `WIDEST`; else what lies between two sets is left out.
        rows: how many rows of X they are the mean of.
        means: fp32 `[K_b]`, of the same columns.
    """

    blocks: tuple[Tensor, ...]
    rows: int
    means: tuple[Tensor, ...] = ()

    def shrunk(self, part: float = SHRINKAGE) -> "Moments":
        """Return the moments with each product of two different columns smaller by a part.

        Positions of one picture are alike, and so are calls of one trajectory, so that a layer with small pictures has
        hardly more rows that tell something new than columns. Codes that make use of every correlation of those rows
        are off on others: on other trajectories, errors of ten out of eleven layers were 3 to 20 % lower with a tenth
        less.

        Source: Schafer and Strimmer 2005, A shrinkage approach to large-scale covariance matrix estimation (target D).
        """
        return replace(self, blocks=tuple((1 - part) * h + part * torch.diag(h.diagonal()) for h in self.blocks))

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of the rows of both, of the same layer."""
        rows = self.rows + other.rows

        def mean(one: Tensor, two: Tensor) -> Tensor:
            return one * (self.rows / rows) + two * (other.rows / rows)

        pairs = [(self.blocks, other.blocks), (self.means, other.means)]
        blocks, means = (tuple(map(mean, mine, theirs)) for mine, theirs in pairs)
        return Moments(blocks, rows, means)

    def cut(self, weight: Tensor) -> list[Tensor]:
        """Cut a canonical weight `[O, *taps, I]` into the columns `[O, K_b]` of each block."""
        taps = math.prod(weight.shape[1:-1])
        return [part.flatten(1) for part in weight.split([len(block) // taps for block in self.blocks], -1)]


def input_moments(layer: nn.Linear | nn.Conv2d, x: Tensor, *, max_rows: int | None = None) -> Moments:
    """Measure the second moments of a layer's inputs. Equal inputs give equal moments; temporaries are bounded.

    Args:
        layer: gives the geometry; its weight is not read. A convolution pads by zeros and has one group.
        x: float `[..., I]` of a linear layer, `[N, I, H, W]` of a convolution.
        max_rows: rows of X that are used, spread over all; by default 8 for each column of a block, at least 4096.

    Raises:
        MomentsError: there are no inputs, or one is NaN, infinite, or too large to be squared.
    """
    taps = 1
    if isinstance(layer, nn.Conv2d):
        assert layer.groups == 1
        assert layer.padding_mode == "zeros"
        taps = math.prod(layer.kernel_size)
        x = x.movedim(1, -1)
    x = x.detach()
    channels = x.shape[-1]
    width = -(-channels // -(-channels * taps // WIDEST))
    wanted = max_rows or max(FEWEST_ROWS, ROWS_PER_COLUMN * width * taps)
    blocks, means = [], []
    for channel_set in x.split(width, -1):
        rows, columns = 0, taps * channel_set.shape[-1]
        total, mean = torch.zeros(columns, columns, device=x.device), torch.zeros(columns, device=x.device)
        for chunk in _rows(layer, channel_set, wanted):
            for first in range(0, columns, _STRIPE):
                stripe = slice(first, first + _STRIPE)
                total[first:, stripe].addmm_(chunk[:, first:].t(), chunk[:, stripe])
            mean += chunk.sum(0)
            rows += len(chunk)
        blocks.append((total.tril() + total.tril(-1).t()).div_(rows))
        means.append(mean.div_(rows))
    if not all(block.isfinite().all() for block in blocks):
        raise MomentsError(
            "The inputs of a layer are missing, not finite, or too large to be squared",
            where=str(layer),
            remedy="Run the model in float32 and find the first layer whose output is not finite.",
        )
    return Moments(tuple(blocks), rows, tuple(means))


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor, wanted: int) -> Iterator[Tensor]:
    """Yield chunks of at most `wanted` rows of X, fp32 `[rows, K]`; channels of `x` are last."""
    if isinstance(layer, nn.Conv2d):
        yield from _patches(layer, x, wanted)
        return
    flat = x.reshape(-1, x.shape[-1])
    for rows in spread_rows(len(flat), wanted).split(max(1, _PATCH_ELEMENTS // x.shape[-1])):
        yield flat[rows.to(x.device)].float()


def _patches(conv: nn.Conv2d, x: Tensor, wanted: int) -> Iterator[Tensor]:
    """Likewise of inputs `[N, H, W, I]`, cut out at output positions only that are wanted."""
    samples, height, width, channels = x.shape
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    height, width = height + top + bottom, width + left + right
    out_height, out_width = (
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, dilation, taps, stride in zip(
            (height, width), conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    )
    positions = out_height * out_width
    down, across = (torch.arange(k) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    taps = (down[:, None] * width + across).flatten()
    chosen = spread_rows(samples * positions, wanted)
    together = max(1, _IMAGE_ELEMENTS // (height * width * channels))
    for first in range(0, samples, together):
        image = functional.pad(x[first : first + together].float(), (0, 0, left, right, top, bottom))
        image = image.reshape(-1, channels)
        here = chosen[(chosen >= first * positions) & (chosen < (first + together) * positions)] - first * positions
        for place in here.split(max(1, _PATCH_ELEMENTS // (len(taps) * channels))):
            sample, row, column = place // positions, place % positions // out_width, place % out_width
            corner = (sample * height + row * conv.stride[0]) * width + column * conv.stride[1]
            yield image[(corner[:, None] + taps).to(x.device)].flatten(1)


def spread_rows(total: int, count: int) -> Tensor:
    """Return `min(count, total)` ascending numbers below `total`: one at random, always the same, of each equal part.

    Equal distances would meet the same columns of every picture.
    """
    if total <= count:
        return torch.arange(total)
    edges = torch.arange(count + 1) * total // count
    share = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return edges[:-1] + (share * edges.diff()).long()
