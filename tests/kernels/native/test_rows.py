"""Our own C++ kernels against the plain definitions: bits of codes, scales and zeros, for any shape and layout."""

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcomp.kernels import dispatch, onednn, packing, qparams, reference
from dcomp.kernels.native import rows
from dcomp.kernels.reference import GroupNorm, LayerNorm
from tests.support import avx512_compiler

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


@given(
    st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 5), st.integers(1, 150), st.integers(1, 160),
    st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip
def test_images_of_groups(
    seed: int, samples: int, count: int, channels: int, group: int, dtype: torch.dtype, positive: bool
) -> None:
    x = values(seed, samples, count, channels, dtype=dtype)
    x[seed % samples] = x[seed % samples].abs() if positive else 0
    for given_x in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        for found, expected in zip(rows.quantize_group(given_x, group), qparams.quantize_group(x, group), strict=True):
            assert torch.equal(found, expected)


@given(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 9))
def test_any_bits_make_the_images_of_the_definition(seed: int, channels: int, group: int) -> None:
    bits = torch.randint(-(2**31), 2**31, (3, 2, channels), generator=torch.Generator().manual_seed(seed))
    x = bits.to(torch.int32).view(torch.float32).nan_to_num(nan=1e-42)
    for found, expected in zip(rows.quantize_group(x, group), qparams.quantize_group(x, group), strict=True):
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
    for tokens in (x.unsqueeze(1), x.unsqueeze(0)):
        for found, expected in zip(rows.quantize_group(tokens, 16), qparams.quantize_group(tokens, 16), strict=True):
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
    for count in (1, 2):
        samples = x.unsqueeze(1).repeat(1, count, 1)
        codes, scale = rows.quantize_group(samples, 16)
        group_codes, group_scale = qparams.quantize_group(samples, 16)
        torch.testing.assert_close(scale, group_scale, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes[::2], group_codes[::2])


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 5), torch.full((2, 5), 1e-40), torch.full((2, 5), 3e38), -torch.ones(2, 1)]
)
def test_extremes(x: torch.Tensor) -> None:
    for found, expected in zip(rows.quantize_token(x), qparams.quantize_token(x), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(rows.quantize_sample(x), qparams.quantize_sample(x), strict=True):
        assert torch.equal(found, expected)
    for samples in (x.unsqueeze(1), x.unsqueeze(0)):
        for found, expected in zip(rows.quantize_group(samples, 4), qparams.quantize_group(samples, 4), strict=True):
            assert torch.equal(found, expected)


@given(
    st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 40), st.integers(1, 130), st.sampled_from(DTYPES),
    st.sampled_from(["rows", "channels first", "channels last"]),
)  # fmt: skip
def test_channels_are_smoothed_while_they_are_read(
    seed: int, samples: int, pixels: int, channels: int, dtype: torch.dtype, layout: str
) -> None:
    x = values(seed, samples, pixels, channels, dtype=dtype)
    smooth = torch.randn(channels, generator=torch.Generator().manual_seed(seed)).exp()
    expected = [qparams.quantize_token(x.float() * smooth), qparams.quantize_group(x.float() * smooth, 24)]
    found: list[Any] = [rows.quantize_token(x.flatten(0, 1), smooth), rows.quantize_group(x, 24, smooth)]
    assert torch.equal(found[0][0].view(x.shape), expected[0][0])
    assert torch.equal(found[0][1].view(x.shape[:-1]), expected[0][1])
    assert all(map(torch.equal, found[1], expected[1]))
    wide = smooth
    if layout != "rows":
        x, wide = x.unsqueeze(1).movedim(-1, 1), smooth.view(-1, 1, 1)
        x = x.contiguous() if layout == "channels first" else x.contiguous(memory_format=torch.channels_last)
    scale, zero = torch.tensor([0.03]), torch.tensor([seed % 256], dtype=torch.uint8)
    codes = rows.quantize_static(x, scale, zero, smooth)
    assert torch.equal(codes, qparams.quantize_static(x.float() * wide, scale, zero))
    assert codes.stride() == x.stride()
    assert all(map(torch.equal, rows.quantize_sample(x, smooth), qparams.quantize_sample(x.float() * wide)))


def test_large_images_are_smoothed_in_any_stretch() -> None:
    x = values(4, 2, 37, 65, 67, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    smooth = torch.rand(37) + 0.5
    assert all(map(torch.equal, rows.quantize_sample(x, smooth), qparams.quantize_sample(x, smooth)))
    scale, zero = torch.tensor([0.03]), torch.tensor([99], dtype=torch.uint8)
    assert torch.equal(rows.quantize_static(x, scale, zero, smooth), qparams.quantize_static(x, scale, zero, smooth))


def spread_values(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return values that lie no further from 0 than from each other, which norms would make large."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 10 ** (seed % 4)).to(dtype)


def same_but_for_ties(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Norms are summed in another order: values next to the middle between two codes may get either."""
    return int((found.int() - expected.int()).abs().max()) <= 1


@given(
    st.integers(0, 2**16),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(2, 9),
    st.tuples(st.integers(2, 12), st.integers(2, 12)),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from(DTYPES),
)
def test_group_norm_and_activation_before_codes(
    seed: int,
    samples: int,
    groups: int,
    of_group: int,
    size: tuple[int, int],
    options: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> None:
    silu, static, affine = options
    channels = groups * of_group
    x = spread_values(seed, samples, channels, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, channels, generator=torch.Generator().manual_seed(seed)) if affine else (None, None)
    ranges = (torch.tensor([0.03]), torch.tensor([seed % 256], dtype=torch.uint8)) if static else (None, None)
    norm = GroupNorm(groups, weight, bias, 1e-5, silu)
    found, expected = (each.group_norm_quantize(x, norm, *ranges) for each in (rows, reference))
    assert same_but_for_ties(found[0], expected[0])
    assert found[0].stride() == x.stride()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=0)
    assert same_but_for_ties(found[2], expected[2])


def test_codes_after_norms_differ_from_the_definition_where_there_are_ties_alone() -> None:
    x = torch.randn(2, 64, 40, 33, generator=torch.Generator().manual_seed(5)) * 10 + 1
    x = x.contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(8, None, None, 1e-5, silu=True)
    found, expected = (each.group_norm_quantize(x, norm, None, None)[0] for each in (rows, reference))
    assert int((found != expected).sum()) < found.numel() / 1000
    tokens = x.flatten(2)
    plain = LayerNorm(None, None, None, None, 1e-5)
    found, expected = (each.layer_norm_quantize(tokens, plain)[0] for each in (rows, reference))
    assert int((found != expected).sum()) < found.numel() / 1000


def test_a_group_far_from_zero_keeps_its_variance() -> None:
    x = (torch.randn(1, 8, 40, 40) + 3000).contiguous(memory_format=torch.channels_last)
    found = rows.group_norm_quantize(x, GroupNorm(2, None, None, 1e-5, silu=False), None, None)
    exact = torch.nn.functional.group_norm(x.double(), 2, None, None, 1e-5)
    values = (found[0].double() - found[2]) * found[1]
    assert (values - exact).abs().max() < found[1] * 0.55


@given(
    st.integers(0, 2**16),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(8, 70),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from(DTYPES),
)
def test_layer_norm_before_codes(
    seed: int, samples: int, length: int, channels: int, options: tuple[bool, bool], dtype: torch.dtype
) -> None:
    affine, modulated = options
    x = spread_values(seed, samples, length, channels, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, channels, generator=generator) if affine else (None, None)
    gain, shift = torch.randn(2, samples, channels, generator=generator) if modulated else (None, None)
    norm = LayerNorm(weight, bias, gain, shift, 1e-5)
    (found, scale), (expected, expected_scale) = (each.layer_norm_quantize(x, norm) for each in (rows, reference))
    assert same_but_for_ties(found, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-3, atol=0)


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


AVX512 = {"avx512bw", "avx512vl", "avx512dq"}
FLAGS = {
    "generic": set[str](),
    "avx2": {"avx2", "fma"},
    "avx512": AVX512,
    "avx512bf16": AVX512 | {"avx512_bf16"},
    "amx": AVX512 | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_instruction_set_passes_the_same_tests(name: str) -> None:
    """What AVX2 has not is emulated, unless the processor has it."""
    if os.environ.get("DCOMP_INSTRUCTION_SET") or rows.instruction_set() == name:
        pytest.skip("this process runs it")
    file = Path("/proc/cpuinfo")
    here = set(file.read_text().split()) if file.is_file() else set()
    environment = os.environ | {"DCOMP_INSTRUCTION_SET": name}
    if not here >= FLAGS[name]:
        if not here >= FLAGS["avx2"]:
            pytest.skip("the processor has no AVX2")
        environment["CXX"] = shlex.join([sys.executable, "-P", str(avx512_compiler.__file__)])
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    done = subprocess.run(
        [*command, "--import-mode=importlib", __file__], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_instruction_set_that_was_asked_for_runs() -> None:
    name = os.environ.get("DCOMP_INSTRUCTION_SET")
    if name is None:
        pytest.skip("none was asked for")
    assert rows.instruction_set() == name


def stored_weight(generator: torch.Generator, *shape: int, group: int | None) -> rows.Stored:
    """A random weight `[O, *taps, I]` of 8 bits, or of 4 bits in groups; every code occurs."""
    if group is None:
        return rows.Stored(torch.randint(-128, 128, shape, generator=generator).to(torch.int8), None)
    groups = -(-shape[-1] // group)
    multiplier = torch.randint(1, 16, (*shape[:-1], groups), generator=generator).to(torch.int8)
    packed = torch.randint(0, 256, (*shape[:-1], groups * group // 2), generator=generator)
    return rows.Stored(packed.to(torch.uint8), multiplier)


def same_but_for_rounding(found: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None) -> bool:
    size = exact.abs() + (0 if bias is None else bias.abs().max())
    return bool(((found - exact).abs() <= 4 * 2**-24 * size).all())


GROUPED = st.sampled_from([None, 2, 24, 32, 64, 128])


@given(st.integers(0, 2**16), st.integers(0, 70), st.integers(1, 140), sizes, GROUPED, st.booleans())
def test_products_of_tokens_in_tiles(
    seed: int, count: int, channels: int, outputs: int, group: int | None, with_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = stored_weight(generator, outputs, channels, group=group)
    q = torch.randint(-128, 128, (count, channels), generator=generator).to(torch.int8)
    x_scale, scale, bias = (torch.rand(size, generator=generator) for size in (count, outputs, outputs))
    given_bias = bias if with_bias else None
    image = packing.int8_image(*weight, channels)
    exact = reference.linear_a8(q, x_scale, image, scale, given_bias)
    found = rows.linear_a8_by_strips(q, x_scale, weight, scale, given_bias)
    assert found.shape == exact.shape
    assert same_but_for_rounding(found, exact, given_bias)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    st.integers(0, 2**16),
    st.integers(0, 3),
    st.integers(1, 70),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 40),
    pairs,
    pairs,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    pairs,
    GROUPED,
    st.booleans(),
)
def test_products_of_images_in_tiles(
    seed: int,
    samples: int,
    channels: int,
    image: tuple[int, int],
    outputs: int,
    taps: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    group: int | None,
    one_scale: bool,
) -> None:
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(image, padding, dilation, taps, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    weight = stored_weight(generator, outputs, *taps, channels, group=group)
    q = torch.randint(0, 256, (samples, channels, *image), generator=generator).to(torch.uint8)
    x_scale = torch.rand(1 if one_scale else samples, generator=generator)
    zero = torch.randint(0, 256, (len(x_scale),), generator=generator).to(torch.uint8)
    scale, bias = torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)
    shape = (list(stride), list(padding), list(dilation))
    codes = packing.int8_image(*weight, channels)
    exact = reference.conv2d_a8(q, x_scale, zero, codes, scale, bias, *shape, 1)
    found = rows.conv2d_a8_by_strips(q, x_scale, zero, weight, scale, bias, *shape)
    assert found.shape == exact.shape
    assert same_but_for_rounding(found, exact, bias)


def test_products_of_more_rows_and_strips_than_a_task_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = stored_weight(generator, 530, 2200, group=64)
    scale, codes = torch.rand(530, generator=generator), packing.int8_image(*weight, 2200)
    for count in (300, 512, 700):
        q = torch.randint(-128, 128, (count, 2200), generator=generator).to(torch.int8)
        x_scale = torch.rand(count, generator=generator)
        exact = reference.linear_a8(q, x_scale, codes, scale, None)
        assert same_but_for_rounding(rows.linear_a8_by_strips(q, x_scale, weight, scale, None), exact, None)


@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize(("nibbles", "group"), [(0x88, 64), (0x77, 64), (0x88, 2)])
def test_extreme_codes_and_weights_do_not_saturate(code: int, nibbles: int, group: int) -> None:
    channels, multiplier = 640, torch.full((3, 640 // group), 15, dtype=torch.int8)
    weight = rows.Stored(torch.full((3, channels // 2), nibbles, dtype=torch.uint8), multiplier)
    q = torch.full((5, channels), code, dtype=torch.int8)
    found = rows.linear_a8_by_strips(q, torch.ones(5), weight, torch.ones(3), None)
    exact = code * channels * 15 * (-8 if nibbles == 0x88 else 7)
    assert found.tolist() == [[exact] * 3] * 5
    pixels = torch.full((1, channels, 1, 2), 255, dtype=torch.uint8)
    image = rows.Stored(weight.qweight.view(3, 1, 1, -1), multiplier.view(3, 1, 1, -1))
    shape = ([1, 1], [0, 0], [1, 1])
    zero = torch.zeros(1, dtype=torch.uint8)
    found = rows.conv2d_a8_by_strips(pixels, torch.ones(1), zero, image, torch.ones(3), None, *shape)
    assert found.flatten().tolist() == [255 * exact // code] * 6


def wide_pairs(generator: torch.Generator, kind: str, *shape: int) -> torch.Tensor:
    """Codes of 8 bits whose neighbours rarely, often or always add up to more than 128, of one sign or both."""
    if kind == "normal":
        return (torch.randn(shape, generator=generator) * 40).round().clamp(-128, 127).to(torch.int8)
    if kind == "uniform":
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    codes = torch.full(shape, 127 if kind == "highest" else -128, dtype=torch.int8)
    if kind == "alternating":
        codes[..., 1::2] = 127
    if kind == "few":  # the last channel has nothing else, and most of a strip has none
        codes = torch.zeros(shape, dtype=torch.int8)
        codes[::7, ..., ::50] = -128
        codes[::7, ..., 1::50] = -128
        codes[-1, ..., -2:] = 127
    return codes


@pytest.mark.parametrize("kind", ["normal", "uniform", "highest", "lowest", "alternating", "few"])
@settings(max_examples=15)
@given(st.integers(0, 2**16), st.integers(65, 200), st.integers(1, 1500), st.integers(1, 300))
def test_pairs_of_weights_that_bytes_cannot_hold_are_added(
    kind: str, seed: int, count: int, channels: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = wide_pairs(generator, kind, outputs, channels)
    q = torch.randint(-128, 128, (count, channels), generator=generator).to(torch.int8)
    q[: count // 3] = 127 if seed % 2 else -128
    ones = (torch.ones(count), rows.Stored(codes, None), torch.ones(outputs), None)
    assert torch.equal(rows.linear_a8_by_strips(q, *ones), (q.double() @ codes.double().T).float())


@pytest.mark.parametrize("kind", ["normal", "uniform", "highest", "lowest", "few"])
@pytest.mark.parametrize(("channels", "stride"), [(70, 1), (600, 2)])
def test_pairs_of_weights_of_every_tap_are_added(kind: str, channels: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = rows.Stored(wide_pairs(generator, kind, 40, 3, 3, channels), None)
    q = torch.randint(0, 256, (2, channels, 11, 13), generator=generator).to(torch.uint8)
    q[1] = 255
    ones, zeros = torch.ones(2), torch.tensor([3, 0], dtype=torch.uint8)
    shape = ([stride, 1], [1, 0], [1, 2])
    exact = reference.conv2d_a8(q, ones, zeros, weight.qweight, torch.ones(40), None, *shape, 1)
    assert torch.equal(rows.conv2d_a8_by_strips(q, ones, zeros, weight, torch.ones(40), None, *shape), exact)


needs_attention = pytest.mark.skipif(
    rows.defect() is not None or rows.instruction_set() == "generic", reason="no attention"
)
needs_integer_attention = pytest.mark.skipif(
    rows.defect() is not None or rows.instruction_set() not in ("avx2", "avx512"), reason="not in integers, or not ours"
)


def heads(seed: int, *sizes: tuple[int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Random `[B, H, N, d]` as projections leave it: the heads of a token lie together."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, h, d, generator=generator).to(dtype).transpose(1, 2) for b, h, n, d in sizes]


def error_of_codes(q: torch.Tensor, k: torch.Tensor, scale: float) -> float:
    """Return how far a score can be off when queries and keys are rounded to integers whose products fit 31 bits."""
    most = (2**31 / q.shape[-1]) ** 0.5 - 1
    q, k = (x.double().abs() for x in (q, k))
    steps = [x.amax(-1, keepdim=True).expand(x.shape) / min(most, 2**15 - 1) / 2 for x in (q, k)]
    return (steps[0] @ k.mT + (q + steps[0]) @ steps[1].mT).amax().item() * scale


@needs_attention
@given(
    st.integers(0, 2**16),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 256),
    st.sampled_from(DTYPES),
    st.sampled_from([0.01, 0.3, 40.0]),
)
def test_attention(
    seed: int, batch: int, count: int, queries: int, keys: int, width: int, dtype: torch.dtype, scale: float
) -> None:
    q, k, v = heads(seed, *((batch, count, n, width) for n in (queries, keys, keys)), dtype=dtype)
    found = rows.attention(q, k, v, scale)
    in_integers = rows.instruction_set() in ("avx2", "avx512")
    rounded = [(x if in_integers else x.bfloat16()).double() for x in (q, k, v)]
    exact = reference.attention(*rounded, scale)
    # Sums of scores in fp32, whose error grows with them; probabilities that are rounded to 8 bits. In integers that is
    # 64 errors of 2^-15 at most, and what is scored is rounded too.
    scores = (rounded[0].abs() @ rounded[1].abs().mT * scale).amax().item()
    off = 4e-7 * scores + (math.expm1(min(1, 2 * error_of_codes(q, k, scale))) + 2**-11 if in_integers else 0)
    bound = rounded[2].abs().amax() * (2**-8 + off + (2**-8 if dtype == torch.bfloat16 else 0))
    assert found.dtype == dtype
    assert found.shape == q.shape
    assert bool(((found.double() - exact).abs() <= bound).all())


@needs_attention
def test_attention_of_layouts_and_extremes() -> None:
    q, k, v = heads(1, (2, 3, 40, 24), (2, 3, 130, 24), (2, 3, 130, 24), dtype=torch.float32)
    expected = rows.attention(q, k, v, 0.2)
    for other in ([x.contiguous() for x in (q, k, v)], [torch.cat((x, x), -1)[..., :24] for x in (q, k, v)]):
        assert torch.equal(rows.attention(*other, 0.2), expected)
    # Scores far apart: the largest takes all, whatever block it stands in.
    k[:, :, 129] = 10 * q[:, :, 0]
    taken = rows.attention(q, k, v, 2.0)[:, :, 0]
    torch.testing.assert_close(taken, v[:, :, 129], rtol=2**-8, atol=2**-9)
    assert bool(torch.isfinite(rows.attention(q, k, v, 10.0)).all())
    q[0, 1, 7, 3] = torch.nan
    found = rows.attention(q, k, v, 0.2)
    assert bool(found[0, 1, 7].isnan().all())
    assert int(found.isnan().sum()) == 24
    assert rows.attention(q[:, :, :0], k, v, 0.2).shape == (2, 3, 0, 24)


@needs_integer_attention
@pytest.mark.parametrize(
    ("queries", "keys", "width", "larger"), [(40, 1100, 40, 1), (64, 300, 80, 4), (64, 64, 160, 1), (33, 77, 250, 2)]
)
def test_integers_are_nearer_to_attention_than_bfloat16(queries: int, keys: int, width: int, larger: int) -> None:
    q, k, v = heads(2, *((1, 3, n, width) for n in (queries, keys, keys)), dtype=torch.float32)
    q, scale = q * larger, width**-0.5
    exact = reference.attention(q.double(), k.double(), v.double(), scale)
    in_bfloat16 = reference.attention(*(x.bfloat16().double() for x in (q, k, v)), scale)  # with exact probabilities
    error, other = ((x - exact).square().mean().sqrt() for x in (rows.attention(q, k, v, scale), in_bfloat16))
    assert error < other / 2


@needs_attention
def test_attention_of_zeros_and_of_large_and_small_numbers() -> None:
    q, k, v = heads(3, (1, 2, 37, 24), (1, 2, 133, 24), (1, 2, 133, 24), dtype=torch.float32)
    mean = v.mean(-2, keepdim=True).expand(q.shape)
    for pair in ((q * 0, k), (q, k * 0), (q * 1e-25, k * 1e-25)):
        torch.testing.assert_close(rows.attention(*pair, v, 0.3), mean, rtol=0, atol=2**-8)
    assert not rows.attention(q, k, v * 0, 0.3).any()
    expected = rows.attention(q, k, v, 0.3)
    for size in (2.0**100, 2.0**-60):
        torch.testing.assert_close(rows.attention(q * size, k / size, v * size, 0.3) / size, expected)
    far = [(x * 1e15).bfloat16().float() for x in (q, k)]  # as products take them: nobody else wins by rounding
    winners = torch.nn.functional.scaled_dot_product_attention(*far, v, scale=0.3)
    torch.testing.assert_close(rows.attention(*far, v, 0.3), winners, rtol=2**-8, atol=2**-9)
    assert bool(rows.attention(q * 1e25, k * 1e25, v, 0.3).isnan().all())


@needs_attention
@pytest.mark.parametrize("gap", [5.0, 7.0, 8.3, 9.0, 10.4, 12.0])
def test_many_small_probabilities_beside_a_large_one_count(gap: float) -> None:
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 4096, 16)
    k[0, 0, 77] = gap / 16
    v = torch.cat((torch.ones(1, 1, 4096, 8), torch.zeros(1, 1, 4096, 8)), -1)
    v[0, 0, 77] = 1 - v[0, 0, 77]
    exact = reference.attention(q, k, v, 1.0)
    torch.testing.assert_close(rows.attention(q, k, v, 1.0), exact, rtol=0, atol=2**-7)


@needs_integer_attention
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("key", [7, 132])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_spoils_what_it_meets(which: int, key: int, value: float) -> None:
    inputs = heads(4, (2, 3, 133, 24), (2, 3, 133, 24), (2, 3, 133, 24), dtype=torch.float32)
    expected = rows.attention(*inputs, 0.3)
    inputs[which][1, 2, key, 3] = value
    found = rows.attention(*inputs, 0.3)
    met = torch.zeros_like(found, dtype=torch.bool)
    met[1, 2, key if which == 0 else slice(None), 3 if which == 2 else slice(None)] = True
    assert torch.equal(found.isnan(), met)
    assert torch.equal(found[~met], expected[~met])
    theirs = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=0.3)
    assert not bool((theirs.isnan() & ~met).any())


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 16, 31, 33, 128, 255, 256])
@needs_attention
def test_the_largest_products_of_attention_fit(width: int) -> None:
    q, k = torch.full((1, 1, 3, width), 1.5), torch.full((1, 1, 130, width), 1.5)
    v = torch.full((1, 1, 130, width), -3.0)
    torch.testing.assert_close(rows.attention(q, k, v, 1.0), v[:, :, :3], rtol=2**-10, atol=0)
    k[:, :, ::2] *= -1
    v[:, :, 1::2] = 2.0
    torch.testing.assert_close(rows.attention(q, k, v, 5.0), torch.full_like(q, 2.0), rtol=2**-10, atol=0)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512bf16", "amx"])
def test_attention_is_offered_where_it_is_known_to_gain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "instruction_set", lambda: name)
    monkeypatch.setattr(rows, "attention", reference.attention)
    refusal = rows.attention_defect.__wrapped__()
    assert (refusal is None) == (name != "generic")
    assert refusal is None or name in refusal
    request = dispatch._Request("attention", "cpu", 0, 8, 1, 1, None)
    if refusal is None:
        reason = dispatch._native_row(request).reason
        assert ("tiles" in reason, "bfloat16" in reason) == (name == "amx", name in ("amx", "avx512bf16"))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.half(), k.half(), v.half()),
        lambda q, k, v: (q, k, torch.cat((v, v), -1)),
        lambda q, k, v: (q, k[:, :1], v[:, :1]),
        lambda q, k, v: tuple(torch.cat([x] * 20, -1) for x in (q, k, v)),
        lambda q, k, v: tuple(x.mT.contiguous().mT for x in (q, k, v)),
    ],
)
def test_attention_that_the_kernel_does_not_take_is_torchs(change: Callable[..., Any]) -> None:
    tensors = change(*heads(1, (2, 2, 33, 24), (2, 2, 33, 24), (2, 2, 33, 24), dtype=torch.float32))
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, scale=0.2)
    torch.testing.assert_close(rows.attention(*tensors, 0.2), expected, rtol=2e-2, atol=2e-2)


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
    # Without vectors, plain C++ would multiply; only unpacking and rescaling around another product are worth it.
    plain = rows.instruction_set() == "generic" and onednn.defect() is not None
    assert dispatch.choose("linear_a8", bits=4).row == ("emulated" if plain else "native")
