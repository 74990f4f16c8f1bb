"""The search by survivors, against all plans that there are."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcomp.cachequant.survivors import Survivor, search, thinned
from dcomp.cachequant.trials import Actions, Branch
from dcomp.calibrate.pipeline import open_pipeline
from tests.cachequant.test_trials import STEPS, alone, trials_of

MENU: list[Actions] = [{"all": "reuse"}, {"deep1": "reuse"}]
PRICES = {(): 1.0, ("all",): 0.0, ("deep1",): 0.4}


def price(actions: Actions) -> float:
    return PRICES[tuple(actions)]


def test_with_room_for_all_the_front_is_that_of_all_plans(folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of("UNet2DModel"))
    trials = trials_of(pipeline, ["all", "deep1"])
    with trials:
        found = search(trials, MENU, price, survivors=3**STEPS)
        few = search(trials, MENU, price, survivors=6)
    every = [Branch(({}, *rows)) for rows in itertools.product([{}, *MENU], repeat=STEPS - 1)]
    errors = [(sum(map(price, branch.rows)), alone(pipeline, trials, branch)) for branch in every[1:]]

    def best(cost: float) -> float:
        return min(error for other, error in errors if other <= cost + 1e-9)

    assert found[-1].cost == STEPS
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    assert found[0].cost == 1
    for one in found[:-1]:
        assert one.branch.error == pytest.approx(best(one.cost), rel=1e-3)
    # Of 3 at a time of 27 hardly one is near the end as bad as twice the best.
    for one in few[:-1]:
        assert one.branch.error < 1.3 * best(one.cost)
    assert few[0].cost < 0.5 * STEPS


def one(error: float, cost: float, age: int) -> Survivor:
    return Survivor(Branch(error=error), cost, age)


ANY = st.builds(one, st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9]), st.integers(1, 10).map(float), st.integers(0, 3))


@given(st.lists(ANY, min_size=1, max_size=40), st.integers(1, 12))
def test_who_goes_on_is_not_beaten_and_the_best_of_all_costs_are_there(found: list[Survivor], count: int) -> None:
    chosen = thinned(found, count, 10)
    assert 1 <= len(chosen) <= max(count, 1)
    assert all(one in found for one in chosen)
    assert not any(other.beats(one) for one in chosen for other in found)
    unbeaten = [one for one in found if not any(other.beats(one) for other in found)]
    assert len(chosen) == min(count, len(unbeaten))


def test_each_range_of_cost_keeps_its_best() -> None:
    dear = [one(0.001 * i, 9.0 - 0.01 * i, 0) for i in range(1, 30)]
    cheap = [one(0.5, 1.5, 0), one(0.4, 2.0, 0)]
    chosen = thinned([*dear, *cheap], 4, 10)
    assert {0.4, 0.001} <= {round(s.branch.error, 4) for s in chosen}


def test_to_beat_another_is_to_be_no_worse_in_anything_and_better_in_something() -> None:
    assert one(0.1, 1.0, 0).beats(one(0.1, 1.0, 1))
    assert not one(0.1, 1.0, 0).beats(one(0.1, 1.0, 0))
    assert not one(0.1, 1.0, 1).beats(one(0.2, 0.5, 0))
