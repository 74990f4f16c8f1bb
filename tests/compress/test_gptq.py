import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.calibrate.range_search import search_weight
from dcomp.compress import gptq
from dcomp.compress import moments as moments_module
from dcomp.compress.gptq import metric_error, round_gptq
from dcomp.compress.moments import Moments, input_moments
from dcomp.kernels.packing import PackedWeight, unpack_int4

FORMATS = [(8, None), (4, 32)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor) -> Moments:
    return Moments((x.t() @ x / len(x),), len(x))


def low_rank_inputs(rows: int, channels: int = 64, rank: int = 16, seed: int = 1) -> Tensor:
    """A few strong directions and a little of everything else, as inputs of real layers are."""
    x = gaussian(rows, rank, seed=seed) @ gaussian(rank, channels, seed=99)
    return x + 0.05 * gaussian(rows, channels, seed=seed + 1)


def output_error(x: Tensor, weight: Tensor, packed: PackedWeight) -> float:
    return float((x.double() @ (packed.dequantize() - weight).double().flatten(1).t()).square().mean())


def test_a_wide_layer_has_a_block_for_each_set_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = nn.Conv2d(10, 6, 3, padding=1), gaussian(3, 10, 6, 6)
    weight = conv.weight.detach().permute(0, 2, 3, 1).contiguous()
    whole = input_moments(conv, x).blocks[0].view(9, 10, 9, 10)
    monkeypatch.setattr(moments_module, "WIDEST", 40)  # 90 columns: 3 blocks
    moments = input_moments(conv, x)
    assert [len(block) for block in moments.blocks] == [36, 36, 18]
    for first, block in zip((0, 4, 8), moments.blocks, strict=True):
        channels = slice(first, first + 4)
        torch.testing.assert_close(block, whole[:, channels, :, channels].reshape(block.shape))
    start = search_weight(weight, 4, 4)
    rounded = round_gptq(weight, start, moments)
    assert (metric_error(weight, rounded, moments) <= metric_error(weight, start, moments)).all()
    # Each set is rounded by itself: as if the others' weights were not there.
    alone = round_gptq(weight[..., :4], search_weight(weight[..., :4], 4, 4), Moments(moments.blocks[:1], moments.rows))
    assert alone.codes().shape == (6, 3, 3, 4)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("shape", [(6, 70), (3, 3, 3, 10)])
def test_with_uncorrelated_inputs_of_one_size_the_nearest_codes_are_kept(
    bits: int, group_size: int | None, shape: tuple[int, ...]
) -> None:
    weight = gaussian(*shape)
    start = search_weight(weight, bits, group_size)
    identity = Moments((torch.eye(weight[0].numel()),), 1)
    rounded = round_gptq(weight, start, identity)
    assert torch.equal(rounded.qweight, start.qweight)
    # The search fits a scale and then rounds once more; here the scale follows that last rounding.
    image = rounded.codes().double().flatten(1)
    fitted = (weight.double().flatten(1) * image).sum(1) / image.square().sum(1)
    torch.testing.assert_close(rounded.scale.double(), fitted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        metric_error(weight, start, identity), (weight - start.dequantize()).double().square().flatten(1).sum(1)
    )


@settings(max_examples=40)
@given(
    st.sampled_from([(8, None), (4, 4), (4, 32)]),
    st.integers(1, 9),
    st.sampled_from([(1,), (7,), (40,), (150,), (3, 2, 5), (3, 3, 20)]),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.01, 1.0]),
    st.integers(0, 99),
)
def test_no_channel_is_worse_than_at_the_start(
    form: tuple[int, int | None], channels: int, columns: tuple[int, ...], rows: int, damp: float, seed: int
) -> None:
    weight = gaussian(channels, *columns, seed=seed) * torch.exp(2 * gaussian(channels, *[1] * len(columns), seed=seed))
    weight[0] *= seed % 2  # now and then a channel of zeros
    size = weight[0].numel()
    x = gaussian(rows, size, seed=seed) * torch.exp(
        2 * gaussian(size, seed=seed + 1)
    )  # fewer rows than columns: singular
    x[:, :: 1 + seed % 5] *= seed % 3  # now and then dead columns, or no live ones
    moments = moments_of(x)
    start = search_weight(weight, *form)
    rounded = round_gptq(weight, start, moments, damp)
    assert (metric_error(weight, rounded, moments) <= metric_error(weight, start, moments)).all()
    assert rounded.bits == start.bits
    assert rounded.multiplier is start.multiplier or torch.equal(rounded.multiplier, start.multiplier)


@settings(max_examples=30)
@given(st.integers(1, 6), st.sampled_from([3, 40, 128, 150, 300]), st.booleans(), st.integers(0, 99))
def test_descent_ends_lower_and_no_code_alone_can_gain_where_it_ends(
    channels: int, columns: int, dead: bool, seed: int
) -> None:
    weight, steps = gaussian(columns, channels, seed=seed), gaussian(columns, channels, seed=seed + 1).abs() + 0.2
    x = gaussian(2 * columns, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 2)
    x[:, 1::3] *= not dead
    h = x.t() @ x / len(x)

    def error(codes: Tensor) -> Tensor:
        d = (codes * steps - weight).double()
        return (d * (h.double() @ d)).sum(0)

    codes = (weight / steps).round().clamp(-8, 7)
    start = codes.clone()
    errors = [error(codes)]
    for _ in range(60):
        before = codes.clone()
        gptq._descend(codes, weight, steps, -8, 7, h)
        errors.append(error(codes))
        if torch.equal(codes, before):
            break
    assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(errors))
    assert ((codes >= -8) & (codes <= 7) & (codes == codes.round())).all()
    if dead:
        assert torch.equal(codes[1::3], start[1::3])
    for row in range(0, columns, max(1, columns // 20)):  # by hand: one code up or down
        for step in (-1, 1):
            moved = codes.clone()
            moved[row] = (moved[row] + step).clamp(-8, 7)
            assert (error(moved) >= errors[-1] * (1 - 1e-4)).all()


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, x = gaussian(8, 64), low_rank_inputs(500)
    dead = torch.arange(0, 64, 3)
    x[:, dead] = 0
    start = search_weight(weight, 4, 32)
    rounded = round_gptq(weight, start, moments_of(x))
    codes, before = unpack_int4(rounded.qweight), unpack_int4(start.qweight)
    assert torch.equal(codes[:, dead], before[:, dead])
    assert not torch.equal(codes, before)


@pytest.mark.parametrize(("bits", "group_size", "columns"), [(8, None, 3), (4, 2, 4)])
@pytest.mark.parametrize("seed", range(6))
def test_a_tiny_weight_comes_near_the_best_of_all_codes(
    bits: int, group_size: int | None, columns: int, seed: int
) -> None:
    weight = gaussian(16, columns, seed=seed)
    x = gaussian(50, columns, seed=seed + 100) @ (torch.eye(columns) + gaussian(columns, columns, seed=seed + 200))
    moments = moments_of(x)
    start = search_weight(weight, bits, group_size)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    multiplier = torch.ones(16, columns) if bits == 8 else start.multiplier.repeat_interleave(group_size, 1)
    steps = start.scale[:, None] * multiplier
    # For 8 bits only codes near the weight: others are far off in every direction.
    centre = (weight / steps).round() if bits == 8 else torch.zeros(16, columns)
    offsets = range(-4, 5) if bits == 8 else range(low, high + 1)
    tried = torch.tensor(list(itertools.product(offsets, repeat=columns)), dtype=torch.float64)
    codes = (tried[:, None] + centre).clamp(low, high)
    d = codes * steps - weight
    best = ((d @ moments.blocks[0].double()) * d).sum(-1).amin(0)
    found, nearest = (metric_error(weight, packed, moments) for packed in (round_gptq(weight, start, moments), start))
    assert (found <= nearest).all()
    # A fitted scale may even win against the best codes on the given grid. A single channel has no bound, the sum has.
    assert found.sum() <= 1.5 * best.sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_correlated_inputs_gain_on_rows_not_seen(bits: int) -> None:
    weight, layer = gaussian(48, 64), nn.Linear(64, 48)
    start = search_weight(weight, bits, 32 if bits == 4 else None)
    rounded = round_gptq(weight, start, input_moments(layer, low_rank_inputs(4000)))
    held_out = low_rank_inputs(1000, seed=7)
    assert output_error(held_out, weight, rounded) < 0.15 * output_error(
        held_out, weight, start
    )  # 0.25: half the error


def test_white_inputs_gain_next_to_nothing() -> None:
    weight, layer = gaussian(48, 64), nn.Linear(64, 48)
    start = search_weight(weight, 4, 32)
    rounded = round_gptq(weight, start, input_moments(layer, gaussian(20_000, 64, seed=3)))
    held_out = gaussian(1000, 64, seed=4)
    assert output_error(held_out, weight, rounded) / output_error(held_out, weight, start) == pytest.approx(1, abs=0.03)


def test_the_fitted_scale_is_the_least_squares_one() -> None:
    weight, x = gaussian(5, 40), low_rank_inputs(300, 40)
    moments = moments_of(x)
    codes = (weight * 20).round().clamp(-127, 127)
    fitted = gptq._fitted_scale(weight, codes, torch.ones(5), moments)
    for channel in range(5):
        solution = torch.linalg.lstsq(
            (x.double() @ codes[channel].double())[:, None], (x.double() @ weight[channel].double())[:, None]
        ).solution
        assert fitted[channel] == pytest.approx(float(solution), rel=1e-6)
    kept = gptq._fitted_scale(weight, torch.zeros_like(codes), torch.full((5,), 0.5), moments)
    assert torch.equal(kept, torch.full((5,), 0.5))


def test_the_error_factor_is_that_of_the_inverse() -> None:
    x = gaussian(100, 30)
    h = (x.t() @ x / 100).double()
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(30)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(gptq._error_factor(h, 0.01), upper / upper.diagonal()[:, None])
    singular = torch.ones(30, 30, dtype=torch.float64)
    assert gptq._error_factor(singular, 0.0).isfinite().all()
