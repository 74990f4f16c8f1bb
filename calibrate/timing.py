"""Time two functions against each other on a machine whose speed drifts.

They run in turns (A B, B A, ...) in one process, so that whatever else the machine does meets both alike.
"""

import math
import time
from collections.abc import Callable

WARM_UPS = 2
MIN_SECONDS = 0.2  # of one timed run: below it the timer and the scheduler's whims weigh too much
MAX_LOOPS = 200


def time_in_turns(
    original: Callable[[], object],
    compressed: Callable[[], object],
    repeats: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    warm_ups: int = WARM_UPS,
    min_seconds: float = MIN_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Time two functions in turns, `repeats` pairs, and return seconds a call of each pair.

    Which one goes first alternates, so that a slow drift of the machine's speed favours neither. Functions that are
    done sooner than `min_seconds` are called several times in a run, both equally often.
    """
    functions = (original, compressed)
    quickest = math.inf
    for _ in range(warm_ups):
        quickest = min(quickest, *(_seconds(function, 1, clock) for function in functions))
    loops = min(MAX_LOOPS, max(1, math.ceil(min_seconds / max(quickest, 1e-9))))
    pairs = []
    for number in range(repeats):
        progress(number, repeats)
        order = (0, 1) if number % 2 == 0 else (1, 0)
        taken = {side: _seconds(functions[side], loops, clock) / loops for side in order}
        pairs.append((taken[0], taken[1]))
    progress(repeats, repeats)
    return pairs


def _seconds(function: Callable[[], object], loops: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(loops):
        function()
    return clock() - started
