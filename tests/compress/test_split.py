import copy

import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dcomp.calibrate.cost import count_macs
from dcomp.compress.layers import QuantConv2d, QuantLinear
from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.compress.split import (
    SplitConv2d,
    SplitLinear,
    empty_layer,
    float_parts,
    is_quantized,
    join_parts,
    part_slices,
    parts_of,
    quantized_layers,
)
from dcomp.kernels import dispatch, ops
from dcomp.kernels.packing import pack_weight
from tests.support.schemes import quantized_form, relative_error

torch.manual_seed(0)
LINEAR, CONV, SHORTCUT = nn.Linear(24, 10), nn.Conv2d(24, 10, 3, padding=1), nn.Conv2d(24, 10, 1)
W8A8 = {"input_bits": 8, "input_granularity": "token"}


def inputs_of(layer, batch=3):
    return torch.randn(batch, 24) if layer is LINEAR else torch.randn(batch, 24, 6, 5)


@pytest.mark.parametrize("layer", [LINEAR, CONV, nn.Conv2d(24, 3, (2, 3), (2, 1), (0, 1), (1, 2))], ids=str)
@pytest.mark.parametrize("boundaries", [(1,), (7, 8, 20)])
def test_float_parts_add_up_to_the_layer(layer, boundaries):
    x = inputs_of(layer)
    parts = float_parts(layer, boundaries)
    slices = part_slices(24, boundaries)
    axis = -1 if layer is LINEAR else 1
    pieces = [x.narrow(axis, own.start, own.stop - own.start) for own in slices]
    y = sum(part(piece) for part, piece in zip(parts, pieces, strict=True))
    assert torch.allclose(y, layer(x), atol=1e-5)
    assert [part.bias is None for part in parts] == [False, *[True] * len(boundaries)]
    assert all(part.weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr() for part in parts)


def _pieces(layer, codes, scale, multiplier, boundaries, group, scheme, ranges):
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    built = []
    for part, own in zip(float_parts(layer, boundaries), part_slices(24, boundaries), strict=True):
        own_multiplier = None if multiplier is None else multiplier[..., own.start // group : own.stop // group]
        packed = pack_weight(codes[..., own], scale, own_multiplier, group_size=group)
        built.append(kind.from_float(part, packed, scheme, *ranges))
    return built


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layer", [CONV, SHORTCUT], ids=["conv", "shortcut"])
def test_parts_with_joint_scales_have_the_operands_of_the_layer_bit_by_bit(layer, bits):
    group, boundaries = (8, (8, 16)) if bits == 4 else (None, (5, 16))
    shape = (10, *layer.kernel_size, 24)
    scale = torch.rand(10) * 1e-2 + 1e-3
    codes = torch.randint(-8, 8, shape) if bits == 4 else torch.randint(-127, 128, shape)
    multiplier = torch.randint(1, 16, (*shape[:-1], 3)) if bits == 4 else None
    ranges = (torch.tensor([0.03]), torch.tensor([117], dtype=torch.uint8))
    scheme = QScheme(bits, group, input_bits=8, input_granularity="tensor")
    whole = QuantConv2d.from_float(layer, pack_weight(codes, scale, multiplier, group_size=group), scheme, *ranges)
    split = SplitConv2d.from_parts(
        layer,
        _pieces(layer, codes, scale, multiplier, boundaries, group, scheme, ranges),
        QScheme(bits, group, input_bits=8, input_granularity="tensor", boundaries=boundaries),
    )
    x = inputs_of(layer)
    parts, slices = parts_of(split), part_slices(24, boundaries)
    assert torch.equal(torch.cat([part.packed().codes() for part in parts], -1), whole.packed().codes())
    codes_of_x = [ops.quantize_static(x[:, own], *ranges) for own in slices]
    assert torch.equal(torch.cat(codes_of_x, 1), ops.quantize_static(x, *ranges))
    assert torch.equal(split.dequantize(), whole.dequantize())
    y = whole(x)
    assert (split(x) - y).abs().max() <= 1e-6 * y.abs().max()


@pytest.mark.parametrize(("bits", "least"), [(8, 30), (4, 10)])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_quiet_part_keeps_its_information(bits, least, granularity):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(64, 16, 1, bias=False), torch.randn(4, 64, 8, 8)
    x[:, 32:] /= 200
    scheme = QScheme(8, input_bits=bits, input_granularity=granularity, input_group=64 if bits == 4 else None)
    split = quantized_form(layer, QScheme(**(scheme.to_dict() | {"boundaries": (32,)})))
    whole = quantized_form(layer, scheme)
    loud = torch.cat([x[:, :32], torch.zeros_like(x[:, 32:])], 1)

    def quality(quantized):
        # What the quiet part adds to the output, with the loud one taken away on both sides.
        own = quantized(x) - quantized(loud)
        return -20 * torch.tensor(relative_error(own, layer(x) - layer(loud))).log10()

    assert quality(split) > least
    assert quality(whole) < 5


@settings(max_examples=25)
@given(st.data(), st.sampled_from([LINEAR, CONV, SHORTCUT]), st.sampled_from(["int", "fake"]))
def test_a_split_layer_is_the_sum_of_its_parts(data, layer, execution):
    boundaries = tuple(sorted(data.draw(st.sets(st.integers(1, 23), min_size=1, max_size=5))))
    assume(min(own.stop - own.start for own in part_slices(24, boundaries)) >= 2)
    granularity = "sample" if layer is CONV else "token"
    scheme = QScheme(
        4, 4, input_bits=4, input_granularity=granularity, input_group=4, boundaries=boundaries, smooth=True, rank=2
    )
    split, x = quantized_form(layer, scheme), inputs_of(layer)
    split.execution = execution
    assert {part.execution for part in parts_of(split)} == {execution} == {split.execution}
    pieces = [x[:, own] for own in part_slices(24, boundaries)]
    expected = sum(part(piece) for part, piece in zip(parts_of(split), pieces, strict=True))
    assert torch.allclose(split(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(split.int_forward(x) if execution == "int" else split.fake_forward(x), split(x))
    assert split(x.bfloat16()).dtype == torch.bfloat16
    y = split(x.bfloat16().float())
    assert torch.equal(split(x.bfloat16()), y.bfloat16())
    if layer is not LINEAR:
        assert torch.allclose(split(x[0]), split(x[:1])[0], atol=1e-6)


def test_a_split_layer_looks_like_the_layer_to_the_model():
    for layer, kind in ((LINEAR, SplitLinear), (CONV, SplitConv2d)):
        split = quantized_form(layer, QScheme(8, boundaries=(5,)))
        assert type(split) is kind
        assert isinstance(split, type(layer))
        assert split.weight.shape == layer.weight.shape
        assert split.weight.dim() == layer.weight.dim()
        assert torch.equal(split.bias, layer.bias)
        assert layer.extra_repr() in split.extra_repr()
        assert relative_error(split.dequantize(), layer.weight) < 0.015
        assert sorted(split.state_dict()) == [
            "parts.0.bias", "parts.0.qweight", "parts.0.scale", "parts.1.qweight", "parts.1.scale",
        ]  # fmt: skip
        with pytest.raises(AttributeError, match=r"dequantize\(\)"):
            _ = split.weight.data
        assert type(kind(3, 4, 1) if layer is CONV else kind(3, 4)) is type(layer)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first = nn.Conv2d(24, 24, 1)
        self.layer = layer

    def forward(self, x):
        return self.layer(self.first(x))


def test_parts_are_neither_listed_nor_counted_beside_their_layer():
    split = quantized_form(CONV, QScheme(8, boundaries=(5, 9)))
    net, x = Net(split), inputs_of(CONV)
    assert quantized_layers(net) == {"layer": split}
    assert quantized_layers(split) == {"": split}
    assert all(is_quantized(part) for part in split.parts)
    assert not is_quantized(net.first)
    assert count_macs(net, (x,), {}) == count_macs(Net(CONV), (x,), {})
    inner = parts_of(split)[0]
    assert parts_of(inner) == [inner]


def test_the_clock_reaches_every_part():
    split = quantized_form(CONV, QScheme(8, input_bits=8, input_granularity="tensor", boundaries=(5, 9)), bins=3)
    clock = type("Clock", (), {"bin": 0, "row_bins": None})()
    split.clock = clock
    assert {id(part.clock) for part in parts_of(split)} == {id(clock)}
    assert split.clock is clock
    x = inputs_of(CONV)
    y = split(x)
    clock.bin = 2
    assert not torch.equal(split(x), y)
    twin = copy.deepcopy(split)
    assert torch.equal(twin(x), split(x))
    twin.clock.bin = 0
    assert torch.equal(twin(x), y)


def test_an_adapter_attaches_to_a_split_layer_and_not_to_its_parts():
    net, x = Net(quantized_form(CONV, QScheme(8, boundaries=(5, 9)))), inputs_of(CONV)
    y = net(x)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["layer"]))
    assert type(net.layer.lora_A["default"]) is nn.Conv2d
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 1
    with torch.no_grad():
        assert torch.equal(adapted(x), y)
        nn.init.normal_(net.layer.lora_B["default"].weight)
        assert not torch.allclose(adapted(x), y, atol=1e-3)
        with pytest.raises(AttributeError, match="not merged"):
            adapted.merge_adapter()
    assert torch.equal(adapted.unload()(x), y)


@pytest.mark.parametrize("execution", ["int", "fake"])
@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_compiled_split_layer_is_the_eager_one(layer, execution):
    split = quantized_form(layer, QScheme(8, boundaries=(8,), smooth=True, rotate=True, rank=2))
    split.execution = execution
    torch._dynamo.reset()
    compiled = torch.compile(split, fullgraph=True, backend="aot_eager")
    x = inputs_of(layer)
    with torch.no_grad():
        assert torch.allclose(compiled(x), split(x), atol=1e-6)


def test_a_part_without_smoothing_beside_one_with_it_gets_factors_of_one():
    scheme = QScheme(8, boundaries=(8,), smooth=True)
    split, x = quantized_form(LINEAR, scheme), inputs_of(LINEAR)
    plain = quantized_form(float_parts(LINEAR, (8,))[1], QScheme(8))
    joined = join_parts(LINEAR, [parts_of(split)[0], plain], scheme)
    assert joined.scheme == scheme
    assert torch.equal(parts_of(joined)[1].smooth_inv, torch.ones(16))
    assert relative_error(joined(x), functional.linear(x, joined.dequantize(), LINEAR.bias)) < 1e-5
    empty_layer(LINEAR, joined.scheme, 1).load_state_dict(joined.state_dict())
    parts = [quantized_form(part, QScheme(8)) for part in float_parts(LINEAR, (8,))]
    assert join_parts(LINEAR, parts, scheme).scheme == QScheme(8, boundaries=(8,))


def test_a_layer_of_one_part_is_joined_to_itself():
    layer = quantized_form(LINEAR, QScheme(8))
    assert join_parts(LINEAR, [layer], QScheme(8)) is layer


def _refused():
    parts = [quantized_form(part, QScheme(8)) for part in float_parts(LINEAR, (8,))]
    wrong = [quantized_form(part, QScheme(4, 8)) for part in float_parts(LINEAR, (8,))]
    convs = [quantized_form(part, QScheme(8)) for part in float_parts(CONV, (8,))]
    scheme = QScheme(8, boundaries=(8,))
    grouped = nn.Conv2d(8, 8, 1, groups=2)
    return {
        "missing": lambda: SplitLinear.from_parts(LINEAR, parts[:1], scheme),
        "swapped": lambda: SplitLinear.from_parts(LINEAR, parts[::-1], scheme),
        "other boundaries": lambda: SplitLinear.from_parts(LINEAR, parts, QScheme(8, boundaries=(9,))),
        "other scheme": lambda: SplitLinear.from_parts(LINEAR, wrong, scheme),
        "other kind": lambda: SplitLinear.from_parts(LINEAR, convs, scheme),
        "other geometry": lambda: SplitConv2d.from_parts(nn.Conv2d(24, 10, 3, padding=2), convs, scheme),
        "second bias": lambda: SplitLinear.from_parts(LINEAR, [parts[0], quantized_form(nn.Linear(16, 10), QScheme(8))],
                                                      scheme),
        "bias lost": lambda: SplitLinear.from_parts(nn.Linear(24, 10, bias=False), parts, scheme),
        "boundary outside": lambda: float_parts(LINEAR, (24,)),
        "boundary at zero": lambda: float_parts(LINEAR, (0, 8)),
        "no boundary": lambda: float_parts(LINEAR, ()),
        "empty form outside": lambda: empty_layer(CONV, QScheme(8, boundaries=(30,)), 1),
        "groups": lambda: empty_layer(grouped, QScheme(8, boundaries=(4,)), 1),
        "a norm": lambda: float_parts(nn.GroupNorm(2, 8), (4,)),
        "rank above a part": lambda: empty_layer(LINEAR, QScheme(8, boundaries=(2,), rank=3), 1),
    }  # fmt: skip


@pytest.mark.parametrize("name", _refused())
def test_what_cannot_be_split_is_refused(name):
    with pytest.raises(SchemeError):
        _refused()[name]()


def test_an_input_with_other_channels_is_refused():
    for layer in (LINEAR, CONV):
        split = quantized_form(layer, QScheme(8, boundaries=(8,)))
        x = torch.randn(2, 25) if layer is LINEAR else torch.randn(2, 25, 4, 4)
        with pytest.raises(dispatch.KernelError, match="25 channels instead of 24"):
            split(x)
