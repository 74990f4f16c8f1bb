"""Weights of the layer that reads a group, made up for the members that it loses.

The layer shall return what it returned: the weights of what stays, and the bias, are those with the least squares of
the difference on observed inputs, in closed form from their second moments. Letters: O outputs of the layer, K columns
of its input as `moments.py` orders them, S the columns that stay and R those that go.

Source: Hassibi and Stork 1993, Optimal brain surgeon, for many columns at once; Frantar and Alistarh 2022, Optimal
brain compression, for the order in which members go.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.compress.moments import Moments

SHRINKAGE = 0.02
DAMPING = 1e-3  # of the mean variance, added to each
STEPS = 256  # at most, in which members go; between two, those that stay make up for those that went


class ConsumerFit:
    """The layer that reads a group, with what is known of its inputs.

    Args:
        layer: linear, or a convolution without groups; it is not changed.
        moments: of its inputs.
        shrinkage: part of what two columns have in common that is taken for chance.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, moments: Moments, shrinkage: float = SHRINKAGE) -> None:
        self.layer = layer
        weight = layer.weight.detach().float()
        self._weight = weight.movedim(1, -1) if weight.dim() == 4 else weight
        taps = self._weight[0].numel() // self._weight.shape[-1]
        self._blocks, first = [], 0
        for moment, mean in zip(moments.blocks, moments.means, strict=True):
            centered = moment - torch.outer(mean, mean)
            spread = centered.diagonal()
            centered = (1 - shrinkage) * centered + torch.diag(shrinkage * spread + DAMPING * spread.mean() + 1e-12)
            channels = len(mean) // taps
            columns = self._weight[..., first : first + channels].flatten(1)
            self._blocks.append(_Block(first, channels, taps, columns, centered, mean))
            first += channels

    def order(self, members: Sequence[Sequence[int]]) -> list[int]:
        """Return the members in the order in which they should go, the least important one first.

        Args:
            members: input channels of each, as many of each.
        """
        blocks = [_Going(block, members) for block in self._blocks]
        alive, gone = torch.ones(len(members), dtype=torch.bool), list[int]()
        while alive.any():
            scores = sum(block.scores() for block in blocks)
            assert isinstance(scores, Tensor)
            going = scores.masked_fill(~alive, torch.inf).argsort(stable=True)[: -(-len(members) // STEPS)]
            going = going[alive[going]]
            gone += going.tolist()
            alive[going] = False
            for block in blocks:
                block.remove(going)
        return gone

    def scores(self, members: Sequence[Sequence[int]]) -> Tensor:
        """Return what the output loses with each member alone, squared and summed over outputs, fp64 `[M]`.

        Args:
            members: input channels of each, as many of each.
        """
        found = sum(_Going(block, members).scores() for block in self._blocks)
        assert isinstance(found, Tensor)
        return found

    def energy(self) -> float:
        """Return how far the output varies: the sum of the variances of all outputs."""
        return sum(float(torch.einsum("ok,kj,oj->", b.weight, b.moments, b.weight)) for b in self._blocks)

    def without(self, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias that make up for lost channels, whose columns are zero.

        Args:
            channels: of the input, that are gone.

        Returns:
            The weight in torch's layout, and the bias `[O]`, in the dtype of the layer.
        """
        weight = self._weight.clone()
        bias = torch.zeros(len(weight)) if self.layer.bias is None else self.layer.bias.detach().float().clone()
        for block in self._blocks:
            columns, shift = block.without(channels)
            bias += shift
            weight[..., block.first : block.first + block.channels] = columns.view(*weight.shape[:-1], block.channels)
        layout = weight.movedim(-1, 1) if self.layer.weight.dim() == 4 else weight
        kind: Any = self.layer.weight.dtype
        return layout.contiguous().to(kind), bias.to(kind)


class _Block:
    """A set of input channels with all of their taps: `[O, K]`, `[K, K]`, `[K]`."""

    def __init__(self, first: int, channels: int, taps: int, weight: Tensor, moments: Tensor, mean: Tensor) -> None:
        self.first, self.channels, self.taps = first, channels, taps
        self.weight, self.moments, self.mean = weight, moments, mean

    def columns(self, channels: Sequence[int]) -> Tensor:
        """Return the columns of those of the channels that lie in this block."""
        inside = torch.tensor([c - self.first for c in channels if self.first <= c < self.first + self.channels])
        if not len(inside):
            return torch.zeros(0, dtype=torch.int64)
        return (torch.arange(self.taps)[:, None] * self.channels + inside.long()).flatten()

    def split(self, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the columns that go and those that stay."""
        stays = torch.ones(self.taps * self.channels, dtype=torch.bool)
        stays[self.columns(channels)] = False
        return (~stays).nonzero().flatten(), stays.nonzero().flatten()

    def made_up(self, goes: Tensor, stays: Tensor) -> Tensor:
        """Return the weights `[O, S]` of what stays."""
        if not len(goes) or not len(stays):
            return self.weight[:, stays]
        factor = torch.linalg.cholesky(self.moments[stays[:, None], stays])
        shared = self.weight[:, goes] @ self.moments[goes[:, None], stays]
        return self.weight[:, stays] + torch.cholesky_solve(shared.T, factor).T

    def without(self, channels: Sequence[int]) -> tuple[Tensor, Tensor]:
        goes, stays = self.split(channels)
        weight = torch.zeros_like(self.weight)
        weight[:, stays] = self.made_up(goes, stays)
        return weight, (self.weight - weight) @ self.mean


class _Going:
    """A block whose members go, one after the other.

    The inverse of the moments of what stays, and the weights that make up for what went, are kept up to date by the
    rules for one column more (Hassibi and Stork 1993, equations 5 and 8), for all columns of a member.
    """

    def __init__(self, block: _Block, members: Sequence[Sequence[int]]) -> None:
        self._weight = block.weight.double()
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(block.moments.double()))
        self._columns = [block.columns(channels) for channels in members]  # none where a member lies in another block

    def scores(self) -> Tensor:
        """Return what the output loses with each member, `[M]`; 0 for those that went."""
        found = torch.zeros(len(self._columns), dtype=torch.float64)
        by_size: dict[int, list[int]] = {}
        for member, columns in enumerate(self._columns):
            by_size.setdefault(len(columns), []).append(member)
        for size, members in by_size.items():
            if size == 1:
                columns = torch.cat([self._columns[member] for member in members])
                found[members] = self._weight[:, columns].square().sum(0) / self._inverse.diagonal()[columns]
            elif size:
                columns = torch.stack([self._columns[member] for member in members])
                part = self._weight.T[columns]  # [M, size, O]
                within = self._inverse[columns[:, :, None], columns[:, None, :]]
                found[members] = (part * torch.linalg.solve(within, part)).sum((1, 2))
        return found

    def remove(self, members: Tensor) -> None:
        """Let members go."""
        columns = torch.cat([self._columns[member] for member in members.tolist()])
        if not len(columns):
            return
        towards = torch.linalg.solve(self._inverse[columns[:, None], columns], self._inverse[columns])
        self._weight = self._weight - self._weight[:, columns] @ towards
        self._inverse = self._inverse - self._inverse[:, columns] @ towards
        self._weight[:, columns] = 0
        # Their own part of the inverse is zero now: any number keeps later steps finite.
        self._inverse[columns], self._inverse[:, columns] = 0.0, 0.0
        self._inverse[columns, columns] = 1.0
