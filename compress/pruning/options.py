"""Ways to cut each site, with the error that each makes alone.

The error is that of the guided prediction on recorded rows, with the step's unit of `objective.py`, and is measured by
a run of the cut denoiser: one ruler for blocks, branches and widths (Zhang et al. 2024, LAPTOP-Diff, for layers). Where
a scorer's own numbers add up, they may be the error instead, which needs no run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.progress import silent
from dcomp.compress.objective import Objective
from dcomp.compress.pruning.choose import Option
from dcomp.compress.pruning.compensation import ConsumerFit
from dcomp.compress.pruning.costs import Costs, sites
from dcomp.compress.pruning.cut import cut_copy, renamed
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.importance import Subject, consumers, going_order, widths
from dcomp.compress.pruning.observe import CHUNK_ROWS
from dcomp.compress.pruning.units import Group

PARTS = (0.75, 0.5, 0.25)
"""Of the members of a group: what may stay."""


def list_options(
    subject: Subject,
    costs: Costs,
    scores: Mapping[str, Tensor],
    *,
    parts: Sequence[float] = PARTS,
    round_to: int = 1,
) -> dict[str, list[Option]]:
    """Return the ways to cut each site; their errors are sums of scores.

    Args:
        subject: what is cut.
        costs: of it.
        scores: of the members of each group.
        parts: of the members of a group that may stay.
        round_to: channels of a group that stays are a multiple of this, where it has so many.
    """
    units = subject.units
    found: dict[str, list[Option]] = {}
    for site, _ in sites(units):
        path = site.partition(":")[0]
        options = []
        own = [g for g in units.groups.values() if g.name == site or (site in units.parts and g.path == site)]
        for group in own if site not in units.parts or units.parts[site].kind != "block" else ():
            order = going_order(scores[group.name])
            for count in widths(group.members, parts, _multiple(group, round_to)):
                gone = order[: group.members - count]
                kept = {group.name: tuple(sorted({*range(group.members)} - {*gone}))}
                error = float(scores[group.name][gone].sum())
                saving = costs.members[group.name].times(len(gone))
                options.append(Option(site, f"{count} of {group.members}", CutList(kept=kept), error, saving))
        if site in units.parts:
            inside = [g for g in units.groups.values() if g.path == path or g.path.startswith(f"{path}.")]
            error = sum(float(scores[group.name].sum()) for group in inside)
            options.append(Option(site, "gone", CutList(frozenset({site})), error, costs.parts[site]))
        found[site] = options
    return found


def altered(subject: Subject, cuts: CutList, *, made_up: bool = True) -> nn.Module:
    """Return a cut copy of a denoiser.

    Args:
        subject: with the denoiser, which stays as it is.
        cuts: that are made.
        made_up: what stays makes up for what goes: the weights behind a group, and constants in the place of parts.
    """
    units = subject.units
    cuts = cuts.simplified(units)
    small = cut_copy(subject.denoiser, cuts, units)
    if made_up:
        modules = dict(small.named_modules())
        for name, values in _made_up(subject, cuts):
            path, _, leaf = name.rpartition(".")
            place = renamed(path, cuts, units)
            if place in modules:  # the last block of joint attention has lost what made its second stream
                setattr(modules[place], leaf, nn.Parameter(values, requires_grad=False))
    return small


def _made_up(subject: Subject, cuts: CutList) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, by the names that they have in the original, with the values that make up for what goes."""
    lost: dict[str, list[int]] = {}
    for name, members in cuts.kept.items():
        group = subject.units.groups[name]
        for path, owned in consumers(group):
            gone = {*range(group.members)} - {*members}
            lost.setdefault(path, []).extend(channel for member in sorted(gone) for channel in owned.of(member))
    for path, channels in lost.items():
        layer: Any = subject.denoiser.get_submodule(path)
        weight, bias = ConsumerFit(layer, subject.observed.moments[path]).without(channels)
        stays = sorted({*range(weight.shape[1])} - {*channels})
        yield f"{path}.weight", weight[:, stays].contiguous()
        if layer.bias is not None:
            yield f"{path}.bias", bias
    for name in cuts.removed:
        for leaf, path in zip(("bias", "added_bias"), subject.units.parts[name].last, strict=False):
            kept: Any = subject.denoiser.get_submodule(path).weight
            yield f"{name}.{leaf}", subject.observed.means[path].to(kept.dtype)


def errors_of(subject: Subject, denoiser: nn.Module) -> Tensor:
    """Return the error of a denoiser's guided predictions at each step, fp64."""
    objective = Objective(denoiser, subject.rows, subject.guidance, CHUNK_ROWS)
    every = torch.arange(len(objective.units))
    return objective.by_step(objective.measure(every, silent), every)


def measured_options(
    subject: Subject,
    options: Mapping[str, Sequence[Option]],
    keep: Callable[[str, Callable[[], list[float]]], list[float]] = lambda _, measure: measure(),
) -> tuple[dict[str, list[Option]], Tensor]:
    """Measure the error that each option makes alone.

    Args:
        subject: what is cut.
        options: of each site.
        keep: called with a name and what measures its errors by step; returns them, measured now or before.

    Returns:
        The options with their errors, and the unit of an error at each step: the mean of those of all options.
    """
    every = [option for found in options.values() for option in found]
    by_step = []
    for place, option in enumerate(every):
        subject.progress("errors of cuts", place, len(every))

        def measure(cuts: CutList = option.cuts) -> list[float]:
            return errors_of(subject, altered(subject, cuts)).tolist()

        by_step.append(keep(f"{option.site} {option.label}", measure))
    subject.progress("errors of cuts", len(every), len(every))
    steps = torch.tensor(by_step, dtype=torch.float64)
    units = steps.mean(0)
    errors = iter([in_units(each, units) for each in steps])
    found = {site: [replace(option, error=next(errors)) for option in given] for site, given in options.items()}
    return found, units


def in_units(by_step: Tensor, units: Tensor) -> float:
    """Return the mean error over all steps, each in its unit."""
    return float((by_step / units)[units > 0].mean()) if bool((units > 0).any()) else 0.0


def _multiple(group: Group, round_to: int) -> int:
    """Return how many members have a multiple of some channels; 1 where the group is smaller than that."""
    width = group.consumers[0].width
    members = math.lcm(width, round_to) // width
    return members if members < group.members else 1
