"""Schedules of single modules: the partition of each, and the union with later feed-forwards."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dcomp.cachequant.blockwise import VOLATILE, calls_of_modules, volatility
from dcomp.cachequant.drift import Drift
from dcomp.cachequant.schedules import ordered_partition


def drift_of(calls: int, seed: int, scale: float = 1.0) -> Drift:
    values = torch.rand(calls, calls, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Drift(scale * values.triu(1), values.triu(1))


def jump(calls: int, at: int, scale: float = 1.0) -> Drift:
    """A module whose output changes in one call only."""
    later, earlier = torch.arange(calls)[None, :] >= at, torch.arange(calls)[:, None] < at
    cost = (later & earlier).double()
    return Drift(scale * cost, cost)


def test_each_module_refreshes_where_it_changes_and_volatile_ones_with_feed_forwards_after_them() -> None:
    drifts = {"0.attn": jump(8, 2, 9.0), "0.ff": jump(8, 5, 0.1), "1.attn": jump(8, 3, 9.0), "1.ff": jump(8, 6, 0.1)}
    quiet = {f"{number}.attn": jump(8, 4, 1.0) for number in range(2, 2 + VOLATILE - 2)}
    found = calls_of_modules({**drifts, **quiet}, {"0.ff", "1.ff"}, 2)
    assert found["0.attn"] == {0, 2, 5, 6}
    assert found["1.attn"] == {0, 3, 6}
    assert found["0.ff"] == {0, 5}
    assert found["1.ff"] == {0, 6}
    assert all(found[name] == {0, 4} for name in quiet)  # volatile too, and after every feed-forward


@given(st.integers(3, 9), st.integers(1, 9), st.integers(1, 8), st.integers(0, 99))
def test_a_refreshed_feed_forward_reads_volatile_modules_that_refresh_too(
    calls: int, count: int, blocks: int, seed: int
) -> None:
    count = min(count, calls)
    names = [f"{block}.{kind}" for block in range(blocks) for kind in ("attn", "ff")]
    drifts = {name: drift_of(calls, seed + place, 1 + place % 5) for place, name in enumerate(names)}
    feed_forwards = {name for name in names if name.endswith("ff")}
    found = calls_of_modules(drifts, feed_forwards, count)
    own = {name: {*ordered_partition(drifts[name].cosine, count, 1, calls)} for name in names}
    volatile = sorted(names, key=lambda name: -volatility(drifts[name]))[:VOLATILE]
    for place, name in enumerate(names):
        expected = set(own[name])
        if name in volatile:
            expected |= {call for other in names[place + 1 :] if other in feed_forwards for call in own[other]}
        assert found[name] == expected
        assert 0 in found[name]


def test_distances_that_were_not_measured_do_not_count_as_volatile() -> None:
    drift = Drift(torch.tensor([[0.0, 1.0, torch.inf], [0, 0, 3], [0, 0, 0]]), torch.zeros(3, 3))
    assert volatility(drift) == 2.0
    assert volatility(Drift(torch.zeros(1, 1), torch.zeros(1, 1))) == 0.0
