"""The best schedules, against all schedules that there are."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.cachequant.dynamic import GRID, Schedule, best_schedules
from dcomp.cachequant.gap_costs import GapCosts, Skip

ZONES = ("all", "deep1")


@st.composite
def costs(draw: st.DrawFn) -> GapCosts:
    calls, longest = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    value = st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.3, 0.5])
    skips: dict[str, list[dict[tuple[int, ...], Skip]]] = {zone: [{} for _ in range(calls)] for zone in ZONES}
    for zone, s in itertools.product(ZONES, range(calls)):
        for t in range(s + 1, min(calls, s + longest + 1)):
            skips[zone][t][s,] = Skip(draw(value), ((s, 1.0),))
            for r in range(max(0, s - longest - 1), s):
                if draw(st.booleans()):
                    skips[zone][t][r, s] = Skip(draw(value), ((r, -1.0), (s, 2.0)))
    sensitivities = tuple(draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(calls))
    rounding = tuple(draw(value) for _ in range(calls)) if draw(st.booleans()) else None
    return GapCosts(calls, longest, skips, sensitivities, rounding)


def every_schedule(
    given_costs: GapCosts, prices: dict[str, float], unrounded: float | None = None
) -> Iterator[tuple[float, float]]:
    """Cost and loss of all choices of calls that compute, and at what precision, with all of zones for the others."""
    total = given_costs.calls
    for count in range(1, total + 1):
        for rest in itertools.combinations(range(1, total), count - 1):
            computing = [0, *rest, total]
            skipped = [call for call in range(total) if call not in computing]
            for zones in itertools.product(ZONES, repeat=len(skipped)):
                chosen = dict(zip(skipped, zones, strict=True))
                loss, possible = 0.0, True
                for i in range(count):
                    start, end = computing[i], computing[i + 1]
                    before = computing[i - 1] if i else None
                    found = [given_costs.of_call(chosen[t], before, start, t) for t in range(start + 1, end)]
                    possible = possible and None not in found
                    loss += sum(skip.error for skip in found if skip) ** 2
                if not possible:
                    continue
                cost = count + sum(prices[zone] for zone in zones)
                rounds = [given_costs.of_rounding(computing[i], computing[i + 1]) ** 2 for i in range(count)]
                for exact in itertools.product((False, True) if unrounded else (False,), repeat=count):
                    left = sum(error for error, is_exact in zip(rounds, exact, strict=True) if not is_exact)
                    yield cost + sum(exact) * ((unrounded or 1) - 1), loss + left


def error_of(schedule: Schedule) -> float:
    assert schedule.error is not None
    return schedule.error


@given(costs(), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([None, 1.0, 1.3, 2.5]))
@settings(max_examples=150)
def test_the_front_is_that_of_all_schedules(given_costs: GapCosts, deep: float, unrounded: float | None) -> None:
    prices = {"all": 0.0, "deep1": deep}
    found = best_schedules(given_costs, prices, unrounded=unrounded, grid=0.0)
    everything = list(every_schedule(given_costs, prices, unrounded))
    for one in found:
        least = min(loss for cost, loss in everything if cost <= one.cost + 1e-9)
        assert error_of(one) ** 2 == pytest.approx(least, abs=1e-12)
    for cost, loss in everything:
        assert min(error_of(one) ** 2 for one in found if one.cost <= cost + 1e-9) <= loss + 1e-12
    assert [one.cost for one in found] == sorted({one.cost for one in found})


@given(costs(), st.sampled_from([None, 1.4]))
@settings(max_examples=60)
def test_rows_say_what_was_paid_for(given_costs: GapCosts, unrounded: float | None) -> None:
    prices = {"all": 0.0, "deep1": 0.3}
    for one in best_schedules(given_costs, prices, unrounded=unrounded):
        paid = sum(1.0 if not row else prices[next(iter(row))] for row in one.rows)
        assert one.cost == pytest.approx(paid + (0.4 * len(one.unrounded) if unrounded else 0))
        assert all(not one.rows[call] for call in one.unrounded)
        assert unrounded or not one.unrounded
        assert len(one.rows) == given_costs.calls
        assert not one.rows[0]
        loss, computing = 0.0, [call for call, row in enumerate(one.rows) if not row]
        for i, start in enumerate(computing):
            end = computing[i + 1] if i + 1 < len(computing) else given_costs.calls
            before, gap = computing[i - 1] if i else None, 0.0
            for call in range(start + 1, end):
                ((zone, reads),) = one.rows[call].items()
                skip = given_costs.of_call(zone, before, start, call)
                assert skip is not None
                assert skip.reads == reads
                gap += skip.error
            loss += gap**2
            if start not in one.unrounded:
                loss += given_costs.of_rounding(start, end) ** 2
        assert error_of(one) ** 2 == pytest.approx(loss, abs=1e-12)


@given(costs())
@settings(max_examples=60)
def test_a_coarse_grid_costs_little(given_costs: GapCosts) -> None:
    prices = {"all": 0.0, "deep1": 0.3}
    exact, coarse = (best_schedules(given_costs, prices, grid=grid) for grid in (0.0, 0.05))
    for one in exact:
        near = min(error_of(other) for other in coarse if other.cost <= one.cost + 0.05 * given_costs.calls)
        assert near <= error_of(one) + 1e-9
    assert coarse[0].cost == exact[0].cost
    assert len(coarse) <= len(exact)
    assert GRID < 0.05


def test_each_call_of_a_gap_has_the_zone_that_is_worth_its_price() -> None:
    def skip(error: float, *nodes: int) -> dict[tuple[int, ...], Skip]:
        return {nodes: Skip(error, tuple((node, 1 / len(nodes)) for node in nodes))}

    skips = {"all": [{}, skip(0.1, 0), skip(0.5, 0)], "deep1": [{}, skip(0.09, 0), skip(0.2, 0)]}
    front = best_schedules(GapCosts(3, 2, skips, (1.0,) * 3), {"all": 0.0, "deep1": 0.3}, grid=0.0)
    assert [(round(one.cost, 6), [next(iter(row), None) for row in one.rows]) for one in front] == [
        (1.0, [None, "all", "all"]),
        (1.3, [None, "all", "deep1"]),
        (1.6, [None, "deep1", "deep1"]),
        (2.0, [None, "all", None]),
        (2.3, [None, "deep1", None]),
        (3.0, [None, None, None]),
    ]
    assert error_of(front[1]) == pytest.approx(0.3)


def test_a_call_whose_error_is_repeated_is_the_first_to_leave_its_inputs_unrounded() -> None:
    skips = {"all": [{}, {}, {(1,): Skip(0.0, ((1, 1.0),))}, {(1,): Skip(0.0, ((1, 1.0),))}]}
    costs = GapCosts(4, 2, skips, (1.0,) * 4, (0.1,) * 4)
    front = best_schedules(costs, {"all": 0.0}, unrounded=1.5, grid=0.0)
    assert [(round(one.cost, 6), sorted(one.unrounded)) for one in front if one.rows[2] and one.rows[3]] == [
        (2.0, []),
        (2.5, [1]),
        (3.0, [0, 1]),
    ]
    assert error_of(front[0]) == pytest.approx((0.1**2 + 0.3**2) ** 0.5)
    assert error_of(front[1]) == pytest.approx(0.1)
