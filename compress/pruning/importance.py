"""How much the members of each group matter: the one with the least score goes first.

Which scorers there are is said in `prune.METHODS`. Scores of all but `reconstruction` are taken to add up over members,
groups and parts; those are places in an order, which say nothing about another group. Letters: M members.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import RowBatch, predict
from dcomp.compress.pruning.compensation import ConsumerFit
from dcomp.compress.pruning.masks import Latents, learn_masks
from dcomp.compress.pruning.observe import CHUNK_ROWS, Observed, observe
from dcomp.compress.pruning.units import Group, Slice, Units, parameters_of_member


@dataclass
class Subject:
    """What is scored.

    Attributes:
        denoiser: in float and eval mode; it stays as it is.
        units: of it.
        rows: recorded, with what it predicted.
        guidance: scale of guided predictions.
        seed: of what is drawn.
        progress: called with a text, the count done and the total.
        latents: runs a trajectory with gradients, and returns its final latents; None where nobody asks for it.
        trajectories: how many it knows.
    """

    denoiser: nn.Module
    units: Units
    rows: RowBatch
    guidance: float | None = None
    seed: int = 0
    progress: Progress = field(default=silent)
    latents: Latents | None = None
    trajectories: int = 0

    @cached_property
    def observed(self) -> Observed:
        """What layers that read groups read, and what the last layers of parts return."""
        read = dict.fromkeys(path for group in self.units.groups.values() for path, _ in consumers(group))
        made = dict.fromkeys(layer for part in self.units.parts.values() for layer in part.last)
        return observe(self.denoiser, self.rows, [*read], [*made], progress=self.progress)

    def fits(self, group: Group) -> list[tuple[ConsumerFit, list[range]]]:
        """Return the fit of each layer that reads a group, and the channels of each member there."""
        found = []
        for path, owned in consumers(group):
            layer: Any = self.denoiser.get_submodule(path)
            members = [owned.of(member) for member in range(group.members)]
            found.append((ConsumerFit(layer, self.observed.moments[path]), members))
        return found


Scorer = Callable[[Subject], Mapping[str, Tensor]]
"""Subject -> scores `[M]` of every group, not negative."""


def consumers(group: Group) -> list[tuple[str, Slice]]:
    """Return the layers that read a group, each with what members own of its input channels."""
    return [(owned.tensor.rpartition(".")[0], owned) for owned in group.consumers]


def magnitude(subject: Subject) -> dict[str, Tensor]:
    """Squares of all weights of a member (Li et al. 2017, Pruning filters)."""
    return _weighed(subject, lambda name: subject.denoiser.get_parameter(name).detach().double().square())


def taylor(subject: Subject) -> dict[str, Tensor]:
    """Change of the loss to first order in each weight, `sum |w g|` (Fang et al. 2023, Diff-Pruning, section 3.3).

    Where the model is compared with itself its loss has no gradient: that of noise, which it was trained with, has one.
    """
    groups = subject.units.groups.values()
    named = {owned.tensor for group in groups for owned in (*group.producers, *group.consumers)}
    weights = {name: p for name, p in subject.denoiser.named_parameters() if name in named}
    asked = {name: p.requires_grad for name, p in weights.items()}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in weights.items()}
    noise = torch.Generator().manual_seed(subject.seed)
    try:
        for p in weights.values():
            p.requires_grad_(True)
        for place, rows in enumerate(subject.rows.chunks(CHUNK_ROWS)):
            subject.progress("gradients", place * CHUNK_ROWS, len(subject.rows))
            with torch.enable_grad():
                values = predict(subject.denoiser, rows)
                loss = (values - values.detach() - torch.randn(values.shape, generator=noise)).square().mean()
                gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    total[name] += (weights[name].detach() * gradient).double().abs()
    finally:
        for name, p in weights.items():
            p.requires_grad_(asked[name])
    return _weighed(subject, total.__getitem__)


def at_random(subject: Subject) -> dict[str, Tensor]:
    """Draw scores: what any other scorer must be better than."""
    draw = torch.Generator().manual_seed(subject.seed)
    return {
        name: torch.rand(group.members, generator=draw, dtype=torch.float64)
        for name, group in subject.units.groups.items()
    }


def reconstruction(subject: Subject) -> dict[str, Tensor]:
    """Places in the order in which the layer behind a group misses its members least, while others make up for them.

    Places of two layers that read one group add up. See `compensation.py`.
    """
    found = {}
    groups = subject.units.groups
    for place, (name, group) in enumerate(groups.items()):
        subject.progress("orders of members", place, len(groups))
        scores = torch.zeros(group.members, dtype=torch.float64)
        for fit, members in subject.fits(group):
            rank = torch.empty(group.members, dtype=torch.float64)
            rank[fit.order(members)] = torch.arange(group.members, dtype=torch.float64)
            scores += rank
        found[name] = scores
    subject.progress("orders of members", len(groups), len(groups))
    return found


def learned(subject: Subject) -> dict[str, Tensor]:
    """How open gates of members stay that are learned over whole trajectories (EcoDiff, see `masks.py`).

    Times what a member costs, so that a choice by scores for each parameter goes by openness alone, as in the paper.
    """
    assert subject.latents is not None
    groups = subject.units.groups
    weights = {name: parameters_of_member(subject.denoiser, group) for name, group in groups.items()}
    found = learn_masks(
        subject.denoiser,
        groups,
        weights,
        subject.latents,
        subject.trajectories,
        seed=subject.seed,
        progress=subject.progress,
    )
    return {name: openness * weights[name] for name, openness in found.items()}


def _weighed(subject: Subject, values: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return for each member the sum of some values, given for each tensor, over all weights that it owns."""
    found = {}
    for name, group in subject.units.groups.items():
        scores = torch.zeros(group.members, dtype=torch.float64)
        for owned in (*group.producers, *group.consumers):
            by_element = _by_element(values(owned.tensor), owned.axis)
            scores += by_element[owned.start :][: group.members * owned.width].view(group.members, -1).sum(1)
        found[name] = scores
    return found


def _by_element(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, 0).flatten(1).sum(1) if values.dim() > 1 else values


def going_order(scores: Tensor) -> list[int]:
    """Return the members of a group in the order in which they should go."""
    return scores.argsort(stable=True).tolist()


def widths(members: int, parts: Sequence[float], round_to: int) -> list[int]:
    """Return how many members may stay: parts of all of them, in multiples of a number, at least one, fewer than all.

    Args:
        members: of the group.
        parts: of them, such as 0.75.
        round_to: multiples; 1 for any number.
    """
    found = {max(round_to, round(members * part / round_to) * round_to) for part in parts}
    return sorted((count for count in found if 0 < count < members), reverse=True)
