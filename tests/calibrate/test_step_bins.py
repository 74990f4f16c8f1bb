import itertools

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.calibrate.clock import StepBins, StepBinsError, log_snr_function
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.step_bins import log_snr_bins, range_drift, range_drift_bins, step_ranges


def times(count: int) -> list[float]:
    return [1000.0 - 37 * i for i in range(count)]


def random_ranges(steps: int, layers: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, layers, 2, generator=generator).cumsum(0).sort(-1).values


def drift_by_hand(ranges: Tensor, bin_of: tuple[int, ...]) -> float:
    total = 0.0
    for b in set(bin_of):
        part = ranges[[i for i, other in enumerate(bin_of) if other == b]].double()
        for layer in range(part.shape[1]):
            shared = float(part[:, layer, 1].max() - part[:, layer, 0].min())
            total += sum(1 - float(high - low) / shared for low, high in part[:, layer]) if shared else 0.0
    return total


def segmentations(steps: int, count: int) -> list[tuple[int, ...]]:
    return [
        tuple(sum(i >= cut for cut in cuts) for i in range(steps))
        for cuts in itertools.combinations(range(1, steps), count - 1)
    ]


@given(steps=st.integers(1, 8), layers=st.integers(1, 3), count=st.integers(1, 8), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_no_other_segmentation_drifts_less(steps: int, layers: int, count: int, seed: int) -> None:
    ranges, count = random_ranges(steps, layers, seed), min(count, steps)
    bins = range_drift_bins(ranges, times(steps), count)
    assert bins.count == count
    assert range_drift(ranges, bins.bin_of) == pytest.approx(drift_by_hand(ranges, bins.bin_of), abs=1e-9)
    best = min(drift_by_hand(ranges, other) for other in segmentations(steps, count))
    assert range_drift(ranges, bins.bin_of) == pytest.approx(best, abs=1e-9)


@given(steps=st.integers(2, 25), seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_more_bins_never_drift_more_and_one_for_each_step_not_at_all(steps: int, seed: int) -> None:
    ranges = random_ranges(steps, 3, seed)
    drifts = [range_drift(ranges, range_drift_bins(ranges, times(steps), b).bin_of) for b in range(1, steps + 1)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(drifts))
    assert drifts[-1] == 0.0


def test_a_jump_of_the_ranges_is_a_boundary() -> None:
    ranges = torch.tensor([[-1.0, 1.0]] * 7 + [[-8.0, 8.0]] * 3).unsqueeze(1)
    bins = range_drift_bins(ranges, times(10), 2)
    assert bins.bin_of == (0,) * 7 + (1,) * 3
    assert range_drift(ranges, bins.bin_of) == 0.0
    # One bin: seven steps use 1/8 of the codes.
    assert range_drift(ranges, (0,) * 10) == pytest.approx(7 * (1 - 1 / 8))


def test_equal_ranges_give_bins_of_equal_size() -> None:
    ranges = torch.tensor([-1.0, 2.0]).expand(12, 2, 2)
    assert [range_drift_bins(ranges, times(12), 4).bin_of.count(b) for b in range(4)] == [3, 3, 3, 3]
    assert [range_drift_bins(ranges * 0, times(12), 3).bin_of.count(b) for b in range(3)] == [4, 4, 4]


@given(steps=st.integers(1, 9), count=st.integers(1, 9), flow=st.booleans())
@settings(max_examples=25)
def test_log_snr_bins_have_the_least_spread(steps: int, count: int, flow: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if flow else DDIMScheduler()
    scheduler.set_timesteps(steps)
    timesteps, count = [float(t) for t in scheduler.timesteps], min(count, steps)
    log_snr = log_snr_function(scheduler, max(timesteps))
    values = torch.tensor([log_snr(t) for t in timesteps], dtype=torch.float64)

    def squares(bin_of: tuple[int, ...]) -> float:
        index = torch.tensor(bin_of)
        return sum(float((values[index == b] - values[index == b].mean()).square().sum()) for b in set(bin_of))

    bins = log_snr_bins(timesteps, count, scheduler)
    assert bins.count == count
    assert squares(bins.bin_of) == pytest.approx(min(map(squares, segmentations(steps, count))), abs=1e-9)


def test_boundaries_are_half_way_in_log_snr_and_others_join_the_nearest_bin() -> None:
    scheduler = DDIMScheduler()
    ranges = torch.tensor([[-1.0, 1.0]] * 2 + [[-4.0, 4.0]] * 2).unsqueeze(1)
    bins = range_drift_bins(ranges, [900.0, 700.0, 300.0, 100.0], 2, scheduler, others=[500.0, 420.0, 50.0])
    log_snr = log_snr_function(scheduler, 900)
    assert log_snr(bins.boundaries[0]) == pytest.approx((log_snr(700) + log_snr(300)) / 2, abs=1e-9)
    assert bins.timesteps == (900.0, 700.0, 500.0, 420.0, 300.0, 100.0, 50.0)
    for t in (500.0, 420.0, 50.0):
        assert bins.lookup(t) == int(abs(log_snr(t) - log_snr(300)) < abs(log_snr(t) - log_snr(700)))


def test_with_one_bin_for_each_step_both_agree_with_uniform() -> None:
    scheduler, timesteps = DDIMScheduler(), [900.0, 500.0, 120.0]
    assert (
        range_drift_bins(random_ranges(3, 2, 0), timesteps, 3, scheduler)
        == log_snr_bins(timesteps, 7, scheduler)
        == StepBins.uniform(timesteps, 3, scheduler)
    )


@pytest.mark.parametrize(
    ("ranges", "timesteps", "count"),
    [
        (torch.zeros(2, 1, 2), [2.0, 1.0], 0),
        (torch.zeros(2, 1, 2), [1.0, 2.0], 1),
        (torch.zeros(0, 1, 2), [], 1),
        (torch.zeros(3, 1, 2), [2.0, 1.0], 1),
        (torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), [2.0, 1.0], 1),
        (torch.full((2, 1, 2), torch.nan), [2.0, 1.0], 1),
    ],
)
def test_what_makes_no_bins_is_refused(ranges: Tensor, timesteps: list[float], count: int) -> None:
    with pytest.raises(StepBinsError):
        range_drift_bins(ranges, timesteps, count)


class Twice(nn.Module):
    """Its second layer reads `2 x + t`; its third reads no rows, and the fourth is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.layers[2](torch.zeros(1, 3))
        return self.layers[0](sample) + self.layers[1](2 * sample + timestep[:, None])


def test_step_ranges_are_those_of_the_rows_of_each_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(40, 3, generator=generator), torch.tensor([5.0, 9.0, 1.0, 9.0]).repeat(10)
    rows = RowBatch((x, t), {}, x, t, torch.zeros(len(x), dtype=torch.int64), None, frozenset({(0,), (1,)}))
    timesteps, ranges = step_ranges(Twice(), rows, ["layers.1", "layers.0"])
    assert timesteps == (9.0, 5.0, 1.0)
    for i, step in enumerate(timesteps):
        own = x[t == step]
        assert ranges[i, 1].tolist() == [float(own.min()), float(own.max())]
        assert ranges[i, 0].tolist() == [float((2 * own + step).min()), float((2 * own + step).max())]
    for layer, problem in (("layers.2", "no row axis"), ("layers.3", "not called")):
        with pytest.raises(StepBinsError, match=problem):
            step_ranges(Twice(), rows, [layer])
