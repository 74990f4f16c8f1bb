from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.observer import HistogramObserver
from dcomp.calibrate.range_search import RangeError
from dcomp.compress.layers import fake_quant_dynamic
from dcomp.compress.quantize_layer import QuantizationError, quantize_layer
from dcomp.compress.quantized import Quantized
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import float_parts, part_slices, parts_of
from tests.support.schemes import relative_error

CHANNELS = 48
W8A8 = QScheme(8, input_bits=8, input_granularity="token")
W4A8 = QScheme(4, 16, input_bits=8, input_granularity="token")
W4A4 = QScheme(4, 16, input_bits=4, input_granularity="token", input_group=16)
STATIC = QScheme(8, input_bits=8, input_granularity="tensor")


def layer_of(kind: str, outputs: int = 24) -> nn.Linear | nn.Conv2d:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Linear(CHANNELS, outputs)
    return nn.Conv2d(CHANNELS, outputs, 1) if kind == "pointwise" else nn.Conv2d(CHANNELS, outputs, 3, padding=1)


def inputs_of(kind: str, rows: int = 12, outliers: float = 1.0) -> Tensor:
    """Normal inputs; every eighth channel is larger by `outliers`."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 6, 6, CHANNELS, generator=generator)
    x[..., ::8] *= outliers
    return x.flatten(1, 2) if kind == "linear" else x.movedim(-1, 1).contiguous()


def scheme_for(kind: str, scheme: QScheme, **changes: Any) -> QScheme:
    granularity = "sample" if kind == "conv" and scheme.input_bits < 16 else scheme.input_granularity
    return replace(scheme, **({"input_granularity": granularity} | changes))


def fake(layer: Quantized, x: Tensor) -> Tensor:
    layer.execution = "fake"
    return layer(x)


def output_error(layer: nn.Module, x: Tensor, scheme: QScheme) -> float:
    with torch.no_grad():
        return relative_error(fake(quantize_layer(layer, x, scheme), x), layer(x))


KINDS = ["linear", "pointwise", "conv"]
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smooth": {"smooth": True},
    "rotate": {"rotate": True},
    "rank": {"rank": 4},
    "directions": {"directions": 3},
    "split": {"boundaries": (16,)},
    "all": {"smooth": True, "rotate": True, "rank": 4, "directions": 3, "boundaries": (16,)},
}


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("bits", ["W8A8", "W4A8", "W4A4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_quantized_layer_is_near_the_float_one_and_runs_in_integers(
    kind: str, bits: str, transforms: str, rounding: str
) -> None:
    base = {"W8A8": W8A8, "W4A8": W4A8, "W4A4": W4A4}[bits]
    scheme = scheme_for(kind, base, rounding=rounding, **TRANSFORMS[transforms])
    layer, x = layer_of(kind), inputs_of(kind, outliers=4.0)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    result = quantize_layer(layer, x, scheme)
    assert replace(result.scheme, smooth=False, rotate=False) == replace(scheme, smooth=False, rotate=False)
    assert result.scheme.smooth <= scheme.smooth
    assert result.scheme.rotate <= scheme.rotate
    assert len(parts_of(result)) == 1 + len(scheme.boundaries)
    # As a file gives them back: other strides would round otherwise.
    assert all(tensor.is_contiguous() for tensor in result.state_dict().values())
    with torch.no_grad():
        y = fake(result, x)
        # Half a step in parts of the largest value is 1/254 with 8 bits and about 1/15 with 4.
        assert relative_error(y, layer(x)) < {"W8A8": 0.02, "W4A8": 0.12, "W4A4": 0.2}[bits]
        assert (result.int_forward(x) - y).abs().max() <= 1e-5 * y.abs().max()
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("boundaries", [(), (16,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_rotated_where_that_lowers_its_error(kind: str, boundaries: tuple[int, ...]) -> None:
    scheme = scheme_for(kind, W4A4, boundaries=boundaries, rotate=True, input_group=16)
    layer = layer_of(kind)
    # One large channel a group takes all levels; rotated, it becomes a value of middling size in every channel.
    spiky = inputs_of(kind)
    axis = -1 if kind == "linear" else 1
    spiky.select(axis, 3).mul_(16), spiky.select(axis, 20).mul_(16)
    result = quantize_layer(layer, spiky, scheme)
    assert result.scheme.rotate
    assert all(part.scheme.rotate for part in parts_of(result))
    assert output_error(layer, spiky, scheme) < 0.95 * output_error(layer, spiky, replace(scheme, rotate=False))
    # Inputs with two values, one of them 0, lose little as they are, and more when they are mixed.
    even = (inputs_of(kind) > 0).float()
    result = quantize_layer(layer, even, scheme)
    assert not result.scheme.rotate
    plain = quantize_layer(layer, even, replace(scheme, rotate=False)).state_dict()
    assert all(tensor.equal(plain[name]) for name, tensor in result.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_layer_is_its_parts_quantized_by_themselves(kind: str) -> None:
    scheme = scheme_for(kind, W4A4, boundaries=(16, 32), rotate=True, rank=2, rounding="gptq")
    layer, x = layer_of(kind), inputs_of(kind, outliers=4.0)
    result = quantize_layer(layer, x, scheme)
    axis = -1 if kind == "linear" else 1
    pieces = [x.narrow(axis, own.start, own.stop - own.start) for own in part_slices(CHANNELS, scheme.boundaries)]
    floats = float_parts(layer, scheme.boundaries)
    for part, own, piece in zip(parts_of(result), floats, pieces, strict=True):
        alone = quantize_layer(own, piece, replace(scheme, boundaries=())).state_dict()
        assert alone.keys() == part.state_dict().keys()
        assert all(tensor.equal(alone[name]) for name, tensor in part.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_factors_that_are_of_no_use_are_left_out(kind: str) -> None:
    layer, x = layer_of(kind), inputs_of(kind).sign()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign() * 0.25)  # all channels have one magnitude: every factor is 1
    for boundaries in ((), (16,)):
        smoothed = quantize_layer(layer, x, scheme_for(kind, W4A4, smooth=True, boundaries=boundaries))
        plain = quantize_layer(layer, x, scheme_for(kind, W4A4, boundaries=boundaries))
        assert smoothed.scheme == plain.scheme
        assert smoothed.state_dict().keys() == plain.state_dict().keys()
        assert all(tensor.equal(plain.state_dict()[name]) for name, tensor in smoothed.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"smooth": True}, {"rotate": True}, {"rank": 8}, {"boundaries": (24,)}], ids=str)
def test_each_transform_lowers_the_error_it_is_made_for(kind: str, change: dict[str, Any]) -> None:
    layer, x = layer_of(kind), inputs_of(kind, outliers=30.0)
    scheme = scheme_for(kind, W4A4)
    if "boundaries" in change:  # two tensors of other sizes, with one range for both
        scheme = scheme_for(kind, W8A8)
        axis = -1 if kind == "linear" else 1
        x = torch.cat([inputs_of(kind).narrow(axis, 0, 24), 50 * inputs_of(kind).narrow(axis, 24, 24)], axis)
        with torch.no_grad():
            layer.weight[:, 24:] /= 50
    if "rank" in change:  # a branch takes what a few directions of the weight have more of
        with torch.no_grad():
            up, down = torch.randn(len(layer.weight), 3), torch.randn(3, layer.weight[0].numel())
            layer.weight.add_((0.3 * up @ down).view_as(layer.weight))
        scheme = scheme_for(kind, replace(W4A8, group_size=CHANNELS))
    assert output_error(layer, x, replace(scheme, **change)) < 0.9 * output_error(layer, x, scheme)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_moved_errors_of_codes_cost_the_output_less(kind: str, bits: int) -> None:
    layer = layer_of(kind)
    x = inputs_of(kind, rows=16) @ torch.linspace(0, 2, 36).view(6, 6) if kind != "linear" else inputs_of(kind, rows=16)
    x = x + x.roll(1, -1 if kind == "linear" else 1)  # neighbouring channels know each other
    nearest = QScheme(bits, 16 if bits == 4 else None)
    gptq = replace(nearest, rounding="gptq")
    assert output_error(layer, x, gptq) < 0.9 * output_error(layer, x, nearest)
    # No output channel is worse, the moments being those of all inputs.
    with torch.no_grad():
        errors = [
            (fake(quantize_layer(layer, x, scheme), x) - layer(x)).movedim(-1 if kind == "linear" else 1, 0)
            for scheme in (gptq, nearest)
        ]
    moved, rounded = (error.flatten(1).double().square().sum(1) for error in errors)
    assert (moved <= rounded * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *[(kind, scheme_for(kind, base)) for kind in KINDS for base in (W8A8, W4A4)],
        *[(kind, QScheme(8)) for kind in KINDS],
    ],
)
def test_the_simulated_input_quantizer_is_that_of_the_layer(kind: str, scheme: QScheme) -> None:
    eight = replace(scheme, weight_bits=8, group_size=None)
    layer, x = layer_of(kind, outputs=CHANNELS), inputs_of(kind, outliers=5.0)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.zero_()
        center = layer.weight if kind == "linear" else layer.weight[..., -1 - (kind == "conv"), -1 - (kind == "conv")]
        center.copy_(torch.eye(CHANNELS))  # the layer hands its input on
        y = fake(quantize_layer(layer, x, eight), x)
    expected = fake_quant_dynamic(x if kind == "linear" else x.movedim(1, -1), eight)
    assert torch.allclose(y, expected if kind == "linear" else expected.movedim(-1, 1), rtol=1e-6, atol=1e-6)
    assert (scheme.input_bits == 16) == torch.allclose(y, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("boundaries", [(), (16,)])
def test_static_ranges_belong_to_the_rows_of_their_bin(boundaries: tuple[int, ...]) -> None:
    layer, x = layer_of("conv"), inputs_of("conv", rows=8)
    row_bins = torch.tensor([1, 3, 1, 3, 1, 1, 3, 3])
    x = x * (1 + row_bins.view(-1, 1, 1, 1))
    result = quantize_layer(layer, x, replace(STATIC, boundaries=boundaries), row_bins=row_bins, bins=5)
    for part, own in zip(parts_of(result), part_slices(CHANNELS, boundaries), strict=True):
        observers = {step_bin: HistogramObserver() for step_bin in (1, 3)}
        for step_bin, observer in observers.items():
            observer.update(x[row_bins == step_bin][:, own])
        # Bins without rows share the nearest one's statistics, the earlier where two are as near.
        scale, zero = HistogramObserver.tables([observers[i] for i in (1, 1, 1, 3, 3)], "mse")
        assert part.input_scale.equal(scale)
        assert part.input_zero.equal(zero)
        assert len(scale.unique()) == 2
    alone = quantize_layer(layer, x, replace(STATIC, boundaries=boundaries))
    assert all(len(part.input_scale) == 1 for part in parts_of(alone))


def test_nothing_of_chance_is_in_a_result() -> None:
    layer, x = layer_of("conv"), inputs_of("conv", outliers=9.0)
    scheme = scheme_for("conv", W4A4, smooth=True, rotate=True, rank=3, rounding="gptq")
    one = quantize_layer(layer, x, scheme).state_dict()
    torch.manual_seed(99)
    other = quantize_layer(layer, x.clone(), scheme).state_dict()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad: float) -> None:
    layer, x = layer_of("linear"), inputs_of("linear")
    x[3, 2, 1] = bad
    with pytest.raises(QuantizationError, match="input of a layer is not finite") as caught:
        quantize_layer(layer, x, W8A8, name="blocks.1.to_q")
    assert caught.value.where == "blocks.1.to_q"
    with torch.no_grad():
        layer.weight[2, 2] = bad
    with pytest.raises(RangeError, match="NaN or infinite") as weight:
        quantize_layer(layer, inputs_of("linear"), W8A8, name="blocks.1.to_q")
    assert weight.value.where == "blocks.1.to_q"


@pytest.mark.parametrize("kind", KINDS)
def test_directions_in_float_take_the_error_of_inputs_that_have_few(kind: str) -> None:
    layer, axis = layer_of(kind), -1 if kind == "linear" else 1
    noise, generator = inputs_of(kind).movedim(axis, -1), torch.Generator().manual_seed(5)
    strong = torch.randn(*noise.shape[:-1], 3, generator=generator) @ torch.randn(3, CHANNELS, generator=generator)
    x = (3 * strong + 0.1 * noise).movedim(-1, axis)
    scheme = scheme_for(kind, W4A4, rounding="gptq")
    plain, two, three = (output_error(layer, x, replace(scheme, directions=count)) for count in (0, 2, 3))
    assert three < 0.2 * plain  # what is left of the input is about a thirtieth
    assert three < two < plain
