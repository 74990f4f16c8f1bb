"""Weights of predictors: exact where they promise it, and the formulas of their papers where those are wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcomp.cachequant.predict import PREDICTORS

GAPS = st.floats(0.2, 5)
NUMBERS = st.floats(-10, 10)


def predicted(name: str, places: list[float], place: float, function) -> float:
    rule = PREDICTORS[name]
    nodes = places[-rule.nodes :]
    return sum(weight * function(node) for weight, node in zip(rule.weights(nodes, place), nodes, strict=True))


@given(gaps=st.tuples(GAPS, GAPS, GAPS), down=st.booleans(), c=st.tuples(NUMBERS, NUMBERS, NUMBERS))
@pytest.mark.parametrize(("name", "degree"), [("reuse", 0), ("linear", 1), ("quadratic", 2)])
def test_extrapolation_is_exact_up_to_its_degree_at_any_distances(name, degree, gaps, down, c) -> None:
    sign = -1 if down else 1
    places = [0.0, sign * gaps[0], sign * (gaps[0] + gaps[1])]
    place = places[-1] + sign * gaps[2]

    def polynomial(x: float) -> float:
        return sum(c[power] * x**power for power in range(degree + 1))

    assert predicted(name, places, place, polynomial) == pytest.approx(polynomial(place), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name", PREDICTORS)
@given(gaps=st.tuples(GAPS, GAPS, GAPS))
def test_what_does_not_change_is_predicted_as_it_is(name, gaps) -> None:
    places = [0.0, gaps[0], gaps[0] + gaps[1]]
    assert predicted(name, places, places[-1] + gaps[2], lambda x: 1.0) == pytest.approx(1)


def test_order_one_is_the_same_on_calls_at_equal_distances() -> None:
    nodes = [4.0, 8.0]
    assert PREDICTORS["taylor1"].weights(nodes, 9.0) == pytest.approx(PREDICTORS["linear"].weights(nodes, 9.0))
    # Half of the step: sigma is 0.5.
    assert PREDICTORS["hermite1"].weights(nodes, 10.0) == pytest.approx(PREDICTORS["linear"].weights(nodes, 9.0))


def test_taylor_of_order_two_misses_a_plain_quadratic_that_the_exact_one_meets() -> None:
    # x^2 / 2 at calls 0, 4, 8, where call 9 is 40.5: its second difference is taken between calls, not at the last.
    nodes, square = [0.0, 4.0, 8.0], lambda x: x * x / 2
    assert predicted("quadratic", nodes, 9.0, square) == pytest.approx(40.5)
    slope, older = (square(8) - square(4)) / 4, (square(4) - square(0)) / 4
    by_hand = square(8) + slope + (slope - older) / 4 / 2
    assert predicted("taylor2", nodes, 9.0, square) == pytest.approx(by_hand) == pytest.approx(38.5)


def test_hermite_of_order_two_is_the_formula_of_its_paper() -> None:
    nodes = [0.0, 4.0, 8.0]
    first, second = (64 - 16) / 4, ((64 - 16) / 4 - (16 - 0) / 4) / 4
    x = 0.5 * 2
    by_hand = 64 + first * 0.5 * 2 * x + second * 0.5**2 * (4 * x * x - 2) / 2
    assert predicted("hermite2", nodes, 10.0, lambda n: n * n) == pytest.approx(by_hand)
