import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.calibrate.tree_file import TreeError, decode, encode, open_tensors, read_description, write_tree_file

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
TENSORS = st.builds(
    lambda dtype, shape: (torch.randn(shape) * 3).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
TREES = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=8,
)


def same(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(two)
    return bool(one == two)


@given(tree=TREES)
@settings(max_examples=30)
def test_a_tree_comes_back_bit_for_bit(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    tensors: dict[str, Tensor] = {}
    write_tree_file(path, {"tree": {"list": [encode(tree, tensors, "tree")]}}, tensors)
    assert same(decode(read_description(path)["tree"], open_tensors(path)), [tree])


def test_equal_trees_give_equal_bytes(tmp_path: Path) -> None:
    def write(name: str, values: list[Tensor]) -> bytes:
        tensors: dict[str, Tensor] = {}
        for value in values:
            encode(value, tensors, "x")
        write_tree_file(tmp_path / name, {"b": 1, "a": 2}, tensors)
        return (tmp_path / name).read_bytes()

    one, two = torch.ones(3), torch.zeros(2, dtype=torch.int64)
    assert write("a", [one, two, one.clone()]) == write("b", [two, one])


def test_what_is_stored_does_not_change_with_the_original() -> None:
    tensors: dict[str, Tensor] = {}
    value = torch.zeros(3)
    encode(value, tensors, "x")
    value += 1
    assert torch.equal(next(iter(tensors.values())), torch.zeros(3))


def test_shape_and_dtype_tell_equal_bytes_apart() -> None:
    tensors: dict[str, Tensor] = {}
    for value in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)):
        encode(value, tensors, "x")
    assert len(tensors) == 3


def test_channels_last_and_expanded_tensors_keep_what_kernels_look_at(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors: dict[str, Tensor] = {}
    tree = encode((image, torch.tensor(7).expand(3)), tensors, "x")
    write_tree_file(tmp_path / "t", {"tree": tree}, tensors)
    back, expanded = decode(tree, open_tensors(tmp_path / "t"))
    assert torch.equal(back, image)
    assert back.stride() == image.stride()
    assert expanded.tolist() == [7, 7, 7]
    assert back.data_ptr() % 64 == 0


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3}}, torch.float32, [torch.device("cpu")], b"bytes"])
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TreeError, match="argument holds a") as error:
        encode({"hidden": value}, {}, "kwargs")
    assert "kwargs['hidden']" in str(error.value)


@pytest.mark.parametrize("node", [[1], {}, {"tensor": 1}, {"tuple": 1}, {"list": [], "tuple": []}, {"float": "1e5"}])
def test_json_that_describes_no_tree_is_refused(node: Any) -> None:
    with pytest.raises(TreeError, match="not understood"):
        decode(node, lambda name: torch.zeros(1))


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    write_tree_file(tmp_path / "t", {}, {"a": torch.zeros(1)})
    with pytest.raises(TreeError, match="'b' is missing"):
        open_tensors(tmp_path / "t")("b")


def test_a_safetensors_file_of_others_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for metadata in (None, {"dcomp": "{"}, {"dcomp": json.dumps([1])}):
        save_file({"a": torch.zeros(1)}, tmp_path / "t", metadata=metadata)
        with pytest.raises(TreeError, match="no recorded calls"):
            read_description(tmp_path / "t")
