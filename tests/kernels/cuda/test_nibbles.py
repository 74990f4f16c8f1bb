"""Products of 4-bit inputs and weights by the kernels, in the emulator: those of the int8 image to the last bit."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.kernels import dispatch, ops, qparams, reference
from dcomp.kernels.cuda import driver, nibbles, rows
from dcomp.kernels.cuda.tiles import ENTRIES
from dcomp.kernels.packing import Stored, int8_image, pack_int4
from tests.support.emulated import SEEDS, emulator
from tests.support.emulated_gpu import emulated_gpu, layers_on_the_emulated_gpu
from tests.support.nibbles import Operands, linear, quantize, same_rows

KERNELS = [name for name in ENTRIES if name.startswith("linear_w4a4")]
SMALL = {block: f"linear_w4a4_group{block}_64x64" for block in nibbles.BLOCKS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, O, I): whole tiles, one row, ragged everything, less than a block, two stages of corrections
SHAPES = [(64, 64, 256), (1, 72, 320), (77, 131, 200), (66, 18, 21), (3, 5, 1100)]


@pytest.fixture(autouse=True)
def needs_emulator() -> None:
    emulator().counts()
    emulator().seed(0)


def operands(size: tuple[int, int, int], groups: tuple[int, int], block: int, seed: int = 0) -> Operands:
    return Operands(torch.Generator().manual_seed(seed), size, groups, block)


def block_of(name: str) -> int:
    return 64 if "group64" in name else 32


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("seed", SEEDS)
def test_sums_are_exact_in_every_tile(name, seed):
    emulator().seed(seed)
    for size in SHAPES:
        drawn = operands(size, (block_of(name), 64), block_of(name), seed)
        assert torch.equal(drawn.run(emulator(), name), drawn.sums()), size


# groups of inputs and of weights, and their block
GROUPS = [(64, 64, 64), (128, 64, 64), (64, 192, 64), (32, 64, 32), (96, 32, 32), (640, 64, 64), (32, 640, 32)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 600), st.sampled_from(GROUPS))
def test_any_shape_and_groups_are_exact(count, outputs, channels, groups):
    drawn = operands((count, outputs, channels), groups[:2], groups[2])
    assert torch.equal(drawn.run(emulator(), SMALL[groups[2]]), drawn.sums())


EXTREMES = [*itertools.product([0, 15], [0, 15], [8], [-8, 7], [-15, 15]), (7, 0, 8, -8, -1), (0, 8, 15, 7, 1)]


@pytest.mark.parametrize("block", nibbles.BLOCKS)
@pytest.mark.parametrize(("code", "zero", "size", "weight", "multiplier"), EXTREMES)
def test_extremes_are_exact(block, code, zero, size, weight, multiplier):
    channels = 8 * block
    of_groups = (torch.full((1, 8), value, dtype=torch.uint8) for value in (zero, size))
    inputs = nibbles.input_rows(torch.full((1, channels), code, dtype=torch.uint8), *of_groups, block, block)
    packed = pack_int4(torch.full((1, channels), weight, dtype=torch.int8))
    stored = Stored(packed, torch.full((1, 8), multiplier, dtype=torch.int8))
    of_weight, _ = nibbles.weight_rows(stored, channels, block)
    y = linear(emulator(), SMALL[block], inputs, of_weight, (torch.ones(1), torch.ones(1)))
    assert y.item() == (code - zero) * size * weight * multiplier * channels


@pytest.mark.parametrize("name", KERNELS)
def test_no_bank_is_asked_twice(name):
    block, entry = block_of(name), ENTRIES[name]
    drawn = operands((entry.rows, entry.columns, 1024), (block, block), block)
    emulator().counts()
    drawn.run(emulator(), name)
    counts = emulator().counts()
    assert counts["wavefronts"] == counts["ideal_wavefronts"]
    assert counts["sectors"] * 32 == counts["copied_bytes"]
    steps = 1024 // block + 2 * nibbles.corrections(1024, block)
    assert counts["products"] == entry.rows * entry.columns // (16 * 8) * steps


def values(count: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    size = 10.0 ** torch.randint(-3, 3, (count, 1), generator=generator)
    x = torch.randn(count, channels, generator=generator) * size
    x[0] = 0
    return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.05, 0.0).to(dtype)


def defined_rows(x: Tensor, group: int, block: int) -> tuple[nibbles.NibbleRows, Tensor]:
    *integers, scale = qparams.quantize_nibbles(x, group)
    return nibbles.input_rows(*integers, group, block), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "block"), [(32, 32), (64, 64), (64, 32), (96, 32), (192, 64), (2048, 64), (2048, 32)]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_rows_are_those_of_the_definition(dtype, group, block, seed):
    emulator().seed(seed)
    for count, channels in ((9, 320), (1, 1), (3, 77), (5, 1203)):
        x = values(count, channels, dtype)
        assert same_rows(quantize(emulator(), x, group, block), defined_rows(x, group, block)), (count, channels)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_floats_are_quantized_equally(data):
    sizes = st.floats(allow_nan=False, allow_infinity=False, width=32)
    channels = data.draw(st.integers(1, 80))
    x = torch.tensor(data.draw(st.lists(st.lists(sizes, min_size=channels, max_size=channels), min_size=1, max_size=3)))
    assert same_rows(quantize(emulator(), x, 32, 32), defined_rows(x, 32, 32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_values_spoil_their_row_alone(bad):
    x = values(3, 200)
    x[1, 70] = bad
    found = quantize(emulator(), x, 64, 64)
    assert same_rows(found, defined_rows(x, 64, 64))
    assert found[1].isfinite().tolist() == [True, False, True]


def test_the_definition_makes_the_image():
    x = values(7, 200)
    codes, zeros, multipliers, scale = qparams.quantize_nibbles(x, 64)
    image, expected_scale = qparams.quantize_group(x.unsqueeze(1), 64)
    zeros, multipliers = (part.int().repeat_interleave(64, 1)[:, :200] for part in (zeros, multipliers))
    assert torch.equal((codes.int() - zeros) * multipliers, image.squeeze(1).int())
    assert torch.equal(scale, expected_scale)
    assert int(codes.max()) == 15


def test_codes_of_a_row_lie_behind_its_corrections():
    codes = torch.arange(40, dtype=torch.uint8).remainder(16).view(1, 40)
    zeros, sizes = torch.tensor([[3, 9]], dtype=torch.uint8), torch.tensor([[10, 2]], dtype=torch.uint8)
    found = nibbles.input_rows(codes, zeros, sizes, 32, 32)
    assert found.data.shape == (1, nibbles.row_bytes(40, 32)) == (1, 64 + 32)
    pairs = [low | (low + 1) << 4 for low in range(0, 16, 2)]
    assert found.data[0, 64:].tolist() == [*pairs, *pairs, *pairs[:4], *[0] * 12]
    sums = 10 * 240, 2 * 28
    assert found.data[0, :6].tolist() == [30, sums[0] >> 7, 18, sums[1] >> 7, 0, 0]
    assert found.data[0, 32:38].tolist() == [30, sums[0] & 127, 18, sums[1] & 127, 0, 0]
    assert found.multipliers[0].tolist() == [[10, 2, 0, 0], *[[0] * 4] * 3]


SUITS = [
    ((32, 64), 320, 32),
    ((64, 64), 320, 64),
    ((16, 64), 320, 0),
    ((64, 16), 320, 0),
    ((96, 64), 320, 32),
    ((320, 64), 320, 64),
    ((65536, 128), 40, 64),
    ((32, 1024), 320, 32),
    ((48, 64), 40, 64),
]


@pytest.mark.parametrize(("sizes", "channels", "block"), SUITS)
def test_blocks_suit_both_groups(sizes, channels, block):
    groups = -(-channels // sizes[1])
    stored = Stored(torch.empty(3, groups * sizes[1] // 2, dtype=torch.uint8), torch.ones(3, groups, dtype=torch.int8))
    assert nibbles.block_of(sizes[0], stored, channels) == block
    assert nibbles.block_of(sizes[0], Stored(torch.empty(3, channels, dtype=torch.int8), None), channels) == 0


def weight_of(outputs: int, channels: int, group: int) -> tuple[Stored, Tensor]:
    """Return a stored weight and its scale."""
    scale = torch.rand(outputs, generator=torch.Generator().manual_seed(0)) / 100 + 0.001
    return operands((1, outputs, channels), (64, group), 32).stored, scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("input_group", "group"), [(32, 64), (64, 64), (1000, 64), (32, 2048)])
@pytest.mark.parametrize("size", [(1, 9, 21), (70, 66, 320), (150, 140, 200)])
def test_results_are_those_of_int8_products_to_the_last_bit(dtype, input_group, group, size):
    count, outputs, channels = size
    stored, scale = weight_of(outputs, channels, group)
    x, bias = values(count, channels, dtype), None if count == 1 else scale.log()
    smooth = None if count == 1 else torch.linspace(-2, 2, channels).exp()
    with emulated_gpu():
        image, x_scale = rows.quantize_group(x.unsqueeze(1), input_group, smooth)
        expected = rows.linear_a8(image.squeeze(1), x_scale, stored, scale, bias, dtype)
        found = rows.linear_a4(x, input_group, stored, scale, bias, smooth, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    definition = reference.linear_a4(x, input_group, int8_image(*stored, channels), scale, bias, smooth).to(dtype)
    torch.testing.assert_close(found, definition, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def run(monkeypatch: Any, x: Tensor, group: int, stored: Stored, scale: Tensor) -> tuple[list[str], str]:
    """Return the kernels that `linear_a4` launches when all are tested, and the table's reason."""
    names: list[str] = []
    reasons: list[str] = []
    weight = (stored.qweight, scale, stored.multiplier, None, x.shape[1])
    with layers_on_the_emulated_gpu(), monkeypatch.context() as noting:
        ops.linear_a4(x, group, *weight)
        launch, choose = driver.launch, dispatch.choose

        def noting_launch(kernel: driver.Kernel, *rest: Any) -> None:
            names.append(kernel.name)
            launch(kernel, *rest)

        def noting_choice(*asked: Any, **more: Any) -> dispatch.Choice:
            choice = choose(*asked, **more)
            reasons.append(choice.reason)
            return choice

        noting.setattr(driver, "launch", noting_launch)
        noting.setattr(dispatch, "choose", noting_choice)
        y = ops.linear_a4(x, group, *weight)
    expected = reference.linear_a4(x, group, int8_image(*stored, x.shape[1]), scale, None)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    return names, reasons[0]


OF_INT8 = ["quantize_group_token", "linear_w4a8_64x64"]
OF_4_BITS = {block: ["quantize_nibbles", f"linear_w4a4_group{block}_64x64"] for block in nibbles.BLOCKS}


@pytest.mark.parametrize(
    ("input_group", "capability", "names", "reason"),
    [
        (32, (8, 6), OF_4_BITS[32], "4-bit codes in one pass"),
        (64, (8, 9), OF_4_BITS[64], "4-bit codes in one pass"),
        (64, (8, 0), OF_4_BITS[64], "4-bit codes in one pass"),
        (32, (8, 0), OF_INT8, "multiples of 64 channels alone; quantize_group by cuda, linear_a8 by cuda"),
        (16, (8, 6), OF_INT8, "multiples of 32 channels alone; quantize_group by cuda, linear_a8 by cuda"),
        (32, (9, 0), OF_INT8, "no fast products of 4 bits; quantize_group by cuda, linear_a8 by cuda"),
        (32, (12, 0), OF_INT8, "no fast products of 4 bits; quantize_group by cuda, linear_a8 by cuda"),
    ],
)
def test_devices_and_groups_without_gain_make_int8_products(monkeypatch, input_group, capability, names, reason):
    monkeypatch.setattr(driver, "device", lambda _: driver.Device(0, "emulator", capability, 4))
    found, why = run(monkeypatch, values(5, 200), input_group, *weight_of(20, 200, 64))
    assert found == names
    assert reason in why


def test_doubles_and_8_bit_weights_make_int8_products(monkeypatch):
    stored, scale = weight_of(20, 200, 64)
    assert run(monkeypatch, values(5, 200).double(), 32, stored, scale)[0] == ["linear_w4a8_64x64"]
    names, reason = run(monkeypatch, values(5, 200), 32, Stored(int8_image(*stored, 200), None), scale)
    assert names == [OF_INT8[0], "linear_w8a8_64x64"]
    assert "the weight has 8 bits" in reason


def test_nothing_is_launched_for_tensors_without_elements(monkeypatch):
    assert run(monkeypatch, torch.empty(0, 64), 32, *weight_of(20, 64, 64))[0] == []


def test_sums_that_could_overflow_are_emulated():
    with layers_on_the_emulated_gpu():
        choice = dispatch.choose("linear_a4", device="cuda", bits=4, reduction=rows.MAX_REDUCTION + 1)
    assert choice.row == "emulated"
    assert "could overflow" in choice.reason
