"""Cut denoisers, against the whole ones in which what was cut is masked."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.compress.pruning.cut import cut, cut_copy
from dcomp.compress.pruning.cut_list import CutError, CutList
from dcomp.compress.pruning.units import Group, Units, find_units
from tests.support.tiny import NAMES, XL, denoiser_inputs, tiny_denoiser

ALL_NAMES = (*NAMES, XL)
Call = tuple[tuple[Any, ...], dict[str, Any]]


def double(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: double(value) for key, value in tree.items()}
    return tuple(map(double, tree)) if isinstance(tree, tuple) else tree


def case(name: str) -> tuple[nn.Module, Call]:
    return tiny_denoiser(name).double(), double(denoiser_inputs(name))


def output(denoiser: nn.Module, call: Call) -> Tensor:
    with torch.no_grad():
        return denoiser(*call[0], **call[1])[0]


@contextmanager
def masked(denoiser: nn.Module, groups: dict[str, Group], kept: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Within a `with` block, let consumers read zeros of the members that do not stay."""
    with ExitStack() as stack:
        for name, members in kept.items():
            for consumer in groups[name].consumers:
                layer: Any = denoiser.get_submodule(consumer.tensor.rpartition(".")[0])
                mask = torch.ones(layer.weight.shape[1], dtype=torch.float64)
                for member in {*range(groups[name].members)} - {*members}:
                    mask[[*consumer.of(member)]] = 0

                def hook(layer: nn.Module, args: Any, mask: Tensor = mask) -> Any:
                    by_channel = mask[:, None, None] if isinstance(layer, nn.Conv2d) else mask
                    return (args[0] * by_channel, *args[1:])

                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


def some(units: Units, seed: int, names: Callable[[str], bool] = lambda name: True) -> dict[str, tuple[int, ...]]:
    """Some members of every group with a name, at least one of each."""
    draw = random.Random(seed)
    return {
        name: tuple(sorted(draw.sample(range(group.members), draw.randint(1, group.members))))
        for name, group in units.groups.items()
        if names(name)
    }


def near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) < 1e-10 * float(other.abs().max())


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_narrow_denoiser_is_the_masked_one(name: str) -> None:
    denoiser, call = case(name)
    units = find_units(denoiser)
    assert not units.left or name.startswith("DiT")
    whole = output(denoiser, call)
    for seed in range(3):
        kept = some(units, seed)
        narrow = cut_copy(denoiser, CutList(kept=kept))
        with masked(denoiser, dict(units.groups), kept):
            expected = output(denoiser, call)
        found = output(narrow, call)
        assert near(found, expected)
        assert not near(found, whole)
        assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in denoiser.parameters())
    assert torch.equal(output(denoiser, call), whole)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_group_alone(name: str) -> None:
    denoiser, call = case(name)
    units = find_units(denoiser)
    whole = output(denoiser, call)
    for group in units.groups.values():
        kept = {group.name: (group.members - 1,)}
        with masked(denoiser, dict(units.groups), kept):
            expected = output(denoiser, call)
        assert near(output(cut_copy(denoiser, CutList(kept=kept)), call), expected), group.name
        # Heads of an attention over one pixel, or of the last block's text, may say nothing; all others do.
        assert not near(expected, whole), group.name


def silenced(module: Any) -> Any:
    """The layers whose output is all that a part adds to its stream."""
    for path in ("to_out.0", "net.2", "conv2", "proj_out"):
        if path.partition(".")[0] in dict(module.named_children()):
            yield module.get_submodule(path)
    if isinstance(getattr(module, "to_add_out", None), nn.Linear):
        yield module.to_add_out


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_part_that_is_gone_leaves_the_bias_of_its_last_layer(name: str) -> None:
    denoiser, call = case(name)
    units = find_units(denoiser)
    whole = output(denoiser, call)
    parts = [part for part in units.parts.values() if part.kind != "block"]
    for chosen in (*([part] for part in parts), parts):
        small = cut_copy(denoiser, CutList(frozenset(part.name for part in chosen)))
        reference, _ = case(name)
        for part in chosen:
            for layer in silenced(reference.get_submodule(part.name)):
                layer.weight.zero_()
        expected = output(reference, call)
        assert near(output(small, call), expected), chosen
        assert not near(expected, whole)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_block_that_is_gone_passes_its_streams_on(name: str) -> None:
    denoiser, call = case(name)
    units = find_units(denoiser)
    blocks = [part.name for part in units.parts.values() if part.kind == "block"]
    assert bool(blocks) == (name != "UNet2DModel")
    for block in blocks:
        small = cut_copy(denoiser, CutList(frozenset({block})))
        module: Any = denoiser.get_submodule(block)

        def passing(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            second = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            return (second, hidden) if "SD3" in name or "Flux" in name else hidden

        module.forward = passing
        expected = output(denoiser, call)
        del module.forward
        assert near(output(small, call), expected), block
        assert not near(expected, output(denoiser, call))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_shapes_need_no_values(name: str) -> None:
    denoiser, _ = case(name)
    units = find_units(denoiser)
    parts = [part.name for part in units.parts.values()]
    cuts = CutList(frozenset(random.Random(0).sample(parts, len(parts) // 3)), some(units, 1))
    small = cut_copy(denoiser, cuts)
    with torch.device("meta"):
        empty: Any = type(denoiser).from_config(denoiser.config)  # type: ignore[attr-defined]
    cut(empty, CutList.from_dict(cuts.to_dict()))
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


def test_what_is_not_understood_is_left_alone_with_a_reason() -> None:
    denoiser: Any = tiny_denoiser("UNet2DConditionModel")
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    block = denoiser.get_submodule(path)
    block.attn1.norm_q = nn.LayerNorm(block.attn1.to_q.out_features)
    block.ff.net[2] = nn.Linear(3, 32)
    units = find_units(denoiser)
    assert units.left == {
        f"{path}.attn1": "a norm acts across its heads",
        f"{path}.ff": "its hidden channels are not those of one activation",
    }
    assert f"{path}.attn2:heads" in units.groups
    with pytest.raises(CutError, match="a norm acts across its heads"):
        cut(denoiser, CutList(kept={f"{path}.attn1:heads": (0,)}))


@pytest.mark.parametrize("members", [(), (1, 0), (0, 0), (-1, 2), (0, 64)])
def test_members_that_are_none_are_refused(members: tuple[int, ...]) -> None:
    denoiser = tiny_denoiser("DiTTransformer2DModel")
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    with pytest.raises(CutError, match="members"):
        cut(denoiser, CutList(kept={"transformer_blocks.1.attn1:heads": members}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


NAME = st.text("ab.:", min_size=1, max_size=9)


@settings(max_examples=50)
@given(st.frozensets(NAME), st.dictionaries(NAME, st.frozensets(st.integers(0, 40), min_size=1)))
def test_a_cut_list_survives_its_file(removed: frozenset[str], kept: dict[str, frozenset[int]]) -> None:
    cuts = CutList(removed, {name: tuple(sorted(members)) for name, members in kept.items()})
    assert CutList.from_dict(cuts.to_dict()) == cuts
    assert CutList.from_dict(cuts.to_dict()).hash == cuts.hash


EDITS: dict[str, Any] = {
    "no object": [],
    "another key": {"removed": [], "kept": {}, "more": 1},
    "names that are none": {"removed": [1], "kept": {}},
    "an endless name": {"removed": ["a" * 301], "kept": {}},
    "runs that overlap": {"removed": [], "kept": {"a": [[0, 3], [3, 4]]}},
    "runs that go back": {"removed": [], "kept": {"a": [[3, 1]]}},
    "runs without an end": {"removed": [], "kept": {"a": [[3]]}},
    "members of another kind": {"removed": [], "kept": {"a": [[0, 1.0]]}},
    "members that are truths": {"removed": [], "kept": {"a": [[False, True]]}},
    "negative members": {"removed": [], "kept": {"a": [[-2, 1]]}},
    "too many members": {"removed": [], "kept": {str(i): [[0, 9_999_000]] for i in range(3)}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_list_is_refused(edit: str) -> None:
    with pytest.raises(CutError, match="another form"):
        CutList.from_dict(EDITS[edit])
