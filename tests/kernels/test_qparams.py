import functools
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dcomp.kernels import qparams

ZERO = torch.tensor([77], dtype=torch.uint8)


@settings(max_examples=50)
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


@settings(max_examples=50)
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
    rows = x.unsqueeze(1)
    for found, expected in zip(qparams.quantize_group(rows, 8), qparams.quantize_group(rows.float(), 8), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(qparams.quantize_sample(x), qparams.quantize_sample(x.float()), strict=True):
        assert torch.equal(found, expected)
    scale = torch.tensor([0.02])
    assert torch.equal(qparams.quantize_static(x, scale, ZERO), qparams.quantize_static(x.float(), scale, ZERO))


def test_nan_in_a_token_gives_a_row_of_nan_alone():
    scale = qparams.token_scale(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))
    assert scale.isnan().tolist() == [True, False]


def _randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50)
@given(st.integers(0, 5), st.integers(1, 60), st.integers(-30, 30), st.floats(-4, 4), st.integers(0, 999))
def test_a_sample_is_cut_into_255_steps_that_hold_its_ends_and_0(samples, size, exponent, shift, seed):
    x = (_randn(samples, size, seed=seed) + shift) * 2.0**exponent
    codes, scale, zero = qparams.quantize_sample(x)
    lowest, highest = x.double().amin(1).clamp(max=0), x.double().amax(1).clamp(min=0)
    assert torch.allclose(scale.double(), (highest - lowest) / 255, rtol=2e-7, atol=0)
    assert torch.equal(codes[(x == lowest[:, None]) & (x < 0)], codes.new_zeros(int((lowest < 0).sum())))
    # Slack: value, product and scale are rounded to float32, and a code is up to 255.
    error = (qparams.dequantize_sample(codes, scale, zero).double() - x.double()).abs()
    assert (error <= 0.5 * scale.double()[:, None] * (1 + 1e-4)).all()
    assert not qparams.fake_quant_sample(torch.cat([x, torch.zeros(samples, 1)], 1))[:, -1].any()


def test_a_sample_depends_on_no_other_and_nan_stays_in_it():
    x = _randn(4, 3, 5, 6) * torch.tensor([1e-3, 1.0, 50.0, 7.0]).view(-1, 1, 1, 1)
    whole = qparams.quantize_sample(x)
    for n in range(4):
        for found, expected in zip(whole, qparams.quantize_sample(x[n : n + 1]), strict=True):
            assert torch.equal(found[n : n + 1], expected)
    x[2, 1, 1, 1] = float("nan")
    spoilt = qparams.quantize_sample(x)
    assert spoilt[1].isnan().tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert all(torch.equal(found[others], expected[others]) for found, expected in zip(spoilt, whole, strict=True))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-37])
def test_a_sample_of_zeros_or_next_to_zero_has_scale_one_and_codes_zero(value):
    codes, scale, zero = qparams.quantize_sample(torch.tensor([[value, -value], [-1.0, 254.0]]))
    assert (scale.tolist(), zero.tolist()) == ([1.0, 1.0], [0, 1])
    assert codes.tolist() == [[0, 0], [0, 255]]


def test_the_widest_range_of_finite_values_has_a_finite_scale():
    largest = torch.finfo(torch.float32).max
    codes, scale, zero = qparams.quantize_sample(torch.tensor([[-largest, 0.0, largest]]))
    assert scale.isfinite().all()
    assert (codes.tolist(), zero.tolist()) == ([[0, 128, 255]], [128])


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (2, 3, 0)])
def test_nothing_has_codes_of_no_size_and_scale_one(shape):
    codes, scale, zero = qparams.quantize_sample(torch.empty(shape))
    image, outer = qparams.quantize_group(torch.empty(shape), 4)
    assert codes.shape == image.shape == shape
    assert scale.tolist() == outer.tolist() == [1.0] * shape[0]
    assert zero.tolist() == [0] * shape[0]


def _grids_by_hand(x, group):
    """The step of each group of `[M, I]`, how many codes are below 0, and the largest multiplier, in float64."""
    grids = {}
    for m, start in itertools.product(range(len(x)), range(0, x.shape[1], group)):
        values = x[m, start : start + group].double()
        above, below = float(values.max().clamp(min=0)), float((-values.min()).clamp(min=0))
        codes_below = 15 * below / (above + below)
        assume(abs(codes_below % 1 - 0.5) > 1e-5)  # else rounding decides
        codes_below = round(codes_below)
        grids[m, start] = (
            qparams._REACH * (above + below) / 15,
            codes_below,
            127 // max(codes_below, 15 - codes_below),
        )
    return grids


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 21), st.integers(1, 24), st.floats(-2, 2), st.integers(0, 99))
def test_groups_have_the_smallest_multipliers_that_reach_their_steps(rows, channels, group, shift, seed):
    x = _randn(2, rows, channels, seed=seed).mul(_randn(2, rows, 1, seed=seed + 1)) + shift
    image, scale = qparams.quantize_group(x, group)
    for n in range(2):
        grids = _grids_by_hand(x[n], group)
        outer = scale[n].double()
        assert torch.isclose(
            outer, torch.tensor(max(step / limit for step, _, limit in grids.values())).double(), rtol=3e-7
        )
        for (m, start), (step, below, limit) in grids.items():
            ratio = step / float(outer) - qparams._SLACK
            assume(min(ratio % 1, -ratio % 1) > 1e-5)  # else rounding decides
            multiplier = min([k for k in range(1, limit + 1) if k >= ratio], default=limit)
            part = slice(start, start + group)
            codes = (x[n, m, part] * (1 / (multiplier * scale[n]))).round().clamp(-below, 15 - below)
            assert torch.equal(image[n, m, part], (codes * multiplier).to(torch.int8))
    assert image.min() >= -127


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 16), st.integers(-20, 20), st.integers(0, 99))
def test_a_group_has_at_most_16_values_and_an_error_is_half_a_step_or_what_is_clipped(
    rows, channels, group, exponent, seed
):
    x = _randn(2, rows, channels, seed=seed) * 2.0**exponent
    image, scale = qparams.quantize_group(x, group)
    for row in qparams.in_groups(image, group).flatten(0, -2):
        found = row.unique()
        divisor = functools.reduce(math.gcd, (int(value) for value in found))
        assert not divisor or int(found.max() - found.min()) // divisor <= 15
    values, groups = qparams.dequantize_group(image, scale), qparams.in_groups(x, group)
    width = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    # A multiplier is at most 0.8 above the step in units of the outer scale, and at most 0.2 below; it is 1 at least.
    # The zero is off by half a step at most, and so are both ends.
    step = width / 15 + 0.8 * scale.view(-1, 1, 1)
    clipped = width * (1 - qparams._REACH / 1.2) + 0.5 * step
    error = qparams.in_groups(values - x, group).abs().amax(-1)
    assert (error <= torch.maximum(0.5 * step, clipped) * 1.0001).all()


def test_groups_of_normal_values_lose_less_than_if_nothing_were_clipped():
    groups = _randn(1, 4000, 32)
    steps, below = qparams.group_grids(groups.unsqueeze(2))
    steps = steps.squeeze(2) / qparams._REACH
    fitted = (8 * steps / steps.max()).ceil() * steps.max() / 8
    codes = torch.minimum((groups / fitted.unsqueeze(-1)).round(), 15 - below)
    unclipped = torch.maximum(codes, -below) * fitted.unsqueeze(-1) - groups
    error = qparams.fake_quant_group(groups, 32) - groups
    assert error.square().mean() < 0.95 * unclipped.square().mean()


def test_values_of_one_sign_have_all_codes_on_their_side():
    x = torch.arange(16.0).view(1, 1, 16)
    for values in (x, -x):
        image, _ = qparams.quantize_group(values, 16)
        assert len(image.unique()) == 16
        assert (image * values >= 0).all()
    # SiLU's values reach from -0.28 up: grids about zero would waste nearly half of their codes.
    silu = torch.nn.functional.silu(1.5 * _randn(8, 16, 64))
    largest = qparams.in_groups(silu, 32).abs().amax(-1, keepdim=True) * qparams._REACH / 7.5
    about_zero = (qparams.in_groups(silu, 32) / largest).round().clamp(-8, 7) * largest
    lost = (qparams.fake_quant_group(silu, 32) - silu).square().sum()
    assert lost < 0.4 * (about_zero.flatten(-2) - silu).square().sum()


def test_the_exponent_of_values_changes_no_code():
    x = _randn(2, 5, 24) + 0.3
    image, scale = qparams.quantize_group(x, 8)
    larger = qparams.quantize_group(x * 2.0**40, 8)
    assert torch.equal(larger[0], image)
    assert torch.equal(larger[1], scale * 2.0**40)


def test_grids_by_hand():
    # Steps of 1, 1/4 and 1/4 before they are clipped; 0, 8 and 15 codes below zero; multipliers up to 8, 15 and 8.
    x = torch.tensor([[[15.0, 0.0, 1.0, 7.0], [-2.0, 1.75, 0.6, -1.0], [-3.75, -0.5, 0.0, -0.25]]])
    image, scale = qparams.quantize_group(x, 4)
    assert torch.allclose(scale, torch.tensor([qparams._REACH / 8]))
    assert image.tolist() == [[[120, 0, 8, 56], [-16, 14, 4, -8], [-30, -4, 0, -2]]]


def test_channels_that_are_missing_in_the_last_group_are_zeros():
    x = _randn(3, 2, 21)
    image, scale = qparams.quantize_group(x, 8)
    padded, same = qparams.quantize_group(torch.nn.functional.pad(x, (0, 3)), 8)
    assert torch.equal(image, padded[..., :21])
    assert torch.equal(scale, same)
    assert torch.equal(qparams.quantize_group(x, 10**12)[0], qparams.quantize_group(x, 21)[0])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-37])
def test_groups_of_zeros_or_next_to_zero_have_scale_one_and_codes_zero(value):
    x = torch.stack([torch.full((2, 6), value), torch.zeros(2, 6)])
    x[1, 0, 0] = 8.0
    image, scale = qparams.quantize_group(x, 3)
    assert torch.allclose(scale, torch.tensor([1.0, qparams._REACH / 15]))  # 8 / 15 over a multiplier of 8
    assert not image[0].any()
    assert image[1].flatten().tolist() == [120] + [0] * 11


def test_nan_in_a_group_gives_a_scale_of_nan_to_its_leading_index_alone():
    x = _randn(3, 2, 8)
    image, scale = qparams.quantize_group(x, 4)
    x[1, 0, 3] = float("nan")
    spoilt, spoilt_scale = qparams.quantize_group(x, 4)
    assert spoilt_scale.isnan().tolist() == [False, True, False]
    assert torch.equal(spoilt[::2], image[::2])
    assert torch.equal(spoilt_scale[::2], scale[::2])


def _sylvester(block):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / block**0.5


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
def test_a_rotation_is_the_product_with_sylvesters_matrix_in_each_block(block):
    x = _randn(3, 4, 3 * block)
    rotated = qparams.hadamard(x, block)
    expected = (x.double().view(3, 4, 3, block) @ _sylvester(block)).view(x.shape)
    assert rotated.dtype == torch.float32
    # A sum of `block` terms: their rounding errors stay far below 1e-6 of the length of the block.
    assert (rotated - expected).abs().max() <= 1e-6 * float(x.view(-1, block).norm(dim=1).max())
    assert (qparams.hadamard(rotated, block) - x).abs().max() <= 1e-6 * float(x.view(-1, block).norm(dim=1).max())


def test_a_rotation_passes_gradients_also_after_its_first_use_in_inference_mode():
    qparams._kept_sylvester.cache_clear()
    with torch.inference_mode():
        qparams.hadamard(torch.ones(2, 8), 8)
    x = _randn(2, 16).requires_grad_()
    (gradient,) = torch.autograd.grad((qparams.hadamard(x, 8) * torch.arange(16)).sum(), x)
    assert torch.allclose(gradient, qparams.hadamard(torch.arange(16.0).expand(2, 16), 8), atol=1e-5)


def test_a_rotation_is_the_same_traced_and_after_tracing():
    x = _randn(3, 32)
    expected = qparams.hadamard(x, 16)
    qparams._kept_sylvester.cache_clear()
    with FakeTensorMode() as mode:
        assert qparams.hadamard(mode.from_tensor(x), 16).shape == x.shape
    compiled = torch.compile(qparams.hadamard, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 16), expected)
    assert torch.equal(qparams.hadamard(x, 16), expected)


def test_a_rotation_spreads_an_outlier_over_its_block():
    x = torch.zeros(1, 256)
    x[0, 5] = 64.0
    rotated = qparams.hadamard(x, 64)
    assert rotated[0, :64].abs().tolist() == [8.0] * 64
    assert not rotated[0, 64:].any()


def test_channels_are_rotated_in_the_largest_power_of_two_that_divides_them():
    for channels in range(1, 1025):
        assert qparams.rotation_block(channels) == max(2**k for k in range(8) if channels % 2**k == 0)


def test_arithmetic_changes_no_input():
    x, scale = torch.randn(4, 6), torch.tensor([0.1])
    kept, kept_scale = x.clone(), scale.clone()
    qparams.fake_quant_sample(x)
    qparams.fake_quant_group(x.unsqueeze(1), 3)
    qparams.hadamard(x, 2)
    codes, token_scale = qparams.quantize_token(x)
    qparams.fake_quant_token(x)
    qparams.fake_quant_static(x, scale, ZERO)
    qparams.dequantize_weight(codes, token_scale)
    assert torch.equal(x, kept)
    assert torch.equal(scale, kept_scale)


def test_fake_quantization_passes_gradients_straight_through_and_keeps_its_values():
    x = torch.randn(3, 8, requires_grad=True)
    fakes = (
        qparams.fake_quant_token,
        qparams.fake_quant_sample,
        lambda t: qparams.fake_quant_static(t, torch.tensor([0.05]), ZERO),
        lambda t: qparams.fake_quant_group(t.unsqueeze(1), 4).squeeze(1),
    )
    for fake in fakes:
        y = fake(x)
        assert torch.equal(y, fake(x.detach()))
        (gradient,) = torch.autograd.grad((y * torch.arange(8)).sum(), x)
        assert torch.equal(gradient, torch.arange(8.0).expand(3, 8))
