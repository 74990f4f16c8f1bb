"""Weights that make up for lost channels, against least squares on the inputs themselves."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.compress.moments import Moments, input_moments
from dcomp.compress.pruning.compensation import ConsumerFit

LAYERS = {"linear": lambda: nn.Linear(6, 5), "convolution": lambda: nn.Conv2d(6, 5, 3, padding=1)}


def case(kind: str, seed: int, exact: bool = True) -> tuple[Any, Tensor, ConsumerFit]:
    """A layer, correlated inputs with a mean, and its fit without shrinkage."""
    torch.manual_seed(seed)
    layer = LAYERS[kind]().requires_grad_(False)
    x = torch.randn(60, 4, 4, 6) @ torch.randn(6, 6) + torch.randn(6)
    x = x.movedim(-1, 1) if kind == "convolution" else x
    return layer, x, ConsumerFit(layer, input_moments(layer, x, max_rows=10_000), 0.0 if exact else 0.1)


def output(layer: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    weight, bias = layer.weight if weight is None else weight, layer.bias if bias is None else bias
    return (
        nn.functional.conv2d(x, weight, bias, padding=1)
        if isinstance(layer, nn.Conv2d)
        else nn.functional.linear(x, weight, bias)
    )


def loss(layer: Any, x: Tensor, *altered: Tensor) -> float:
    outputs = 5
    return float((output(layer, x) - output(layer, x, *altered)).square().mean()) * outputs


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=10)
@given(seed=st.integers(0, 999), lost=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
def test_no_other_weights_have_less_squares(kind: str, seed: int, lost: list[int]) -> None:
    layer, x, fit = case(kind, seed)
    weight, bias = fit.without(lost)
    assert not weight[:, lost].any()
    made = loss(layer, x, weight, bias)
    plain = layer.weight.clone()
    plain[:, lost] = 0
    assert made <= loss(layer, x, plain, layer.bias) * 1.001
    for _ in range(5):
        step = torch.randn_like(weight) * 0.02
        step[:, lost] = 0
        assert made <= loss(layer, x, weight + step, bias) * 1.02 + 1e-9
        assert made <= loss(layer, x, weight, bias + torch.randn_like(bias) * 0.02) * 1.02 + 1e-9


@pytest.mark.parametrize("kind", LAYERS)
def test_scores_are_what_the_output_loses(kind: str) -> None:
    layer, x, fit = case(kind, 3)
    members = [[0, 1], [2, 4], [3, 5]]
    found = [loss(layer, x, *fit.without(member)) for member in members]
    assert fit.scores(members).tolist() == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("width", [1, 2])
def test_members_go_one_after_the_other(kind: str, width: int) -> None:
    _, _, fit = case(kind, 6)
    members = [[*range(first, first + width)] for first in range(0, 6, width)]
    order = fit.order(members)
    gone: list[int] = []
    layer, x, _ = case(kind, 6)
    for member in order[:-1]:
        alive = [one for one in range(len(members)) if one not in gone]
        losses = {one: loss(layer, x, *fit.without([c for m in (*gone, one) for c in members[m]])) for one in alive}
        assert losses[member] < 1.05 * min(losses.values()) + 1e-9
        gone.append(member)


def test_a_copy_goes_first_and_is_made_up_for() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(500, 6)
    x[:, 4] = x[:, 1]
    layer.weight[:, 4] *= 10  # by magnitude it would be the last to go
    fit = ConsumerFit(layer, input_moments(layer, x), 0.0)
    assert {*fit.order([[i] for i in range(6)])[:1]} <= {1, 4}
    assert loss(layer, x, *fit.without([4])) < 1e-3 * fit.energy()
    plain = layer.weight.clone()
    plain[:, 4] = 0
    assert loss(layer, x, plain, layer.bias) > 0.5 * fit.energy()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_order_is_nearly_the_best_one(kind: str) -> None:
    layer, x, fit = case(kind, 5)
    members = [[0, 1], [2, 3], [4, 5]]
    order = fit.order(members)
    assert sorted(order) == [0, 1, 2]
    for count in (1, 2):
        best = min(
            loss(layer, x, *fit.without([c for m in lost for c in members[m]]))
            for lost in itertools.combinations(range(3), count)
        )
        mine = loss(layer, x, *fit.without([c for m in order[:count] for c in members[m]]))
        assert mine < 1.3 * best + 1e-9


def test_energy_is_how_far_the_output_varies() -> None:
    layer, x, fit = case("linear", 2)
    flat = output(layer, x).flatten(0, -2)
    assert fit.energy() == pytest.approx(float((flat - flat.mean(0)).square().mean() * 5), rel=0.01)


def test_sets_of_channels_are_fitted_on_their_own() -> None:
    layer, x, _ = case("linear", 1)
    whole = input_moments(layer, x)
    parts = Moments(
        (whole.blocks[0][:4, :4], whole.blocks[0][4:, 4:]), whole.rows, (whole.means[0][:4], whole.means[0][4:])
    )
    weight, _ = ConsumerFit(layer, parts, 0.0).without([1])
    assert torch.equal(weight[:, 4:], layer.weight[:, 4:])
    assert not torch.equal(weight[:, 0], layer.weight[:, 0])


@pytest.mark.parametrize("kind", LAYERS)
def test_moments_of_parts_are_those_of_the_whole(kind: str) -> None:
    layer, x, _ = case(kind, 4)
    whole = input_moments(layer, x, max_rows=10_000)
    merged = input_moments(layer, x[:20], max_rows=10_000).merged(input_moments(layer, x[20:], max_rows=10_000))
    assert merged.rows == whole.rows
    for one, other in zip((*merged.blocks, *merged.means), (*whole.blocks, *whole.means), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
