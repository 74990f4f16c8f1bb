import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.layers import QuantConv2d
from dcomp.compress.learned_range import learned_static, ranges_replaced
from dcomp.compress.scheme import QScheme
from dcomp.compress.soft_rounding import fake_execution
from dcomp.kernels import qparams


@settings(max_examples=30)
@given(st.floats(1e-3, 1.0), st.integers(0, 255), st.integers(0, 99))
def test_values_are_those_of_the_kernels_and_gradients_those_of_lsq(scale, zero, seed):
    scale, zero = torch.tensor([scale], requires_grad=True), torch.tensor([zero], dtype=torch.uint8)
    x = (torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 30).requires_grad_(True)
    values = learned_static(x, scale, zero)
    assert torch.equal(values, qparams.fake_quant_static(x.detach(), scale.detach(), zero))
    above = torch.rand(200)
    (values * above).sum().backward()
    with torch.no_grad():
        position, codes = x / scale + zero, qparams.quantize_static(x, scale, zero).float()
        inside = (position >= 0) & (position <= 255)
        expected = torch.where(inside, codes - position, codes - zero)
        assert torch.equal(x.grad, above * inside)
        assert torch.allclose(scale.grad, (above * expected).sum(), rtol=1e-3, atol=1e-2)


def test_each_step_bin_learns_its_own_scale():
    conv = nn.Conv2d(3, 4, 3)
    packed = search_weight(conv.weight.permute(0, 2, 3, 1).contiguous(), 8, None)
    scheme = QScheme(8, None, input_bits=8, input_granularity="tensor")
    scale, zero = torch.tensor([0.02, 0.03, 0.04]), torch.tensor([100, 120, 140], dtype=torch.uint8)
    layer = QuantConv2d.from_float(conv, packed, scheme, scale, zero, StepClock(StepBins.uniform([3.0, 2.0, 1.0], 3)))
    layer.clock.read(torch.tensor([3.0, 3.0, 1.0]))
    x, learned = torch.randn(3, 3, 6, 6), scale.clone().requires_grad_(True)
    expected = layer.fake_forward(x)
    with fake_execution([layer]), ranges_replaced({layer: lambda: learned}):
        y = layer(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    assert (learned.grad != 0).tolist() == [True, False, True]
    assert "_fake_inputs" not in vars(layer)
