"""Quantized layers of every sort by CUDA kernels, in the emulator: the launcher that ships, and what the table says."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.compress.scheme import Granularity, QScheme
from dcomp.kernels import dispatch
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import driver
from tests.support.emulated import emulator
from tests.support.emulated_gpu import layers_on_the_emulated_gpu
from tests.support.schemes import quantized_form, schemes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def needs_emulator() -> None:
    try:
        emulator()
    except BuildError as error:
        pytest.skip(str(error))


def run(layer: nn.Module, scheme: QScheme, x: Tensor, seed: int = 0) -> tuple[list[tuple[str, str]], float]:
    """Run a layer by CUDA kernels and by the definitions; return the rows, and how far apart results are."""
    with torch.no_grad():
        quantized = quantized_form(layer, scheme, seed=seed)
        with dispatch.use_backend("emulated"):
            expected = quantized(x)
        with layers_on_the_emulated_gpu() as chosen:
            found = quantized(x)
    assert found.dtype == expected.dtype == x.dtype
    assert found.stride() == expected.stride()
    distance = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))
    return chosen, distance


def bound(dtype: torch.dtype) -> float:
    """Sums are equal, so results are those of a few fp32 roundings, or of one rounding to the layer's dtype."""
    return 2e-6 if dtype == torch.float32 else float(torch.finfo(dtype).eps)


@settings(max_examples=25, deadline=None)
@given(schemes(40, 24, ("token",)), st.sampled_from(DTYPES), st.integers(1, 70), st.booleans())
def test_linear_layers_of_every_scheme(scheme: QScheme, dtype: torch.dtype, count: int, bias: bool) -> None:
    chosen, distance = run(nn.Linear(40, 24, bias), scheme, torch.randn(2, count, 40).to(dtype))
    assert distance < bound(dtype)
    assert {row for _, row in chosen} == {"cuda"}


@settings(max_examples=25, deadline=None)
@given(
    schemes(20, 24, ("tensor", "sample")),
    st.sampled_from(DTYPES),
    st.sampled_from([(3, 1, 1, 1), (1, 1, 0, 1), (3, 2, 1, 1), (2, 1, 2, 2)]),
)
def test_convolutions_of_every_scheme(scheme: QScheme, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    taps, stride, padding, dilation = shape
    layer = nn.Conv2d(20, 24, taps, stride, padding, dilation)
    chosen, distance = run(layer, replace(scheme, boundaries=()), torch.randn(2, 20, 7, 6).to(dtype))
    assert distance < bound(dtype)
    assert {row for _, row in chosen} == {"cuda"}


def test_pixels_of_pointwise_convolutions_are_tokens() -> None:
    scheme = QScheme(4, 32, input_bits=8, input_granularity="token")
    chosen, distance = run(nn.Conv2d(64, 24, 1), scheme, torch.randn(2, 64, 7, 6))
    assert distance < bound(torch.float32)
    assert chosen == [("quantize_token", "cuda"), ("linear_a8", "cuda")]


def test_grouped_convolutions_fall_back_alone() -> None:
    scheme = QScheme(8, input_bits=8, input_granularity="sample")
    chosen, distance = run(nn.Conv2d(8, 16, 3, groups=4), scheme, torch.randn(1, 8, 6, 6))
    assert distance < bound(torch.float32)
    assert chosen == [("quantize_sample", "cuda"), ("conv2d_a8", "emulated")]


def test_kernels_that_reach_too_far_fall_back() -> None:
    scheme = QScheme(8, input_bits=8, input_granularity="sample")
    chosen, _ = run(nn.Conv2d(1, 1, (1, 300)), scheme, torch.randn(1, 1, 1, 310))
    assert chosen == [("quantize_sample", "cuda"), ("conv2d_a8", "emulated")]


@pytest.mark.parametrize(
    ("layer", "granularity", "bits", "quantizer"),
    [
        (nn.Linear(40, 24), "token", 8, "quantize_token"),
        (nn.Linear(40, 24), "token", 4, "quantize_group_token"),
        (nn.Conv2d(40, 24, 3), "tensor", 8, "quantize_static"),
        (nn.Conv2d(40, 24, 3), "sample", 8, "quantize_sample"),
        (nn.Conv2d(40, 24, 3), "sample", 4, "quantize_group"),
    ],
)
@pytest.mark.parametrize("rotate", [False, True])
def test_smoothing_is_left_to_the_quantizer_where_nothing_comes_between(
    layer: nn.Module, granularity: Granularity, bits: int, quantizer: str, rotate: bool
) -> None:
    inputs = {"input_bits": bits, "input_granularity": granularity, "input_group": 8 if bits == 4 else None}
    scheme = QScheme(4, 8, **inputs, smooth=True, rotate=rotate)
    x = torch.randn(2, 3, 40) if isinstance(layer, nn.Linear) else torch.randn(2, 40, 5, 6)
    x = x if x.ndim == 3 else x.contiguous(memory_format=torch.channels_last)
    with mock.patch.object(driver, "launch", wraps=driver.launch) as launch:
        _, distance = run(layer, scheme, x)
    assert distance < bound(torch.float32)
    arguments = [call.args[2] for call in launch.mock_calls if call.args[0].name == quantizer]
    assert bool(arguments[-1].smooth) != rotate  # self-tests come first


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("smooth", [False, True])
def test_rows_are_read_once_for_codes_and_for_the_branch(bits: int, smooth: bool) -> None:
    inputs = {"input_bits": bits, "input_granularity": "token", "input_group": 8 if bits == 4 else None}
    scheme = QScheme(4, 8, **inputs, smooth=smooth, rank=3)
    chosen, distance = run(nn.Linear(40, 24), scheme, torch.randn(2, 3, 40))
    assert distance < bound(torch.float32)
    assert chosen == [("quantize_low_rank", "cuda"), ("linear_a8", "cuda")]
    rotated = replace(scheme, rotate=True)
    chosen, _ = run(nn.Linear(40, 24), rotated, torch.randn(2, 3, 40))
    assert chosen[0] == ("quantize_token" if bits == 8 else "quantize_group", "cuda")
