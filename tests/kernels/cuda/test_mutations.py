"""Bugs put into the kernels: the emulator and a few small cases find each of them, and nothing where there is none.

This tests the tests. A mutation replaces a text that occurs once in a source, so it fails when the source moves on.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams, reference
from dcomp.kernels.cuda import packing
from dcomp.kernels.cuda.compile import entries, part_of
from dcomp.kernels.cuda.nibbles import input_rows
from dcomp.kernels.emulator.build import KERNELS
from dcomp.kernels.packing import int8_image, pack_int4
from tests.support import nibbles, quantizers
from tests.support.attention import attend, key_value_tiles
from tests.support.emulated import SEEDS, Emulator, EmulatorError, of_all_workers
from tests.support.mutants import Mutant, mutants
from tests.support.mutations import MUTATIONS, Mutation
from tests.support.norms import group_norm, layer_norm
from tests.support.products import Int4Weight, conv, integers, linear

Check = Callable[[Emulator], bool]


def right(found: Tensor, expected: Tensor) -> bool:
    """Whether tensors are equal, NaN in the same places."""
    return torch.equal(found.float().nan_to_num(nan=-7.25), expected.float().nan_to_num(nan=-7.25))


def without_conflicts(emulator: Emulator) -> bool:
    """Whether no bank of shared memory was asked twice at once."""
    counts = emulator.counts()
    return counts["wavefronts"] == counts["ideal_wavefronts"]


def check_linear(group: int | None) -> Check:
    def check(emulator: Emulator) -> bool:
        generator = torch.Generator().manual_seed(0)
        stem = "linear_w8a8" if group == 0 else "linear_w4a8" if group else "linear_w4a8_channel"
        good = True
        for rows, outputs, channels in ((70, 72, 208), (64, 63, 400)):
            q = integers(generator, -128, 127, rows, channels)
            if group == 0:
                weight = image = integers(generator, -127, 127, outputs, channels)
            else:
                packed = Int4Weight(generator, (outputs, channels), group)
                weight, image = packed.fragments, packed.image
            x_scale, bias = 2.0 ** (torch.arange(rows) % 5), torch.arange(outputs).float()
            weight_scale = 2.0 ** (torch.arange(outputs) % 7)
            scales = x_scale, weight_scale / 16 if group is None else weight_scale
            y = linear(emulator, f"{stem}_64x64", q, weight, outputs, scales, bias)
            good &= right(y, reference.linear_a8(q, x_scale, image, weight_scale, bias))
        return good and without_conflicts(emulator)

    return check


def check_conv(group: int) -> Check:
    def check(emulator: Emulator) -> bool:
        generator = torch.Generator().manual_seed(0)
        good = True
        for size, taps, shape in (
            ((2, 7, 9, 32), (3, 3), {"padding": (1, 1), "dilation": (1, 2)}),
            ((3, 6, 5, 32), (2, 3), {"padding": (0, 2), "stride": (2, 1)}),
        ):
            q = integers(generator, 0, 255, *size, dtype=torch.uint8)
            zero = torch.arange(1, 1 + size[0], dtype=torch.uint8) * 50
            if group:
                packed = Int4Weight(generator, (40, *taps, 32), group)
                weight, image, stem = packed.fragments, packed.image, "conv_w4a8"
            else:
                weight = image = integers(generator, -127, 127, 40, *taps, 32)
                stem = "conv_w8a8"
            scales = 2.0 ** torch.arange(size[0]), torch.ones(40)
            sums = image.flatten(1).sum(1, dtype=torch.int32)
            y = conv(emulator, f"{stem}_64x64", q, zero, weight, sums, taps, scales, **shape)
            defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | shape
            geometry = [list(defaults[key]) for key in ("stride", "padding", "dilation")]
            expected = reference.conv2d_a8(q.permute(0, 3, 1, 2), scales[0], zero, image, scales[1], None, *geometry, 1)
            good &= right(y, expected.permute(0, 2, 3, 1))
        return good and without_conflicts(emulator)

    return check


def check_low_rank(emulator: Emulator) -> bool:
    generator, good = torch.Generator().manual_seed(0), True
    for rows, outputs, rank in ((70, 72, 24), (64, 63, 8)):
        q, weight = (integers(generator, -127, 127, count, 48) for count in (rows, outputs))
        hidden = integers(generator, -4999, 4999, rows, rank, dtype=torch.float32) / 1024
        up = integers(generator, -7, 7, outputs, rank, dtype=torch.float16)
        scales = torch.full((rows,), 2.0**-8), torch.full((outputs,), 0.25)
        bias = torch.arange(outputs).float()
        y = linear(emulator, "linear_w8a8_low_rank_64x64", q, weight, outputs, scales, bias, branch=(hidden, up))
        expected = reference.linear_a8(q, scales[0], weight, scales[1], bias)
        good &= right(y, reference.add_branch_(expected, hidden, up))
    return good


def check_nibbles(block: int) -> Check:
    def check(emulator: Emulator) -> bool:
        generator, good = torch.Generator().manual_seed(0), True
        for size in ((70, 72, 208), (64, 63, 1100)):
            drawn = nibbles.Operands(generator, size, (block, 64), block)
            good &= right(drawn.run(emulator, f"linear_w4a4_group{block}_64x64"), drawn.sums())
        return good and without_conflicts(emulator)

    return check


def check_quantize_nibbles(emulator: Emulator) -> bool:
    good = True
    for x, group, block in (
        (floats(9, 1203), 32, 32),
        (floats(5, 77, dtype=torch.float16), 96, 32),
        (floats(9, 2200).abs(), 128, 64),
    ):
        *integers, scale = qparams.quantize_nibbles(x, group)
        expected = input_rows(*integers, group, block), scale
        good &= nibbles.same_rows(nibbles.quantize(emulator, x, group, block), expected)
    return good


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = 10.0 ** torch.randint(-2, 3, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def all_right(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(right(a, b) for a, b in zip(found, expected, strict=True))


def check_static(emulator: Emulator) -> bool:
    given = torch.tensor([0.5]), torch.tensor([101], dtype=torch.uint8)
    inputs = [torch.arange(-150, 651).float() / 4, floats(8, 70, dtype=torch.bfloat16), floats(1500, 4)]
    return all(
        right(quantizers.quantize_static(emulator, x, *given), qparams.quantize_static(x, *given)) for x in inputs
    )


def check_sample(emulator: Emulator) -> bool:
    lopsided = floats(4, 5000) + 3
    broken = floats(3, 90)
    broken[1, 7] = torch.nan
    largest = torch.tensor([[3e38, -3e38, 1e38, 0.0], [-1.0, -2.0, -3.0, -250.3]])
    long = floats(1, 40 * 1024)
    long[0, -1] = 1e4
    inputs = [(lopsided, 3), (broken, 3), (largest, 3), (long, 40), (floats(5, 77, dtype=torch.float16), 3)]
    return all(
        all_right(quantizers.quantize_sample(emulator, x, parts), qparams.quantize_sample(x)) for x, parts in inputs
    )


def check_token(emulator: Emulator) -> bool:
    broken = floats(9, 130)
    broken[3, 100] = torch.nan
    good = True
    for x in (broken, floats(5, 77, dtype=torch.float16), floats(20, 320), torch.full((3, 40), 1e-39)):
        depth = -(-x.shape[1] // 16) * 16
        codes, scale = quantizers.quantize_token(emulator, x, depth)
        expected, expected_scale = qparams.quantize_token(x)
        expected = functional.pad(expected, (0, depth - x.shape[1]))
        good &= all_right((codes, scale), (expected, expected_scale))
    return good


def check_group(emulator: Emulator) -> bool:
    good = True
    for x, group in (
        (floats(3, 20, 96), 32),
        (floats(4, 3, 45, dtype=torch.bfloat16), 6),
        (floats(2, 9, 320).abs(), 64),
    ):
        depth = -(-x.shape[2] // 16) * 16
        codes, scale = quantizers.quantize_group(emulator, x, group, depth)
        expected, expected_scale = qparams.quantize_group(x, group)
        good &= all_right((codes, scale), (functional.pad(expected, (0, depth - x.shape[2])), expected_scale))
    return good


def check_group_token(emulator: Emulator) -> bool:
    good = True
    for x, group in ((floats(17, 1, 320), 64), (floats(9, 1, 45, dtype=torch.bfloat16), 6), (floats(1, 1, 96), 32)):
        codes, scale = quantizers.quantize_group(emulator, x, group, parts=1)
        good &= all_right((codes, scale), qparams.quantize_group(x, group))
    return good


def check_smooth(emulator: Emulator) -> bool:
    given = torch.tensor([0.5]), torch.tensor([101], dtype=torch.uint8)
    good = True
    for x in (floats(70, 1, 45), floats(30, 1, 96, dtype=torch.bfloat16), floats(400, 1, 1), floats(3, 1, 1300)):
        smooth = floats(x.shape[-1]).abs() + 0.1
        flat, rows = x.flatten().view(1, *x.shape[::2]), x[:, 0]
        found = quantizers.quantize_static(emulator, x, *given, smooth=smooth)
        good &= right(found, qparams.quantize_static(x, *given, smooth))
        good &= all_right(quantizers.quantize_sample(emulator, flat, 2, smooth), qparams.quantize_sample(flat, smooth))
        good &= all_right(
            quantizers.quantize_token(emulator, rows, smooth=smooth), qparams.quantize_token(rows, smooth)
        )
        found = quantizers.quantize_group(emulator, x, 6, parts=1, smooth=smooth)
        good &= all_right(found, qparams.quantize_group(x, 6, smooth))
    return good


def check_quantize_low_rank(emulator: Emulator) -> bool:
    generator = torch.Generator().manual_seed(0)
    good = True
    emulator.counts()
    for rows, channels, rank, dtype in ((37, 203, 40, torch.float32), (20, 96, 5, torch.bfloat16)):
        x = integers(generator, -127, 127, rows, channels).to(dtype)
        x = x * 517 if dtype == torch.float32 else x
        down, smooth = integers(generator, -3, 3, rank, channels).half(), floats(channels).abs() + 0.1
        found = quantizers.quantize_low_rank(emulator, x, down, None, smooth)
        good &= all_right(found, reference.quantize_low_rank(x, down, None, smooth))
        found = quantizers.quantize_low_rank(emulator, x, down, 32)
        good &= all_right(found, reference.quantize_low_rank(x, down, 32))
    return good and without_conflicts(emulator)


def check_unpack(emulator: Emulator) -> bool:
    generator = torch.Generator().manual_seed(0)
    codes = integers(generator, -8, 7, 5, 3, 12)
    multiplier, scale = integers(generator, -15, 15, 5, 3, 2), torch.rand(5, generator=generator)
    image = int8_image(pack_int4(codes), multiplier, 11)
    expected = qparams.dequantize_weight(image, scale)
    packed = quantizers.unpack(emulator, pack_int4(codes), multiplier, scale, 11, torch.float32)
    return right(packed, expected) and right(
        quantizers.unpack(emulator, image, None, scale, 11, torch.float32), expected
    )


def near(codes: Tensor, steps: Tensor) -> bool:
    return bool((codes.double() - steps).abs().max() < 0.501)


def check_group_norm(emulator: Emulator) -> bool:
    x = floats(2, 137, 42) + 2
    x[:, :60] += 5 * x[:, :20].abs().amax((1, 2), keepdim=True)
    weight, bias = floats(42), floats(42).flip(0)
    y = functional.group_norm(x.double().mT, 6, weight.double(), bias.double(), 1e-5).mT
    y = functional.silu(y)
    static = torch.tensor([1.0]), torch.tensor([100], dtype=torch.uint8)
    codes, _, _ = group_norm(emulator, x, 6, (weight, bias), silu=True, static=static, parts=3)
    good = near(codes, (y + 100).clamp(0, 255))
    codes, scale, zero = group_norm(emulator, x, 6, (weight, bias), silu=True, parts=3)
    expected, _ = qparams.sample_range(y.float().amin((1, 2)), y.float().amax((1, 2)))
    good &= bool(((scale - expected).abs() < 1e-5 * expected).all())
    return good and near(codes, y / qparams.along_first(scale, 3).double() + qparams.along_first(zero, 3))


def check_layer_norm(emulator: Emulator) -> bool:
    x, affine, modulation = (
        floats(18, 45) * 0.01 + 1,
        (floats(45), floats(45).flip(0)),
        (floats(2, 45), floats(2, 45).flip(1)),
    )
    y = functional.layer_norm(x.double(), (45,), *(t.double() for t in affine), 1e-6)
    gain, shift = (t.double().repeat_interleave(9, 0) for t in modulation)
    y = y * (1 + gain) + shift
    codes, _ = layer_norm(emulator, x, affine, modulation, 48)
    steps = y / qparams.token_scale(y.float()).double().unsqueeze(1)
    plain, _ = layer_norm(emulator, x, depth=48)
    return near(codes[:, :45], steps) and not codes[:, 45:].any() and not plain[:, 45:].any()


def check_attention(emulator: Emulator) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (integers(generator, -99, 99, 1, 2, tokens, 38) for tokens in (133, 150))
    v = floats(*k.shape)
    q_scale, k_scale = (1 + torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 4 for x in (q, k))
    k_scale[..., 3] = 200  # far above, or below, all that come after it
    asked, keyed = q.double() * q_scale.unsqueeze(-1), k.double() * k_scale.unsqueeze(-1)
    y = attend(emulator, q, q_scale.float(), k, k_scale.float(), v, 2e-5)
    expected = reference.attention(asked, keyed, v.double(), 2e-5)
    bound = v.double().abs().amax(-2, keepdim=True) * 2.0**-9
    return bool(((y - expected).abs() <= bound).all()) and without_conflicts(emulator)


def check_tiles(emulator: Emulator) -> bool:
    good = True
    for dtype, shape, width, parts in (
        (torch.float32, (1, 2, 77, 40), 48, 3),
        (torch.bfloat16, (2, 1, 9, 160), 160, 1),
    ):
        k, v = floats(*shape, dtype=dtype) + 2, floats(*shape, dtype=dtype)
        tiles, v_scale, mean = key_value_tiles(emulator, k, v, width, parts)
        near = torch.isclose(mean, k.float().mean(2, keepdim=True), rtol=1e-4, atol=1e-4)
        expected = packing.pack_tiles(*packing.quantize_keys(k, mean), v, packing.value_scale(v), width)
        good &= bool(near.all()) and torch.equal(tiles, expected[0]) and torch.equal(v_scale, expected[1])
    return good


CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "linear w8": (check_linear(0), ("linear_w8a8_64x64",)),
    "linear group": (check_linear(32), ("linear_w4a8_64x64",)),
    "linear channel": (check_linear(None), ("linear_w4a8_channel_64x64",)),
    "nibbles 64": (check_nibbles(64), ("linear_w4a4_group64_64x64",)),
    "nibbles 32": (check_nibbles(32), ("linear_w4a4_group32_64x64",)),
    "quantize nibbles": (check_quantize_nibbles, ("quantize_nibbles",)),
    "low rank": (check_low_rank, ("linear_w8a8_low_rank_64x64",)),
    "conv w8": (check_conv(0), ("conv_w8a8_64x64",)),
    "conv group": (check_conv(32), ("conv_w4a8_64x64",)),
    "static": (check_static, ("quantize_static",)),
    "sample": (check_sample, part_of("quantize_sample")),
    "token": (check_token, ("quantize_token",)),
    "group": (check_group, part_of("quantize_group")),
    "group token": (check_group_token, ("quantize_group_token",)),
    "smooth": (
        check_smooth,
        ("quantize_static", *part_of("quantize_sample"), "quantize_token", "quantize_group_token"),
    ),
    "quantize low rank": (check_quantize_low_rank, ("low_rank_token", "low_rank_group")),
    "unpack": (check_unpack, ("unpack_int8", "unpack_int4")),
    "group norm": (check_group_norm, part_of("group_norm_sample")),
    "layer norm": (check_layer_norm, ("layer_norm_token",)),
    "attention": (check_attention, ("attention_48",)),
    "tiles": (check_tiles, part_of("key_value_tiles")),
}
BATCH = 26  # bugs in a library: with more, a second worker waits longer for the first to compile


def findings(emulator: Emulator, check: Check) -> Iterator[str]:
    """Yield what is wrong, for some orders of warps."""
    emulator.counts()
    for seed in SEEDS:
        emulator.seed(seed)
        try:
            if not check(emulator):
                yield "wrong result, or bank conflicts"
        except EmulatorError as error:
            yield str(error)


def kernels_of(*checks: str) -> dict[str, str]:
    """Return the kernels that checks run, with their types."""
    return {name: entries()[name] for check in checks for name in CHECKS[check][1]}


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Mutant]]:
    """The function that returns a batch of bugs."""

    @functools.cache
    def made(number: int) -> list[Mutant]:
        bugs = MUTATIONS[number * BATCH : (number + 1) * BATCH]
        copies = [(bug, kernels_of(bug.check)) for bug in bugs]
        return mutants(copies, tmp_path_factory.mktemp("batch"), of_all_workers(tmp_path_factory))

    return made


@pytest.fixture(scope="module")
def flawless(tmp_path_factory: pytest.TempPathFactory) -> Mutant:
    """A copy without a bug."""
    [copy] = mutants(
        [(None, kernels_of(*CHECKS))], tmp_path_factory.mktemp("flawless"), of_all_workers(tmp_path_factory)
    )
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_nothing_is_found_where_nothing_is_wrong(name: str, flawless: Mutant):
    assert not list(findings(flawless, CHECKS[name][0]))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug)
def test_mutations_are_of_this_source(mutation: Mutation):
    assert (KERNELS / "cuda" / mutation.file).read_text().count(mutation.old) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=lambda number: MUTATIONS[number].bug)
def test_every_bug_is_found(number: int, batch: Callable[[int], list[Mutant]]):
    copy = batch(number // BATCH)[number % BATCH]
    assert len(list(findings(copy, CHECKS[MUTATIONS[number].check][0]))) == len(SEEDS)
