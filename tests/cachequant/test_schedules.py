"""Rules of the literature: against enumeration, and by hand on small cases."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.cachequant.drift import Drift
from dcomp.cachequant.schedules import SCHEDULES, ScheduleError, ScheduleTask, ordered_partition, power, uniform


def task_of(calls: int, count: int, *, seed: int = 0) -> ScheduleTask:
    cost = torch.rand(calls, calls, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).triu(1)
    return ScheduleTask(calls, count, lambda: Drift(cost, cost.flip(1).flip(0).t()))


@pytest.mark.parametrize("name", SCHEDULES)
@given(calls=st.integers(1, 20), data=st.data())
def test_a_rule_places_as_many_calls_as_asked_for_the_first_among_them(name: str, calls: int, data: Any) -> None:
    count = data.draw(st.integers(1, calls))
    found = SCHEDULES[name](task_of(calls, count))
    assert len(found) == count
    assert found[0] == 0
    assert all(one < other for one, other in itertools.pairwise(found))
    assert found[-1] < calls


@settings(max_examples=60)
@given(calls=st.integers(1, 9), data=st.data(), seed=st.integers(0, 10**6), far=st.integers(2, 9), whole=st.booleans())
def test_the_partition_is_the_best_of_all(calls: int, data: Any, seed: int, far: int, whole: bool) -> None:
    count = data.draw(st.integers(1, calls))
    shortest = data.draw(st.integers(1, 3))
    longest = calls if whole else data.draw(st.integers(shortest, calls + 3))
    cost = torch.rand(calls, calls, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).triu(1)
    later = torch.arange(calls)[None, :] - torch.arange(calls)[:, None]
    cost[later >= far] = torch.inf

    def total(starts: tuple[int, ...]) -> float:
        ends = (*starts[1:], calls)
        return sum(float(cost[s, s + 1 : e].sum()) for s, e in zip(starts, ends, strict=True))

    def allowed(starts: tuple[int, ...]) -> bool:
        ends = (*starts[1:], calls)
        lengths = [e - s for s, e in zip(starts, ends, strict=True)]
        return all(n <= longest for n in lengths) and all(n >= shortest for n in lengths[:-1])

    everything = [(0, *rest) for rest in itertools.combinations(range(1, calls), count - 1)]
    totals = [total(starts) for starts in everything if allowed(starts)]
    if not totals or math.isinf(min(totals)):
        with pytest.raises(ScheduleError, match="cannot be cut"):
            ordered_partition(cost, count, shortest, longest)
        return
    found = tuple(ordered_partition(cost, count, shortest, longest))
    assert allowed(found)
    assert total(found) == pytest.approx(min(totals))


def test_costs_count_from_the_call_that_computes() -> None:
    # Reading call 0 is dear from call 2 on, reading call 1 is free: the second segment starts at 1.
    cost = torch.tensor([[0.0, 1.0, 9.0, 9.0], [0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]])
    assert ordered_partition(cost, 2, 1, 4) == [0, 1]


def test_equal_distances() -> None:
    assert uniform(task_of(10, 4)) == [0, 2, 5, 7]
    assert uniform(task_of(6, 3)) == [0, 2, 4]


def test_power_lies_denser_around_its_center() -> None:
    assert power(task_of(50, 10)) == [int(50 * (i / 10) ** 1.2) for i in range(10)]
    around = power(task_of(50, 10), center=0.5)
    gaps = [other - one for one, other in itertools.pairwise(around)]
    assert gaps[0] > min(gaps)
    assert min(gaps) == gaps[around.index(min(around, key=lambda call: abs(call - 25)))]


@pytest.mark.parametrize("count", [0, 7])
def test_a_count_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ScheduleError, match="1 to 6"):
        task_of(6, count)
