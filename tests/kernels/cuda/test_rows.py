"""Rows of CUDA kernels, from stored weights and floats to results: the launcher that ships, over the emulator."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dcomp.kernels import dispatch, ops, qparams, reference
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import driver, rows, self_test
from dcomp.kernels.cuda.calls import quantizers
from dcomp.kernels.cuda.self_test import UnusableError
from dcomp.kernels.packing import Stored, int8_image
from tests.support.emulated_gpu import emulated_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {"int8": None, "groups of 32": 32, "groups of 64": 64, "groups of 16": 16, "one group": 1024}
ONE = ([1, 1], [0, 0], [1, 1])


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    try:
        with emulated_gpu():
            yield
    except BuildError as error:
        pytest.skip(str(error))


def drawn(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).mul(2).to(dtype)


def weight_of(form: str, shape: tuple[int, ...]) -> tuple[Stored, Tensor]:
    """Return a stored weight and its image `[O, *taps, I]`."""
    group = FORMS[form]
    if group is None:
        stored = Stored(drawn(shape, -127, 127, torch.int8), None)
    else:
        groups = -(-shape[-1] // group)
        packed = drawn((*shape[:-1], groups * group // 2), 0, 255, torch.uint8)
        sizes = drawn((*shape[:-1], groups), 1, 15, torch.int8)
        stored = Stored(packed, torch.where(drawn(tuple(sizes.shape), 0, 1, torch.int8, 1) > 0, sizes, -sizes))
    return stored, int8_image(*stored, shape[-1])


def scales(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) / 100 + 0.001


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to an ulp or two: the product of scales may be taken in another order."""
    assert found.dtype == dtype
    assert found.stride() == expected.stride()
    step = torch.finfo(dtype).eps
    size = float(expected.abs().max()) + 1
    assert torch.allclose(found.double(), expected.double(), rtol=2 * step, atol=4e-7 * size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 21), (70, 66, 64), (3, 130, 200)])
def test_linear_layers_are_the_reference(form: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    count, outputs, channels = shape
    stored, image = weight_of(form, (outputs, channels))
    q = drawn((count, channels), -127, 127, torch.int8, 2)
    bias = None if count == 1 else floats(outputs)
    found = rows.linear_a8(q, scales(count), stored, scales(outputs, 1), bias, dtype)
    assert_close(found, reference.linear_a8(q, scales(count), image, scales(outputs, 1), bias), dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("image_shape", "taps", "shape"),
    [
        ((2, 21, 6, 7), (3, 3), ([1, 1], [1, 1], [1, 1])),
        ((1, 64, 9, 5), (1, 1), ONE),
        ((3, 32, 8, 8), (3, 2), ([2, 1], [2, 1], [1, 2])),
        ((1, 3, 17, 16), (7, 7), ([2, 2], [3, 3], [1, 1])),
    ],
)
@pytest.mark.parametrize("by_sample", [False, True])
def test_convolutions_are_the_reference(
    form: str, image_shape: tuple[int, ...], taps: tuple[int, int], shape: Any, by_sample: bool
) -> None:
    stored, image = weight_of(form, (10, *taps, image_shape[1]))
    ranges = image_shape[0] if by_sample else 1
    q, zero = drawn(image_shape, 0, 255, torch.uint8), drawn((ranges,), 0, 255, torch.uint8, 3)
    found = rows.conv2d_a8(q, scales(ranges), zero, stored, scales(10, 1), floats(10), *shape)
    expected = reference.conv2d_a8(q, scales(ranges), zero, image, scales(10, 1), floats(10), *shape, 1)
    assert_close(found, expected, torch.float32)


def test_a_range_of_all_samples_goes_with_zeros_of_each() -> None:
    stored, image = weight_of("int8", (4, 3, 3, 16))
    q, zero = drawn((2, 16, 5, 5), 0, 255, torch.uint8), torch.tensor([3, 200], dtype=torch.uint8)
    shape = ([1, 1], [1, 1], [1, 1])
    found = rows.conv2d_a8(q, scales(1), zero, stored, scales(4), None, *shape)
    expected = reference.conv2d_a8(q, scales(1).expand(2), zero, image, scales(4), None, *shape, 1)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 64, 7, 9), (2, 3, 1030)])
def test_codes_are_those_of_the_definitions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = floats(*shape, dtype=dtype)
    scale, zero = torch.tensor([0.013]), torch.tensor([119], dtype=torch.uint8)
    for inputs in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.transpose(0, -1)):
        assert torch.equal(rows.quantize_static(inputs, scale, zero), qparams.quantize_static(inputs, scale, zero))
        assert all(map(torch.equal, rows.quantize_sample(inputs), qparams.quantize_sample(inputs)))
    tokens = x.reshape(-1, shape[-1])
    assert all(map(torch.equal, rows.quantize_token(tokens), qparams.quantize_token(tokens)))
    for group in (32, 6):
        found = rows.quantize_group(tokens.unsqueeze(1), group)
        assert all(map(torch.equal, found, qparams.quantize_group(tokens.unsqueeze(1), group)))
        found = rows.quantize_group(tokens.unsqueeze(0), group)
        assert all(map(torch.equal, found, qparams.quantize_group(tokens.unsqueeze(0), group)))


@pytest.mark.parametrize("layout", ["channels first", "channels last", "rows"])
@pytest.mark.parametrize("channels", [5, 64])
def test_channels_are_smoothed_in_any_layout(layout: str, channels: int) -> None:
    x, smooth = floats(2, channels, 7, 9, dtype=torch.bfloat16), floats(channels).exp()
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "rows":
        x = x.movedim(1, -1).flatten(1, 2)
    given = torch.tensor([0.013]), torch.tensor([119], dtype=torch.uint8)
    assert torch.equal(rows.quantize_static(x, *given, smooth), qparams.quantize_static(x, *given, smooth))
    assert all(map(torch.equal, rows.quantize_sample(x, smooth), qparams.quantize_sample(x, smooth)))
    if layout == "rows":
        tokens = x.flatten(0, 1)
        assert all(map(torch.equal, rows.quantize_token(tokens, smooth), qparams.quantize_token(tokens, smooth)))
        for samples in (x, tokens.unsqueeze(1)):
            found = rows.quantize_group(samples, 32, smooth)
            assert all(map(torch.equal, found, qparams.quantize_group(samples, 32, smooth)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_inputs_meet_the_dequantized_weight(form: str, dtype: torch.dtype) -> None:
    stored, image = weight_of(form, (6, 45))
    x, bias = floats(3, 45, dtype=dtype), floats(6)
    found = rows.linear_a16(x, stored, scales(6), bias)
    assert torch.equal(found, reference.linear_a16(x, image, scales(6), bias))
    stored, image = weight_of(form, (6, 3, 3, 8))
    x, shape = floats(2, 16, 5, 5, dtype=dtype), ([1, 1], [1, 1], [1, 1], 2)
    found = rows.conv2d_a16(x, stored, scales(6), bias, *shape)
    assert torch.equal(found, reference.conv2d_a16(x, image, scales(6), bias, *shape))


def test_memory_may_begin_anywhere_and_lie_in_any_order() -> None:
    stored, image = weight_of("groups of 32", (20, 96))
    moved = Stored(*(torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape) for t in stored if t is not None))
    q = drawn((8, 97), -127, 127, torch.int8)[:, 1:]
    one, two = scales(9)[1:], scales(21)[1:]
    assert q.data_ptr() % 4
    expected = reference.linear_a8(q, one, image, two, two)
    assert_close(rows.linear_a8(q, one, moved, two, two), expected, torch.float32)
    x = floats(5, 98)[:, 1:-1]
    assert all(map(torch.equal, rows.quantize_token(x), qparams.quantize_token(x)))
    assert all(map(torch.equal, rows.quantize_sample(x[1:]), qparams.quantize_sample(x[1:])))


def test_a_bias_in_the_dtype_of_the_model_is_read_as_such() -> None:
    stored, image = weight_of("int8", (9, 32))
    q, bias = drawn((3, 32), -127, 127, torch.int8), floats(9, dtype=torch.bfloat16)
    found = rows.linear_a8(q, scales(3), stored, scales(9), bias)
    assert_close(found, reference.linear_a8(q, scales(3), image, scales(9), bias.float()), torch.float32)


def test_memory_of_two_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = weight_of("int8", (5, 16))
    assert self_test.defect("linear_w8a8_64x64", 0) is None
    names = launched(monkeypatch)
    with pytest.raises(RuntimeError, match="lie on cpu and meta"):
        rows.linear_a8(drawn((2, 16), 0, 9, torch.int8), scales(2), stored, scales(5).to("meta"), None)
    assert names == []


def test_nothing_is_launched_for_tensors_without_elements() -> None:
    stored, _ = weight_of("int8", (5, 16))
    assert rows.linear_a8(torch.empty(0, 16, dtype=torch.int8), scales(0), stored, scales(5), None).shape == (0, 5)
    codes, scale = rows.quantize_token(torch.empty(3, 0))
    assert codes.shape == (3, 0)
    assert torch.equal(scale, torch.ones(3))
    assert rows.quantize_static(torch.empty(0, 4), scales(1), torch.zeros(1, dtype=torch.uint8)).shape == (0, 4)


def test_doubles_are_quantized_by_the_definitions() -> None:
    x = floats(3, 40).double()
    assert all(map(torch.equal, rows.quantize_token(x), qparams.quantize_token(x)))
    assert rows.linear_a16(x, weight_of("int8", (6, 40))[0], scales(6), None).dtype == torch.float64


def test_more_tokens_than_a_grid_can_hold_are_launched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "_SAMPLES_OF_LAUNCH", 16)
    x = floats(37, 1, 40)
    assert all(map(torch.equal, rows.quantize_group(x, 32), qparams.quantize_group(x, 32)))


@pytest.mark.parametrize(("form", "packs"), [("int8", 1), ("groups of 32", 1), ("one group", 1), ("groups of 16", 0)])
def test_what_is_made_of_a_weight_is_made_once_and_dies_with_it(form: str, packs: int) -> None:
    gc.collect()
    before = len(rows._weights)
    stored = weight_of(form, (6, 3, 3, 32))[0]
    q, zero = drawn((1, 32, 5, 5), 0, 255, torch.uint8), torch.zeros(1, dtype=torch.uint8)
    first = rows.conv2d_a8(q, scales(1), zero, stored, scales(6), None, *ONE)
    kept = rows._weights.of(stored.qweight)
    assert torch.equal(rows.conv2d_a8(q, scales(1), zero, stored, scales(6), None, *ONE), first)
    assert rows._weights.of(stored.qweight) == kept
    assert len(kept) == packs
    del stored
    gc.collect()
    assert len(rows._weights) == before


def test_a_changed_multiplier_is_seen() -> None:
    stored, _ = weight_of("groups of 32", (6, 64))
    q = drawn((2, 64), -127, 127, torch.int8)
    first = rows.linear_a8(q, scales(2), stored, scales(6), None)
    assert stored.multiplier is not None
    stored.multiplier.neg_()
    assert torch.equal(rows.linear_a8(q, scales(2), stored, scales(6), None), -first)


def test_a_pointwise_convolution_by_pixel_keeps_its_weight_though_each_call_has_another_view() -> None:
    weight, _ = weight_of("groups of 32", (6, 1, 1, 64))
    q = drawn((2, 64), -127, 127, torch.int8)
    for _ in range(2):
        view = Stored(weight.qweight.flatten(1), None if weight.multiplier is None else weight.multiplier.flatten(1))
        rows.linear_a8(q, scales(2), view, scales(6), None)
    assert len(rows._weights.of(weight.qweight)) == 1


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the names of kernels come to as they are launched."""
    names: list[str] = []
    launch = driver.launch

    def noting(kernel: driver.Kernel, *arguments: Any) -> None:
        names.append(kernel.name)
        launch(kernel, *arguments)

    monkeypatch.setattr(driver, "launch", noting)
    return names


@pytest.mark.parametrize(("size", "tile"), [((3, 40), "64x64"), ((300, 200), "128x128")])
def test_the_tile_follows_the_size_of_the_output(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], tile: str
) -> None:
    stored, _ = weight_of("int8", (size[1], 32))
    names = ["quantize_token", *(f"linear_w8a8_{tile}" for tile in ("64x64", "128x128"))]
    assert [self_test.defect(name, 0) for name in names] == [None] * 3
    found = launched(monkeypatch)
    rows.linear_a8(drawn((size[0], 32), -127, 127, torch.int8), scales(size[0]), stored, scales(size[1]), None)
    assert found == [f"linear_w8a8_{tile}"]


def test_devices_with_fast_tensor_cores_take_the_largest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    device = driver.device(0)
    for capability, tiles in {(8, 0): 2, (8, 6): 1, (9, 0): 2, (12, 0): 1}.items():
        kind = driver.Device(0, device.name, capability, 4)
        monkeypatch.setattr(driver, "device", lambda _, kind=kind: kind)
        assert len(rows._large_tiles(1000, 1000, 0)) == tiles
        assert rows._large_tiles(100, 100, 0) == []


def test_the_small_tile_stands_in_for_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = self_test.kernels

    def without_large(name: str, index: int) -> Any:
        if "128x128" in name:
            raise UnusableError("it is not right")
        return kernels(name, index)

    monkeypatch.setattr(self_test, "kernels", without_large)
    found = launched(monkeypatch)
    stored, image = weight_of("int8", (200, 32))
    q = drawn((300, 32), -127, 127, torch.int8)
    y = rows.linear_a8(q, scales(300), stored, scales(200), None)
    assert_close(y, reference.linear_a8(q, scales(300), image, scales(200), None), torch.float32)
    assert found[-1] == "linear_w8a8_64x64"


def test_grouped_kernels_stand_in_for_those_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = self_test.kernels

    def without_channel(name: str, index: int) -> Any:
        if "channel" in name:
            raise UnusableError("it is not right")
        return kernels(name, index)

    monkeypatch.setattr(self_test, "kernels", without_channel)
    found = launched(monkeypatch)
    stored, image = weight_of("one group", (20, 100))
    q = drawn((3, 100), -127, 127, torch.int8)
    y = rows.linear_a8(q, scales(3), stored, scales(20), None)
    assert_close(y, reference.linear_a8(q, scales(3), image, scales(20), None), torch.float32)
    assert found[-1] == "linear_w4a8_64x64"


@pytest.fixture
def table() -> Iterator[None]:
    """Forget what the dispatch table chose without this GPU, and with it."""
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.mark.usefixtures("table")
def test_the_table_gives_all_operations_but_attention_to_cuda() -> None:
    for line in dispatch.explain(["cuda"]):
        assert line["row"] == ("torch" if line["operation"] == "attention" else "cuda")
        if line["format"] == "W8A4":
            assert line["reason"] == "the weight has 8 bits; quantize_group by cuda, linear_a8 by cuda"
        else:
            assert line["operation"] == "attention" or line["reason"].endswith("(sm_86)")
    choice = dispatch.choose("linear_a8", device="cuda", bits=4)
    stored, image = weight_of("groups of 32", (6, 64))
    q = drawn((2, 64), -127, 127, torch.int8)
    y = choice.run(q, scales(2), choice.image(*stored, 64), scales(6), None)
    assert_close(y, reference.linear_a8(q, scales(2), image, scales(6), None), torch.float32)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"groups": 2}, "grouped"),
        ({"reduction": rows.MAX_REDUCTION + 1}, "overflow"),
        ({"excess": rows.excess(2**31)}, "too large"),
        ({"excess": rows.excess(9, 5_000_000)}, "rows are too many"),
        ({"excess": rows.excess(9, 9, (50, 50))}, "50 x 50 taps"),
        ({"excess": rows.excess(9, 9, (3, 3), (1, 2**20))}, "taps is too large"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(request_: dict[str, Any], reason: str) -> None:
    choice = dispatch.choose("conv2d_a8", device="cuda", **request_)
    assert choice.row == "emulated"
    assert reason in choice.reason
    assert dispatch.choose("conv2d_a8", device="cuda").row == "cuda"


def test_common_sizes_are_within_bounds() -> None:
    assert rows.excess(2 * 1280 * 128 * 128, 2 * 128 * 128, (3, 3), (1, 1)) is None
    assert rows.excess(2**31 - 1, 4_000_000, (11, 11), (4, 4)) is None


def test_weights_have_fewer_than_2_to_the_32_bytes_with_their_padding() -> None:
    def excess(*shape: int) -> str | None:
        return ops._product_excess(9, torch.empty(shape, dtype=torch.int8, device="meta"), shape[-1], 9)

    assert excess(12288, 12288) is None
    assert "too large" in str(excess(2**16, 2**15))
    assert "too large" in str(excess(2**23, 3, 3, 1))


def test_the_largest_sums_stay_within_int32() -> None:
    channels = rows.MAX_REDUCTION // 16 * 16
    q, stored = (
        torch.full((1, channels, 1, 1), 255, dtype=torch.uint8),
        Stored(torch.full((2, 1, 1, channels), -128, dtype=torch.int8), None),
    )
    for zero in (0, 255):
        zeros = torch.tensor([zero], dtype=torch.uint8)
        y = rows.conv2d_a8(q, torch.ones(1), zeros, stored, torch.ones(2), None, *ONE)
        assert y.flatten().tolist() == [torch.tensor(float(255 - zero) * -128 * channels).item()] * 2


@pytest.mark.usefixtures("table")
def test_kernels_are_not_tested_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "is_capturing", lambda: True)
    monkeypatch.setattr(self_test, "_states", {})
    with pytest.raises(dispatch.KernelError, match="graph is being recorded"):
        dispatch.choose("quantize_token", device="cuda")
    monkeypatch.setattr(driver, "is_capturing", lambda: False)
    assert dispatch.choose("quantize_token", device="cuda").row == "cuda"
    monkeypatch.setattr(driver, "is_capturing", lambda: True)
    assert dispatch.choose("quantize_token", device="cuda", excess=None).row == "cuda"


def test_in_a_graph_only_tested_kernels_run_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_states", {})
    assert self_test.defect("linear_w4a8_64x64", 0) is None
    monkeypatch.setattr(driver, "is_capturing", lambda: True)
    found = launched(monkeypatch)
    stored, _ = weight_of("groups of 32", (200, 64))
    rows.linear_a8(drawn((300, 64), -127, 127, torch.int8), scales(300), stored, scales(200), None)
    assert found == ["linear_w4a8_64x64"]
    one, _ = weight_of("one group", (8, 64))
    rows.linear_a8(drawn((3, 64), -127, 127, torch.int8), scales(3), one, scales(8), None)
    assert found == ["linear_w4a8_64x64"] * 2
    assert rows._weights.of(stored.qweight) == {}


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Codes of norms differ from those of float64 by one, and at ties alone."""
    assert found.stride() == expected.stride()
    off = (found.int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert int(off.sum()) <= max(1, off.numel() // 500)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("shape", [(2, 32, 6, 5), (3, 12, 1, 7)])
def test_group_norms_are_the_reference(
    dtype: torch.dtype, options: tuple[bool, bool, bool], shape: tuple[int, int, int, int]
) -> None:
    silu, is_static, has_factors = options
    x = floats(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    factors = (floats(shape[1]), floats(1, shape[1])[0]) if has_factors else (None, None)
    static = (torch.tensor([0.05]), torch.tensor([40], dtype=torch.uint8)) if is_static else (None, None)
    norm = reference.GroupNorm(4, *factors, 1e-5, silu)
    found, expected = (each.group_norm_quantize(x, norm, *static) for each in (rows, reference))
    assert_near(found[0], expected[0])
    assert_near(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["", "weight bias", "gain shift", "weight bias gain shift", "bias shift"])
def test_layer_norms_are_the_reference(dtype: torch.dtype, parts: str) -> None:
    x, vectors = floats(2, 9, 45, dtype=dtype), {}
    for number, name in enumerate(("weight", "bias", "gain", "shift")):
        shape = (45,) if number < 2 else (2, 45)
        given = torch.rand(shape, generator=torch.Generator().manual_seed(number))
        vectors[name] = given if name in parts.split() else None
    norm = reference.LayerNorm(**vectors, eps=1e-5)
    found, expected = (each.layer_norm_quantize(x, norm) for each in (rows, reference))
    assert_near(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
