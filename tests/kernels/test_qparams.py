import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.kernels import qparams

ZERO = torch.tensor([77], dtype=torch.uint8)


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-6, 1e6), st.integers(0, 255))
def test_real_zero_and_every_code_survive_a_static_range(scale, zero):
    scale, zero = torch.tensor([scale], dtype=torch.float32), torch.tensor([zero], dtype=torch.uint8)
    codes = torch.arange(256).to(torch.uint8)
    values = qparams.dequantize_static(codes, scale, zero)
    assert torch.equal(qparams.quantize_static(values, scale, zero), codes)
    assert qparams.fake_quant_static(torch.zeros(3), scale, zero).tolist() == [0.0, 0.0, 0.0]


def test_static_codes_round_ties_to_even_and_saturate():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf"), -float("inf")])
    assert qparams.quantize_static(x, torch.ones(1), ZERO).tolist() == [77, 79, 79, 77, 75, 255, 0, 255, 0]


def test_a_static_error_is_at_most_half_a_scale_inside_the_range():
    x = torch.linspace(-77 * 0.03, 178 * 0.03, 4001)
    error = (qparams.fake_quant_static(x, torch.tensor([0.03]), ZERO) - x).abs().max()
    assert error <= 0.015 * (1 + 1e-4)  # slack: x, product and scale are rounded to float32


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 6), st.integers(1, 50), st.integers(-30, 30), st.integers(0, 999))
def test_the_largest_magnitude_of_a_token_is_code_127(rows, columns, exponent, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scale = qparams.quantize_token(x)
    assert (codes.int().abs().amax(-1) == 127).all()
    assert torch.allclose(
        qparams.dequantize_token(codes, scale), x, rtol=0, atol=0.51 * float(scale.max()) if rows else 0
    )


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38])
def test_a_token_of_zeros_or_next_to_zero_has_scale_one_and_codes_zero(value):
    codes, scale = qparams.quantize_token(torch.tensor([[value, -value], [1.0, 2.0]]))
    assert scale[0] == 1
    assert codes[0].tolist() == [0, 0]
    assert codes[1].tolist() == [64, 127]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_do_not_depend_on_the_dtype_that_holds_the_values(dtype):
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    for found, expected in zip(qparams.quantize_token(x), qparams.quantize_token(x.double().float()), strict=True):
        assert torch.equal(found, expected)
    scale = torch.tensor([0.02])
    assert torch.equal(qparams.quantize_static(x, scale, ZERO), qparams.quantize_static(x.float(), scale, ZERO))


def test_nan_in_a_token_gives_a_row_of_nan_alone():
    scale = qparams.token_scale(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    assert scale.isnan().tolist() == [True, False]


def test_arithmetic_changes_no_input():
    x, scale = torch.randn(4, 6), torch.tensor([0.1])
    kept, kept_scale = x.clone(), scale.clone()
    codes, token_scale = qparams.quantize_token(x)
    qparams.fake_quant_token(x)
    qparams.fake_quant_static(x, scale, ZERO)
    qparams.dequantize_weight(codes, token_scale)
    assert torch.equal(x, kept)
    assert torch.equal(scale, kept_scale)


def test_fake_quantization_passes_gradients_straight_through_and_keeps_its_values():
    x = torch.randn(3, 8, requires_grad=True)
    for fake in (qparams.fake_quant_token, lambda t: qparams.fake_quant_static(t, torch.tensor([0.05]), ZERO)):
        y = fake(x)
        assert torch.equal(y, fake(x.detach()))
        (gradient,) = torch.autograd.grad((y * torch.arange(8)).sum(), x)
        assert torch.equal(gradient, torch.arange(8.0).expand(3, 8))
