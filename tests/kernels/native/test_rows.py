"""Our own C++ kernels against the plain definitions: bits of codes, scales and zeros, for any shape and layout."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcomp.kernels import dispatch, packing, qparams
from dcomp.kernels.native import rows

needs_library = pytest.mark.skipif(rows.defect() is not None, reason=f"{rows.defect()}")
pytestmark = needs_library

DTYPES = [torch.float32, torch.bfloat16]
sizes = st.integers(1, 70)


def values(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** float(torch.randint(-3, 4, (), generator=generator))
    return (x + torch.randn((), generator=generator)).to(dtype)


@given(st.integers(0, 2**16), sizes, sizes, st.sampled_from(DTYPES))
def test_tokens(seed: int, count: int, channels: int, dtype: torch.dtype) -> None:
    x = values(seed, count, channels, dtype=dtype)
    x[seed % count] = 0
    for given_x in (x, x.t().contiguous().t()):
        for found, expected in zip(rows.quantize_token(given_x), qparams.quantize_token(x), strict=True):
            assert torch.equal(found, expected)


@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 20), sizes, st.sampled_from(DTYPES), st.booleans())
def test_samples_and_static_ranges(
    seed: int, count: int, channels: int, width: int, dtype: torch.dtype, last: bool
) -> None:
    x = values(seed, count, channels, 3, width, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for found, expected in zip(rows.quantize_sample(x), qparams.quantize_sample(x), strict=True):
        assert torch.equal(found, expected)
    scale, zero = torch.tensor([0.03]), torch.tensor([seed % 256], dtype=torch.uint8)
    codes = rows.quantize_static(x, scale, zero)
    assert torch.equal(codes, qparams.quantize_static(x, scale, zero))
    assert codes.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_are_cut_for_threads_where_it_changes_nothing(dtype: torch.dtype) -> None:
    x = values(1, 3, 40, 65, 67, dtype=dtype)
    for found, expected in zip(rows.quantize_sample(x), qparams.quantize_sample(x), strict=True):
        assert torch.equal(found, expected)
    x = values(2, 3001, 67, dtype=dtype)
    for found, expected in zip(rows.quantize_token(x), qparams.quantize_token(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 36])
def test_what_is_not_finite_spoils_its_token_or_sample_alone(wrong: float, place: int) -> None:
    x = values(3, 3, 37, dtype=torch.float32)
    x[1, place] = wrong
    codes, scale = rows.quantize_token(x)
    expected, expected_scale = qparams.quantize_token(x)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes[::2], expected[::2])
    codes, scale, _ = rows.quantize_sample(x)
    sample_codes, sample_scale, _ = qparams.quantize_sample(x)
    torch.testing.assert_close(scale, sample_scale, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes[::2], sample_codes[::2])


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 5), torch.full((2, 5), 1e-40), torch.full((2, 5), 3e38), -torch.ones(2, 1)]
)
def test_extremes(x: torch.Tensor) -> None:
    for found, expected in zip(rows.quantize_token(x), qparams.quantize_token(x), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(rows.quantize_sample(x), qparams.quantize_sample(x), strict=True):
        assert torch.equal(found, expected)


@given(st.integers(0, 2**16), st.integers(1, 9), sizes, st.integers(1, 40))
def test_codes_of_four_bits(seed: int, count: int, channels: int, half_group: int) -> None:
    group, generator = 2 * half_group, torch.Generator().manual_seed(seed)
    groups = -(-channels // group)
    qweight = torch.randint(0, 256, (count, 3, 1, groups * half_group), generator=generator, dtype=torch.uint8)
    multiplier = torch.randint(-15, 16, (count, 3, 1, groups), generator=generator, dtype=torch.int8)
    found = rows.int8_image(qweight, multiplier, channels)
    assert torch.equal(found, packing.int8_image(qweight, multiplier, channels))


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 9), sizes, st.booleans())
def test_sums_become_outputs(seed: int, samples: int, rows_of_one: int, channels: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randint(-(2**30), 2**30, (samples * rows_of_one, channels), generator=generator, dtype=torch.int32)
    scale, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    for x_scale in (torch.rand(1, generator=generator), torch.rand(samples, generator=generator)):
        out = sums.clone().view(torch.float32)
        torch.ops.dcomp_native.rescale(out, x_scale, scale, bias if with_bias else None)
        exact = sums.double() * scale.double() * x_scale.double().repeat_interleave(len(sums) // len(x_scale))[:, None]
        exact = exact + bias if with_bias else exact
        assert bool(((out - exact).abs() <= 4 * 2**-24 * (exact.abs() + bias.abs() * with_bias)).all())


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_every_instruction_set_passes_the_same_tests(name: str) -> None:
    if os.environ.get("DCOMP_INSTRUCTION_SET"):
        pytest.skip("this is one of them")
    environment = os.environ | {"DCOMP_INSTRUCTION_SET": name}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    done = subprocess.run(
        [*command, "--import-mode=importlib", __file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, codes, scale = torch.randn(4, 5), torch.empty(4, 5, dtype=torch.int8), torch.empty(4)
    for arguments in (
        (x.double(), codes, scale),
        (x, codes[:, :4], scale),
        (x, codes.to(torch.uint8), scale),
        (x, codes, scale[:3]),
        (x.t(), codes, scale),
        (x[0], codes, scale),
    ):
        with pytest.raises(RuntimeError, match="dcomp_native"):
            torch.ops.dcomp_native.quantize_token(*arguments)


def test_layers_run_on_them() -> None:
    assert dispatch.choose("quantize_token").row == "native"
    assert dispatch.choose("linear_a8", bits=4).row == "native"
