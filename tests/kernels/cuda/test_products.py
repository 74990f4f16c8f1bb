"""Products by the kernels, in the emulator: sums are those of the reference to the last unit, values to a few ulp."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.kernels import qparams, reference
from dcomp.kernels.cuda.packing import pack_fragments
from dcomp.kernels.cuda.tiles import TILES
from dcomp.kernels.packing import int8_image, pack_int4
from tests.support.emulated import SEEDS, EmulatorError, emulator
from tests.support.products import Int4Weight, conv, integers, linear

SIZES = [f"{rows}x{columns}" for rows, columns in TILES]
SMALL = "64x64"
# (M, O, I): whole tiles, one row, ragged everything, less than a step, odd channels
SHAPES = [(128, 128, 128), (1, 72, 320), (77, 131, 208), (130, 17, 21)]


@pytest.fixture(autouse=True)
def needs_emulator() -> None:
    emulator().counts()
    emulator().seed(0)


def operands(group: int | None, size: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, str]:
    """Return codes of activations, the weight as the kernel takes it, its image `[O, I]`, and the kernel's stem."""
    generator = torch.Generator().manual_seed(seed)
    rows, outputs, channels = size
    q = integers(generator, -128, 127, rows, channels)
    q[0] = 0
    if group == 0:
        image = integers(generator, -127, 127, outputs, channels)
        return q, torch.nn.functional.pad(image, (0, -channels % 16)).contiguous(), image, "linear_w8a8"
    weight = Int4Weight(generator, (outputs, channels), group)
    return q, weight.fragments, weight.image, "linear_w4a8" if group else "linear_w4a8_channel"


def ones(*counts: int) -> tuple[Tensor, ...]:
    return tuple(torch.ones(count) for count in counts)


def unit_scales(rows: int, outputs: int, stem: str) -> tuple[Tensor, Tensor]:
    """Return scales that leave sums as they are."""
    x_scale, weight_scale = ones(rows, outputs)
    return x_scale, weight_scale / 16 if stem.endswith("channel") else weight_scale


@pytest.mark.parametrize("group", [0, None, 32, 64], ids=["w8", "channel", "group32", "group64"])
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_linear_layers_are_exact(group, size):
    for shape, seed in zip(SHAPES, itertools.cycle(SEEDS), strict=False):
        q, weight, image, stem = operands(group, shape)
        emulator().seed(seed)
        y = linear(emulator(), f"{stem}_{size}", q, weight, len(image), unit_scales(len(q), len(image), stem))
        assert torch.equal(y.double(), q.double() @ image.double().t()), shape


@pytest.mark.parametrize("group", [0, None, 32], ids=["w8", "channel", "group32"])
def test_every_order_of_warps_gives_the_same(group):
    q, weight, image, stem = operands(group, (150, 150, 400))
    for seed in range(6):
        emulator().seed(seed)
        y = linear(emulator(), f"{stem}_128x128", q, weight, len(image), unit_scales(len(q), len(image), stem))
        assert torch.equal(y.double(), q.double() @ image.double().t())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 330), st.sampled_from([0, None, 32, 96]))
def test_any_shape_of_a_linear_layer_is_exact(rows, outputs, channels, group):
    q, weight, image, stem = operands(group, (rows, outputs, channels))
    y = linear(emulator(), f"{stem}_{SMALL}", q, weight, len(image), unit_scales(len(q), len(image), stem))
    assert torch.equal(y.double(), q.double() @ image.double().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [72, 71])
@pytest.mark.parametrize("has_bias", [True, False])
def test_sums_are_rescaled_like_the_reference(dtype, outputs, has_bias):
    generator = torch.Generator().manual_seed(1)
    q, weight, image, stem = operands(0, (50, outputs, 96))
    scales = torch.rand(50, generator=generator) * 1e-3, torch.rand(outputs, generator=generator) * 1e-2
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    y = linear(emulator(), f"{stem}_{SMALL}", q, weight, outputs, scales, bias, dtype)
    # The kernel rounds product and sum by themselves; the reference may do it at once.
    sums = (q.double() @ image.double().t()).float()
    expected = sums.mul(scales[1]).mul(scales[0].unsqueeze(1))
    expected = expected if bias is None else bias + expected
    assert torch.equal(y, expected.to(dtype))
    torch.testing.assert_close(
        expected, reference.linear_a8(q, scales[0], image, scales[1], bias), rtol=2**-22, atol=2**-22
    )


def test_the_largest_sums_fit():
    q = torch.full((1, 1024), -128, dtype=torch.int8)
    weight = Int4Weight(torch.Generator(), (16, 1024), 1024)
    fragments = pack_fragments(
        pack_int4(torch.full((16, 1024), -8, dtype=torch.int8)), torch.full((16, 1), 15, dtype=torch.int8), 1024
    )
    assert fragments.shape == weight.fragments.shape
    y = linear(emulator(), f"linear_w4a8_{SMALL}", q, fragments, 16, unit_scales(1, 16, ""))
    assert torch.equal(y, torch.full((1, 16), 1024.0 * 128 * 120))


CONVS = {
    "3x3": {"size": (2, 6, 7, 32), "taps": (3, 3), "padding": (1, 1)},
    "1x1": {"size": (2, 5, 9, 96), "taps": (1, 1)},
    "strided": {"size": (1, 9, 8, 32), "taps": (3, 3), "padding": (1, 1), "stride": (2, 2)},
    "dilated": {"size": (2, 9, 7, 32), "taps": (3, 2), "padding": (2, 1), "dilation": (2, 3), "stride": (1, 2)},
    "7x7": {"size": (1, 7, 8, 32), "taps": (7, 7), "padding": (3, 3)},
    "wide padding": {"size": (2, 3, 3, 32), "taps": (2, 5), "padding": (4, 6)},
}


def conv_case(group, outputs, size, taps, seed=0, **shape):
    """Return codes, zeros, the weight as the kernel takes it, its image `[O, *taps, C]`, and the kernel's stem."""
    generator = torch.Generator().manual_seed(seed)
    q = integers(generator, 0, 255, *size, dtype=torch.uint8)
    zero = integers(generator, 0, 255, size[0], dtype=torch.uint8)
    if group == 0:
        image = integers(generator, -127, 127, outputs, *taps, size[-1])
        return q, zero, image, image, "conv_w8a8"
    weight = Int4Weight(generator, (outputs, *taps, size[-1]), group)
    return q, zero, weight.fragments, weight.image, "conv_w4a8" if group else "conv_w4a8_channel"


def run_conv(kernel_size, group, outputs, case, **options):
    q, zero, weight, image, stem = conv_case(group, outputs, **case)
    zero = zero[: options.pop("zeros", len(zero))]
    sums = image.flatten(1).sum(1, dtype=torch.int32) * (16 if stem.endswith("channel") else 1)
    scales = unit_scales(len(zero), outputs, stem)
    shape = {key: case[key] for key in ("stride", "padding", "dilation") if key in case}
    y = conv(emulator(), f"{stem}_{kernel_size}", q, zero, weight, sums, case["taps"], scales, **shape, **options)
    geometry = [
        list(shape.get(key, default))
        for key, default in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)))
    ]
    expected = reference.conv2d_a8(
        q.permute(0, 3, 1, 2), scales[0], zero, image, torch.ones(outputs), None, *geometry, 1
    )
    return y, expected.permute(0, 2, 3, 1)


@pytest.mark.parametrize("group", [0, None, 32], ids=["w8", "channel", "group32"])
@pytest.mark.parametrize("case", CONVS)
def test_sums_of_convolutions_are_exact(group, case):
    y, expected = run_conv(SMALL, group, 70, CONVS[case])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("group", [0, None, 64], ids=["w8", "channel", "group64"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", SEEDS)
def test_convolutions_are_exact_in_every_tile(group, size, seed):
    emulator().seed(seed)
    case = {"size": (2, 11, 7, 64), "taps": (3, 3), "padding": (1, 1), "seed": seed}
    y, expected = run_conv(size, group, 130, case)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("group", [0, None], ids=["w8", "channel"])
def test_channels_of_a_convolution_come_in_sixteens(group):
    case = {"size": (2, 5, 4, 48), "taps": (3, 3), "padding": (1, 1)}
    y, expected = run_conv(SMALL, group, 20, case)
    assert torch.equal(y, expected)


def test_samples_may_share_scale_and_zero():
    y, expected = run_conv(SMALL, 0, 24, CONVS["3x3"], zeros=1)
    assert torch.equal(y, expected)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_convolution_is_exact(data):
    draw = data.draw
    taps = draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, taps, padding, strict=True)]
    sides = [low + draw(st.integers(0, 5)) for low in least]
    group = draw(st.sampled_from([0, None, 32]))
    case = {
        "size": (draw(st.integers(1, 2)), *sides, 32 * draw(st.integers(1, 2))),
        "taps": taps,
        "padding": padding,
        "dilation": dilation,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    }
    y, expected = run_conv(SMALL, group, draw(st.integers(1, 40)), case)
    assert torch.equal(y, expected)


def image_of_fragments(fragments: Tensor, outputs: int, depth: int) -> Tensor:
    """Undo `pack_fragments` of a grouped weight a byte at a time: the image `[O, K]`."""
    image = torch.zeros(len(fragments) * 16, fragments.shape[1] * 64, dtype=torch.int64)
    for block, step, lane, i in itertools.product(*map(range, (len(fragments), fragments.shape[1], 32, 16))):
        tile, half, byte = i // 8, i // 4 % 2, i % 4
        row = block * 16 + tile * 8 + lane // 4
        k = step * 64 + half * 32 + lane % 4 * 4 + byte
        at = fragments[block, step]
        m, shift = at[512 + lane // 4 * 8 + tile * 4 + half * 2 :][:2].tolist()
        for nibble, further in ((int(at[lane * 16 + i]) & 15, 0), (int(at[lane * 16 + i]) >> 4, 16)):
            image[row, k + further] = nibble * m + shift - 128
    return image[:outputs, :depth]


def test_fragments_hold_the_image():
    weight = Int4Weight(torch.Generator().manual_seed(0), (19, 3, 1, 40), 32)
    expected = torch.nn.functional.pad(weight.image, (0, 24)).flatten(1)
    assert torch.equal(image_of_fragments(weight.fragments, 19, 3 * 64), expected.long())


def test_every_code_times_every_multiplier_is_exact():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(30, 2)
    multiplier = torch.tensor([m for m in range(-15, 16) if m], dtype=torch.int8).unsqueeze(1)
    fragments = pack_fragments(pack_int4(codes), multiplier, 32)
    q = torch.eye(32, dtype=torch.int8)
    y = linear(emulator(), f"linear_w4a8_{SMALL}", q, fragments, 30, unit_scales(32, 30, ""))
    assert torch.equal(y.t(), int8_image(pack_int4(codes), multiplier, 32).float())
    assert torch.equal(y.t(), codes.float() * multiplier)


@pytest.mark.parametrize("group", [0, None, 32], ids=["w8", "channel", "group32"])
@pytest.mark.parametrize("size", SIZES)
def test_no_bank_is_asked_twice(group, size):
    q, weight, image, stem = operands(group, (256, 128, 256))
    emulator().counts()
    linear(emulator(), f"{stem}_{size}", q, weight, len(image), unit_scales(len(q), len(image), stem))
    counts = emulator().counts()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]
    assert counts["sectors"] * 32 == counts["copied_bytes"]
    assert counts["products"] == 256 * 128 * 256 // (16 * 8 * 32)


def test_a_wrong_launch_is_refused():
    q, weight, image, stem = operands(0, (64, 64, 64))
    with pytest.raises(EmulatorError, match="global read outside all buffers"):
        linear(emulator(), f"{stem}_{SMALL}", q, weight[:32], len(image), unit_scales(64, 64, stem))
    with pytest.raises(EmulatorError, match="misaligned"):
        linear(
            emulator(), f"{stem}_{SMALL}", q, torch.cat([weight, weight]).flatten()[1:-63], 64, unit_scales(64, 64, "")
        )


def test_outputs_of_a_layer_equal_its_reference():
    """One path from floats to floats, as a layer has it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 96, generator=generator)
    q, x_scale = qparams.quantize_token(x)
    _, weight, image, stem = operands(32, (40, 48, 96))
    weight_scale = torch.rand(48, generator=generator) * 0.01
    y = linear(emulator(), f"{stem}_{SMALL}", q, weight, 48, (x_scale, weight_scale))
    expected = reference.linear_a8(q, x_scale, image, weight_scale, None)
    torch.testing.assert_close(y, expected, rtol=2**-22, atol=0)
