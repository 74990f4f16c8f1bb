"""What can be cut out of a denoiser: whole parts of it, and channels that are coupled.

Everything is found by structure: a module is an attention because it has the projections of one, whatever its class is
called. What looks like one of the kinds below but has something that its kind does not is left alone, with the reason.
Nothing is run and no value is read, so that models on the meta device have units too.

A *part* can go as a whole: a transformer block, because what flows through it has the same shape behind it, or the
branch beside a residual stream (an attention, a feed-forward, the convolutions of a residual block), of which a
constant is left. A *group* is a number of members, each with its rows and columns of all tensors that must shrink
together: heads of an attention, channels of a feed-forward, groups of the norm between two convolutions.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

PartKind = Literal["block", "attention", "feed_forward", "resnet", "transformer"]
GroupKind = Literal["heads", "channels", "norm_groups"]


@dataclass(frozen=True)
class Slice:
    """What members own of one axis of a tensor: member i has `width` elements from `start + i * width` on.

    Attributes:
        tensor: name of a parameter of the denoiser.
        axis: of it.
        start: first element of the first member.
        width: elements of a member.
    """

    tensor: str
    axis: int
    start: int
    width: int

    def of(self, member: int) -> range:
        """Return the elements of one member."""
        return range(self.start + member * self.width, self.start + (member + 1) * self.width)


@dataclass(frozen=True)
class Group:
    """Channels that are cut together, in members.

    Attributes:
        name: path of the module and what the members are, `path:heads`.
        kind: what the members are.
        members: how many there are; one at least must stay.
        producers: rows that make the channels.
        consumers: columns that read them. Nothing else reads them, so that members whose input here is zero can go.
    """

    name: str
    kind: GroupKind
    members: int
    producers: tuple[Slice, ...]
    consumers: tuple[Slice, ...]

    @property
    def path(self) -> str:
        """The module that the group is in."""
        return self.name.rpartition(":")[0]


@dataclass(frozen=True)
class Part:
    """A module that can go as a whole.

    Attributes:
        name: its path.
        kind: what it is.
        last: layers whose outputs are all that it adds to its streams: a constant of each is left. None of a block.
    """

    name: str
    kind: PartKind
    last: tuple[str, ...] = ()


@dataclass(frozen=True)
class Units:
    """All that can be cut out of a denoiser.

    Attributes:
        parts: by name, in the order of the modules.
        groups: likewise.
        left: path -> why what is there is left alone.
    """

    parts: Mapping[str, Part]
    groups: Mapping[str, Group]
    left: Mapping[str, str] = field(default_factory=dict)


def find_units(denoiser: nn.Module) -> Units:
    """Return the parts and groups of a denoiser."""
    parts: dict[str, Part] = {}
    groups: dict[str, Group] = {}
    left: dict[str, str] = {}
    for path, module in denoiser.named_modules():
        if not path:
            continue
        for kind, looks_like, members_of in _KINDS:
            if not looks_like(module):
                continue
            try:
                found = list(members_of(path, module))
            except _NotUnderstoodError as reason:
                left[path] = str(reason)
                break
            groups |= {group.name: group for group in found}
            if kind is not None:
                parts[path] = Part(path, kind, tuple(f"{path}.{name}" for name in last_layers(module, kind)))
            break
    parts |= {name: Part(name, "block") for name in _blocks(denoiser)}
    for name in _read_from_outside(denoiser):
        if parts.pop(name, None):
            left[name] = "what follows the blocks reads its embedding of timestep and class"
    order = {path: place for place, (path, _) in enumerate(denoiser.named_modules())}
    return Units(dict(sorted(parts.items(), key=lambda item: order[item[0]])), groups, left)


def last_layers(module: nn.Module, kind: PartKind) -> list[str]:
    """Return the layers within a part, but a block, whose outputs are all that it adds to its streams."""
    if kind == "attention":
        return _outputs(module)
    return {"feed_forward": ["net.2"], "resnet": ["conv2"], "transformer": ["proj_out"]}[kind]


def parameters_of_member(denoiser: nn.Module, group: Group) -> int:
    """Return how many parameters a member of a group has."""
    found = 0
    for owned in (*group.producers, *group.consumers):
        tensor = denoiser.get_parameter(owned.tensor)
        found += owned.width * tensor.numel() // tensor.shape[owned.axis]
    return found


def is_joint(attention: nn.Module) -> bool:
    """Whether an attention also projects the tokens of a second stream, and returns both."""
    return getattr(attention, "add_q_proj", None) is not None


class _NotUnderstoodError(Exception):
    """Why a module is not one of the kind that it looks like."""


def _is_attention(module: nn.Module) -> bool:
    return projects_heads(module) and bool(_outputs(module))


def projects_heads(module: nn.Module) -> bool:
    """Whether a module projects queries, keys and values."""
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("to_q", "to_k", "to_v"))


def _heads(path: str, attention: Any) -> Iterator[Group]:
    """Yield the heads of an attention. Softmax and norms act within a head, and projections after all of them."""
    heads, width = getattr(attention, "heads", None), attention.to_q.out_features
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise _NotUnderstoodError("its heads are not of one width")
    projections = ["to_q", "to_k", "to_v"]
    projections += [name for name in ("add_q_proj", "add_k_proj", "add_v_proj") if getattr(attention, name, None)]
    if any(getattr(attention, name).out_features != width for name in projections):
        raise _NotUnderstoodError("its queries, keys and values are not of one width")
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        if weight is not None and weight.numel() != width // heads:
            raise _NotUnderstoodError("a norm acts across its heads")
    known = {*projections, "to_out", "to_add_out", "norm_q", "norm_k", "norm_added_q", "norm_added_k"}
    known |= {"group_norm", "norm_cross", "processor"}
    other = [name for name, child in attention.named_children() if name not in known and any(child.parameters())]
    if other:
        raise _NotUnderstoodError(f"nothing is known of its module {other[0]!r}")
    yield Group(
        f"{path}:heads",
        "heads",
        heads,
        tuple(_rows(path, projections, attention, width // heads)),
        tuple(Slice(f"{path}.{name}.weight", 1, 0, width // heads) for name in _outputs(attention)),
    )


def _outputs(attention: Any) -> list[str]:
    found = []
    to_out = getattr(attention, "to_out", None)
    if isinstance(to_out, nn.ModuleList) and len(to_out) and isinstance(to_out[0], nn.Linear):
        found.append("to_out.0")
    if isinstance(getattr(attention, "to_add_out", None), nn.Linear):
        found.append("to_add_out")
    return found


def _is_feed_forward(module: Any) -> bool:
    net = getattr(module, "net", None)
    return isinstance(net, nn.ModuleList) and len(net) > 2 and isinstance(getattr(net[0], "proj", None), nn.Linear)


def _hidden_channels(path: str, feed_forward: Any) -> Iterator[Group]:
    """Yield the hidden channels of a feed-forward. Of a gated one, each has a second row, its gate."""
    first, last = feed_forward.net[0].proj, feed_forward.net[2]
    if not isinstance(last, nn.Linear) or first.out_features not in (last.in_features, 2 * last.in_features):
        raise _NotUnderstoodError("its hidden channels are not those of one activation")
    width = last.in_features
    starts = range(0, first.out_features, width)
    yield Group(
        f"{path}:channels",
        "channels",
        width,
        tuple(slice_ for start in starts for slice_ in _rows(f"{path}.net.0", ["proj"], feed_forward.net[0], 1, start)),
        (Slice(f"{path}.net.2.weight", 1, 0, 1),),
    )


def _is_resnet(module: nn.Module) -> bool:
    kinds = {"norm1": nn.GroupNorm, "conv1": nn.Conv2d, "norm2": nn.GroupNorm, "conv2": nn.Conv2d}
    return all(isinstance(getattr(module, name, None), kind) for name, kind in kinds.items())


def _norm_groups(path: str, resnet: Any) -> Iterator[Group]:
    """Yield the groups of the second norm. A part of one would change the statistics of what stays."""
    norm, width = resnet.norm2, resnet.conv1.out_channels
    if norm.num_channels != width or resnet.conv2.in_channels != width or resnet.conv1.groups != resnet.conv2.groups:
        raise _NotUnderstoodError("its convolutions are not coupled by one norm")
    if resnet.conv1.groups != 1:
        raise _NotUnderstoodError("its convolutions have groups")
    of_member = width // norm.num_groups
    producers = [*_rows(path, ["conv1", "norm2"], resnet, of_member)]
    time = getattr(resnet, "time_emb_proj", None)
    if time is not None:
        if time.out_features not in (width, 2 * width):
            raise _NotUnderstoodError("its timestep is not a shift, or a scale and a shift, of its channels")
        for start in range(0, time.out_features, width):
            producers += _rows(path, ["time_emb_proj"], resnet, of_member, start)
    consumers = (Slice(f"{path}.conv2.weight", 1, 0, of_member),)
    yield Group(f"{path}:norm_groups", "norm_groups", norm.num_groups, tuple(producers), consumers)


def _is_spatial_transformer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList) and hasattr(module, "proj_out")


def _nothing(path: str, module: Any) -> Iterator[Group]:
    yield from ()


def _is_parallel_block(module: nn.Module) -> bool:
    attention = getattr(module, "attn", None)
    both = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("proj_mlp", "proj_out"))
    return both and attention is not None and projects_heads(attention) and not _outputs(attention)


def _parallel(path: str, block: Any) -> Iterator[Group]:
    """Yield heads and hidden channels of a block whose one projection reads both, the heads first."""
    attention, hidden = block.attn, block.proj_mlp.out_features
    width, heads = attention.to_q.out_features, attention.heads
    if block.proj_out.in_features != width + hidden or width % heads:
        raise _NotUnderstoodError("its projection does not read its heads and hidden channels alone")
    names = ["to_q", "to_k", "to_v"]
    inside = tuple(_rows(f"{path}.attn", names, attention, width // heads))
    weight = f"{path}.proj_out.weight"
    yield Group(f"{path}.attn:heads", "heads", heads, inside, (Slice(weight, 1, 0, width // heads),))
    rows = tuple(_rows(path, ["proj_mlp"], block, 1))
    yield Group(f"{path}:channels", "channels", hidden, rows, (Slice(weight, 1, width, 1),))


_KINDS: tuple[tuple[PartKind | None, Callable[[Any], bool], Callable[[str, Any], Iterator[Group]]], ...] = (
    ("attention", _is_attention, _heads),
    ("feed_forward", _is_feed_forward, _hidden_channels),
    ("resnet", _is_resnet, _norm_groups),
    ("transformer", _is_spatial_transformer, _nothing),
    (None, _is_parallel_block, _parallel),
)
"""Kind of part (None: its block goes or nothing), how a module of it looks, and the groups in it."""


def _rows(path: str, names: list[str], parent: nn.Module, width: int, start: int = 0) -> Iterator[Slice]:
    """Yield the rows of weights and biases of some layers."""
    for name in names:
        layer = parent.get_submodule(name)
        for leaf in ("weight", "bias"):
            if getattr(layer, leaf, None) is not None:
                yield Slice(f"{path}.{name}.{leaf}", 0, start, width)


def _blocks(denoiser: nn.Module) -> Iterator[str]:
    """Yield members of module lists that have an attention and a feed-forward, or both in one, as children."""
    for path, members in denoiser.named_modules():
        if isinstance(members, nn.ModuleList):
            for i, member in enumerate(members):
                children = [*member.children()]
                both = any(map(_is_attention, children)) and any(map(_is_feed_forward, children))
                if both or _is_parallel_block(member):
                    yield f"{path}.{i}"


def _read_from_outside(denoiser: nn.Module) -> Iterator[str]:
    """Yield blocks of which something is read elsewhere.

    The head of a DiT takes its embedding of timestep and class from the first block.
    """
    blocks: Any = getattr(denoiser, "transformer_blocks", None)
    if blocks and hasattr(denoiser, "proj_out_1") and hasattr(getattr(blocks[0], "norm1", None), "emb"):
        yield "transformer_blocks.0"
