import copy
import gc
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dcomp.compress.layers import QuantConv2d, QuantLinear
from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.compress.split import empty_layer
from dcomp.kernels.dispatch import KernelError, use_backend
from dcomp.kernels.packing import pack_weight
from tests.support.schemes import quantized_form, relative_error, schemes

INT_VS_FAKE = 1e-5  # of the largest output, as the quantization pass promises
TOKEN, STATIC, FLOAT = "token", "tensor", None


def _scheme(bits, granularity, group=8):
    return QScheme(
        weight_bits=bits,
        group_size=group if bits == 4 else None,
        input_bits=8 if granularity else 16,
        input_granularity=granularity,
    )


def _packed(layer, bits, group=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = layer.weight.shape if layer.weight.ndim == 2 else layer.weight.permute(0, 2, 3, 1).shape
    scale = torch.rand(shape[0], generator=generator) * 1e-3 + 1e-4
    if bits == 8:
        return pack_weight(torch.randint(-127, 128, shape, generator=generator), scale)
    multiplier = torch.randint(1, 16, (*shape[:-1], -(-shape[-1] // group)), generator=generator)
    codes = torch.randint(-8, 8, shape, generator=generator)
    return pack_weight(codes, scale, multiplier, group_size=group)


def _linear(inner=24, out=10, bits=8, granularity=TOKEN, bias=True):
    layer = nn.Linear(inner, out, bias=bias)
    return QuantLinear.from_float(layer, _packed(layer, bits), _scheme(bits, granularity))


def _conv(*arguments, bits=8, granularity=STATIC, scales=(0.03,), zeros=(120,), clock=None, **options):
    layer = nn.Conv2d(*(arguments or (6, 8, 3)), **options)
    ranges = (torch.tensor(scales), torch.tensor(zeros, dtype=torch.uint8)) if granularity else (None, None)
    return QuantConv2d.from_float(layer, _packed(layer, bits), _scheme(bits, granularity), *ranges, clock)


def _assert_int_is_fake(layer, x):
    fake = layer.fake_forward(x)
    integer = layer.int_forward(x)
    assert integer.dtype == fake.dtype == x.dtype
    assert integer.shape == fake.shape
    if integer.numel():
        peak = fake.abs().max()
        for added in (getattr(layer, "step_bias", None), layer.bias):  # it may cancel a product that is much larger
            peak = peak if added is None else torch.maximum(peak, added.abs().max())
        assert (integer - fake).abs().max() <= INT_VS_FAKE * peak


@settings(max_examples=60)
@given(
    st.sampled_from([8, 4]),
    st.sampled_from([TOKEN, FLOAT]),
    st.booleans(),
    st.integers(1, 90),
    st.integers(1, 40),
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    st.integers(0, 99),
)
def test_a_linear_layer_gives_the_same_in_integers_as_fake(bits, granularity, bias, inner, out, lead, seed):
    torch.manual_seed(seed)
    _assert_int_is_fake(_linear(inner, out, bits, granularity, bias), torch.randn(*lead, inner) * 3)


@settings(max_examples=120)
@given(
    st.sampled_from([8, 4]),
    st.sampled_from([STATIC, FLOAT]),
    st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 8), st.integers(1, 8)),
    st.integers(1, 12),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.integers(0, 255),
)
def test_a_convolution_gives_the_same_in_integers_as_fake(
    bits, granularity, shape, out, kernel, stride, padding, dilation, layout, zero
):
    sides = list(zip(shape[2:], padding, dilation, kernel, strict=True))
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in sides))
    # Where a window may see nothing but padding, torch's float convolution, which is what fake execution runs, crashes.
    assume(all(p <= d * (k - 1) and (p == 0 or d <= n) for n, p, d, k in sides))
    torch.manual_seed(zero)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "bias": bool(zero % 2)}
    layer = _conv(shape[1], out, kernel, bits=bits, granularity=granularity, zeros=(zero,), **options)
    _assert_int_is_fake(layer, torch.randn(shape).contiguous(memory_format=layout))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", [STATIC, FLOAT])
def test_grouped_and_same_padded_convolutions_give_the_same_in_integers_as_fake(bits, granularity):
    layer = _conv(12, 6, (3, 5), bits=bits, granularity=granularity, groups=3, padding="same")
    _assert_int_is_fake(layer, torch.randn(2, 12, 6, 7))
    assert layer(torch.randn(2, 12, 6, 7)).shape == (2, 6, 6, 7)


def test_fake_execution_is_the_float_layer_with_rounded_operands():
    layer = _linear()
    x = torch.randn(5, 24)
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = functional.linear(torch.round(x * (1 / step)) * step, layer.dequantize(), layer.bias)
    layer.execution = "fake"
    assert torch.equal(layer(x), expected)


def test_the_dequantized_weight_has_the_layout_of_torch():
    layer = nn.Conv2d(6, 8, (3, 5))
    packed = _packed(layer, 4)
    quantized = QuantConv2d.from_float(layer, packed, _scheme(4, FLOAT))
    assert quantized.dequantize().shape == layer.weight.shape
    assert torch.equal(quantized.dequantize().permute(0, 2, 3, 1), packed.dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda b, g: _linear(bits=b, granularity=g), (3, 24)), (lambda b, g: _conv(bits=b, granularity=g), (2, 6, 5, 5))],
)
def test_half_precision_inputs_differ_by_the_rounding_of_the_output_alone(make, shape, bits, dtype):
    layer = make(bits, TOKEN if len(shape) == 2 else STATIC)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))
    assert make(bits, FLOAT)(x).dtype == dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_the_memory_layout_of_the_input_changes_no_bit(bits):
    layer, x = _conv(6, 8, 3, padding=1, bits=bits), torch.randn(2, 6, 9, 9)
    y = layer(x)
    wide = torch.randn(2, 12, 9, 18)
    wide[:, ::2, :, ::2] = x
    for same in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, ::2, :, ::2],
    ):
        assert torch.equal(layer(same), y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x[0]), y[0])
    linear, rows = _linear(bits=bits), torch.randn(7, 24, 5).transpose(1, 2)
    assert torch.equal(linear(rows), linear(rows.contiguous()))


def test_rows_of_a_linear_layer_do_not_see_each_other():
    layer, x = _linear(), torch.randn(4, 24)
    loud = x.clone()
    loud[1] *= 1e4
    loud[2] = 0
    assert torch.equal(layer(loud)[[0, 3]], layer(x)[[0, 3]])
    assert torch.equal(layer(loud)[2], layer.bias)


def _clock(step_bin=0, row_bins=None):
    return SimpleNamespace(bin=step_bin, row_bins=row_bins)


def test_the_clock_picks_the_row_of_the_table():
    clock, x = _clock(), torch.randn(2, 6, 5, 5)
    tables = {"scales": (0.02, 0.03, 0.05), "zeros": (100, 120, 140)}
    layer = _conv(**tables, clock=clock)
    for step_bin in range(3):
        clock.bin = step_bin
        _assert_int_is_fake(layer, x)
        single = _conv(scales=tables["scales"][step_bin : step_bin + 1], zeros=tables["zeros"][step_bin : step_bin + 1])
        single.bias = layer.bias
        assert torch.equal(layer(x), single(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_wrong_scale_of_one_bin_changes_that_bin_alone(bits):
    clock, x = _clock(), torch.randn(1, 6, 5, 5)
    layer = _conv(bits=bits, scales=(0.02,) * 4, zeros=(128,) * 4, clock=clock)
    before = {}
    for clock.bin in range(4):
        before[clock.bin] = layer(x)
    layer.input_scale[2] *= 100
    for clock.bin in range(4):
        assert torch.equal(layer(x), before[clock.bin]) == (clock.bin != 2)


@pytest.mark.parametrize("bits", [8, 4])
def test_samples_of_a_mixed_batch_use_their_own_bins(bits):
    clock, x = _clock(), torch.randn(5, 6, 7, 5)
    layer = _conv(bits=bits, scales=(0.02, 0.03, 0.05), zeros=(100, 120, 140), clock=clock)
    rows = [2, 0, 2, 1, 0]
    alone = []
    for sample, clock.bin in zip(x, rows, strict=True):
        alone.append(layer(sample[None]))
    clock.bin, clock.row_bins = 1, torch.tensor(rows)
    assert torch.equal(layer(x), torch.cat(alone))
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    _assert_int_is_fake(layer, x)
    assert layer(x[:0]).shape == (0, 8, 5, 3)


def test_one_row_of_ranges_serves_every_bin_and_two_do_not_serve_three():
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(_conv_with(_clock(7), 1)(x), _conv_with(None, 1)(x))
    with pytest.raises(SchemeError, match="bin 2"):
        _conv_with(_clock(2), 2)(x)


def _conv_with(clock, bins):
    torch.manual_seed(0)
    return _conv(scales=(0.03,) * bins, zeros=(9,) * bins, clock=clock)


@pytest.mark.parametrize("convert", ["to_bfloat16", "half", "double", "type_float16", "to_meta"])
@pytest.mark.parametrize("make", [lambda: _linear(bits=4), lambda: _conv(bits=4), lambda: _conv(bits=8)])
def test_no_conversion_changes_the_dtype_of_a_buffer(make, convert):
    layer = nn.Sequential(make())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    {
        "to_bfloat16": lambda: layer.to(torch.bfloat16),
        "half": layer.half,
        "double": layer.double,
        "type_float16": lambda: layer.type(torch.float16),
        "to_meta": lambda: layer.to("meta", torch.bfloat16),
    }[convert]()
    after = layer.state_dict()
    float_dtype = {"half": torch.float16, "double": torch.float64, "type_float16": torch.float16}
    assert after.pop("0.bias").dtype == float_dtype.get(convert, torch.bfloat16)
    assert {name: t.dtype for name, t in after.items()} == {name: before[name].dtype for name in after}
    if convert == "to_meta":
        assert all(t.is_meta for t in after.values())
    else:
        assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("make", [lambda: _linear(bits=4), lambda: _conv(bits=4), lambda: _conv(bits=8)])
def test_a_narrow_bias_is_added_in_full_precision(make):
    layer = make()
    x = torch.randn(2, 24) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 5, 5)
    layer.bias.data = layer.bias.data.bfloat16().float()
    expected = layer(x)
    assert torch.equal(layer.to(torch.bfloat16)(x), expected)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (_linear(bits=8), torch.randn(3, 24)),
        (_linear(bits=4, granularity=FLOAT, bias=False), torch.randn(3, 24)),
        (_conv(bits=8, scales=(0.1, 0.2), zeros=(1, 2)), torch.randn(1, 6, 5, 5)),
        (_conv(bits=4, padding=1, stride=2), torch.randn(1, 6, 5, 5)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_fills_an_empty_layer(layer, x, device):
    if isinstance(layer, nn.Linear):
        shape = nn.Linear(24, 10, bias=layer.bias is not None, device="meta")
    else:
        shape = nn.Conv2d(6, 8, 3, padding=layer.padding, stride=layer.stride, device="meta")
    bins = 1 if layer.input_scale is None else len(layer.input_scale)
    with torch.device(device):
        empty = type(layer).from_shape(shape, layer.scheme, bins)
    state = layer.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    empty.load_state_dict(state, assign=device == "meta")
    assert torch.equal(empty(x), layer(x))
    assert all(not p.requires_grad for p in empty.parameters())


def test_loading_other_codes_into_a_used_layer_takes_effect():
    x, first, second = torch.randn(1, 6, 5, 5), _conv(), _conv()
    other = nn.Conv2d(6, 8, 3)
    second.qweight = _packed(other, 8, seed=5).qweight
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def test_a_copy_owns_its_codes():
    x, layer = torch.randn(1, 6, 5, 5), _conv()
    y = layer(x)
    twin = copy.deepcopy(layer)
    twin.qweight.zero_()
    twin(x)
    assert torch.equal(layer(x), y)
    del twin
    gc.collect()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(_linear(bits=8), (2, 3, 24)), (_linear(bits=4), (7, 24)), (_linear(bits=4, granularity=FLOAT), (7, 24)),
     (_conv(bits=8, padding=1), (2, 6, 9, 9)), (_conv(bits=4), (1, 6, 5, 5)), (_conv(granularity=FLOAT), (1, 6, 5, 5))],
)  # fmt: skip
@pytest.mark.parametrize("execution", ["int", "fake"])
def test_a_compiled_layer_is_the_eager_layer(layer, shape, execution):
    layer.execution = execution
    x = torch.randn(shape)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    layer.execution = "int"


def test_gradients_reach_the_input_of_a_fake_layer():
    for layer, x in ((_linear(), torch.randn(3, 24)), (_conv(), torch.randn(1, 6, 5, 5))):
        layer.execution = "fake"
        x.requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        weight = layer.dequantize()
        float_y = functional.linear(x, weight) if x.ndim == 2 else functional.conv2d(x, weight)
        (expected,) = torch.autograd.grad(float_y.sum(), x)
        assert torch.allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"), [(_linear(5, 7, bits=4), (7, 5)), (_conv(6, 8, (3, 5), groups=2), (8, 3, 3, 5))]
)
def test_a_layer_tells_the_form_of_its_weight_and_nothing_else(layer, shape):
    weight = layer.weight
    assert (weight.shape, weight.dim(), weight.dtype, weight.device.type) == (shape, len(shape), torch.float32, "cpu")
    assert "weight" not in dict(layer.named_parameters())
    for name in ("data", "copy_", "add_", "norm", "to", "detach"):
        with pytest.raises(AttributeError, match=r"dequantize\(\)"):
            getattr(weight, name)
    with pytest.raises(TypeError):
        torch.linalg.norm(weight)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = layer.nothing
    assert layer.scheme.label in repr(layer)


def test_a_quantized_layer_cannot_be_made_from_sizes_alone():
    assert type(QuantLinear(3, 4)) is nn.Linear
    assert type(QuantConv2d(3, 4, kernel_size=1)) is nn.Conv2d
    with pytest.raises(TypeError):
        QuantConv2d()


def test_an_input_with_other_channels_is_refused():
    # 17 channels of a group of 8 are padded to 24, so that 18 would fit into the buffers.
    linear, conv = nn.Linear(17, 4), nn.Conv2d(17, 4, 1)
    with pytest.raises(KernelError, match="18 channels instead of 17"):
        QuantLinear.from_float(linear, _packed(linear, 4), _scheme(4, TOKEN))(torch.randn(2, 18))
    with pytest.raises(KernelError, match="18 channels instead of 17"):
        QuantConv2d.from_float(conv, _packed(conv, 4), _scheme(4, FLOAT))(torch.randn(2, 18, 3, 3))


def _refused():
    linear, conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
    ranges = (torch.ones(2), torch.zeros(2, dtype=torch.uint8))
    return {
        "static linear": lambda: QuantLinear.from_float(linear, _packed(linear, 8), _scheme(8, STATIC), *ranges),
        "token convolution": lambda: QuantConv2d.from_float(conv, _packed(conv, 8), _scheme(8, TOKEN)),
        "no range": lambda: QuantConv2d.from_float(conv, _packed(conv, 8), _scheme(8, STATIC)),
        "range for tokens": lambda: QuantLinear.from_float(linear, _packed(linear, 8), _scheme(8, TOKEN), *ranges),
        "zero as int64": lambda: QuantConv2d.from_float(
            conv, _packed(conv, 8), _scheme(8, STATIC), ranges[0], ranges[1].long()
        ),
        "ranges of two lengths": lambda: QuantConv2d.from_float(
            conv, _packed(conv, 8), _scheme(8, STATIC), ranges[0], ranges[1][:1]
        ),
        "other bits": lambda: QuantLinear.from_float(linear, _packed(linear, 4), _scheme(8, TOKEN)),
        "other group": lambda: QuantLinear.from_float(linear, _packed(linear, 4, 4), _scheme(4, TOKEN)),
        "other shape": lambda: QuantLinear.from_float(linear, _packed(nn.Linear(8, 9), 8), _scheme(8, TOKEN)),
        "other kind": lambda: QuantLinear.from_float(conv, _packed(linear, 8), _scheme(8, TOKEN)),
        "circular padding": lambda: QuantConv2d.from_shape(
            nn.Conv2d(8, 8, 3, padding_mode="circular"), _scheme(8, FLOAT), 1
        ),
        "uneven padding": lambda: QuantConv2d.from_shape(nn.Conv2d(8, 8, 2, padding="same"), _scheme(8, FLOAT), 1),
    }


@pytest.mark.parametrize("name", _refused())
def test_what_does_not_fit_together_is_refused(name):
    with pytest.raises(SchemeError):
        _refused()[name]()


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = _conv(6, 8, 3, padding=1), _linear(8, 5)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))


def test_adapters_attach_run_train_and_detach():
    torch.manual_seed(0)
    net, x = _Net(), torch.randn(2, 6, 5, 5)
    y = net(x)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["conv", "linear"]))
    assert type(net.conv).__name__ == "Conv2d"
    assert type(net.linear).__name__ == "Linear"
    assert net.linear.lora_A["default"].weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(adapted(x), y)  # B starts at zero
        down, up = net.linear.lora_A["default"].weight, nn.init.normal_(net.linear.lora_B["default"].weight)
        hidden = net.conv(x).mean((2, 3))
        scaling = net.linear.scaling["default"]
        assert torch.allclose(adapted(x), y + hidden @ down.t() @ up.t() * scaling, atol=1e-5)
        nn.init.normal_(net.conv.lora_B["default"].weight)
        assert not torch.allclose(adapted(x), y + hidden @ down.t() @ up.t() * scaling, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.equal(adapted(x), y)
    assert torch.equal(adapted.unload()(x), y)


def test_merging_an_adapter_fails_and_changes_nothing():
    net, x = _Net(), torch.randn(2, 6, 5, 5)
    y = net(x)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["conv", "linear"]))
    for merge in (adapted.merge_adapter, adapted.merge_and_unload, net.linear.merge, net.conv.merge):
        with pytest.raises(AttributeError, match="not merged"):
            merge()
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(net.linear.base_layer(net.conv.base_layer(x).mean((2, 3))), y)


@pytest.mark.parametrize("layer", [_linear(bits=4), _conv(bits=4, padding=1), _conv(bits=8, padding=1)])
def test_both_rows_agree_on_a_layer(layer):
    x = torch.randn(3, 24) if isinstance(layer, nn.Linear) else torch.randn(3, 6, 8, 8)
    y = layer(x)
    with use_backend("emulated"):
        assert torch.allclose(layer(x), y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))


def test_four_bit_weights_stay_four_bits_after_running():
    layer, x = _conv(64, 32, 3, bits=4), torch.randn(1, 64, 5, 5)
    layer(x)
    stored = sum(t.nbytes for name, t in layer.state_dict().items() if name in ("qweight", "multiplier"))
    assert stored == 32 * 9 * 64 // 2 + 32 * 9 * 8
    assert {name for name, t in vars(layer).items() if isinstance(t, torch.Tensor)} == set()


CONVS = st.tuples(
    st.integers(1, 9),  # input channels
    st.integers(1, 7),  # output channels
    st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 1), st.integers(0, 2)),
    st.booleans(),
)


@settings(max_examples=80)
@given(st.data(), st.integers(1, 33), st.integers(1, 12), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99))
def test_linear_layers_of_every_scheme_run_the_same_in_integers_as_fake(data, inner, out, lead, seed):
    scheme = data.draw(schemes(inner, out, ("token",)))
    torch.manual_seed(seed)
    layer = quantized_form(nn.Linear(inner, out), scheme, seed=seed)
    _assert_int_is_fake(layer, torch.randn(*lead, inner) * 3 + 1)


@settings(max_examples=120)
@given(st.data(), CONVS, st.integers(0, 3), st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_convolutions_of_every_scheme_run_the_same_in_integers_as_fake(data, conv, batch, layout):
    channels, out, kernel, stride, padding, bias = conv
    assume(all(p <= k - 1 for p, k in zip(padding, kernel, strict=True)))
    pixels = kernel == (1, 1) and stride == (1, 1)
    granularities = ("tensor", "sample", "token") if pixels else ("tensor", "sample")
    scheme = data.draw(schemes(channels, out, granularities))
    torch.manual_seed(channels)
    layer = quantized_form(nn.Conv2d(channels, out, kernel, stride, padding, bias=bias), scheme)
    x = (torch.randn(batch, channels, 5, 4) + 0.5).contiguous(memory_format=layout)
    _assert_int_is_fake(layer, x)
    if batch:
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
        # One sample alone may have other strides, by which torch chooses another order of sums.
        torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


torch.manual_seed(0)
LINEAR, CONV = nn.Linear(24, 10), nn.Conv2d(24, 10, 3, stride=2, padding=1)
TRANSFORMS = [
    {"smooth": smooth, "rotate": rotate, "rank": rank, "directions": directions}
    for smooth in (False, True)
    for rotate in (False, True)
    for rank in (0, 3)
    for directions in (0, 2)
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("boundaries", [(), (7, 16)])
@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv"])
def test_transforms_keep_the_float_function(layer, transform, boundaries):
    x = torch.randn(4, 24) if layer is LINEAR else torch.randn(4, 24, 7, 6)
    y = layer(x)
    quantized = quantized_form(layer, QScheme(8, boundaries=boundaries, **transform))
    weight = quantized.dequantize()
    assert weight.shape == layer.weight.shape
    assert relative_error(weight, layer.weight) < 0.015
    assert relative_error(quantized(x), y) < 0.015
    shape = (layer.stride, layer.padding) if layer is CONV else ()
    function = functional.conv2d if layer is CONV else functional.linear
    assert relative_error(quantized(x), function(x, weight, layer.bias, *shape)) < 1e-5
    assert relative_error(quantized_form(layer, QScheme(4, 8, boundaries=boundaries, **transform))(x), y) > 0.02


@pytest.mark.parametrize("input_bits", [4, 8])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_dynamic_inputs_lose_little_and_four_bits_lose_more(transform, input_bits):
    x = torch.randn(4, 24, 7, 6)
    group = 8 if input_bits == 4 else None
    scheme = QScheme(8, input_bits=input_bits, input_granularity="sample", input_group=group, **transform)
    error = relative_error(quantized_form(CONV, scheme)(x), CONV(x))
    assert error < 0.02 if input_bits == 8 else 0.02 < error < 0.2


def test_every_stage_of_a_layer_is_the_formula():
    scheme = QScheme(8, input_bits=8, input_granularity="token", smooth=True, rotate=True, rank=2, directions=3)
    layer, x = quantized_form(nn.Linear(12, 5), scheme), torch.randn(3, 12)
    hadamard = functional.pad(torch.ones(1, 1), (0, 0))
    for _ in range(2):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5, hadamard)
    smoothed, directions = x * layer.smooth_inv, layer.directions.float()
    along = smoothed @ directions.t()
    transformed = (smoothed - along @ directions).view(3, 3, 4) @ hadamard
    step = transformed.flatten(1).abs().amax(1, keepdim=True) / 127
    values = torch.round(transformed.flatten(1) / step) * step
    expected = values @ (layer.qweight * layer.scale[:, None]).t() + layer.bias
    expected = expected + along @ (layer.direction_weight * layer.direction_scale).t()
    expected = expected + x @ layer.lr_down.float().t() @ layer.lr_up.float().t()
    assert (layer(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_of_one_change_no_bit(bits):
    scheme = QScheme(8, input_bits=bits, input_granularity="token", input_group=8 if bits == 4 else None)
    plain, x = quantized_form(LINEAR, scheme), torch.randn(5, 24)
    smoothed = QuantLinear.from_float(LINEAR, plain.packed(), replace(scheme, smooth=True), smooth_inv=torch.ones(24))
    assert torch.equal(plain(x), smoothed(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_a_convolution_over_pixels_is_a_linear_layer(weight_bits, bits):
    scheme = QScheme(
        weight_bits, 8 if weight_bits == 4 else None, input_bits=bits, input_granularity="token",
        input_group=8 if bits == 4 else None, smooth=True, rotate=True, rank=2, directions=2,
    )  # fmt: skip
    conv = quantized_form(nn.Conv2d(20, 6, 1), scheme)
    linear = QuantLinear.from_shape(nn.Linear(20, 6), scheme, 1)
    state = conv.state_dict()
    linear.load_state_dict({name: state[name].view(tensor.shape) for name, tensor in linear.state_dict().items()})
    x = torch.randn(3, 20, 4, 5)
    y = conv(x)
    assert torch.allclose(y.movedim(1, -1), linear(x.movedim(1, -1)), rtol=1e-6, atol=1e-6)
    loud = x.clone()
    loud[1, :, 2, 3] *= 1e3
    different = (conv(loud) != y).any(1)
    assert different[1, 2, 3]
    assert different.sum() == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transform", [{}, {"smooth": True, "rotate": True}], ids=str)
def test_samples_of_a_convolution_do_not_see_each_other(bits, transform):
    scheme = QScheme(4, 8, input_bits=bits, input_granularity="sample", input_group=8 if bits == 4 else None)
    layer, x = quantized_form(CONV, replace(scheme, **transform)), torch.randn(4, 24, 5, 5)
    loud = x.clone()
    loud[1] *= 1e3
    loud[2] = 0
    y = layer(loud)
    assert torch.equal(y[[0, 3]], layer(x)[[0, 3]])
    assert torch.equal(y[2], layer.bias[:, None, None].expand_as(y[2]))
    assert torch.equal(layer(x[:1]), layer(x)[:1])


def test_a_dynamic_range_needs_no_clock_and_a_static_one_follows_it():
    x = torch.randn(2, 24, 5, 5)
    dynamic = quantized_form(CONV, QScheme(8, input_bits=8, input_granularity="sample"), bins=3)
    static = quantized_form(CONV, QScheme(8, input_bits=8, input_granularity="tensor", rotate=True), bins=3)
    outputs = []
    for layer in (dynamic, static):
        layer.clock = _clock(0)
        first = layer(x)
        layer.clock.bin = 2
        outputs.append(torch.equal(layer(x), first))
        _assert_int_is_fake(layer, x)
        layer.clock.row_bins = torch.tensor([0, 2])
        mixed = layer(x)
        layer.clock.row_bins = None
        assert torch.equal(mixed[1], layer(x)[1])
        assert torch.equal(mixed[0], first[0])
        _assert_int_is_fake(layer, x)
    assert outputs == [True, False]


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_group_of_inputs_wider_than_the_layer_is_one_group_and_takes_no_memory(layer):
    x = torch.randn(2, 24) if layer is LINEAR else torch.randn(2, 24, 5, 5)
    granularity = "token" if layer is LINEAR else "sample"
    wide, huge = (
        quantized_form(layer, QScheme(8, input_bits=4, input_granularity=granularity, input_group=group))
        for group in (24, 2**60)
    )
    for execution in ("int", "fake"):
        wide.execution = huge.execution = execution
        assert torch.equal(wide(x), huge(x))


ALL = {"smooth": True, "rotate": True, "rank": 2, "directions": 2}
FULL = [
    (LINEAR, QScheme(4, 8, input_bits=4, input_granularity="token", input_group=8, **ALL)),
    (CONV, QScheme(4, 8, input_bits=4, input_granularity="sample", input_group=8, **ALL)),
    (CONV, QScheme(8, input_bits=8, input_granularity="tensor", **ALL)),
    (LINEAR, QScheme(8, input_bits=8, input_granularity="token", boundaries=(5, 16), **ALL)),
    (CONV, QScheme(4, 8, input_bits=8, input_granularity="sample", boundaries=(8,), **ALL)),
]


@pytest.mark.parametrize(("layer", "scheme"), FULL)
def test_conversions_and_state_dicts_keep_every_buffer(layer, scheme):
    quantized = quantized_form(layer, scheme, bins=2)
    x = torch.randn(2, 24) if layer is LINEAR else torch.randn(2, 24, 5, 5)
    y, before = quantized(x), copy.deepcopy(quantized.state_dict())
    empty = empty_layer(layer, scheme, 2)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    empty.load_state_dict(before)
    assert torch.equal(empty(x), y)
    for dtype in (torch.bfloat16, torch.float64):
        after = quantized.to(dtype).state_dict()
        for name, tensor in after.items():
            if name.endswith("bias"):
                assert tensor.dtype == dtype
            else:
                assert tensor.dtype == before[name].dtype
                assert torch.equal(tensor, before[name])
    assert quantized.to(torch.float32)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("layer", "scheme"), FULL[:3])
def test_gradients_reach_an_override_of_the_values(layer, scheme):
    quantized = quantized_form(layer, scheme)
    x = torch.randn(2, 24) if layer is LINEAR else torch.randn(2, 24, 5, 5)
    x.requires_grad_()
    quantized.execution = "fake"
    y = quantized(x)
    values = quantized.values().requires_grad_()
    quantized.values = lambda: values
    tuned = quantized(x)
    assert torch.equal(tuned, y)
    by_weight, by_input = torch.autograd.grad(tuned.square().sum(), (values, x))
    assert by_weight.shape == values.shape
    assert (by_weight != 0).float().mean() > 0.9  # that of a code 0 of the input is 0
    # The straight-through gradient is that of the layer with its effective weight and the output at hand.
    weight = quantized.dequantize().detach()
    inputs = x.detach().requires_grad_()
    plain = functional.linear(inputs, weight) if layer is LINEAR else functional.conv2d(inputs, weight, None, 2, 1)
    (expected,) = torch.autograd.grad(plain, inputs, 2 * y.detach())
    assert relative_error(by_input, expected) < 1e-5
    # The gradient of an override is what finite differences say.
    direction = torch.randn_like(values)
    with torch.no_grad():
        values += 1e-3 * direction
        above = quantized(x).double().square().sum()
        values -= 2e-3 * direction
        below = quantized(x).double().square().sum()
    assert float((above - below) / 2e-3) == pytest.approx(float((by_weight * direction).sum()), rel=1e-2, abs=1e-2)


def _refused_schemes():
    linear, conv, pixels = nn.Linear(8, 4), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
    dynamic = {"input_bits": 8, "input_granularity": "sample"}
    token = {"input_bits": 8, "input_granularity": "token"}
    return {
        "sample of a linear layer": (linear, QScheme(8, **dynamic), "by token"),
        "pixels of a wide kernel": (conv, QScheme(8, **token), "by tensor or sample"),
        "pixels with stride": (nn.Conv2d(8, 8, 1, stride=2), QScheme(8, **token), "by tensor or sample"),
        "pixels with padding": (nn.Conv2d(8, 8, 1, padding=1), QScheme(8, **token), "by tensor or sample"),
        "pixels in groups": (nn.Conv2d(8, 8, 1, groups=2), QScheme(8, **token), "by tensor or sample"),
        "smooth groups": (nn.Conv2d(8, 8, 1, groups=2), QScheme(8, smooth=True), "in groups"),
        "rotated groups": (nn.Conv2d(8, 8, 1, groups=2), QScheme(8, rotate=True), "in groups"),
        "branch of groups": (nn.Conv2d(8, 8, 1, groups=2), QScheme(8, rank=1), "in groups"),
        "rank above outputs": (linear, QScheme(8, rank=5), "more than 4 channels"),
        "directions above inputs": (pixels, QScheme(8, directions=9), "more than 8 channels"),
        "directions of groups": (nn.Conv2d(8, 8, 1, groups=2), QScheme(8, directions=1), "in groups"),
        "rank above inputs": (pixels, QScheme(8, rank=9), "more than 8 channels"),
        "boundaries of one part": (linear, QScheme(8, boundaries=(4,)), "no boundaries"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _refused_schemes())
def test_a_scheme_that_a_layer_cannot_have_is_refused(name):
    layer, scheme, words = _refused_schemes()[name]
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    with pytest.raises(SchemeError, match=words):
        kind.from_shape(layer, scheme, 1)


def test_transforms_that_do_not_fit_the_scheme_are_refused():
    scheme, packed = QScheme(8, smooth=True, rank=2), _packed(LINEAR, 8)
    good = {"smooth_inv": torch.ones(24), "low_rank": (torch.zeros(2, 24).half(), torch.zeros(10, 2).half())}
    QuantLinear.from_float(LINEAR, packed, scheme, **good)
    for name, value in (
        ("smooth_inv", None),
        ("smooth_inv", torch.ones(23)),
        ("smooth_inv", torch.ones(24).half()),
        ("low_rank", None),
        ("low_rank", (torch.zeros(3, 24).half(), torch.zeros(10, 3).half())),
        ("low_rank", (torch.zeros(2, 24), torch.zeros(10, 2))),
    ):
        with pytest.raises(SchemeError, match=r"smooth_inv|lr_down"):
            QuantLinear.from_float(LINEAR, packed, scheme, **(good | {name: value}))
    with pytest.raises(SchemeError, match="smooth_inv"):
        QuantLinear.from_float(LINEAR, packed, QScheme(8), smooth_inv=torch.ones(24))


CORRECTED = {
    "token": (LINEAR, QScheme(8, input_bits=8, input_granularity="token", smooth=True, rank=3)),
    "float input": (LINEAR, QScheme(4, 8)),
    "static": (CONV, QScheme(8, input_bits=8, input_granularity="tensor", rotate=True)),
    "sample": (CONV, QScheme(4, 8, input_bits=8, input_granularity="sample", rank=2)),
    "parts": (CONV, QScheme(8, input_bits=8, input_granularity="sample", boundaries=(8, 16), rank=2)),
    "pixels": (nn.Conv2d(24, 10, 1, bias=False), QScheme(8, input_bits=8, input_granularity="token")),
    "linear parts": (LINEAR, QScheme(8, input_bits=8, input_granularity="token", boundaries=(5,))),
}


@pytest.mark.parametrize("name", CORRECTED)
def test_a_correction_is_a_scale_and_a_bias_of_the_output(name):
    original, scheme = CORRECTED[name]
    original = copy.deepcopy(original)
    if original.bias is not None:
        original.bias.data += 100  # a bias that is counted twice, or without its factor, is seen
    layer = quantized_form(original, scheme, bins=3)
    layer.clock = _clock()
    x = torch.randn(4, 24) if isinstance(layer, nn.Linear) else torch.randn(4, 24, 6, 5)
    plain = []
    for layer.clock.bin in range(3):
        plain.append((layer.int_forward(x), layer.fake_forward(x)))
    scale, bias = torch.rand(3, 10) + 0.5, torch.randn(3, 10)
    own = torch.zeros(10) if layer.bias is None else layer.bias
    layer.correct(scale, bias + scale * own)
    assert layer.scheme == replace(scheme, corrected=True)
    shape = (10, *[1] * (x.ndim - 2))
    for layer.clock.bin in range(3):
        integer, fake = layer.int_forward(x), layer.fake_forward(x)
        factor, offset = (table[layer.clock.bin].view(shape) for table in (scale, bias))
        for found, before in zip((integer, fake), plain[layer.clock.bin], strict=True):
            assert relative_error(found, before * factor + offset) < 1e-6
        assert relative_error(integer, fake) < 1e-6
    rows = [2, 0, 0, 1]
    alone = []
    for sample, layer.clock.bin in zip(x, rows, strict=True):
        alone.append((layer.int_forward(sample[None]), layer.fake_forward(sample[None])))
    layer.clock.bin, layer.clock.row_bins = 1, torch.tensor(rows)
    for found, expected in zip((layer.int_forward(x), layer.fake_forward(x)), zip(*alone, strict=True), strict=True):
        assert torch.allclose(found, torch.cat(expected), rtol=1e-5, atol=1e-4)
    again = empty_layer(original, layer.scheme, 3)
    again.load_state_dict(layer.state_dict())
    again.clock = layer.clock
    assert torch.equal(again(x), layer(x))


def test_tables_of_another_form_correct_nothing():
    layer = quantized_form(CONV, QScheme(8, input_bits=8, input_granularity="tensor"), bins=3)
    for scale, bias in (
        (torch.ones(2, 10),) * 2,
        (torch.ones(3, 9),) * 2,
        (torch.ones(3, 10), torch.ones(3, 10).half()),
    ):
        with pytest.raises(SchemeError, match="Tables of a correction"):
            layer.correct(scale, bias)
    assert layer.step_scale is None
    assert not layer.scheme.corrected
    layer.clock = _clock(3)
    layer.correct(torch.ones(3, 10), torch.zeros(3, 10))
    with pytest.raises(SchemeError, match="bin 3"):
        layer(torch.randn(1, 24, 6, 5))
