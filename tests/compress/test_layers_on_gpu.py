"""Quantized layers of every sort by CUDA kernels, in the emulator: the launcher that ships, and what the table says."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.compress.attention import attend_by_kernels
from dcomp.compress.scheme import Granularity, QScheme
from dcomp.kernels import dispatch
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import driver
from tests.support.emulated import emulator
from tests.support.emulated_gpu import layers_on_the_emulated_gpu
from tests.support.schemes import quantized_form, schemes

FOUR_BITS = {block: ["quantize_nibbles", f"linear_w4a4_group{block}_64x64"] for block in (32, 64)}
OF_INT8 = ["quantize_group_token", "linear_w4a8_64x64"]
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


@pytest.mark.parametrize("layer", [nn.Linear(200, 24), nn.Conv2d(200, 24, 1)])
@pytest.mark.parametrize(("input_group", "kernels"), [(32, FOUR_BITS[32]), (64, FOUR_BITS[64]), (16, OF_INT8)])
def test_4_bit_inputs_meet_4_bit_weights_in_groups_that_suit(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, input_group: int, kernels: list[str]
) -> None:
    scheme = QScheme(4, 64, input_bits=4, input_granularity="token", input_group=input_group)
    x = torch.randn(2, 200) if isinstance(layer, nn.Linear) else torch.randn(1, 200, 4, 3)
    run(layer, scheme, x)  # tests the kernels
    names, launch = [], driver.launch
    monkeypatch.setattr(driver, "launch", lambda kernel, *rest: (names.append(kernel.name), launch(kernel, *rest)))
    chosen, distance = run(layer, scheme, x)
    assert distance < bound(torch.float32)
    parts = [("quantize_group", "cuda"), ("linear_a8", "cuda")] if kernels is OF_INT8 else []
    assert chosen == [("linear_a4", "cuda"), *parts]
    assert names == kernels


def tokens(weight_bits: int, group: int | None, input_group: int | None = None, **options: Any) -> QScheme:
    """Return a scheme of layers without taps; inputs of 4 bits have groups."""
    given: dict[str, Any] = {"input_bits": 4 if input_group else 8, "input_group": input_group, **options}
    return QScheme(weight_bits, group, input_granularity="token", **given)


@pytest.mark.parametrize("layer", [nn.Linear(200, 24), nn.Conv2d(200, 24, 1)])
@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        (tokens(8, None, rank=5), "linear_w8a8_low_rank_64x64"),
        (tokens(4, 64, rank=8), "linear_w4a8_low_rank_64x64"),
        (tokens(4, 200, rank=16), "linear_w4a8_channel_low_rank_64x64"),
        (tokens(4, 64, 32, rank=3), "linear_w4a4_group32_low_rank_64x64"),
        (tokens(4, 64, 64, rank=9), "linear_w4a4_group64_low_rank_64x64"),
        (tokens(4, 64, 16, rank=9), "linear_w4a8_low_rank_64x64"),
        # what else is multiplied in float, and what changes with the step, is not the kernel's
        (tokens(8, None, rank=5, directions=2), "linear_w8a8_64x64"),
        (tokens(8, None, rank=5, corrected=True), "linear_w8a8_64x64"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_branch_is_added_by_the_product(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, scheme: QScheme, kernel: str, dtype: torch.dtype
) -> None:
    x = (torch.randn(2, 3, 200) if isinstance(layer, nn.Linear) else torch.randn(1, 200, 4, 3)).to(dtype)
    run(layer, scheme, x)  # tests the kernels
    names, launch = [], driver.launch
    monkeypatch.setattr(driver, "launch", lambda kernel, *rest: (names.append(kernel.name), launch(kernel, *rest)))
    _, distance = run(layer, scheme, x)
    assert distance < bound(dtype)
    assert names[-1] == kernel


def test_grouped_convolutions_fall_back_alone() -> None:
    scheme = QScheme(8, input_bits=8, input_granularity="sample")
    chosen, distance = run(nn.Conv2d(8, 16, 3, groups=4), scheme, torch.randn(1, 8, 6, 6))
    assert distance < bound(torch.float32)
    assert chosen == [("quantize_sample", "cuda"), ("conv2d_a8", "emulated")]


def test_kernels_that_reach_too_far_fall_back() -> None:
    scheme = QScheme(8, input_bits=8, input_granularity="sample")
    chosen, _ = run(nn.Conv2d(1, 1, (1, 300)), scheme, torch.randn(1, 1, 1, 310))
    assert chosen == [("quantize_sample", "cuda"), ("conv2d_a8", "emulated")]


@torch.no_grad()
@pytest.mark.parametrize("demanded", [True, False])
@pytest.mark.parametrize(("tokens", "context"), [(20, None), (70, 77)])
def test_attention_between_integer_projections_is_ours_where_it_is_demanded(
    demanded: bool, tokens: int, context: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Attention(query_dim=80, heads=2, dim_head=40)}).eval()
    for name in ("to_q", "to_k", "to_v"):
        scheme = QScheme(weight_bits=8, input_bits=8, input_granularity="token")
        model.attn.set_submodule(name, quantized_form(model.attn.get_submodule(name), scheme))
    attend_by_kernels(model)
    x, other = torch.randn(2, tokens, 80), None if context is None else torch.randn(2, context, 80)
    with dispatch.use_backend("emulated"):
        expected = model.attn(x, other)
    with layers_on_the_emulated_gpu() as chosen, dispatch.use_backend("cuda" if demanded else "auto"):
        found = model.attn(x, other)
    rows_of_attention = [row for operation, row in chosen if operation == "attention"]
    assert rows_of_attention == (["cuda", "cuda"] if demanded else ["torch"])  # asked for, and run
    distance = float((found - expected).norm() / expected.norm())
    assert distance < (0.01 if demanded else bound(torch.float32))
    assert (distance > 1e-5) is demanded


@torch.no_grad()
def test_attention_that_no_kernel_takes_is_torchs() -> None:
    model = nn.ModuleDict({"attn": Attention(query_dim=32, heads=1, dim_head=200)}).eval()
    model.attn.to_q = quantized_form(model.attn.to_q, QScheme(8, input_bits=8, input_granularity="token"))
    attend_by_kernels(model)
    with layers_on_the_emulated_gpu() as chosen, dispatch.use_backend("cuda"):
        model.attn(torch.randn(1, 20, 32))
    assert [row for operation, row in chosen if operation == "attention"] == ["cuda"]  # asked for alone


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
    operation = [("linear_a4", "cuda")] * (bits == 4)
    assert chosen == [*operation, ("quantize_low_rank", "cuda"), ("linear_a8", "cuda")]
    rotated = replace(scheme, rotate=True)
    chosen, _ = run(nn.Linear(40, 24), rotated, torch.randn(2, 3, 40))
    quantizer = "quantize_token" if bits == 8 else "quantize_group"
    assert chosen == [*operation, (quantizer, "cuda"), ("linear_a8", "cuda")]
