import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dcomp.calibrate.range_search import search_weight
from dcomp.compress import transforms
from dcomp.compress.transforms import (
    FACTOR_LIMIT,
    Reader,
    carried_weight,
    choose_smoothing,
    low_rank_branch,
    principal_directions,
    rotate_weight,
    smoothing_factors,
)
from dcomp.kernels import qparams


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def four_bits(weight: Tensor) -> Tensor:
    return search_weight(weight.contiguous(), 4, 16).dequantize()


def eight_bits(weight: Tensor) -> Tensor:
    return search_weight(weight.contiguous(), 8, None).dequantize()


def per_sample(x: Tensor) -> Tensor:
    """8 bits with one scale for each sample."""
    step = x.abs().amax(tuple(range(1, x.ndim)), keepdim=True) / 127
    return (x / step).round() * step


def relative(error: Tensor, of: Tensor) -> float:
    return float(error.double().norm() / of.double().norm())


def test_smoothing_factors_are_those_of_the_formula() -> None:
    x, w = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([1.0, 1.0, 4.0])
    half = smoothing_factors(x, w, 0.5)  # 1, 2, 2 over the cube root of 4
    torch.testing.assert_close(half, torch.tensor([1.0, 2.0, 2.0]) / 4 ** (1 / 3))
    torch.testing.assert_close(smoothing_factors(x, w, 1.0), torch.tensor([0.25, 1.0, 4.0]))
    torch.testing.assert_close(smoothing_factors(x, w, 0.0), 4 ** (1 / 3) / w)
    assert half.dtype == torch.float32


@settings(max_examples=50)
@given(st.integers(1, 40), st.floats(0, 1), st.floats(-30, 30), st.integers(0, 99))
def test_smoothing_factors_have_the_mean_one_and_forget_the_unit(
    channels: int, alpha: float, exponent: float, seed: int
) -> None:
    x, w = gaussian(channels, seed=seed).abs() + 0.1, gaussian(channels, seed=seed + 1).abs() + 0.1
    sigma = smoothing_factors(x, w, alpha)
    assert float(sigma.double().log().mean()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(smoothing_factors(x * 10**exponent, w, alpha), sigma)
    torch.testing.assert_close(smoothing_factors(x, w * 10**exponent, alpha), sigma)


def test_dead_channels_have_the_factor_one_and_no_say_in_the_mean() -> None:
    x, w = torch.tensor([1.0, 0.0, 4.0, 9.0]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(smoothing_factors(x, w, 0.5), torch.tensor([2**-0.5, 1.0, 2**0.5, 1.0]))
    assert torch.equal(smoothing_factors(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3))


def test_factors_are_limited() -> None:
    sigma = smoothing_factors(torch.tensor([1e-20, 1.0, 1e20]), torch.ones(3), 1.0)
    assert sigma.tolist() == [1 / FACTOR_LIMIT, 1.0, FACTOR_LIMIT]


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_smoothing_keeps_the_float_output(alpha: float) -> None:
    x, weight = gaussian(3, 12, 7, 7) * torch.exp(gaussian(12, 1, 1)), gaussian(5, 3, 3, 12)
    sigma = smoothing_factors(x.abs().amax((0, 2, 3)), weight.abs().amax((0, 1, 2)), alpha)
    y = functional.conv2d(x, weight.permute(0, 3, 1, 2))
    smoothed = functional.conv2d(x * (1 / sigma).view(-1, 1, 1), (weight * sigma).permute(0, 3, 1, 2))
    assert relative(smoothed - y, y) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_outlier_channel_of_the_input_is_smoothed(kind: str) -> None:
    if kind == "linear":
        layer: nn.Module = nn.Linear(32, 24, device="meta")
        x, weight, shape = gaussian(64, 5, 32), gaussian(24, 32), (32,)
        run: Callable[[Tensor, Tensor], Tensor] = functional.linear
    else:
        layer = nn.Conv2d(32, 24, 3, stride=2, padding=1, device="meta")
        x, weight, shape = gaussian(8, 32, 6, 6), gaussian(24, 3, 3, 32), (32, 1, 1)

        def run(x: Tensor, weight: Tensor) -> Tensor:
            return functional.conv2d(x, weight.permute(0, 3, 1, 2), None, 2, 1)

    outlier = torch.ones(32)
    outlier[5] = 60
    x = x * outlier.view(shape)
    weight = weight / outlier  # the output is not the outlier's alone
    sigma = choose_smoothing([Reader(layer, weight, per_sample, eight_bits)], x)
    assert sigma is not None
    assert sigma.argmax() == 5
    y = run(x, weight)
    plain = relative(run(per_sample(x), eight_bits(weight)) - y, y)
    smoothed = relative(run(per_sample(x / sigma.view(shape)), eight_bits(weight * sigma)) - y, y)
    assert smoothed < plain / 3


def test_the_choice_is_the_best_of_the_grid() -> None:
    layer, weight, x = nn.Linear(16, 8), gaussian(8, 16), gaussian(50, 16) * torch.exp(gaussian(16, seed=3))
    y = functional.linear(x, weight)
    tried = {}
    for alpha in (0.25, 0.5, 0.75, 1.0):
        sigma = smoothing_factors(x.abs().amax(0), weight.abs().amax(0), alpha)
        output = functional.linear(per_sample(x[None] * (1 / sigma))[0], four_bits(weight * sigma))
        tried[float((output - y).double().square().sum())] = sigma
    chosen = choose_smoothing([Reader(layer, weight, lambda values: per_sample(values[None])[0], four_bits)], x)
    assert chosen is not None
    assert torch.equal(chosen, tried[min(tried)])


def test_nothing_is_smoothed_without_need() -> None:
    layer, weight, x = nn.Linear(64, 32), gaussian(32, 64).sign(), gaussian(100, 64).sign()
    reader = Reader(layer, weight, per_sample, eight_bits)
    assert choose_smoothing([reader], x) is None
    noisy = gaussian(100, 64) * torch.exp(gaussian(64))
    assert choose_smoothing([Reader(layer, weight, lambda values: values, lambda values: values)], noisy) is None
    assert choose_smoothing([reader], noisy, grid=(0.0,)) is None


def test_layers_that_share_factors_count_alike_whatever_their_size() -> None:
    x = gaussian(60, 16) * torch.exp(gaussian(16, seed=3))
    readers = [
        Reader(nn.Linear(16, 8), gaussian(8, 16, seed=4) * torch.exp(gaussian(16, seed=5)), per_sample, four_bits),
        Reader(
            nn.Linear(16, 8), 1e4 * gaussian(8, 16, seed=6) * torch.exp(gaussian(16, seed=7)), per_sample, four_bits
        ),
    ]
    absmax = torch.maximum(*(reader.weight.abs().amax(0) for reader in readers))
    tried = {}
    for alpha in (0.25, 0.5, 0.75, 1.0):
        sigma = smoothing_factors(x.abs().amax(0), absmax, alpha)
        tried[sum(reader.error(x, sigma) / reader.error(x, None) for reader in readers)] = sigma
    chosen = choose_smoothing(readers, x)
    assert min(tried) < 0.99 * 2
    assert chosen is not None
    assert torch.equal(chosen, tried[min(tried)])


@pytest.mark.parametrize("shape", [(6, 32), (4, 3, 3, 16)])
def test_a_rotated_weight_meets_rotated_inputs_in_the_same_output(shape: tuple[int, ...]) -> None:
    weight, x = gaussian(*shape), gaussian(9, *shape[1:], seed=1)
    rotated = rotate_weight(weight, 16)
    y = x.flatten(1) @ weight.flatten(1).t()
    assert rotated.shape == weight.shape
    assert relative(qparams.hadamard(x, 16).flatten(1) @ rotated.flatten(1).t() - y, y) < 1e-5
    torch.testing.assert_close(rotate_weight(rotated, 16), weight, rtol=1e-5, atol=1e-5)  # H is its own inverse


def test_rotation_spreads_a_planted_outlier() -> None:
    weight = gaussian(8, 64)
    weight[:, 7] *= 60
    rotated = rotate_weight(weight, 64)
    assert (rotated.abs().amax() / rotated.abs().mean()) < 0.2 * (weight.abs().amax() / weight.abs().mean())


@pytest.mark.parametrize("shape", [(6, 32), (4, 3, 3, 32)])
@pytest.mark.parametrize("count", [1, 5, 32, 40])
def test_directions_hold_the_most_energy_and_keep_the_function(shape: tuple[int, ...], count: int) -> None:
    weight, x = gaussian(*shape), gaussian(500, 32, seed=1) @ gaussian(32, 32, seed=2) + 2 * gaussian(32, seed=3)
    directions = principal_directions(x, count)
    assert (directions.shape, directions.dtype) == ((count, 32), torch.float16)
    rest, along = qparams.take_out(x, directions)
    tail = torch.linalg.svdvals(x.double())[count:].square().sum().sqrt()  # Eckart and Young
    assert rest.norm() <= tail * 1.001 + 2e-3 * x.norm()
    codes, scale, left = carried_weight(weight, directions)
    carried = codes * scale
    assert (codes.dtype, codes.shape, scale.shape, left.shape) == (torch.int8, (*shape[:-1], count), (count,), shape)
    y = x @ weight.movedim(-1, 0).flatten(1)
    found = rest @ left.movedim(-1, 0).flatten(1) + along @ carried.movedim(-1, 0).flatten(1)
    assert relative(found - y, y) < 0.01  # of 8-bit codes
    exact = (weight @ directions.float().t()).movedim(-1, 0).flatten(1)
    assert ((carried.movedim(-1, 0).flatten(1) - exact).abs() <= 0.51 * scale[:, None] + 2e-3 * exact.abs()).all()
    # What is left of the weight reads nothing along them.
    assert (left @ directions.float().t()).norm() < 3e-3 * weight.norm()


def test_directions_of_many_inputs_repeat_and_those_of_zeros_are_finite() -> None:
    x = gaussian(9_000, 20) @ gaussian(20, 300, seed=1) + 0.1 * gaussian(9_000, 300, seed=2)
    one, two = principal_directions(x, 4), principal_directions(x.view(3, 3_000, 300), 4)
    assert torch.equal(one, two)
    kept = x @ one.float().t()
    most = torch.linalg.svdvals(x)[:4].square().sum()
    assert kept.square().sum() > 0.97 * most
    for value in (0.0, 1e-30):
        assert principal_directions(torch.full((7, 3), value), 2).isfinite().all()


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 5), ((40, 3, 3, 4), 8), ((10, 16), 10)])
def test_without_quantization_the_residual_is_what_the_singular_values_leave(shape: tuple[int, ...], rank: int) -> None:
    weight = gaussian(*shape)
    down, up, residual = low_rank_branch(weight, rank, torch.zeros_like, iterations=1)
    assert (down.shape, up.shape, residual.shape) == ((rank, *shape[1:]), (shape[0], rank), shape)
    assert down.dtype == up.dtype == torch.float16
    tail = torch.linalg.svdvals(weight.double().flatten(1))[rank:]  # Eckart and Young
    rounding = 2**-10 * float(weight.norm())
    assert tail.norm() - 1e-5 <= residual.norm() <= math.hypot(float(tail.norm()), rounding)
    branch = (up.float() @ down.float().flatten(1)).view(shape)
    torch.testing.assert_close(branch + residual, weight, rtol=1e-6, atol=1e-6)


def test_a_big_matrix_takes_a_randomised_decomposition_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(300, 20) @ gaussian(20, 320, seed=1) * 3 + gaussian(300, 320, seed=2)
    state = torch.random.get_rng_state()
    one, two = (low_rank_branch(weight, 20, torch.zeros_like, iterations=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(transforms, "_SMALL", 1000)
    exact = low_rank_branch(weight, 20, torch.zeros_like, iterations=1)
    assert float(one[2].norm()) == pytest.approx(float(exact[2].norm()), rel=1e-3)
    assert not torch.equal(one[0], exact[0])


def test_more_iterations_are_never_worse_and_beat_quantization_alone() -> None:
    weight = gaussian(64, 96)
    weight[:, torch.arange(0, 96, 12)] *= 12  # strong channels
    losses = []
    for iterations in (1, 2, 4, 16):
        residual = low_rank_branch(weight, 8, four_bits, iterations)[2]
        losses.append(relative(residual - four_bits(residual), weight))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert losses[0] < 10 ** (-3 / 20) * relative(weight - four_bits(weight), weight)  # 3 dB


def test_the_first_branch_that_is_no_better_ends_the_search() -> None:
    weight, calls = gaussian(16, 32), []

    def quantize(residual: Tensor) -> Tensor:
        calls.append(residual)
        return residual.round() if len(calls) < 3 else torch.zeros_like(residual)

    _, _, residual = low_rank_branch(weight, 4, quantize)
    errors = [float((r - (r.round() if i < 2 else 0)).double().square().sum()) for i, r in enumerate(calls)]
    stopped = next(i for i in range(1, len(errors)) if errors[i] >= errors[i - 1])
    assert len(calls) == stopped + 1
    assert torch.equal(residual, calls[stopped - 1])


def test_a_rank_beyond_the_weights_is_filled_with_zeros() -> None:
    weight = gaussian(4, 30)
    down, up, residual = low_rank_branch(weight, 7, four_bits)
    assert down.shape == (7, 30)
    assert up.shape == (4, 7)
    assert not down[4:].any()
    assert not up[:, 4:].any()
    assert relative(residual, weight) < 2e-3
