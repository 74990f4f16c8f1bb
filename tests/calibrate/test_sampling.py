import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.calibrate.sampling import Sampling, SamplingError, spread


def mass(total: int, call: int, mu: float, sigma: float) -> float:
    """Probability that a truncated normal place falls on a call, which are counted from the noisy end."""

    def below(edge: float) -> float:
        return 0.5 * (1 + math.erf((edge / total - mu) / (sigma * math.sqrt(2))))

    return (below(total - call) - below(total - call - 1)) / (below(total) - below(0))


@given(
    total=st.integers(1, 60),
    count=st.integers(1, 70),
    mu=st.floats(0, 1),
    sigma=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50)
def test_calls_are_distinct_ascending_and_within_the_trajectory(
    total: int, count: int, mu: float, sigma: float, seed: int
) -> None:
    kept = Sampling("normal", mu, sigma).choose(total, count, seed)
    assert kept == sorted(set(kept))
    assert len(kept) == min(total, count)
    assert set(kept) <= set(range(total))
    assert kept == Sampling("normal", mu, sigma).choose(total, count, seed)


def test_uniform_is_spread() -> None:
    assert Sampling().choose(20, 6, seed=5) == spread(20, 6)


def test_one_call_is_drawn_from_the_truncated_normal_distribution() -> None:
    total, draws = 8, 4000
    found = Counter(Sampling("normal", 0.4, 0.4).choose(total, 1, seed)[0] for seed in range(draws))
    for call in range(total):
        p = mass(total, call, 0.4, 0.4)
        assert abs(found[call] / draws - p) < 4 * math.sqrt(p * (1 - p) / draws)
    # What moves outside draws to the ends has 16 % + 14 % at the last call.
    assert found[total - 1] / draws < 0.15


def test_two_calls_are_drawn_one_after_the_other_without_repeating() -> None:
    total, draws = 4, 4000
    p = [mass(total, call, 0.6, 0.2) for call in range(total)]
    found = Counter(tuple(Sampling("normal", 0.6, 0.2).choose(total, 2, seed)) for seed in range(draws))
    for a in range(total):
        for b in range(a + 1, total):
            pair = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
            assert abs(found[a, b] / draws - pair) < 4 * math.sqrt(pair * (1 - pair) / draws)


def test_mu_counts_from_the_picture() -> None:
    assert Sampling("normal", 0.0, 1e-3).choose(20, 3) == [17, 18, 19]
    assert Sampling("normal", 1.0, 1e-3).choose(20, 3) == [0, 1, 2]
    assert Sampling("normal", 0.5, 1e-3).choose(21, 3) == [9, 10, 11]


@pytest.mark.parametrize("values", [{"kind": "best"}, {"mu": -0.1}, {"mu": math.nan}, {"sigma": 0.0}, {"sigma": "1"}])
def test_an_impossible_sampling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SamplingError):
        Sampling(**values)


def test_sampling_survives_json() -> None:
    one = Sampling("normal", 0.3, 0.2)
    assert Sampling.from_dict(one.to_dict()) == one
    with pytest.raises(SamplingError, match="Not a sampling"):
        Sampling.from_dict({"name": "normal"})
