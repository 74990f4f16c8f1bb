"""Quantizers and unpacking by the kernels, in the emulator: equal to the definitions to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.kernels import qparams
from dcomp.kernels.native import rows as native
from dcomp.kernels.packing import int8_image, pack_int4
from tests.support import quantizers
from tests.support.emulated import emulator, seed_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What breaks orders of operations: ties, extremes of the range of floats, zeros, subnormal numbers.
TIES = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 127.0, -127.0, 0.0, -0.0])


@pytest.fixture(autouse=True)
def seed(request):
    found = seed_of(request.node.nodeid)
    emulator().seed(found)
    return found


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal values, with some tails and zeros, each row of another size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.where(torch.rand(shape, generator=generator) < 0.02, 20.0, 1.0)
    size = 10.0 ** torch.randint(-3, 3, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return (x * size).masked_fill(torch.rand(shape, generator=generator) < 0.05, 0.0).to(dtype)


def same(found, expected):
    """Whether tensors are equal, NaN in the same places."""
    return all(
        torch.equal(a.nan_to_num(nan=-7.25), b.nan_to_num(nan=-7.25))
        if a.dtype.is_floating_point
        else torch.equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1024), (1, 3), (5, 77)])
def test_static_codes_are_equal(dtype, shape, seed):
    x = values(seed, *shape, dtype=dtype)
    for scale, zero in ((0.013, 128), (1.0, 0), (3e-5, 255)):
        given = torch.tensor([scale]), torch.tensor([zero], dtype=torch.uint8)
        assert torch.equal(quantizers.quantize_static(emulator(), x, *given), qparams.quantize_static(x, *given))


def test_static_ties_go_to_even():
    scale, zero = torch.ones(1), torch.tensor([100], dtype=torch.uint8)
    expected = torch.tensor([100, 102, 100, 98, 226, 227, 0, 100, 100], dtype=torch.uint8)
    assert torch.equal(quantizers.quantize_static(emulator(), TIES, scale, zero), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2048), (2, 5), (4, 8, 9, 3)])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_samples_are_equal(dtype, shape, parts, seed):
    x = values(seed, *shape, dtype=dtype)
    x[-1] = x[-1].abs()
    x[0].flatten()[:2] = -1e-30
    assert same(quantizers.quantize_sample(emulator(), x, parts), qparams.quantize_sample(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 320), (1, 1), (17, 131), (8, 1030)])
def test_tokens_are_equal(dtype, shape, seed):
    x = values(seed, *shape, dtype=dtype)
    x[0] = 0
    codes, scale = quantizers.quantize_token(emulator(), x)
    assert same((codes, scale), qparams.quantize_token(x))
    depth = -(-shape[1] // 16) * 16
    padded, _ = quantizers.quantize_token(emulator(), x, depth)
    assert torch.equal(padded, torch.nn.functional.pad(codes, (0, depth - shape[1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 320), (2, 19, 96), (1, 3, 45), (2, 2, 2)])
@pytest.mark.parametrize("group", [2, 14, 32, 128, 256])
def test_groups_are_equal(dtype, shape, group, seed):
    x = values(seed, *shape, dtype=dtype)
    x[0, 0] = x[0, 0].abs()
    codes, scale = quantizers.quantize_group(emulator(), x, group)
    assert same((codes, scale), qparams.quantize_group(x, group))
    depth = -(-shape[-1] // 16) * 16
    padded, _ = quantizers.quantize_group(emulator(), x, group, depth, parts=4)
    assert torch.equal(padded, torch.nn.functional.pad(codes, (0, depth - shape[-1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1, 320), (19, 1, 96), (1, 1, 45), (9, 1, 2)])
@pytest.mark.parametrize("group", [2, 14, 32, 128, 256])
def test_groups_of_single_rows_take_one_launch(dtype, shape, group, seed):
    x = values(seed, *shape, dtype=dtype)
    x[0] = x[0].abs()
    x[-1] = 0
    emulator().counts()
    codes, scale = quantizers.quantize_group(emulator(), x, group, parts=1)
    assert emulator().counts()["launches"] == 1
    assert same((codes, scale), qparams.quantize_group(x, group))
    depth = -(-shape[-1] // 16) * 16
    padded, _ = quantizers.quantize_group(emulator(), x, group, depth, parts=1)
    assert torch.equal(padded, torch.nn.functional.pad(codes, (0, depth - shape[-1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 45, 64, 320])
def test_channels_are_smoothed_while_they_are_read(dtype, channels, seed):
    x = values(seed, 3, 35, channels, dtype=dtype)
    smooth = torch.randn(channels, generator=torch.Generator().manual_seed(seed)).exp()
    given = torch.tensor([0.013]), torch.tensor([120], dtype=torch.uint8)
    codes = quantizers.quantize_static(emulator(), x, *given, smooth=smooth)
    assert torch.equal(codes, qparams.quantize_static(x, *given, smooth))
    for parts in (1, 3):
        assert same(quantizers.quantize_sample(emulator(), x, parts, smooth), qparams.quantize_sample(x, smooth))
    rows = x.flatten(0, 1)
    depth = -(-channels // 16) * 16
    codes, scale = quantizers.quantize_token(emulator(), rows, depth, smooth)
    assert same((codes[:, :channels], scale), qparams.quantize_token(rows, smooth))
    assert not codes[:, channels:].any()
    for group in (6, 32):
        found = quantizers.quantize_group(emulator(), x, group, smooth=smooth)
        assert same(found, qparams.quantize_group(x, group, smooth))
        found = quantizers.quantize_group(emulator(), rows.unsqueeze(1), group, parts=1, smooth=smooth)
        assert same(found, qparams.quantize_group(rows.unsqueeze(1), group, smooth))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_floats_are_quantized_equally(data):
    sizes = st.floats(allow_nan=False, allow_infinity=False, width=32)
    channels = data.draw(st.integers(1, 24))
    x = torch.tensor(data.draw(st.lists(st.lists(sizes, min_size=channels, max_size=channels), min_size=1, max_size=3)))
    emulator().seed(1)
    assert same(quantizers.quantize_token(emulator(), x), qparams.quantize_token(x))
    assert same(quantizers.quantize_sample(emulator(), x), qparams.quantize_sample(x))
    for parts in (1, 2):
        found = quantizers.quantize_group(emulator(), x.unsqueeze(1), 8, parts=parts)
        assert same(found, qparams.quantize_group(x.unsqueeze(1), 8))


BROKEN = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize("place", [0, 40, 76])
@pytest.mark.skipif(native.defect() is not None, reason=str(native.defect()))
def test_broken_values_give_what_the_processor_gives(bad, place, seed):
    x = values(seed, 3, 77)
    x[1, place] = bad
    given = torch.tensor([0.01]), torch.tensor([7], dtype=torch.uint8)
    assert same([quantizers.quantize_static(emulator(), x, *given)], [native.quantize_static(x, *given)])
    assert same(quantizers.quantize_token(emulator(), x), native.quantize_token(x))
    assert same(quantizers.quantize_sample(emulator(), x), native.quantize_sample(x))
    for rows, parts in ((x.unsqueeze(1), 1), (x.unsqueeze(0), 2)):
        assert same(quantizers.quantize_group(emulator(), rows, 16, parts=parts), native.quantize_group(rows, 16))


@pytest.mark.parametrize("bad", BROKEN)
def test_broken_values_spoil_the_scale_of_their_sample_alone(bad, seed):
    x = values(seed, 3, 2, 64)
    x[1, 1, 30] = bad
    found, expected = quantizers.quantize_group(emulator(), x, 16), qparams.quantize_group(x, 16)
    assert same(found, expected)
    assert not found[1][1].isfinite()
    assert found[1][[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "group"), [(64, 32), (37, 38), (45, 6), (1, 2)])
def test_weights_are_unpacked_equally(dtype, channels, group, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-channels // group)
    codes = torch.randint(-8, 8, (5, 3, groups * group), generator=generator, dtype=torch.int8)
    multiplier = torch.randint(1, 16, (5, 3, groups), generator=generator, dtype=torch.int8)
    multiplier *= torch.randint(0, 2, (5, 3, groups), generator=generator, dtype=torch.int8) * 2 - 1
    scale = torch.rand(5, generator=generator)
    image = int8_image(pack_int4(codes), multiplier, channels)
    expected = qparams.dequantize_weight(image, scale).to(dtype)
    assert torch.equal(quantizers.unpack(emulator(), pack_int4(codes), multiplier, scale, channels, dtype), expected)
    assert torch.equal(quantizers.unpack(emulator(), image, None, scale, channels, dtype), expected)
