"""The best schedules, against all schedules that there are."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.cachequant.dynamic import best_schedules
from dcomp.cachequant.gap_costs import GapCosts, Way

REUSE, LINE, DEEP = ("all", "reuse"), ("all", "linear"), ("deep1", "reuse")
WAYS: list[Way] = [REUSE, LINE, DEEP]


@st.composite
def costs(draw: st.DrawFn) -> GapCosts:
    calls, longest = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    value = st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.3, 0.5])
    errors: dict[Way, dict[tuple[int, ...], dict[int, float]]] = {way: {} for way in WAYS}
    for s in range(calls):
        skipped = range(s + 1, min(calls, s + longest + 1))
        if not skipped:
            continue
        for way in (REUSE, DEEP):
            errors[way][s,] = {t: draw(value) for t in skipped}
        for r in range(max(0, s - longest - 1), s):
            errors[LINE][r, s] = {t: draw(value) for t in skipped}
    return GapCosts(calls, longest, errors, (1.0,) * calls)


def every_schedule(given_costs: GapCosts, prices: dict[Way, float]) -> Iterator[tuple[float, float]]:
    """Cost and loss of all choices of calls that compute, each with all choices of ways for its gaps."""
    total = given_costs.calls
    for count in range(1, total + 1):
        for rest in itertools.combinations(range(1, total), count - 1):
            computing = [0, *rest, total]
            for ways in itertools.product(WAYS, repeat=count):
                cost, loss, possible = float(count), 0.0, True
                for i, way in enumerate(ways):
                    start, end = computing[i], computing[i + 1]
                    if end - start - 1 > given_costs.longest:
                        possible = False
                    elif end - start > 1:
                        gap = given_costs.of_gap(way, computing[i - 1] if i else None, start, end)
                        possible = possible and gap is not None
                        loss += (gap or 0.0) ** 2
                        cost += prices[way] * (end - start - 1)
                if possible:
                    yield cost, loss


@given(costs(), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=150, deadline=None)
def test_the_front_is_that_of_all_schedules(given_costs: GapCosts, deep: float) -> None:
    prices = {REUSE: 0.0, LINE: 0.0, DEEP: deep}
    found = best_schedules(given_costs, prices, grid=0.0)
    everything = list(every_schedule(given_costs, prices))
    for one in found:
        least = min(loss for cost, loss in everything if cost <= one.cost + 1e-9)
        assert one.error**2 == pytest.approx(least, abs=1e-12)
    for cost, loss in everything:
        assert min(one.error**2 for one in found if one.cost <= cost + 1e-9) <= loss + 1e-12
    assert [one.cost for one in found] == sorted({one.cost for one in found})


@given(costs())
@settings(max_examples=60, deadline=None)
def test_rows_say_what_was_paid_for(given_costs: GapCosts) -> None:
    prices = {REUSE: 0.0, LINE: 0.0, DEEP: 0.3}
    for one in best_schedules(given_costs, prices):
        price = sum(1.0 if not row else prices[next(iter(row.items()))] for row in one.rows)
        assert one.cost == pytest.approx(price)
        assert len(one.rows) == given_costs.calls
        assert not one.rows[0]
        gaps = [sum(1 for _ in run) for empty, run in itertools.groupby(one.rows, key=lambda row: not row) if not empty]
        assert max(gaps, default=0) <= given_costs.longest


@given(costs())
@settings(max_examples=60, deadline=None)
def test_a_coarse_grid_costs_little(given_costs: GapCosts) -> None:
    prices = {REUSE: 0.0, LINE: 0.0, DEEP: 0.3}
    exact, coarse = (best_schedules(given_costs, prices, grid=grid) for grid in (0.0, 0.05))
    for one in exact:
        near = min(other.error for other in coarse if other.cost <= one.cost + 0.05 * given_costs.calls)
        assert near <= one.error + 1e-9
    assert len(coarse) <= len(exact)


def test_a_line_needs_two_calls_before() -> None:
    errors: dict[Way, dict[tuple[int, ...], dict[int, float]]] = {
        REUSE: {(0,): {1: 0.5}, (1,): {2: 0.5}},
        LINE: {(0, 1): {2: 0.1}},
        DEEP: {},
    }
    found = best_schedules(GapCosts(3, 1, errors, (1.0,) * 3), {REUSE: 0.0, LINE: 0.0}, grid=0.0)
    assert [(one.cost, one.rows) for one in found] == [
        (2.0, ({}, {}, {"all": "linear"})),
        (3.0, ({}, {}, {})),
    ]
    assert found[0].error == pytest.approx(0.1)
