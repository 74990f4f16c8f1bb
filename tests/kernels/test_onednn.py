"""The oneDNN rows against the definition. Sums must be equal; scaled results may differ by a few ulp.

Without VNNI oneDNN adds pairs of products in int16. With weights of at most 64 nothing saturates there, so these rows,
which such a processor is refused, are tested on it too.
"""

import gc
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcomp.kernels import onednn, reference

EXACT = onednn.defect() is None
LARGEST = 127 if EXACT else 64  # weight: 2 * 255 * 64 is below 2^15
EXTREMES = st.sampled_from(["random", "lowest", "highest", "mixed"])


def _draw(shape, low, high, seed, kind="random"):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.uint8 if low == 0 else torch.int8
    if kind == "random":
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    if kind == "mixed":
        return torch.where(torch.rand(shape, generator=generator) < 0.5, low, high).to(dtype)
    return torch.full(shape, low if kind == "lowest" else high, dtype=dtype)


def _weights(shape, seed, kind="random"):
    return _draw(shape, -128 if EXACT else -LARGEST, LARGEST, seed, kind)


def _assert_close(found, expected, terms):
    # Three float32 roundings (two products, one sum), each of at most half an ulp of the largest term.
    bound = 4 * 2.0**-24 * terms
    assert ((found.double() - expected.double()).abs() <= bound).all()


@settings(max_examples=150)
@given(st.integers(0, 40), st.integers(1, 130), st.integers(1, 70), st.integers(0, 999), EXTREMES, EXTREMES)
def test_linear_sums_are_exact_for_ragged_shapes_and_extremes(rows, inner, out, seed, kind_q, kind_w):
    q, codes = _draw((rows, inner), -128, 127, seed, kind_q), _weights((out, inner), seed + 1, kind_w)
    ones = (torch.ones(rows), torch.ones(out))
    found = onednn.linear_a8(q, ones[0], codes, ones[1], None)
    assert torch.equal(found, reference.linear_a8(q, ones[0], codes, ones[1], None))


@settings(max_examples=25)
@given(
    st.integers(1, 600),
    st.sampled_from([1, 3, 64, 320]),
    st.sampled_from([1, 16, 33, 700]),
    st.booleans(),
    st.integers(0, 99),
)
def test_scaled_linear_outputs_agree_to_a_few_ulp(rows, inner, out, with_bias, seed):
    torch.manual_seed(seed)
    q, codes = _draw((rows, inner), -127, 127, seed), _weights((out, inner), seed + 1)
    x_scale, scale, bias = torch.rand(rows) + 0.01, torch.rand(out) + 0.01, torch.randn(out) if with_bias else None
    expected = reference.linear_a8(q, x_scale, codes, scale, bias)
    terms = reference.linear_a8(q, x_scale, codes, scale, None).abs() + (bias.abs() if with_bias else 0)
    _assert_close(onednn.linear_a8(q, x_scale, codes, scale, bias), expected, terms)


def test_a_result_that_spans_many_blocks_equals_its_parts():
    q, codes = _draw((1000, 40), -127, 127, 0), _weights((2100, 40), 1)
    x_scale, scale, bias = torch.rand(1000), torch.rand(2100), torch.randn(2100)
    whole = onednn.linear_a8(q, x_scale, codes, scale, bias)
    assert torch.equal(whole[777:778], onednn.linear_a8(q[777:778], x_scale[777:778], codes, scale, bias))


SHAPES = {
    "batch": st.integers(0, 3),
    "channels": st.sampled_from([1, 2, 3, 4, 15, 16, 17, 64]),
    "out": st.sampled_from([1, 2, 3, 16, 17, 33]),
    "size": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "zero": st.integers(0, 255),
    "seed": st.integers(0, 999),
    "kind": EXTREMES,
}


@pytest.mark.parametrize("convolve", [onednn.conv2d_prepacked, onednn.conv2d_patches])
@settings(max_examples=200)
@given(**SHAPES)
def test_convolution_sums_are_exact_and_padding_is_the_real_zero(
    convolve, batch, channels, out, size, kernel, stride, padding, dilation, zero, seed, kind
):
    assume(all(n + 2 * p > d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)))
    q, codes = _draw((batch, channels, *size), 0, 255, seed, kind), _weights((out, *kernel, channels), seed)
    scales = (torch.ones(1), torch.tensor([zero], dtype=torch.uint8), codes, torch.ones(out), None)
    shape = ([*stride], [*padding], [*dilation])
    junk = torch.full((batch * 4000 + 1,), -12345, dtype=torch.int32)  # memory that is never written would show
    del junk
    found = convolve(q, *scales, *shape)
    assert torch.equal(found, reference.conv2d_a8(q, *scales, *shape, 1))


@pytest.mark.parametrize("stride", [[1, 2], [2, 3], [1, 1]])
@pytest.mark.parametrize("kernel", [(1, 3), (3, 3)])
def test_one_column_of_several_rows_is_exact_with_a_horizontal_stride(kernel, stride):
    q, codes = _draw((2, 16, 6, 3), 0, 255, 0), _weights((16, *kernel, 16), 1)
    arguments = (torch.ones(1), torch.tensor([7], dtype=torch.uint8), codes, torch.ones(16), None, stride, [0, 0])
    y = onednn.conv2d_prepacked(q, *arguments, [1, 1])
    assert y.shape[3] == 1 < y.shape[2]
    assert torch.equal(y, reference.conv2d_a8(q, *arguments, [1, 1], 1))


@pytest.mark.parametrize("convolve", [onednn.conv2d_prepacked, onednn.conv2d_patches])
@pytest.mark.parametrize("zero", range(0, 256, 5))
def test_an_image_of_real_zeros_gives_zeros_up_to_its_edge(convolve, zero):
    q, codes = torch.full((1, 5, 4, 4), zero, dtype=torch.uint8), _weights((8, 3, 3, 5), zero)
    x_zero = torch.tensor([zero], dtype=torch.uint8)
    y = convolve(q, torch.rand(1), x_zero, codes, torch.rand(8), None, [1, 1], [1, 1], [1, 1])
    assert not y.any()


@pytest.mark.parametrize("convolve", [onednn.conv2d_prepacked, onednn.conv2d_patches])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scaled_convolutions_agree_to_a_few_ulp(convolve, layout):
    torch.manual_seed(0)
    q = _draw((3, 64, 40, 40), 0, 255, 0).contiguous(memory_format=layout)
    codes, scale, bias = _weights((96, 3, 3, 64), 1), torch.rand(96) + 0.01, torch.randn(96)
    static = (torch.tensor([0.0173]), torch.tensor([93], dtype=torch.uint8), codes, scale)
    shape = ([1, 1], [1, 1], [1, 1])
    expected = reference.conv2d_a8(q, *static, bias, *shape, 1)
    terms = reference.conv2d_a8(q, *static, None, *shape, 1).abs() + bias.abs().view(1, -1, 1, 1)
    _assert_close(convolve(q, *static, bias, *shape), expected, terms)


def _loop_over_samples(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_SMALL_SAMPLE", 0)
        return onednn.conv2d_prepacked(*arguments)


BY_SAMPLE = pytest.mark.parametrize("convolve", [_loop_over_samples, onednn.conv2d_prepacked, onednn.conv2d_patches])


@BY_SAMPLE
@settings(max_examples=100)
@given(**{key: value for key, value in SHAPES.items() if key != "zero"})
def test_convolution_sums_are_exact_with_a_zero_for_each_sample(
    convolve, batch, channels, out, size, kernel, stride, padding, dilation, seed, kind
):
    assume(all(n + 2 * p > d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)))
    q, codes = _draw((batch, channels, *size), 0, 255, seed, kind), _weights((out, *kernel, channels), seed)
    ranges = (torch.ones(batch), _draw((batch,), 0, 255, seed), codes, torch.ones(out), None)
    shape = ([*stride], [*padding], [*dilation])
    found = convolve(q, *ranges, *shape)
    assert torch.equal(found, reference.conv2d_a8(q, *ranges, *shape, 1))
    assert found.is_contiguous(memory_format=torch.channels_last)


@BY_SAMPLE
@pytest.mark.parametrize("block_bytes", [1, 40_000, 1 << 21])
def test_convolutions_scaled_by_sample_agree_to_a_few_ulp(monkeypatch, convolve, block_bytes):
    monkeypatch.setattr(onednn, "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    q = _draw((5, 24, 10, 9), 0, 255, 0).contiguous(memory_format=torch.channels_last)
    codes, scale, bias = _weights((17, 3, 3, 24), 1), torch.rand(17) + 0.01, torch.randn(17)
    ranges = (torch.rand(5) + 0.01, torch.tensor([0, 255, 128, 3, 90], dtype=torch.uint8), codes, scale)
    shape = ([1, 1], [1, 1], [1, 1])
    expected = reference.conv2d_a8(q, *ranges, bias, *shape, 1)
    terms = reference.conv2d_a8(q, *ranges, None, *shape, 1).abs() + bias.abs().view(1, -1, 1, 1)
    _assert_close(convolve(q, *ranges, bias, *shape), expected, terms)


@BY_SAMPLE
def test_a_scale_of_nan_spoils_its_sample_alone(convolve):
    q, codes = _draw((3, 8, 5, 5), 0, 255, 0), _weights((4, 3, 3, 8), 1)
    ranges = (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1, 0, 7], dtype=torch.uint8))
    y = convolve(q, *ranges, codes, torch.ones(4), torch.ones(4), [1, 1], [1, 1], [1, 1])
    assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert y[::2].isfinite().all()


@BY_SAMPLE
def test_equal_ranges_of_all_samples_give_the_sums_of_one_range(convolve):
    q, codes = _draw((3, 8, 5, 5), 0, 255, 0), _weights((4, 3, 3, 8), 1)
    one, zero, rest = torch.ones(1), torch.tensor([77], dtype=torch.uint8), (codes, torch.ones(4), None)
    shape = ([1, 1], [1, 1], [1, 1])
    expected = convolve(q, one, zero, *rest, *shape)
    assert torch.equal(convolve(q, one.expand(3), zero.expand(3), *rest, *shape), expected)
    assert torch.equal(convolve(q, one, zero.expand(3), *rest, *shape), expected)
    assert torch.equal(convolve(q, one.expand(3), zero, *rest, *shape), expected)


@pytest.mark.parametrize("budget", [1, 1000, 2500, 5000, 1 << 20])
def test_blocks_of_patches_cover_every_row_once_and_in_order(budget):
    patches = torch.arange(5 * 8 * 9 * 2 * 3 * 4).view(5, 8, 9, 2, 3, 4)
    covered = 0
    for start, stop, block in onednn._blocks(patches, budget):
        assert start == covered
        assert torch.equal(block.reshape(-1), patches.reshape(5 * 8, -1)[start:stop].reshape(-1))
        assert stop - start == 1 or block.numel() <= budget
        covered = stop
    assert covered == 5 * 8


def _stale_guard(change):
    codes = _weights((16, 3, 3, 16), 0)
    q = _draw((1, 16, 6, 6), 0, 255, 1)
    shape = ([1, 1], [1, 1], [1, 1])
    fixed = (torch.ones(1), torch.tensor([128], dtype=torch.uint8))
    onednn.conv2d_prepacked(q, *fixed, codes, torch.ones(16), None, *shape)
    codes = change(codes)
    found = onednn.conv2d_prepacked(q, *fixed, codes, torch.ones(16), None, *shape)
    assert torch.equal(found, reference.conv2d_a8(q, *fixed, codes, torch.ones(16), None, *shape, 1))


def _copy(codes):
    return codes.copy_(_weights(codes.shape, 2))


def _swap_data_twice(codes):
    address = codes.data_ptr()
    codes.data = codes.data.clone()
    for _ in range(50):  # give the allocator a chance to hand the first address out again
        codes.data = _weights(codes.shape, 3)
        if codes.data_ptr() == address:
            break
    return codes


def _shift_within_storage(codes):
    storage = torch.cat([codes.flatten(), codes.flatten().neg()])
    codes.data = storage[: codes.numel()].view(codes.shape)
    codes.data = storage[codes.numel() :].view(codes.shape)
    return codes


@pytest.mark.parametrize("change", [_copy, _swap_data_twice, _shift_within_storage, torch.clone])
def test_a_pack_is_never_served_after_its_weight_changed(change):
    _stale_guard(change)


def test_a_pack_is_made_once_and_dies_with_its_weight():
    gc.collect()
    before = len(onednn._packs)
    codes = _weights((4, 3, 3, 4), 0)
    arguments = (
        torch.ones(1),
        torch.tensor([3], dtype=torch.uint8),
        codes,
        torch.ones(4),
        None,
        [1, 1],
        [1, 1],
        [1, 1],
    )
    onednn.conv2d_prepacked(_draw((1, 4, 5, 5), 0, 255, 1), *arguments)
    packs = onednn._packs.of(codes)
    assert len(packs) == 1
    onednn.conv2d_prepacked(_draw((2, 4, 7, 3), 0, 255, 1), *arguments)
    assert onednn._packs.of(codes) == packs
    del codes, arguments
    gc.collect()
    assert len(onednn._packs) == before


def test_a_weight_without_a_version_is_never_cached():
    with torch.inference_mode():
        codes = _weights((4, 3, 3, 4), 0)
    arguments = (
        torch.ones(1),
        torch.tensor([3], dtype=torch.uint8),
        codes,
        torch.ones(4),
        None,
        [1, 1],
        [1, 1],
        [1, 1],
    )
    q = _draw((1, 4, 5, 5), 0, 255, 1)
    assert torch.equal(onednn.conv2d_prepacked(q, *arguments), reference.conv2d_a8(q, *arguments, 1))
    assert onednn._packs.of(codes) == {}


PROBE = """
import torch
from dcomp.kernels import dispatch, onednn, ops
codes = torch.full((8, 3, 3, 16), 127, dtype=torch.int8)
q = torch.full((1, 16, 5, 5), 255, dtype=torch.uint8)
one, zero = torch.ones(1), torch.tensor([0], dtype=torch.uint8)
y = ops.conv2d_a8(q, one, zero, codes, torch.ones(8), None, None, [1, 1], [0, 0], [1, 1], 1)
p = torch.full((4, 144), -127, dtype=torch.int8)
rows = ops.linear_a8(p, torch.ones(4), codes.view(8, -1), torch.ones(8), None, None, 144)
print(y.unique().tolist() == [255.0 * 127 * 144] and rows.unique().tolist() == [-127.0 * 127 * 144])
print({c["row"] for c in dispatch.explain(["cpu"]) if c["operation"] in ("linear_a8", "conv2d_a8")})
print(onednn.defect())
"""


def test_an_instruction_set_that_saturates_is_refused_and_results_stay_exact():
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE],
        env={"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    exact, rows, defect = done.stdout.splitlines()
    assert (exact, rows) == ("True", "{'emulated'}")
    assert "VNNI" in defect
