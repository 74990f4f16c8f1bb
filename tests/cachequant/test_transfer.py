from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.transfer import carry_over
from dcomp.cachequant.zones import WHOLE, Zone

ZONES = (Zone(WHOLE, "output", ("",)), Zone("deep1", "output", ("mid",)))


def plan_of(*rows: dict[str, Any], places: tuple[float, ...] | None = None) -> CachePlan:
    count = len(rows)
    return CachePlan(
        ZONES, tuple(float(count - i) for i in range(count)), places or tuple(map(float, range(count))), rows
    )


def trajectory(count: int, last: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(count - i) for i in range(count)), tuple(last * i / (count - 1) for i in range(count))


def test_the_same_trajectory_gets_the_same_plan() -> None:
    line = ((0, -0.6), (2, 1.6))  # at 3, through 0 and 2: the exact slope is 0.5, taken 1.2 times
    plan = plan_of({}, {"deep1": "reuse"}, {}, {WHOLE: line}, {WHOLE: ((2, 1.0),)}, {})
    same = carry_over(plan, plan.timesteps, plan.places)
    assert [row.keys() for row in same.actions] == [row.keys() for row in plan.actions]
    for call, row in enumerate(plan.predictions):
        for zone, prediction in row.items():
            assert same.predictions[call][zone].calls == prediction.calls
            assert same.predictions[call][zone].weights == pytest.approx(prediction.weights)


def test_inputs_stay_unrounded_at_the_same_places() -> None:
    plan = replace(plan_of({}, {WHOLE: "reuse"}, {}, {WHOLE: "reuse"}, {}), unrounded=frozenset({0, 2}))
    assert carry_over(plan, plan.timesteps, plan.places).unrounded == {0, 2}
    assert carry_over(plan, *trajectory(9, 4.0)).unrounded == {0, 1, 4, 5}  # places 0, 0.5 ... 4
    assert carry_over(plan, *trajectory(3, 4.0)).unrounded == {0, 1}


def test_half_the_steps_compute_at_the_same_places() -> None:
    skip = {WHOLE: "reuse"}
    plan = plan_of({}, {}, {}, {}, skip, skip, skip, {}, skip)  # dense at first
    half = carry_over(plan, *trajectory(5, 8.0))
    # Places 0, 2, 4, 6, 8; the plan computes at 0 to 3 and at 7. Of two that are as near, the one before computes.
    assert [not row for row in half.actions] == [True, True, False, True, False]
    twice = carry_over(plan, *trajectory(17, 8.0))
    assert [call for call, row in enumerate(twice.actions) if not row] == [0, 2, 4, 6, 14]
    assert twice.predictions[9][WHOLE].calls == (6,)


def test_a_line_has_the_slope_of_its_own_distances() -> None:
    rows = ({}, {}, {WHOLE: ((0, -1.0), (1, 2.0))}, {WHOLE: ((0, -2.0), (1, 3.0))})  # exact
    plan = plan_of(*rows, places=(0.5, 1.0, 1.5, 2.0))
    places = (0.5, 0.75, 1.0, 1.5, 1.875)
    carried = carry_over(plan, (5.0, 4.0, 3.0, 2.0, 1.0), places)
    assert [not row for row in carried.actions] == [True, False, True, False, False]
    assert carried.predictions[3][WHOLE].weights == pytest.approx((-1.0, 2.0))
    assert carried.predictions[4][WHOLE].weights == pytest.approx((-1.75, 2.75))  # a linear function is met exactly


@given(st.data())
def test_any_plan_becomes_a_plan_for_any_trajectory(data: st.DataObject) -> None:
    calls = data.draw(st.integers(2, 12))
    actions = [{}, {WHOLE: "reuse"}, {"deep1": "reuse"}, {WHOLE: "linear"}]
    rows = [{}, {}, *(data.draw(st.sampled_from(actions)) for _ in range(calls - 2))]
    plan = plan_of(*rows)
    count = data.draw(st.integers(2, 30))
    carried = carry_over(plan, *trajectory(count, data.draw(st.floats(0.5, 40))))  # checked when it is made
    assert carried.calls == count
    assert not carried.actions[0]
    if any(rows):
        assert sum(not row for row in carried.actions) <= sum(not row for row in plan.actions)
    else:
        assert not any(carried.actions)
    for row in carried.predictions:
        for prediction in row.values():
            assert sum(prediction.weights) == pytest.approx(1)
