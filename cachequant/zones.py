"""Zones: parts of a denoiser that a call may skip, each with the one tensor that must then come from somewhere else.

A zone is found by what runs and what flows, and is proven by a *cut test*: with its tensor given and everything that it
skips filled with NaN the denoiser must return what it returned, bit for bit. Attribute names of diffusers only propose
what is tested: `down_blocks`, `mid_block` and `up_blocks` of a U-Net, module lists of a transformer, and the children
of blocks in `SUBMODULES`.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.cachequant.rows import halves_apart, joined_halves, second_half
from dcomp.cachequant.tensors import leaves, like, map_tensors, parts_of, placeholder

SUBMODULES = {"attention": ("attn", "attn1"), "cross_attention": ("attn2",), "feed_forward": ("ff", "ff_context")}
SUBLAYERS = "sublayers"  # name of the zone that is all of them together
WHOLE = "all"  # name of the zone that is the denoiser itself
GUIDANCE = "guidance"  # name of the zone that is one of two guidance contexts in a batch
MAX_MODULES = 10_000
_ROUNDING = 1e-2  # 8-bit codes of a row may differ with the batch that it is in
_SENTENCE = 200  # characters of a name in a file

Streams = tuple[tuple[str, int], ...]  # of a block: parameter and position in its output, for each stream through it


class ZoneError(UsageError):
    """A zone that this denoiser does not have."""


@dataclass(frozen=True)
class Zone:
    """A part that can be skipped.

    Attributes:
        name: in plans.
        kind: what is kept of a computed call: `output` of the modules, the `residual` that a chain of blocks adds to
            the streams that pass through it, or of `guidance` how far the predictions of its two contexts are apart:
            then the denoiser runs on the second half of its rows alone.
        predicted: modules whose output is predicted; the denoiser itself is "". Blocks of a residual zone, in order.
        skipped: modules that nothing but predicted ones read, and that do not run either.
        streams: of each predicted block of a residual zone.
    """

    name: str
    kind: Literal["output", "residual", "guidance"]
    predicted: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    streams: tuple[Streams, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that do not run when the zone is predicted."""
        return self.predicted + self.skipped

    def encloses(self, other: "Zone") -> bool:
        """Whether nothing of another zone runs when this one is predicted."""
        own = {*self.modules}
        return other.name != self.name and all(own & {*_paths_around(name)} for name in other.modules)

    def silences(self, other: "Zone") -> bool:
        """Whether some of what is kept of another zone is not computed when this one is predicted."""
        own = {*self.modules}
        ends = (other.predicted[0], other.predicted[-1]) if other.streams else other.predicted
        return any(own & {*_paths_around(name)} for name in ends)

    def to_dict(self) -> dict[str, Any]:
        """Return the zone as JSON data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "predicted": [*self.predicted],
            "skipped": [*self.skipped],
            "streams": [[[*stream] for stream in streams] for streams in self.streams],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ZoneError: the data has another form.
        """
        fields = ("name", "kind", "predicted", "skipped", "streams")
        good = (
            isinstance(data, dict)
            and sorted(data) == sorted(fields)
            and data["kind"] in ("output", "residual", "guidance")
            and (data["kind"] != "guidance" or (data["predicted"], data["skipped"]) == ([""], []))
            and all(isinstance(data[key], list) and len(data[key]) <= MAX_MODULES for key in fields[2:])
            and all(isinstance(name, str) and len(name) <= _SENTENCE for name in (data["name"], *_names(data)))
            and len(data["predicted"]) > 0
            and len(data["streams"]) == (len(data["predicted"]) if data["kind"] == "residual" else 0)
            and all(
                isinstance(streams, list) and streams and all(map(_is_stream, streams)) for streams in data["streams"]
            )
        )
        if not good:
            raise ZoneError(
                "A zone of the cache plan has another form than dcomp writes",
                where=str(data.get("name") if isinstance(data, dict) else data)[:80],
                remedy="Make the plan again with `dcomp search-schedule`.",
            )
        streams = tuple(tuple((str(name), int(place)) for name, place in each) for each in data["streams"])
        return cls(data["name"], data["kind"], tuple(data["predicted"]), tuple(data["skipped"]), streams)


def find_zones(
    denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, guidance: bool = False
) -> tuple[Zone, ...]:
    """Propose the zones that a denoiser may have, and return those that pass the cut test, widest first.

    Args:
        denoiser: in eval mode.
        args: positional arguments of a recorded call.
        kwargs: its keyword arguments.
        guidance: the rows of the call are those of two contexts of guidance, and how far these are apart is a zone too.

    Source of the zone `guidance`: Lv et al. 2025, FasterCache, section 3.3, without its split by frequencies.
    """
    proposed = [Zone(WHOLE, "output", ("",)), *([Zone(GUIDANCE, "guidance", ("",))] if guidance else [])]
    if all(hasattr(denoiser, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        proposed += [*_branches(denoiser), *_encoder(denoiser)]
    with torch.no_grad():
        proposed += _ranges(_chains(denoiser, args, kwargs))
        proposed += _submodules(denoiser, args, kwargs)
        return tuple(zone for zone in proposed if is_cut(denoiser, zone, args, kwargs))


def single_modules(zones: Sequence[Zone]) -> tuple[Zone, ...]:
    """Return zones of one module each for those that are all modules of a kind, in the order in which they run."""
    kinds = [zone for zone in zones if zone.name in SUBMODULES]
    blocks = dict.fromkeys(name.rpartition(".")[0] for zone in kinds for name in zone.predicted)
    return tuple(
        Zone(name, "output", (name,))
        for block in blocks
        for zone in kinds
        for name in zone.predicted
        if name.rpartition(".")[0] == block
    )


def is_cut(denoiser: nn.Module, zone: Zone, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the denoiser returns the same bits with the zone's tensors given and NaN for all that it skips.

    Of half of the rows they are the same up to the order of sums.
    """
    if zone.kind == "guidance":
        whole = denoiser(*args, **kwargs)
        names = [*inspect.signature(denoiser.forward).parameters]
        second = leaves(second_half(names, denoiser, tuple(args), dict(kwargs)))
        found = joined_halves(second, halves_apart(whole))
        pairs = zip(leaves(whole), found, strict=True)
        return all(bool((one - other).norm() <= _ROUNDING * one.norm()) for one, other in pairs)
    kept: dict[str, Any] = {}
    modules = {name: denoiser.get_submodule(name) for name in zone.modules}
    calls = dict.fromkeys(modules, 0)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[name] = output
            calls[name] += 1

        return hook

    def give(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            nothing = map_tensors(lambda t: placeholder(t, torch.nan), kept[name])
            if zone.kind == "output" or name != zone.predicted[-1]:
                return kept[name] if zone.kind == "output" and name in zone.predicted else nothing
            parts = parts_of(nothing)
            for _, place in zone.streams[-1]:
                parts[place] = parts_of(kept[name])[place]
            return like(kept[name], parts)

        return hook

    before = _run(denoiser, modules, keep, args, kwargs)
    if any(count != 1 for count in calls.values()):
        return False
    after = _run(denoiser, modules, give, args, kwargs)
    pairs = zip(leaves(before), leaves(after), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def parameter_position(module: nn.Module, name: str) -> int:
    """Return at which position a module's forward takes a parameter."""
    return list(inspect.signature(module.forward).parameters).index(name)


def _run(
    denoiser: nn.Module, modules: Mapping[str, nn.Module], hook: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        return denoiser(*args, **kwargs)


def _branches(unet: Any) -> list[Zone]:
    """The deep part of a U-Net below each skip connection: with L of its last up layers left, and what feeds them.

    The L-th tensor that the way down leaves behind is the last that these layers read; whatever comes after it, down,
    in the middle and up, is skipped, and the tensor that enters the first layer that is left is predicted.

    Source: Ma et al. 2024, DeepCache, section 3.2; L - 1 is its branch.
    """
    down = [layers for i in range(len(unet.down_blocks)) for layers in _down_layers(unet, i)]
    up = [layers for i in range(len(unet.up_blocks)) for layers in _up_layers(unet, i)]
    zones = []
    for left in range(1, min(len(up), len(down) + 1)):
        # The first tensor left behind is that of conv_in, and needs no layer.
        skipped = [name for layer in [*down[left - 1 :], ("mid_block",), *up[:-left]] for name in layer]
        zones.append(Zone(f"deep{left}", "output", (skipped[-1],), _as_blocks(unet, skipped[:-1])))
    return zones


def _down_layers(unet: Any, number: int) -> list[tuple[str, ...]]:
    """For each tensor that a down block leaves behind, the modules that make it out of the one before."""
    block, path = unet.down_blocks[number], f"down_blocks.{number}"
    found = _layers(block, path)
    if getattr(block, "downsamplers", None):
        found.append(tuple(f"{path}.downsamplers.{i}" for i in range(len(block.downsamplers))))
    return found


def _up_layers(unet: Any, number: int) -> list[tuple[str, ...]]:
    """The modules of each layer of an up block, its upsampler with the last."""
    block, path = unet.up_blocks[number], f"up_blocks.{number}"
    found = _layers(block, path)
    if found and getattr(block, "upsamplers", None):
        found[-1] += tuple(f"{path}.upsamplers.{i}" for i in range(len(block.upsamplers)))
    return found


def _layers(block: Any, path: str) -> list[tuple[str, ...]]:
    attentions = getattr(block, "attentions", None) or ()
    return [
        (f"{path}.resnets.{i}", *((f"{path}.attentions.{i}",) if i < len(attentions) else ()))
        for i in range(len(getattr(block, "resnets", None) or ()))
    ]


def _as_blocks(unet: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Put the names of whole blocks for those of their layers, where all layers of a block are there."""
    found = {*names}
    for side in ("down_blocks", "up_blocks"):
        for number in range(len(getattr(unet, side))):
            own = _down_layers(unet, number) if side == "down_blocks" else _up_layers(unet, number)
            members = {name for layer in own for name in layer}
            if members and members <= found:
                found = found - members | {f"{side}.{number}"}
    order = {name: place for place, (name, _) in enumerate(unet.named_modules())}
    return tuple(sorted(found, key=order.__getitem__))


def _encoder(unet: Any) -> list[Zone]:
    """The way down and the middle: all that the decoder reads beside the timestep is predicted.

    Source: Li et al. 2024, Faster Diffusion, section 3.2.
    """
    middle = () if unet.mid_block is None else ("mid_block",)
    return [Zone("encoder", "output", (*(f"down_blocks.{i}" for i in range(len(unet.down_blocks))), *middle))]


@dataclass(frozen=True)
class _Link:
    """A block of a chain: the streams that enter it and where it returns them."""

    name: str
    streams: Streams


def _chains(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[_Link]]:
    """Find blocks of module lists in which the very tensors that one returns are what the next one reads."""
    lists = [(name, child) for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList)]
    blocks = {f"{name}.{i}": block for name, members in lists for i, block in enumerate(members)}
    seen: list[tuple[str, dict[str, Tensor], list[Any]]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            inputs = {key: value for key, value in named.items() if isinstance(value, Tensor)}
            seen.append((name, inputs, parts_of(output)))

        return hook

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.callback(block.register_forward_hook(watch(name), with_kwargs=True).remove)
        denoiser(*args, **kwargs)
    chains: list[list[_Link]] = []
    linked: list[Streams] = []
    for (_, entered, outputs), (_, inputs, _) in pairwise(seen):
        # What flows through a block keeps its shape, or it could not be added to what entered.
        links = {
            key: i
            for key, value in inputs.items()
            for i, out in enumerate(outputs)
            if out is value and key in entered and entered[key].shape == out.shape
        }
        linked.append(tuple(links.items()))
    kinds = [type(blocks[name]) for name, _, _ in seen]
    for place, (name, _, _) in enumerate(seen):
        # What a block returns is known by who reads it; the last of a chain returns what its like do.
        own = linked[place] if place < len(linked) else ()
        joined = place > 0 and bool(linked[place - 1])
        if not own and joined and kinds[place] is kinds[place - 1]:
            own = linked[place - 1]
        if not own:
            continue
        if not joined or not chains:
            chains.append([])
        chains[-1].append(_Link(name, own))
    return chains


def _ranges(chains: Sequence[Sequence[_Link]]) -> list[Zone]:
    """Ranges of each chain: all of it, all but the first, all but the ends, its front and its rear half.

    Source: Chen et al. 2024, Delta-DiT, section 3.3 (front and rear); first-block caches leave the first.
    """
    zones: dict[tuple[str, ...], Zone] = {}
    for number, chain in enumerate(chains):
        size, prefix = len(chain), f"blocks{number + 1}" if len(chains) > 1 else "blocks"
        for first, last in ((0, size), (1, size), (1, size - 1), (0, size // 2), (size // 2, size)):
            links = chain[first:last]
            # One stream may come and go under one name only: what leaves is compared with what entered.
            if links and len({frozenset(name for name, _ in link.streams) for link in links}) == 1:
                names = tuple(link.name for link in links)
                zone = Zone(f"{prefix}[{first}:{last}]", "residual", names, (), tuple(link.streams for link in links))
                zones.setdefault(names, zone)
    return [*zones.values()]


def _submodules(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Zone]:
    """All modules of each kind in `SUBMODULES`, and of all kinds: what is between them is computed at every call.

    Source: Liu et al. 2025, TaylorSeer, section 3.2, forecasts attentions and feed-forwards so.
    """
    ran: list[str] = []
    modules = dict(denoiser.named_modules())
    wanted = {child for children in SUBMODULES.values() for child in children}

    def note(name: str) -> Any:
        return lambda module, args, output: ran.append(name)

    with ExitStack() as stack:
        for name, module in modules.items():
            if name.rpartition(".")[2] in wanted:
                stack.callback(module.register_forward_hook(note(name)).remove)
        denoiser(*args, **kwargs)
    kinds = [
        Zone(kind, "output", names)
        for kind, children in SUBMODULES.items()
        if (names := tuple(name for name in ran if name.rpartition(".")[2] in children))
    ]
    return [*kinds, *([Zone(SUBLAYERS, "output", tuple(ran))] if len(kinds) > 1 else [])]


def _paths_around(name: str) -> list[str]:
    """The module itself and all modules that it lies in, the denoiser included."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def _names(data: dict[str, Any]) -> list[Any]:
    return [*data["predicted"], *data["skipped"]]


def _is_stream(stream: Any) -> bool:
    return (
        isinstance(stream, list)
        and len(stream) == 2
        and isinstance(stream[0], str)
        and stream[0].isidentifier()
        and type(stream[1]) is int
        and 0 <= stream[1] < 16
    )
