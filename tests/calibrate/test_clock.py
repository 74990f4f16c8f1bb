import copy
import inspect
import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.clock import StepBins, StepBinsError, StepClock, log_snr_function


class Denoiser(nn.Module):
    """Predicts something from anything: the clock looks at the arguments only."""

    def forward(self, sample: Tensor, timestep: Tensor | float, scale: float = 1.0) -> Tensor:
        return sample * 0.5 * scale


def run(denoiser: nn.Module, scheduler: object, steps: int, clock: StepClock, calls_per_step: int = 1) -> list[tuple]:
    """Drive a trajectory as a pipeline does; what the clock said at each denoiser call."""
    seen = []
    hook = denoiser.register_forward_hook(
        lambda *_: seen.append((clock.trajectory, clock.call, clock.step, clock.timestep, clock.bin))
    )
    sample = torch.ones(2, 1, 4, 4)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        for _ in range(calls_per_step):
            prediction = denoiser(sample, t)
        sample = scheduler.step(prediction, t, sample).prev_sample
        assert clock.last_sample is sample
    hook.remove()
    return seen


def bins_of(scheduler: object, steps: int, count: int) -> StepBins:
    scheduler.set_timesteps(steps)
    return StepBins.uniform(scheduler.timesteps.tolist(), count, scheduler)


def test_calls_and_steps_follow_the_scheduler() -> None:
    denoiser, scheduler = Denoiser(), DDIMScheduler()
    clock = StepClock(bins_of(scheduler, 4, 2))
    with clock.attach(denoiser, scheduler):
        assert run(denoiser, scheduler, 4, clock) == [
            (0, 0, 0, 750.0, 0),
            (0, 1, 1, 500.0, 0),
            (0, 2, 2, 250.0, 1),
            (0, 3, 3, 0.0, 1),
        ]
        assert [entry[0] for entry in run(denoiser, scheduler, 2, clock)] == [1, 1]


def test_contexts_run_one_by_one_share_a_call() -> None:
    denoiser, scheduler, clock = Denoiser(), DDIMScheduler(), StepClock()
    with clock.attach(denoiser, scheduler):
        assert [entry[1] for entry in run(denoiser, scheduler, 3, clock, calls_per_step=2)] == [0, 0, 1, 1, 2, 2]


def test_a_second_order_scheduler_makes_two_calls_in_a_step() -> None:
    denoiser, scheduler, clock = Denoiser(), HeunDiscreteScheduler(), StepClock()
    with clock.attach(denoiser, scheduler):
        seen = run(denoiser, scheduler, 3, clock)
    assert [entry[1] for entry in seen] == [0, 1, 2, 3, 4]
    assert [entry[2] for entry in seen] == [0, 0, 1, 1, 2]


def test_nothing_is_left_behind_in_whatever_order_clocks_leave() -> None:
    denoiser, scheduler = Denoiser(), DDIMScheduler()
    before = dict(vars(scheduler)), inspect.signature(scheduler.step), dict(denoiser._forward_pre_hooks)
    clocks = [StepClock(), StepClock()]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        handles = [clocks[0].attach(denoiser, scheduler), clocks[1].attach(denoiser, scheduler)]
        handles.append(clocks[0].attach(denoiser, scheduler))
        run(denoiser, scheduler, 2, clocks[0])
        assert inspect.signature(scheduler.step) == before[1]
        for position in order:
            handles[position].remove()
            handles[position].remove()  # harmless
        run_state = {"timesteps", "num_inference_steps"}
        assert {k: v for k, v in vars(scheduler).items() if k not in run_state}.keys() <= before[0].keys()
        assert "step" not in vars(scheduler)
        assert "set_timesteps" not in vars(scheduler)
        assert dict(denoiser._forward_pre_hooks) == before[2]


def test_a_clock_attached_twice_counts_once() -> None:
    denoiser, scheduler, clock = Denoiser(), DDIMScheduler(), StepClock()
    with clock.attach(denoiser), clock.attach(denoiser, scheduler), clock.attach(denoiser, scheduler):
        assert [entry[:2] for entry in run(denoiser, scheduler, 3, clock)] == [(0, 0), (0, 1), (0, 2)]


def test_an_older_wrapper_on_the_scheduler_stays_and_goes_on_working() -> None:
    denoiser, scheduler, clock, heard = Denoiser(), DDIMScheduler(), StepClock(), []
    original = scheduler.step

    def wrapper(*args: object, **kwargs: object) -> object:
        heard.append(1)
        return original(*args, **kwargs)

    scheduler.step = wrapper
    with clock.attach(denoiser, scheduler):
        run(denoiser, scheduler, 3, clock)
    assert len(heard) == 3
    assert vars(scheduler)["step"] is wrapper
    assert clock.call == 3


def test_two_pipelines_keep_their_own_time() -> None:
    one, two = StepClock(), StepClock()
    parties = [(Denoiser(), DDIMScheduler()), (Denoiser(), DDIMScheduler())]
    with one.attach(*parties[0]), two.attach(*parties[1]):
        run(*parties[0], 4, one)
        run(*parties[1], 2, two)
    assert (one.call, two.call) == (4, 2)


def test_a_deep_copy_has_a_clock_of_its_own() -> None:
    denoiser, scheduler = Denoiser(), DDIMScheduler()
    denoiser.clock = StepClock(bins_of(scheduler, 4, 4))
    denoiser.clock.attach(denoiser)
    twin = copy.deepcopy(denoiser)
    twin(torch.ones(1), 0)
    assert (twin.clock.bin, denoiser.clock.bin) == (3, 0)

    handle = denoiser.clock.attach(denoiser, scheduler)
    other = copy.deepcopy(scheduler)
    handle.remove()
    other.set_timesteps(2)
    other.step(torch.zeros(1, 1, 2, 2), other.timesteps[0], torch.zeros(1, 1, 2, 2))
    assert denoiser.clock.trajectory == -1
    assert scheduler.num_inference_steps == 4


@pytest.mark.parametrize(
    "timestep",
    [
        500,
        500.0,
        torch.tensor(500),
        torch.tensor([500]),
        torch.tensor(500).expand(6),
        torch.tensor([500.0, 500.0], dtype=torch.bfloat16),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
def test_the_bin_is_right_without_a_scheduler_for_any_form_of_timestep(timestep: object, by_name: bool) -> None:
    clock, denoiser = StepClock(bins_of(DDIMScheduler(), 4, 4)), Denoiser()
    with clock.attach(denoiser):
        denoiser(torch.ones(1), timestep=timestep) if by_name else denoiser(torch.ones(1), timestep)
    assert (clock.timestep, clock.bin, clock.row_bins, clock.unseen, clock.call) == (500.0, 1, None, 0, 0)


def test_a_batch_of_mixed_timesteps_has_a_bin_per_row() -> None:
    clock, denoiser = StepClock(bins_of(DDIMScheduler(), 4, 4)), Denoiser()
    with clock.attach(denoiser):
        denoiser(torch.ones(3), torch.tensor([250, 750, 0]))
        assert clock.row_bins is not None
        assert clock.row_bins.tolist() == [2, 0, 3]
        assert clock.row_bins.dtype == torch.int64
        denoiser(torch.ones(3), torch.tensor([250, 250, 250]))
    assert (clock.row_bins, clock.bin) == (None, 2)


@pytest.mark.parametrize("bins", [None, bins_of(DDIMScheduler(), 4, 4)])
def test_a_batch_of_mixed_timesteps_has_a_timestep_per_row_with_and_without_bins(bins: StepBins | None) -> None:
    clock, denoiser = StepClock(bins), Denoiser()
    with clock.attach(denoiser):
        denoiser(torch.ones(3), torch.tensor([250.5, 750.0, 0.0]))
        assert clock.row_timesteps == (250.5, 750.0, 0.0)
        assert clock.timestep == 250.5
        for equal in (torch.tensor([250, 250, 250]), torch.tensor(250), 250):
            denoiser(torch.ones(3), equal)
            assert (clock.row_timesteps, clock.timestep) == (None, 250.0)


def test_unseen_timesteps_are_counted_with_their_distance_and_never_raise() -> None:
    clock, denoiser = StepClock(bins_of(DDIMScheduler(), 4, 4)), Denoiser()
    with clock.attach(denoiser):
        for t in (750, 749, 749, 500, 1e6, -5.0, math.nan, 0):
            denoiser(torch.ones(1), t)
    assert clock.unseen == 3  # 749, 1e6 and -5
    assert clock.max_distance == 1e6 - 750


def test_timesteps_that_tables_do_not_hold_are_counted_with_and_without_bins() -> None:
    bins = StepBins.uniform([900.0, 500.0, 100.0], 2)
    for known, table, unseen, distance in ((None, (900.0, 100.0), 3, 400.0), (bins, (900.0, 100.0), 3, 400.0),
                                           (bins, (900.0, 500.0, 100.0), 2, 150.0), (None, (), 0, 0.0)):  # fmt: skip
        clock = StepClock(known)
        clock.table_timesteps = table
        for t in (900, torch.tensor(500), 500.0, torch.tensor([100.0, 250.0]), 901):
            clock.read(t)
        assert (clock.unseen, clock.max_distance) == (unseen, distance)


def test_a_double_is_the_timestep_that_is_stored_as_a_float() -> None:
    clock = StepClock()
    clock.table_timesteps = tuple(torch.tensor([0.9, 0.1]).tolist())
    for t in (0.9, torch.tensor(0.1, dtype=torch.float64)):
        clock.read(t)
    assert clock.unseen == 0


def test_rounding_of_half_precision_is_not_an_unseen_timestep() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    clock = StepClock(StepBins.uniform((scheduler.timesteps / 1000).tolist(), 20, scheduler))
    for t in scheduler.timesteps:
        clock.read(t.expand(2).half() / 1000)
        assert clock.unseen == 0


def test_a_module_without_timestep_is_refused() -> None:
    with pytest.raises(UsageError, match="no denoiser"):
        StepClock().attach(nn.Linear(1, 1))


@given(
    timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=60),
    count=st.integers(1, 70),
    others=st.lists(st.integers(0, 999), max_size=20),
)
def test_bins_are_balanced_monotone_and_survive_json(timesteps: list[int], count: int, others: list[int]) -> None:
    bins = StepBins.uniform(timesteps, count, DDIMScheduler(), others=others)
    distinct = sorted(set(timesteps), reverse=True)
    assert bins.count == min(count, len(distinct))
    sizes = [sum(bins.lookup(t) == b for t in distinct) for b in range(bins.count)]
    assert max(sizes) - min(sizes) <= 1
    assert list(bins.timesteps) == sorted({*timesteps, *others}, reverse=True)
    assert StepBins.from_dict(json.loads(json.dumps(bins.to_dict()))) == bins


@pytest.mark.parametrize(
    ("scheduler", "unit"),
    [(DDIMScheduler(), 1), (EulerDiscreteScheduler(), 1), (FlowMatchEulerDiscreteScheduler(shift=3.0), 1000)],
)
def test_any_timestep_goes_to_the_bin_that_is_nearest_in_log_snr(scheduler: object, unit: int) -> None:
    scheduler.set_timesteps(8)
    told = [t / unit for t in scheduler.timesteps.tolist()]
    bins = StepBins.uniform(told, 8, scheduler)
    log_snr = log_snr_function(scheduler, max(told))
    for i in range(400):
        t = min(told) + (max(told) - min(told)) * i / 399
        distances = [abs(log_snr(t) - log_snr(known)) for known in told]
        assert distances[bins.lookup(t)] <= min(distances) + 1e-9


def test_log_snr_is_that_of_the_schedule() -> None:
    ddim = DDIMScheduler()
    alpha = ddim.alphas_cumprod[400].double().item()
    assert log_snr_function(ddim, 999)(400) == pytest.approx(math.log(alpha / (1 - alpha)), rel=1e-6)
    flow = log_snr_function(FlowMatchEulerDiscreteScheduler(), 1000)
    assert flow(250) == pytest.approx(2 * math.log(3))
    assert log_snr_function(FlowMatchEulerDiscreteScheduler(), 1.0)(0.25) == pytest.approx(2 * math.log(3))
    assert flow(1000) == pytest.approx(-flow(0), abs=1e-6)
    assert flow(1000) < flow(999) < flow(1)


def test_bins_of_a_schedule_in_other_units_are_ordered_too() -> None:
    scheduler = EDMEulerScheduler()  # tells the denoiser log(sigma) / 4
    bins = bins_of(scheduler, 10, 5)
    assert [bins.lookup(t) for t in bins.timesteps] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    "damage",
    [
        {"timesteps": []},
        {"timesteps": [1.0, 2.0]},
        {"bin_of": [0]},
        {"bin_of": [1, 1]},
        {"bin_of": [0, 2]},
        {"bin_of": [0.0, 1.0]},
        {"boundaries": []},
        {"boundaries": [0.5]},
        {"boundaries": [math.nan]},
        {"boundaries": ["1"]},
        {"boundaries": 1},
        {"extra": []},
    ],
)
def test_bins_that_contradict_themselves_are_refused(damage: dict) -> None:
    good = {"timesteps": [2.0, 1.0], "bin_of": [0, 1], "boundaries": [1.5]}
    assert StepBins.from_dict(good).count == 2
    with pytest.raises(StepBinsError):
        StepBins.from_dict(good | damage)


def test_no_timesteps_or_no_bins_are_refused() -> None:
    with pytest.raises(StepBinsError):
        StepBins.uniform([], 1, DDIMScheduler())
    with pytest.raises(StepBinsError):
        StepBins.uniform([1.0], 0, DDIMScheduler())
