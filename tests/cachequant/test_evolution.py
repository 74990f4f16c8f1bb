"""Evolution against all plans that there are."""

import importlib.util
import itertools
from collections.abc import Sequence

import pytest

from dcomp import UsageError
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.evolution import evolve
from dcomp.cachequant.plan import Actions

PRICES = {"all": 0.0, "deep1": 0.4}
CALLS = 6
EVERY_SECOND: list[Actions] = [{"all": "reuse"} if call % 2 else {} for call in range(CALLS)]


def harm(rows: Sequence[Actions]) -> float:
    """A made-up error: early calls matter more, and long gaps more than their length."""
    error, length = 0.0, 0
    for call, row in enumerate(rows):
        length = length + 1 if row else 0
        error += length**2 * (CALLS - call) * {"all": 1.0, "deep1": 0.3}.get(next(iter(row), ""), 0.0)
    return error


def cost_of(rows: Sequence[Actions]) -> float:
    return sum(PRICES[next(iter(row))] if row else 1.0 for row in rows)


def bred(evaluations: int = 200, seed: int = 0) -> list[Schedule]:
    return evolve(CALLS, PRICES, harm, [EVERY_SECOND], evaluations=evaluations, population=20, seed=seed)


def test_what_comes_out_is_a_front_and_true() -> None:
    front = bred()
    for one in front:
        assert not one.rows[0]
        assert one.error == harm(one.rows)
        assert one.cost == pytest.approx(cost_of(one.rows))
    assert [one.cost for one in front] == sorted({one.cost for one in front})
    assert [one.error for one in front] == sorted({one.error for one in front}, reverse=True)


def test_it_finds_nearly_the_best_of_all_plans() -> None:
    choices: list[Actions] = [{}, {"all": "reuse"}, {"deep1": "reuse"}]
    every = [[{}, *rest] for rest in itertools.product(choices, repeat=CALLS - 1)]
    front = bred()
    for budget in (3.0, 4.0, 5.0):
        best = min(harm(rows) for rows in every if cost_of(rows) <= budget)
        found = min(one.error or 0.0 for one in front if one.cost <= budget)
        assert best <= found <= 1.25 * best


def test_no_plan_is_followed_twice_and_none_is_worse_than_what_it_began_with() -> None:
    followed: list[tuple[str, ...]] = []

    def counted(rows: Sequence[Actions]) -> float:
        followed.append(tuple(next(iter(row), "") for row in rows))
        return harm(rows)

    front = evolve(CALLS, PRICES, counted, [EVERY_SECOND], evaluations=40, population=10)
    assert followed[0] == tuple(next(iter(row), "") for row in EVERY_SECOND)
    assert len(followed) == len(set(followed)) <= 40
    assert any(one.cost <= cost_of(EVERY_SECOND) and (one.error or 0.0) <= harm(EVERY_SECOND) for one in front)


def test_the_same_seed_gives_the_same_plans() -> None:
    assert bred(60) == bred(60)
    assert bred(60) != bred(60, seed=1)


def test_latents_that_are_not_finite_are_worse_than_all_others() -> None:
    def broken(rows: Sequence[Actions]) -> float:
        return float("nan") if any(rows) else 0.0

    front = evolve(CALLS, PRICES, broken, [[{}] * CALLS], evaluations=20, population=10)
    assert front[-1].rows == ({},) * CALLS
    assert all((one.error or 0.0) > 1e6 for one in front[:-1])


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="optuna is not installed"):
        bred(1)
