"""Codes of rows and the first half of a low-rank branch by one kernel, in the emulator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.kernels import reference
from tests.support import quantizers
from tests.support.emulated import emulator, seed_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed(request):
    found = seed_of(request.node.nodeid)
    emulator().seed(found)
    return found


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_right(x: Tensor, down: Tensor, group: int | None, smooth: Tensor | None) -> None:
    """Codes and scales are equal; each addition and each input that is two values of tf32 may be off by 2^-22."""
    codes, scale, hidden = quantizers.quantize_low_rank(emulator(), x, down, group, smooth)
    expected = reference.quantize_low_rank(x, down, group, smooth)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    exact, size = x.double() @ down.double().t(), x.double().abs() @ down.double().abs().t()
    assert bool(((hidden - exact).abs() <= 2**-22 * (2 + x.shape[1] / 64) * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "rank"), [(1, 1, 1), (33, 320, 32), (70, 203, 40), (5, 77, 65)])
def test_codes_are_equal_and_hidden_is_near(dtype, rows, channels, rank, seed):
    x, down = drawn(seed, rows, channels).to(dtype), drawn(seed + 1, rank, channels).half()
    x[0] = 0
    smooth = drawn(seed + 2, channels).exp()
    for group in (None, 6, 32):
        assert_right(x, down, group, None)
        assert_right(x, down, group, smooth)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 90), st.integers(1, 36), st.sampled_from(DTYPES), st.integers(-6, 6),
    st.sampled_from([None, 2, 14, 64]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_is_right(rows, channels, rank, dtype, exponent, group, is_smooth, seed):
    emulator().seed(1)
    x = (drawn(seed, rows, channels) * 2.0**exponent).to(dtype)
    smooth = drawn(seed + 2, channels).exp() if is_smooth else None
    assert_right(x, drawn(seed + 1, rank, channels).half(), group, smooth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    most = 2**16 + 1 if dtype == torch.float32 else 127
    x = torch.randint(-most, most + 1, (40, 130), generator=generator).to(dtype)
    down = torch.randint(-1, 2, (34, 130), generator=generator).half()
    _, _, hidden = quantizers.quantize_low_rank(emulator(), x, down)
    assert torch.equal(hidden.double(), x.double() @ down.double().t())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_values_spoil_their_row_alone(bad):
    x, down = drawn(0, 40, 70), drawn(1, 8, 70).half()
    whole = reference.quantize_low_rank(x, down)
    x[17, 3] = bad
    codes, scale, hidden = quantizers.quantize_low_rank(emulator(), x, down)
    others = [row for row in range(40) if row != 17]
    assert torch.equal(codes[others], whole[0][others])
    assert torch.equal(scale[others], whole[1][others])
    assert not scale[17].isfinite()
    assert not hidden[17].isfinite().any()
    assert torch.allclose(hidden[others], whole[2][others], rtol=1e-4, atol=1e-5)


def test_no_bank_is_asked_twice_at_once():
    emulator().counts()
    quantizers.quantize_low_rank(emulator(), drawn(0, 32, 256), drawn(1, 32, 256).half())
    counts = emulator().counts()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]
    # Two tiles of 16 rows, four of 8 columns, 32 steps of 8 channels, two values of tf32 for each input.
    assert counts["products"] == 2 * 4 * 32 * 2
