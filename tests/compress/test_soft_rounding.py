import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dcomp.calibrate.range_search import search_weight
from dcomp.compress.code_grid import CodeGrid
from dcomp.compress.layers import QuantLinear
from dcomp.compress.scheme import QScheme
from dcomp.compress.soft_rounding import (
    fake_execution,
    inverse_soft_step,
    round_through,
    soft_step,
    undecided,
    weights_replaced,
)


@settings(max_examples=25)
@given(
    st.sampled_from([(8, None), (4, 8), (4, 64)]),
    st.sampled_from([(5, 24), (3, 1), (4, 3, 3, 10), (2, 1, 1, 70)]),
    st.integers(0, 99),
)
def test_a_grid_gives_back_the_stored_weight_bit_for_bit(form, shape, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = search_weight(weight, *form)
    grid = CodeGrid.of(packed)
    assert torch.equal(grid.values(grid.codes, packed.scale), packed.dequantize())
    again = grid.repack(grid.codes, packed.scale)
    assert torch.equal(again.qweight, packed.qweight)
    assert torch.equal(again.scale, packed.scale)
    exact = grid.to_codes(weight)
    assert torch.equal(exact.round().clamp(grid.low, grid.high), grid.codes)
    assert torch.allclose(grid.values(exact, packed.scale), weight, rtol=1e-6, atol=0)


def test_rounding_is_exact_and_its_gradient_passes_through():
    codes = torch.linspace(-12, 12, 4001).requires_grad_(True)
    whole = round_through(codes, -8, 7)
    assert torch.equal(whole, codes.detach().round().clamp(-8, 7))
    whole.mul(torch.arange(4001.0)).sum().backward()
    assert torch.equal(codes.grad, torch.arange(4001.0))


def test_the_soft_step_reaches_both_ends_and_is_undone_by_its_inverse():
    h = torch.linspace(0, 1, 101)
    assert torch.allclose(soft_step(inverse_soft_step(h)), h, atol=2e-7)
    assert soft_step(torch.tensor([-3.0, 0.0, 3.0])).tolist() == pytest.approx([0, 0.5, 1])
    # Up is the nearer code exactly where the logit is not negative.
    assert torch.equal(inverse_soft_step(h) >= 0, h >= 0.5)


@pytest.mark.parametrize("beta", [20.0, 2.0])
def test_indecision_is_one_in_the_middle_and_zero_at_the_ends(beta):
    assert undecided(torch.tensor([0.0, 0.5, 1.0]), beta).tolist() == [0, 1, 0]
    assert undecided(torch.tensor(0.75), beta).item() == pytest.approx(1 - 0.5**beta)


def test_replaced_weights_are_used_with_gradients_and_then_gone():
    linear = nn.Linear(8, 4)
    layer = QuantLinear.from_float(
        linear, search_weight(linear.weight, 8, None), QScheme(8, None, input_bits=16, input_granularity=None)
    )
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    before = layer(x)
    with fake_execution([layer]), weights_replaced({layer: lambda: weight}):
        y = layer(x)
    y.sum().backward()
    assert torch.allclose(y, x @ weight.T + linear.bias, atol=1e-6)
    assert torch.allclose(weight.grad, x.sum(0).expand(4, 8))
    assert torch.equal(layer(x), before)
    assert layer.execution == "int"
