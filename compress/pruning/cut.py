"""Cut a denoiser: take away what a cut list names, from its tensors and from what its modules know of their shapes.

Works on models without values too (the meta device), where it makes the shapes that a pruned checkpoint has.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.compress.pruning.cut_list import CutError, CutList
from dcomp.compress.pruning.removed import stand_in
from dcomp.compress.pruning.units import Group, Units, find_units

_CUTS = "dcomp_cuts"
_DIGITS = 10  # of a number in a path


def cut(denoiser: nn.Module, cuts: CutList, units: Units | None = None) -> None:
    """Cut a denoiser in place.

    Args:
        denoiser: the original, with or without values.
        cuts: what goes.
        units: of the denoiser, if they are known.

    Raises:
        CutError: the denoiser does not have what is to be cut, or was cut before.
    """
    if not cuts:
        return
    if cuts_of(denoiser):
        raise CutError(
            "The denoiser was cut before, and names of cuts are those of the original",
            where=type(denoiser).__name__,
            remedy="Start from the original, with a larger budget.",
        )
    units = units or find_units(denoiser)
    cuts.check(units)
    cuts = cuts.simplified(units)
    _narrow(denoiser, [(units.groups[name], members) for name, members in cuts.kept.items()])
    for name in cuts.removed:
        kind = units.parts[name].kind
        if kind != "block":
            parent, _, leaf = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), leaf, stand_in(denoiser.get_submodule(name), kind))
    _drop_blocks(denoiser, [name for name in cuts.removed if units.parts[name].kind == "block"])
    setattr(denoiser, _CUTS, cuts)


def cuts_of(denoiser: nn.Module) -> CutList:
    """Return what was cut out of a denoiser, in this process or before it was saved."""
    found: CutList = getattr(denoiser, _CUTS, CutList())
    return found


def cut_copy(denoiser: nn.Module, cuts: CutList, units: Units | None = None) -> nn.Module:
    """Return a denoiser that is cut; what it keeps whole it shares with the given one, which stays as it is."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    copied = copy.deepcopy(denoiser, shared)
    cut(copied, cuts, units)
    return copied


def renamed(path: str, cuts: CutList, units: Units) -> str | None:
    """Return the path that a module of the original has in the cut denoiser; None if it is gone.

    What stands in the place of a part has its path.
    """
    blocks = {name for name in cuts.removed if units.parts[name].kind == "block"}
    if any(path.startswith(f"{part}.") for part in cuts.removed) or path in blocks:
        return None
    gone: dict[str, list[int]] = {}
    for block in blocks:
        around, _, number = block.rpartition(".")
        gone.setdefault(around, []).append(int(number))
    names = path.split(".")
    for place, name in enumerate(names):
        before = gone.get(".".join(path.split(".")[:place]))
        if before and name.isdecimal() and len(name) < _DIGITS:  # paths also come from adapters' files
            names[place] = str(int(name) - sum(number < int(name) for number in before))
    return ".".join(names)


def lost(slices: Iterable[tuple[Group, Iterable[int]]]) -> dict[tuple[str, int], list[int]]:
    """Return the elements that go from each axis of each tensor, when of some groups only some members stay."""
    gone: dict[tuple[str, int], list[int]] = {}
    for group, members in slices:
        away = sorted({*range(group.members)} - {*members})
        for owned in (*group.producers, *group.consumers):
            gone.setdefault((owned.tensor, owned.axis), []).extend(e for member in away for e in owned.of(member))
    return gone


def _narrow(denoiser: nn.Module, kept: list[tuple[Group, tuple[int, ...]]]) -> None:
    """Take members out of groups."""
    for (name, axis), gone in lost(kept).items():
        path, _, leaf = name.rpartition(".")
        layer: Any = denoiser.get_submodule(path)
        tensor = getattr(layer, leaf)
        stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
        stays[gone] = False
        index = stays.nonzero().flatten().to(tensor.device)
        setattr(layer, leaf, nn.Parameter(tensor.detach().index_select(axis, index), tensor.requires_grad))
        _fit(layer)
    for group, members in kept:
        module: Any = denoiser.get_submodule(group.path)
        if group.kind == "heads":
            head = module.to_q.out_features // len(members)
            told = dict.fromkeys(("heads", "sliceable_head_dim"), len(members))
            told |= dict.fromkeys(("inner_dim", "inner_kv_dim"), head * len(members))
            for attribute, value in told.items():
                if hasattr(module, attribute):
                    setattr(module, attribute, value)
        elif group.kind == "norm_groups":
            module.norm2.num_groups = len(members)
        elif hasattr(module, "mlp_hidden_dim"):
            module.mlp_hidden_dim = len(members)
        for consumer in group.consumers:
            path = consumer.tensor.rpartition(".")[0]
            if hasattr(denoiser.get_submodule(path), "_tp_packed_row_blocks"):
                block: Any = denoiser.get_submodule(path.rpartition(".")[0])
                block.proj_out._tp_packed_row_blocks = [block.attn.to_q.out_features, block.proj_mlp.out_features]


def _fit(layer: Any) -> None:
    """Let a layer know the shape of its weight."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    else:
        layer.num_channels = len(layer.weight)


def _drop_blocks(denoiser: nn.Module, names: list[str]) -> None:
    lists: dict[str, list[int]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        lists.setdefault(path, []).append(int(last))
    for path, places in lists.items():
        blocks: Any = denoiser.get_submodule(path)
        ended = getattr(blocks[-1], "context_pre_only", False)
        for place in sorted(places, reverse=True):
            del blocks[place]
        if ended and len(blocks) and not blocks[-1].context_pre_only:
            _end_second_stream(blocks[-1])


def _end_second_stream(block: Any) -> None:
    """Make a joint block the last one: its tokens of the text are read and not made again."""
    from diffusers.models.normalization import AdaLayerNormContinuous  # the loader is part of diffusers' own import

    old = block.norm1_context.linear
    width = old.in_features
    with torch.device("meta"):  # no value is drawn for what is replaced
        norm = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6, norm_type="layer_norm")
    order = [1, 0]  # a scale and a shift, which the other norm has the other way round

    def rows(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.detach().unflatten(0, (6, -1))[order].flatten(0, 1), values.requires_grad)

    norm.linear.weight, norm.linear.bias = rows(old.weight), rows(old.bias)
    block.norm1_context = norm
    block.attn.to_add_out, block.attn.context_pre_only = None, True
    block.norm2_context, block.ff_context, block.context_pre_only = None, None, True
