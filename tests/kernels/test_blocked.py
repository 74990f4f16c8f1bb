"""Rows in torch's own operations, in blocks, against the definition. Codes must be equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.kernels import blocked, qparams, reference

LAYOUTS = st.sampled_from(["nchw", "nhwc", "sliced", "flat"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BLOCK_SIZES = st.sampled_from([1, 37, 300, 1 << 18])  # of many blocks in a sample, and many samples in a block


def _assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@settings(max_examples=60)
@given(
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["nchw", "nhwc", "sliced", "flat"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 255),
    st.integers(0, 99),
)
def test_static_codes_are_those_of_the_definition(batch, channels, side, layout, dtype, zero, seed):
    x = (torch.randn(batch, channels, side, side + 1, generator=torch.Generator().manual_seed(seed)) * 40).to(dtype)
    x = {
        "nchw": x,
        "nhwc": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[..., ::2],
        "flat": x.flatten(),
    }[layout]
    static = (torch.tensor([0.11 + seed]), torch.tensor([zero], dtype=torch.uint8))
    codes = blocked.quantize_static(x, *static)
    assert torch.equal(codes, qparams.quantize_static(x, *static))
    assert layout != "nhwc" or codes.is_contiguous(memory_format=torch.channels_last)


def test_static_codes_of_many_blocks_and_of_extremes_are_those_of_the_definition():
    x = torch.randn(700_001) * 100
    x[:8] = torch.tensor([0.0, -0.0, 1e38, -1e38, float("inf"), -float("inf"), 0.5, 2.5])
    for zero in (0, 128, 255):
        static = (torch.tensor([1.0]), torch.tensor([zero], dtype=torch.uint8))
        assert torch.equal(blocked.quantize_static(x, *static), qparams.quantize_static(x, *static))


@settings(max_examples=60)
@given(
    st.integers(0, 20),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(-40, 15),
    st.integers(0, 99),
)
def test_token_codes_are_those_of_the_definition(rows, columns, dtype, exponent, seed):
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(dtype)
    x[::3] = 0
    for found, expected in zip(blocked.quantize_token(x), qparams.quantize_token(x), strict=True):
        assert torch.equal(found, expected)


def test_token_codes_of_many_blocks_and_strided_rows_are_those_of_the_definition():
    x = torch.randn(3000, 700)[:, 50:650]
    for found, expected in zip(blocked.quantize_token(x), qparams.quantize_token(x), strict=True):
        assert torch.equal(found, expected)


@settings(max_examples=80)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), LAYOUTS, DTYPES, BLOCK_SIZES, st.integers(0, 99))
def test_codes_of_samples_are_those_of_the_definition(batch, channels, side, layout, dtype, block, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, side, side + 1, generator=generator) + torch.randn(1, generator=generator)
    x = (x * 40 * torch.rand(batch, 1, 1, 1, generator=generator)).to(dtype)
    x[::3] *= seed % 2
    x = {
        "nchw": x,
        "nhwc": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[..., ::2],
        "flat": x.flatten(1),
    }[layout]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK_ELEMENTS", block)
        found = blocked.quantize_sample(x)
    _assert_same(found, qparams.quantize_sample(x))
    assert layout != "nhwc" or found[0].is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=80)
@given(
    st.integers(0, 3), st.integers(0, 9), st.integers(1, 40), st.integers(1, 48), DTYPES, BLOCK_SIZES,
    st.integers(-40, 15), st.integers(0, 99),
)  # fmt: skip
def test_images_of_groups_are_those_of_the_definition(batch, rows, channels, group, dtype, block, exponent, seed):
    x = torch.randn(batch, rows, channels, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x[1::3] = 0
    x = x.to(dtype) if seed % 2 else x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "_BLOCK_ELEMENTS", block)
        found = blocked.quantize_group(x, group)
    _assert_same(found, qparams.quantize_group(x, group))


@pytest.mark.parametrize("shape", [(2, 40, 90, 88), (600, 8, 9, 9)])
def test_samples_and_groups_of_many_blocks_and_of_extremes_are_those_of_the_definition(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, :6] = torch.tensor([0.0, -0.0, 1e38, -1e38, 0.5, 2.5])
    _assert_same(blocked.quantize_sample(x), qparams.quantize_sample(x))
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    _assert_same(blocked.quantize_group(pixels, 16), qparams.quantize_group(pixels, 16))
    rows = pixels.flatten(0, 1).unsqueeze(1)
    _assert_same(blocked.quantize_group(rows, 16), qparams.quantize_group(rows, 16))


def test_nan_and_infinity_give_the_scale_of_the_definition_and_stay_in_their_sample():
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[1, 0, 0, 0], x[2, 1, 2, 3] = float("nan"), -float("inf")
    for found, expected in (
        (blocked.quantize_sample(x), qparams.quantize_sample(x)),
        (blocked.quantize_group(x.flatten(1, 2), 4), qparams.quantize_group(x.flatten(1, 2), 4)),
    ):
        assert [str(float(value)) for value in found[1][1:3]] == ["nan", "inf"]
        assert torch.equal(found[1][::3], expected[1][::3])
        assert torch.equal(found[0][::3], expected[0][::3])
        assert all(torch.equal(one, other) for one, other in zip(found[2:], expected[2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_dequantized_in_blocks_gives_the_result_of_the_whole(monkeypatch, dtype):
    codes = torch.randint(-127, 128, (70, 3, 3, 16), dtype=torch.int8)
    scale, bias = torch.rand(70), torch.randn(70)
    x, rows = torch.randn(2, 16, 6, 7).to(dtype), torch.randn(3, 5, 16).to(dtype)
    shape = ([1, 1], [1, 1], [1, 1], 1)
    monkeypatch.setattr(blocked, "_FLOAT_WEIGHT_ELEMENTS", 20 * codes[0].numel())
    assert len(blocked._output_blocks(codes)) == 5
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # a sum of 144 terms in another order
    for b in (bias, None):
        whole = reference.conv2d_a16(x, codes, scale, b, *shape)
        assert (blocked.conv2d_a16(x, codes, scale, b, *shape) - whole).abs().max() <= tolerance * whole.abs().max()
        monkeypatch.setattr(blocked, "_FLOAT_WEIGHT_ELEMENTS", 16 * 16)
        whole = reference.linear_a16(rows, codes[:, 0, 0], scale, b)
        assert (blocked.linear_a16(rows, codes[:, 0, 0], scale, b) - whole).abs().max() <= tolerance * whole.abs().max()
