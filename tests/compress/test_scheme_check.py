from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.compress.scheme_check import SHOWN, WeightError, check_schemes, check_weights
from tests.support.parts import PARTS
from tests.support.schemes import quantized_form, schemes

TOKEN = QScheme(8, input_bits=8, input_granularity="token")


@settings(max_examples=30)
@given(st.data())
def test_what_passes_can_be_made_and_runs(data: Any) -> None:
    inputs, outputs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    layer: nn.Module = nn.Linear(inputs, outputs)
    scheme = data.draw(schemes(inputs, outputs))
    model = nn.ModuleDict({"layer": layer})
    parts = [stop - start for start, stop in pairwise((0, *scheme.boundaries, inputs))]
    if scheme.input_granularity in ("tensor", "sample") or (scheme.rotate and all(part % 2 for part in parts)):
        with pytest.raises(SchemeError):
            check_schemes(model, {"layer": scheme})
        return
    check_schemes(model, {"layer": scheme})
    assert quantized_form(layer, scheme)(torch.randn(3, inputs)).shape == (3, outputs)


@pytest.mark.parametrize(
    ("name", "scheme", "words", "remedy"),
    [
        (
            "linear",
            replace(TOKEN, input_granularity="sample"),
            "takes inputs by token",
            "linear layers inputs by token",
        ),
        ("conv", TOKEN, "takes inputs by tensor or sample", "convolutions by sample"),
        ("strided", TOKEN, "takes inputs by tensor or sample", "convolutions by sample"),
        ("conv", QScheme(8, rank=65), "rank 65 is more than 64", "Lower the rank"),
        ("shortcut", QScheme(8, rank=6, boundaries=(4,)), "rank 6 is more than 4", "of a part"),
        ("grouped", QScheme(8, smooth=True), "in groups", "smooth, rotate, directions and rank"),
        ("grouped", QScheme(8, rotate=True), "in groups", "smooth, rotate, directions and rank"),
        ("grouped", QScheme(8, boundaries=(64,)), "in 128 groups", "boundaries"),
        ("linear", QScheme(8, boundaries=(64,)), "no parts between 64 channels at [64]", "boundaries"),
        ("wide", QScheme(8, rotate=True), "odd in number (65)", "Leave the rotation out"),
        ("linear", QScheme(8, rotate=True, boundaries=(1, 2, 61)), "odd in number (1, 1, 59, 3)", "rotation out"),
        ("circular", QScheme(8), "pads by 'circular'", "in float"),
        ("uneven", QScheme(8), "one side more than the other", "in float"),
        ("norm", QScheme(8), "is no Linear", "in float"),
    ],
)
def test_what_a_shape_cannot_hold_is_refused(name: str, scheme: QScheme, words: str, remedy: str) -> None:
    with pytest.raises(SchemeError) as caught:
        check_schemes(PARTS, {name: scheme, "pointwise": TOKEN})
    assert caught.value.problem.startswith(f"1 layer cannot be quantized as asked:\n  {name}: ")
    assert words in caught.value.problem
    assert remedy in caught.value.remedy


def test_one_part_that_turns_is_enough() -> None:
    check_schemes(PARTS, {"linear": QScheme(8, rotate=True, boundaries=(1, 61))})


def many(count: int, make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({f"layer{i}": make() for i in range(count)})


def test_the_first_layers_are_listed_and_all_are_counted() -> None:
    model = many(SHOWN + 7, lambda: nn.Linear(4, 4))
    wanted = {name: QScheme(8, rank=5 + i) for i, name in enumerate(model)} | {"layer3": QScheme(8, rank=4)}
    with pytest.raises(SchemeError) as caught:
        check_schemes(model, wanted)
    head, *lines = caught.value.problem.splitlines()
    assert head == f"{SHOWN + 6} layers cannot be quantized as asked, the first {SHOWN}:"
    assert [line.split(":")[0].strip() for line in lines] == [f"layer{i}" for i in range(SHOWN + 1) if i != 3]
    assert caught.value.remedy.count("Lower the rank") == 1
    assert caught.value.exit_code == 2


def test_weights_that_are_not_finite_are_counted_and_placed() -> None:
    model = many(3, lambda: nn.Linear(4, 2))
    every = dict.fromkeys(model, TOKEN)
    check_weights(model, every)
    with torch.no_grad():
        model["layer1"].weight[1, 2] = torch.nan
        model["layer1"].weight[1, 3] = torch.inf
        model["layer2"].bias[0] = -torch.inf
        model["layer0"].weight.fill_(3e38)  # finite, but their sum is not
    with pytest.raises(WeightError) as caught:
        check_weights(model, every)
    assert caught.value.problem.splitlines() == [
        "Weights are NaN or infinite:",
        "  layer1.weight: 2 of 8 values, the first at [1, 2]",
        "  layer2.bias: 1 of 2 values, the first at [0]",
    ]
    assert caught.value.exit_code == 1
    check_weights(model, {"layer0": TOKEN})


def test_the_check_needs_no_memory_and_changes_nothing() -> None:
    with torch.device("meta"):
        model = many(2, lambda: nn.Linear(1 << 20, 1 << 20))
    check_schemes(model, dict.fromkeys(model, QScheme(4, 64, rank=8, smooth=True)))
    assert all(type(layer) is nn.Linear for layer in model.values())
