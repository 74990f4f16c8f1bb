import pytest
import torch
from torch import nn

from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.held_out import hold_out
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.reconstruction import BlockCall, _SoftWeight, reconstruct_block
from dcomp.compress.scheme import QScheme
from dcomp.compress.soft_rounding import soft_step
from dcomp.compress.split import SplitLinear, float_parts
from dcomp.kernels.packing import pack_weight

FAST = {"iterations": 600, "lr": 4e-2}
FLOAT_INPUT = {"input_bits": 16, "input_granularity": None}
W4 = QScheme(4, 64, **FLOAT_INPUT)


def _quantized(linear, bits=4, group=64):
    scheme = QScheme(bits, group if bits == 4 else None, **FLOAT_INPUT)
    return QuantLinear.from_float(linear, search_weight(linear.weight, bits, scheme.group_size), scheme)


def _mlp(layers):
    """A float network of 64 channels, its 4-bit form, and the weights of that form's layers by name."""
    torch.manual_seed(0)
    floats = [nn.Linear(64, 64).requires_grad_(False) for _ in range(layers)]
    network = nn.Sequential(*[part for linear in floats for part in (linear, nn.SiLU())][:-1])
    block = nn.Sequential(*[part for linear in floats for part in (_quantized(linear), nn.SiLU())][:-1])
    return network.eval(), block.eval(), {str(2 * i): linear.weight for i, linear in enumerate(floats)}


def _inputs(rank, count):
    torch.manual_seed(1)
    mixing = torch.randn(rank, 64) / rank**0.5 if rank else torch.eye(64)
    return torch.randn(count, len(mixing)) @ mixing


def _call(x):
    return BlockCall((x,), {}, {(0,)})


def _state(block):
    return {key: value.clone() for key, value in block.state_dict().items()}


def _same(block, state):
    return all(torch.equal(value, state[key]) for key, value in block.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_at_the_start_soft_weights_are_the_float_ones_and_hard_ones_the_nearest(bits):
    torch.manual_seed(0)
    linear = nn.Linear(100, 33)
    layer = _quantized(linear, bits)
    soft = _SoftWeight(layer, linear.weight.detach())
    exact = soft.grid.to_codes(linear.weight.detach())
    unclipped = (exact >= soft.grid.low) & (exact <= soft.grid.high)
    assert unclipped.float().mean() > 0.9
    # One unit of the largest logit's last place, through a slope of at most 0.3, is far less than 1e-6 of a step.
    step = (soft.grid.values(torch.ones_like(exact), layer.scale)).abs()
    error = (soft.values().detach() - linear.weight.detach()).abs()
    assert (error <= 2e-6 * step * exact.abs().clamp_min(1))[unclipped].all()
    assert torch.equal(soft.decided(), layer.packed().dequantize())
    assert torch.equal(soft.packed().qweight, layer.qweight)


@pytest.mark.parametrize(("layers", "rank"), [(1, 8), (1, 16), (3, 8), (3, 16)])
def test_correlated_inputs_halve_the_error_on_rows_that_were_not_seen(layers, rank):
    network, block, weights = _mlp(layers)
    x = _inputs(rank, 1500)
    result = reconstruct_block(block, _call(x), network(x), weights, **FAST)
    assert result.kept
    assert result.held_out_final <= 0.5 * result.held_out_initial
    assert result.undecided < 0.01
    assert 0 < result.changed < 0.3
    fresh = _inputs(rank, 4000)[1500:]
    error = (block(fresh) - network(fresh)).square().sum() / network(fresh).square().sum()
    assert float(error) == pytest.approx(result.held_out_final, rel=0.3)


def test_white_inputs_leave_next_to_nothing_to_gain():
    network, block, weights = _mlp(1)
    x = _inputs(None, 4000)
    result = reconstruct_block(block, _call(x), network(x), weights, **FAST)
    assert abs(1 - result.held_out_final / result.held_out_initial) < 0.03


def test_a_gain_that_does_not_hold_elsewhere_is_not_kept():
    network, block, weights = _mlp(1)
    before, x = _state(block), _inputs(None, 70)
    result = reconstruct_block(block, _call(x), network(x), weights, **FAST)
    assert result.final < result.initial
    assert result.held_out_final >= result.held_out_initial
    assert not result.kept
    assert result.changed == 0
    assert _same(block, before)


def test_a_start_that_is_better_than_nearest_is_not_lost():
    network, block, weights = _mlp(1)
    x = _inputs(8, 600)
    first = reconstruct_block(block, _call(x), network(x), weights, **FAST)
    before = _state(block)
    # A few steps do not get as far, and must not replace what is there.
    second = reconstruct_block(block, _call(x), network(x), weights, iterations=2)
    assert second.held_out_initial == pytest.approx(first.held_out_final)
    assert not second.kept
    assert _same(block, before)


def test_the_scale_of_weights_and_outputs_does_not_matter():
    results = []
    for factor in (1.0, 128.0):
        network, block, _ = _mlp(1)
        network[0].weight.mul_(factor)
        network[0].bias.mul_(factor)
        block = nn.Sequential(_quantized(network[0]))
        x = _inputs(16, 600)
        options = {"iterations": 300, "lr": 5e-2}
        weights = {"0": network[0].weight}
        results.append(reconstruct_block(block, _call(x), network(x), weights, **options))
    assert results[0].held_out_final == pytest.approx(results[1].held_out_final, rel=1e-3)
    assert results[0].undecided == results[1].undecided


def test_both_parts_of_a_split_layer_are_decided():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64).requires_grad_(False)
    weights = {"parts.0": linear.weight[:, :32].contiguous(), "parts.1": linear.weight[:, 32:].contiguous()}
    scheme = QScheme(4, 32, **FLOAT_INPUT)
    parts = [
        QuantLinear.from_float(shape, search_weight(weight, 4, 32), scheme)
        for shape, weight in zip(float_parts(linear, (32,)), weights.values(), strict=True)
    ]
    block = SplitLinear.from_parts(linear, parts, QScheme(4, 32, **FLOAT_INPUT, boundaries=(32,))).eval()
    before, x = _state(block), _inputs(16, 1500)
    result = reconstruct_block(block, _call(x), linear(x), weights, **FAST)
    assert result.held_out_final <= 0.5 * result.held_out_initial
    assert result.undecided < 0.01
    changed = {key for key, value in block.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"parts.0.qweight", "parts.1.qweight"}


class _TwoStreams(nn.Module):
    """A block as transformers have them: several arguments, one of them the same for all rows, and two answers."""

    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x, *, context, positions, gate=None):
        context = torch.tanh(self.other(context))
        return context, {"x": self.one(x * positions) + context, "nothing": gate}


def test_trees_of_arguments_and_answers_are_followed_and_asymmetric_inputs_used():
    torch.manual_seed(0)
    one, other = (nn.Linear(64, 64).requires_grad_(False) for _ in range(2))
    network, block = _TwoStreams(one, other), _TwoStreams(_quantized(one), _quantized(other, bits=8))
    x, context, positions = _inputs(8, 600), _inputs(16, 1200)[600:], torch.rand(64)
    noisy = x + 0.01 * torch.randn_like(x)
    kwargs = {"context": context, "positions": positions, "gate": None}
    call = BlockCall((noisy,), kwargs, {(0,), ("context",)})
    targets = network(x, context=context, positions=positions)
    before = _state(block)
    options = {**FAST, "groups": torch.arange(600) // 10}
    result = reconstruct_block(block, call, targets, {"one": one.weight}, **options)
    assert result.kept
    assert result.held_out_final <= 0.6 * result.held_out_initial
    changed = {key for key, value in block.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"one.qweight"}


def test_a_table_with_as_many_entries_as_there_are_rows_belongs_to_every_row():
    torch.manual_seed(0)
    one, other = (nn.Linear(64, 64).requires_grad_(False) for _ in range(2))
    network, block = _TwoStreams(one, other), _TwoStreams(_quantized(one), _quantized(other, bits=8))
    x = _inputs(8, 64)
    for positions in (torch.rand(64), torch.rand(1, 64)):
        call = BlockCall((x,), {"context": x, "positions": positions}, {(0,), ("context",)})
        targets = network(x, context=x, positions=positions)
        result = reconstruct_block(block, call, targets, {}, iterations=1, batch=16)
        answer = block(x, context=x, positions=positions)
        pairs = [(answer[0], targets[0]), (answer[1]["x"], targets[1]["x"])]
        learn, held_out = hold_out(torch.arange(64), 0)
        for rows, error in ((learn, result.initial), (held_out, result.held_out_initial)):
            off = sum((got - wanted)[rows].square().sum() for got, wanted in pairs)
            assert error == pytest.approx(
                float(off / sum(wanted[rows].square().sum() for _, wanted in pairs)), rel=1e-4
            )


def test_static_ranges_follow_the_timestep_of_each_row():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    weight = conv.weight.permute(0, 2, 3, 1).contiguous()
    clock = StepClock(StepBins.uniform([2.0, 1.0], 2))
    # In the second bin the range is so narrow that nearly everything is clipped.
    ranges = torch.tensor([0.04, 1e-4]), torch.tensor([128, 128], dtype=torch.uint8)
    scheme = QScheme(4, 8, input_bits=8, input_granularity="tensor")
    block = QuantConv2d.from_float(conv, search_weight(weight, 4, 8), scheme, *ranges, clock)
    x = torch.randn(24, 8, 5, 5)
    errors = []
    for times in (torch.tensor([2.0] * 23 + [1.0]), torch.full((24,), 1.0)):
        options = {"iterations": 1, "timesteps": times, "batch": 8}
        errors.append(reconstruct_block(block, _call(x), conv(x), {"": weight}, **options).initial)
    assert errors[0] < 0.1
    assert errors[1] > 0.9


def test_a_block_is_left_as_it_was_found():
    network, block, weights = _mlp(2)
    flags = [block[0].bias.requires_grad_(True), block[2].bias]
    x = _inputs(8, 300)
    call, targets = _call(x), network(x)

    def interrupt(text, done, total):
        if done == 3:
            raise KeyboardInterrupt

    before = _state(block)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_block(block, call, targets, weights, iterations=5, progress=interrupt)
    assert _same(block, before)
    assert [bias.requires_grad for bias in flags] == [True, False]
    for layer in block.modules():
        if isinstance(layer, QuantLayer):
            assert layer.execution == "int"
            assert "values" not in vars(layer)


def test_an_exact_block_has_nothing_to_learn():
    codes = torch.randint(-8, 8, (64, 64))
    packed = pack_weight(codes, torch.full((64,), 0.5), torch.ones(64, 1, dtype=torch.int8), group_size=64)
    linear = nn.Linear(64, 64).requires_grad_(False)
    linear.weight.copy_(packed.dequantize())
    block, x = QuantLinear.from_float(linear, packed, W4), _inputs(None, 50)
    result = reconstruct_block(block, _call(x), linear(x), {"": linear.weight})
    assert (result.initial, result.final, result.kept) == (0, 0, False)
    assert soft_step(_SoftWeight(block, linear.weight).logits).max() == 0
