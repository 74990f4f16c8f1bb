from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dcomp.cachequant.drift import Drift
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.planners import PLANNERS, PlanningTask
from dcomp.cachequant.zones import SUBLAYERS

FRONT, REAR = "blocks[0:3]", "blocks[3:6]"


def task(*zones: str, calls: int = 12) -> PlanningTask:
    def unasked() -> None:
        raise AssertionError("this planner measures nothing")

    return PlanningTask(calls, zones, (), unasked, unasked, unasked)  # type: ignore[arg-type]


def test_the_stage_rule_reuses_rear_blocks_first_and_front_blocks_then() -> None:
    prices = {FRONT: 0.55, REAR: 0.45, "blocks[1:6]": 0.2}
    (plan,) = PLANNERS["stage"](task("blocks[1:6]", FRONT, REAR), prices, 8.0)
    assert [call for call, row in enumerate(plan.rows) if not row] == [0, 3, 6, 9]
    assert {zone for row in plan.rows[:6] for zone in row} == {REAR}
    assert {zone for row in plan.rows[6:] for zone in row} == {FRONT}
    assert plan.cost == pytest.approx(4 + 4 * 0.45 + 4 * 0.55)


def test_the_stage_rule_needs_both_halves_of_one_chain_and_a_budget_that_they_can_keep() -> None:
    both = {FRONT: 0.5, REAR: 0.5}
    assert PLANNERS["stage"](task(FRONT), {FRONT: 0.5}, 8.0) == []
    assert PLANNERS["stage"](task("deep1", "all"), {"deep1": 0.3, "all": 0.0}, 8.0) == []
    assert PLANNERS["stage"](task(FRONT, "blocks2[3:6]"), {FRONT: 0.5, "blocks2[3:6]": 0.5}, 8.0) == []
    assert PLANNERS["stage"](task(FRONT, REAR), both, 5.0) == []
    assert len(PLANNERS["stage"](task(FRONT, REAR), both, 6.5)) == 1


@pytest.mark.parametrize("name", ["taylor", "hermite"])
@pytest.mark.parametrize("limit", [3.0, 4.0, 6.0])
def test_forecasts_at_equal_distances_cost_what_they_may(name: str, limit: float) -> None:
    equal, early = PLANNERS[name](task("all"), {"all": 0.0}, limit)
    assert all(sum(not row for row in plan.rows) == limit == plan.cost for plan in (equal, early))
    assert not equal.rows[0]
    # With the second call computed all gaps have two calls to draw a line through.
    assert [not row for row in early.rows[:2]] == [True, True]
    assert all("reuse" not in row.values() for row in early.rows)
    assert any("reuse" in row.values() for row in equal.rows)


def test_forecasts_are_of_the_prediction_and_of_all_sublayers() -> None:
    plans = PLANNERS["taylor"](task("all", "deep1", SUBLAYERS), {"all": 0.0, "deep1": 0.1, SUBLAYERS: 0.1}, 4.0)
    assert {name for plan in plans for row in plan.rows for name in row} == {"all", SUBLAYERS}
    assert all(plan.cost <= 4.0 for plan in plans)


def test_best_plans_of_fewer_zones_are_proposed_beside_the_best_of_all() -> None:
    class Fronts(PlanningTask):
        def front(self, prices: Mapping[str, float]) -> list[Schedule]:
            def plan(cost: float) -> Schedule:
                rows: list[Any] = [{} for _ in range(self.calls)]
                rows[1] = dict.fromkeys(prices, f"reuse {cost}")
                return Schedule(tuple(rows), cost, 1 / cost)

            return [plan(3.0), plan(4.0), plan(5.0)]

    def unasked() -> None:
        raise AssertionError("this planner measures nothing")

    able = Fronts(12, ("all", "deep1", SUBLAYERS), (), unasked, unasked, unasked)  # type: ignore[arg-type]
    found = PLANNERS["joint"](able, {"all": 0.0, "deep1": 0.1, SUBLAYERS: 0.1}, 4.5)
    expected = [({*row[1]}, one.cost) for one in found if one.error is not None for row in [one.rows]]
    every = {"all", "deep1", SUBLAYERS}
    assert expected == [(every, 4.0), ({"all", "deep1"}, 4.0), ({"all"}, 4.0), (every, 3.0)]
    without = PLANNERS["joint"](able, {"all": 0.0, "deep1": 0.1}, 4.5)
    assert [({*one.rows[1]}, one.cost) for one in without if one.error is not None] == [
        ({"all", "deep1"}, 4.0),
        ({"all"}, 4.0),
        ({"all", "deep1"}, 3.0),
    ]


@pytest.mark.parametrize(("limit", "plans"), [(8.0, 1), (2.0, 0)])
def test_modules_have_no_plan_whose_computing_calls_are_further_apart_than_was_measured(
    limit: float, plans: int
) -> None:
    distance = torch.arange(12)[None, :] - torch.arange(12)[:, None]
    known = distance.double().triu(1).masked_fill(distance >= 4, torch.inf)
    modules = ("0.attn1", "0.ff")
    within = task(calls=12)
    within.modules, within.measure_drifts = modules, lambda names: dict.fromkeys(names, Drift(known, known))
    assert len(PLANNERS["blockwise"](within, dict.fromkeys(modules, 0.5), limit)) == plans
