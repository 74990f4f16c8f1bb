"""A schedule of its own for each attention and feed-forward of a transformer, joined so that errors do not travel on.

Letters: T calls, K of them compute.

Source: Ji et al. 2026, Block-wise Adaptive Caching (BAC): partitions by cosine for each block, then the bubbling union.
Theirs lets the union compute more than was asked for; who plans for a budget must ask for less.
"""

from collections.abc import Collection, Mapping
from functools import partial

import torch

from dcomp.cachequant.drift import Drift
from dcomp.cachequant.schedules import ScheduleTask, cosine

VOLATILE = 5  # modules that refresh with those after them


def calls_of_modules(drifts: Mapping[str, Drift], feed_forwards: Collection[str], count: int) -> dict[str, set[int]]:
    """Return for each module the calls in which it computes, the first one among them.

    A feed-forward that refreshes reads what modules before it have reused, and keeps their error. So the most volatile
    modules also compute wherever a feed-forward after them does.

    Args:
        drifts: of the modules, in the order in which they run.
        feed_forwards: those of them that are one.
        count: K of each module, before the union.

    Raises:
        ScheduleError: K is not between 1 and T.
    """
    names = [*drifts]
    found = {
        name: {*cosine(ScheduleTask(len(drift.cosine), count, partial(drifts.__getitem__, name)))}
        for name, drift in drifts.items()
    }
    own = {name: frozenset(calls) for name, calls in found.items()}
    for name in sorted(names, key=lambda name: -volatility(drifts[name]))[:VOLATILE]:
        after = names[names.index(name) + 1 :]
        found[name] |= {call for other in after if other in feed_forwards for call in own[other]}
    return found


def volatility(drift: Drift) -> float:
    """Return the mean distance between two calls, of those that are known."""
    known = drift.absolute[torch.triu(torch.isfinite(drift.absolute), 1)]
    return float(known.mean()) if len(known) else 0.0
