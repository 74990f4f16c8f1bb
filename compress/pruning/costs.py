"""What cuts save: parameters and multiply-accumulates of every part and every member, from shapes alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcomp.calibrate.cost import counting_macs
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.removed import stand_in
from dcomp.compress.pruning.units import Group, Units, parameters_of_member


@dataclass(frozen=True)
class Saving:
    """What a cut saves.

    Attributes:
        parameters: fewer.
        macs: multiply-accumulates of the counted call, fewer.
    """

    parameters: int
    macs: int

    def __add__(self, other: "Saving") -> "Saving":
        return Saving(self.parameters + other.parameters, self.macs + other.macs)

    def times(self, count: int) -> "Saving":
        """Return what several such cuts save."""
        return Saving(self.parameters * count, self.macs * count)


@dataclass(frozen=True)
class Costs:
    """What a denoiser costs, and what can be saved of it.

    Attributes:
        whole: of the denoiser.
        parts: part -> what is saved without it, its groups whole.
        members: group -> what is saved without one member.
    """

    whole: Saving
    parts: Mapping[str, Saving]
    members: Mapping[str, Saving]

    def of(self, cuts: CutList, units: Units) -> Saving:
        """Return what cuts save together.

        A second stream that ends one block earlier saves a little more than this.
        """
        cuts = cuts.simplified(units)
        total = Saving(0, 0)
        for name in cuts.removed:
            total += self.parts[name]
        for name, members in cuts.kept.items():
            total += self.members[name].times(units.groups[name].members - len(members))
        return total


def measure_costs(denoiser: nn.Module, units: Units, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Costs:
    """Run one call, also without values, and return the costs.

    Args:
        denoiser: may be on the meta device, with the arguments.
        units: of it.
        args: positional arguments of a call.
        kwargs: its keyword arguments.
    """
    layers, products = _count(denoiser, units, args, kwargs)
    whole = Saving(sum(p.numel() for p in denoiser.parameters()), sum(layers.values()) + products[""])
    members = {name: _of_member(denoiser, group, layers, products) for name, group in units.groups.items()}
    parts = {}
    for name, part in units.parts.items():
        module = denoiser.get_submodule(name)
        left = None if part.kind == "block" else stand_in(module, part.kind)
        kept = sum(p.numel() for p in left.parameters()) if left is not None else 0
        shortcut = f"{name}.conv_shortcut" if part.kind == "resnet" else ""
        macs = sum(count for layer, count in layers.items() if _within(layer, name) and layer != shortcut)
        macs += sum(products.get(path, 0) for path in products if path and _within(path, name))
        parts[name] = Saving(sum(p.numel() for p in module.parameters()) - kept, macs)
    return Costs(whole, parts, members)


def _count(
    denoiser: nn.Module, units: Units, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return multiply-accumulates of each layer, and of each attention's products; those of all together under ""."""
    products: dict[str, int] = {}
    with counting_macs(denoiser) as counted, torch.no_grad(), ExitStack() as stack:
        for group in units.groups.values():
            if group.kind != "heads":
                continue

            def begin(*_: Any, path: str = group.path) -> None:
                products[path] = products.get(path, 0) - counted().attention

            def end(*_: Any, path: str = group.path) -> None:
                products[path] += counted().attention

            attention = denoiser.get_submodule(group.path)
            stack.callback(attention.register_forward_pre_hook(begin).remove)
            stack.callback(attention.register_forward_hook(end).remove)
        denoiser(*args, **kwargs)
        found = counted()
    return found.layers, products | {"": found.attention}


def _of_member(denoiser: nn.Module, group: Group, layers: Mapping[str, int], products: Mapping[str, int]) -> Saving:
    macs = 0
    for owned in (*group.producers, *group.consumers):
        path, _, leaf = owned.tensor.rpartition(".")
        if leaf == "weight" and path in layers:
            macs += layers[path] * owned.width // denoiser.get_parameter(owned.tensor).shape[owned.axis]
    if group.kind == "heads":
        macs += products.get(group.path, 0) // group.members
    return Saving(parameters_of_member(denoiser, group), macs)


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}.")


def sites(units: Units) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every place of a choice, with the parts around it: a part, or a group that no part but a block holds."""
    alone = [
        group.name
        for group in units.groups.values()
        if group.path not in units.parts or units.parts[group.path].kind == "block"
    ]
    for name in (*units.parts, *alone):
        path = name.partition(":")[0]
        yield name, tuple(part for part in units.parts if part != name and _within(path, part))
