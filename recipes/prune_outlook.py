"""What can be cut out of a model under a recipe's stage, before anything is measured, and whether that is enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dcomp import UsageError
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.compress.pruning.choose import Constraints, Problem
from dcomp.compress.pruning.costs import Costs, Saving, measure_costs, sites
from dcomp.compress.pruning.cut import cuts_of
from dcomp.compress.pruning.importance import Subject
from dcomp.compress.pruning.options import list_options
from dcomp.compress.pruning.units import Units, find_units
from dcomp.recipes.schema import PruneStage

DEFAULT_PART = 0.2  # of the parameters, where no budget is given


@dataclass(frozen=True)
class Outlook:
    """What can be cut, before anything is measured.

    Attributes:
        units: of the denoiser.
        costs: of a call for one prompt, all contexts.
        most: that can be saved of each, under the stage's constraints.
        needed: that the stage asks for.
    """

    units: Units
    costs: Costs
    most: Saving
    needed: Saving

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            "parts": {
                name: {"kind": part.kind, **vars(self.costs.parts[name])} for name, part in self.units.parts.items()
            },
            "groups": {
                name: {"kind": group.kind, "members": group.members, **vars(self.costs.members[name])}
                for name, group in self.units.groups.items()
            },
            "left": dict(self.units.left),
            "most": vars(self.most),
            "needed": vars(self.needed),
        }


def outlook(
    denoiser: nn.Module, stage: PruneStage, nbytes: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> Outlook:
    """Find out what can be cut, and whether that is enough.

    Args:
        denoiser: the original.
        stage: of the recipe.
        nbytes: of the denoiser's weights, as stored.
        args: positional arguments of a call for one prompt.
        kwargs: its keyword arguments.

    Raises:
        UsageError: it was pruned before, or less can go than is asked for.
    """
    if cuts_of(denoiser):
        raise UsageError(
            "The model was pruned before, and cuts are chosen for a whole one",
            where=type(denoiser).__name__,
            remedy="Start from the original, with a larger budget.",
        )
    units = find_units(denoiser)
    costs = measure_costs(denoiser, units, args, kwargs)
    subject = Subject(denoiser, units, None)  # type: ignore[arg-type]  # nothing is run
    nothing = {group.name: torch.zeros(group.members, device="cpu") for group in units.groups.values()}
    options = list_options(subject, costs, nothing, round_to=stage.round_to)
    constraints = constraints_of(stage, units)
    problem = Problem(options, dict(sites(units)), constraints)
    needed = _needed(stage, costs.whole, nbytes)
    problem.best(needed)
    return Outlook(units, costs, problem.most(), needed)


def constraints_of(stage: PruneStage, units: Units) -> Constraints:
    """Return the constraints that a stage names by patterns.

    Raises:
        UsageError: a pattern names nothing that can be cut.
    """
    names = [name for name, _ in sites(units)]

    def named(pattern: str) -> list[str]:
        found = [name for name in names if fnmatchcase(name, pattern)]
        found = found or [name for name in names if fnmatchcase(name, f"{pattern}.*")]  # all within a module
        if not found:
            raise UsageError(
                f"The pattern {pattern!r} names nothing that can be cut",
                where="stages.prune",
                remedy="Run `dcomp prune MODEL --dry-run` to see what can be.",
            )
        return found

    lists: dict[str, list[str]] = {}
    for part in units.parts.values():
        if part.kind == "block":
            lists.setdefault(part.name.rpartition(".")[0], []).append(part.name)
    return Constraints(
        frozenset(name for pattern in stage.pin for name in named(pattern)),
        tuple(tuple(dict.fromkeys(n for pattern in patterns for n in named(pattern))) for patterns in stage.tie),
        tuple(map(tuple, lists.values())) if stage.contiguous else (),
    )


def _needed(stage: PruneStage, whole: Saving, nbytes: int) -> Saving:
    parts = [stage.parameters or 0.0]
    if stage.max_megabytes is not None:
        parts.append(max(0.0, 1 - stage.max_megabytes * 1e6 / nbytes))
    elif stage.parameters is None and stage.macs is None:
        parts.append(DEFAULT_PART)
    return Saving(-int(-max(parts) * whole.parameters // 1), -int(-(stage.macs or 0.0) * whole.macs // 1))


def stored_bytes(pipeline: OpenPipeline) -> int:
    """Return the bytes of the denoiser's weights, as stored."""
    part = check_model_folder(pipeline.source, match_weights=False).components[pipeline.denoiser_name]
    return sum(tensor.nbytes for tensor in part.tensors.values())
