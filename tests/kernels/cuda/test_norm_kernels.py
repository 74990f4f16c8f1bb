"""Norms with quantized results, in the emulator: codes of the norm in float64, but for values at a tie."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams
from tests.support.emulated import emulator, seed_of
from tests.support.norms import group_norm, layer_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AT_TIE = 1e-4  # of a step
MOST_AT_TIES = 1e-3  # of all codes


@pytest.fixture(autouse=True)
def seed(request):
    found = seed_of(request.node.nodeid)
    emulator().seed(found)
    return found


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32, offset: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + offset).to(dtype)


def assert_codes(found: Tensor, steps: Tensor, low: int, high: int) -> None:
    """Check codes against values in steps, zero included: all are right but for neighbours of a tie."""
    expected = steps.round().clamp(low, high)
    wrong = found.double() != expected
    off = (found.double() - steps.clamp(low, high)).abs()
    assert (off[wrong] <= 0.5 + AT_TIE).all()
    assert wrong.double().mean() <= MOST_AT_TIES


def expected_group_norm(x: Tensor, groups: int, affine: tuple[Tensor, Tensor] | None, silu: bool) -> Tensor:
    weight, bias = (t.double() for t in affine) if affine else (None, None)
    y = functional.group_norm(x.double().movedim(-1, 1), groups, weight, bias, 1e-5).movedim(1, -1)
    return functional.silu(y) if silu else y


SHAPES = [(2, 60, 64, 8), (1, 33, 320, 32), (3, 7, 21, 3), (2, 5, 12, 12), (1, 300, 16, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "pixels", "channels", "groups"), SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_in_a_static_range(dtype, samples, pixels, channels, groups, silu, seed):
    x = values(seed, samples, pixels, channels, dtype=dtype)
    affine = values(seed + 1, channels), values(seed + 2, channels, offset=0.0)
    static = torch.tensor([0.05]), torch.tensor([40], dtype=torch.uint8)
    codes, _, _ = group_norm(emulator(), x, groups, affine, silu=silu, static=static, parts=3)
    steps = expected_group_norm(x, groups, affine, silu) / static[0].double() + 40
    assert_codes(codes, steps, 0, 255)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "pixels", "channels", "groups"), SHAPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_group_norm_in_the_range_of_a_sample(dtype, samples, pixels, channels, groups, parts, seed):
    x = values(seed, samples, pixels, channels, dtype=dtype)
    codes, scale, zero = group_norm(emulator(), x, groups, None, silu=True, parts=parts)
    y = expected_group_norm(x, groups, None, silu=True)
    expected_scale, expected_zero = qparams.sample_range(y.float().amin((1, 2)), y.float().amax((1, 2)))
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert torch.equal(zero, expected_zero)
    assert_codes(codes, y / qparams.along_first(scale, 3).double() + qparams.along_first(zero, 3), 0, 255)


def test_group_norm_far_from_zero_keeps_its_variance(seed):
    x = values(seed, 1, 64, 32, offset=4096.0)
    codes, scale, zero = group_norm(emulator(), x, 4, None, silu=False)
    steps = expected_group_norm(x, 4, None, silu=False) / scale.double() + zero
    assert (codes.double() - steps).abs().max() <= 0.52  # x itself is known to 2^-12 only


def expected_layer_norm(x, affine, modulation):
    weight, bias = (t.double() for t in affine) if affine else (None, None)
    y = functional.layer_norm(x.double(), x.shape[1:], weight, bias, 1e-6)
    if modulation is None:
        return y
    gain, shift = (t.double().repeat_interleave(len(x) // len(t), 0) for t in modulation)
    return y * (1 + gain) + shift


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(12, 64), (9, 320), (3, 45), (1, 1152)])
@pytest.mark.parametrize("has_affine", [True, False])
@pytest.mark.parametrize("has_modulation", [True, False])
def test_layer_norm_by_token(dtype, rows, channels, has_affine, has_modulation, seed):
    x = values(seed, rows, channels, dtype=dtype)
    affine = (values(seed + 1, channels), values(seed + 2, channels, offset=0.0)) if has_affine else None
    batch = 3 if rows % 3 == 0 else 1
    modulation = tuple(values(seed + i, batch, channels, offset=0.1) for i in (3, 4)) if has_modulation else None
    depth = -(-channels // 16) * 16
    codes, scale = layer_norm(emulator(), x, affine, modulation, depth)
    y = expected_layer_norm(x, affine, modulation)
    torch.testing.assert_close(scale, qparams.token_scale(y.float()), rtol=1e-6, atol=0)
    assert_codes(codes[:, :channels], y / scale.double().unsqueeze(1), -127, 127)
    assert not codes[:, channels:].any()


def test_a_constant_row_has_codes_zero(seed):
    codes, scale = layer_norm(emulator(), torch.full((2, 32), 5.0))
    assert not codes.any()
    assert torch.equal(scale, torch.ones(2))
