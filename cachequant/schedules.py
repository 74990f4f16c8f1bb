"""Which of T calls compute, where K of them may: the rules of the literature, for one zone at a time.

All return ascending call indices, the first call always among them. A segment is a computing call with those after it
up to the next one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcomp import UsageError
from dcomp.cachequant.drift import Drift

_POWER, _POWER_STEP = 1.2, 0.02


class ScheduleError(UsageError):
    """A number of computing calls that a rule cannot place."""


@dataclass(frozen=True)
class ScheduleTask:
    """What a rule may look at.

    Attributes:
        calls: T.
        count: K.
        drift: returns that of the zone; it is measured for rules that look at it.
    """

    calls: int
    count: int
    drift: Callable[[], Drift]

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.calls:
            raise ScheduleError(
                f"{self.count} of {self.calls} calls cannot compute", remedy=f"Ask for 1 to {self.calls}."
            )


def uniform(task: ScheduleTask) -> list[int]:
    """Equal distances, as nearly as whole numbers allow. Source: Ma et al. 2024, DeepCache, section 3.3."""
    return [i * task.calls // task.count for i in range(task.count)]


def power(task: ScheduleTask, *, center: float = 0.0) -> list[int]:
    """Calls that lie denser around a center, by a power of their distance from it.

    The released code takes a fractional power of negative numbers and drops what is imaginary; here the sign is kept.

    Args:
        task: the numbers.
        center: as a part of the trajectory.

    Source: Ma et al. 2024, DeepCache, appendix (non-uniform 1:N).
    """
    middle, exponent = center * task.calls, _POWER
    while True:
        ends = [math.copysign(abs(x) ** (1 / exponent), x) for x in (-middle, task.calls - middle)]
        grid = [ends[0] + (ends[1] - ends[0]) * i / task.count for i in range(task.count)]
        found = {int(math.copysign(abs(x) ** exponent, x) + middle) for x in grid} | {0}
        if len(found) >= task.count or exponent <= 1:
            return sorted(found)[: task.count] if exponent > 1 else uniform(task)
        exponent -= _POWER_STEP


def partition(task: ScheduleTask) -> list[int]:
    """The ordered partition with the least sum of absolute drift, segments between half and twice the mean length.

    Without these bounds the costs, which do not know what a drift does to the picture, put all calls where tensors are
    large. Source: Liu et al. 2026, CacheQuant, section 3.2 and its released code.
    """
    mean = math.ceil(task.calls / task.count)
    return ordered_partition(task.drift().absolute, task.count, math.ceil(mean / 2), 2 * mean)


def cosine(task: ScheduleTask) -> list[int]:
    """The ordered partition with the least sum of cosine distances, without bounds.

    Source: Wang et al. 2025, DDT: Decoupled Diffusion Transformer, section 3.4.
    """
    return ordered_partition(task.drift().cosine, task.count, 1, task.calls)


def ordered_partition(cost: Tensor, count: int, shortest: int, longest: int) -> list[int]:
    """Cut T calls into segments so that the costs between each segment's first call and its others add up to the least.

    Args:
        cost: `[T, T]`, of reading call s in call t; infinite for what may not be.
        count: K, of segments.
        shortest: calls of a segment, at least; one that ends the trajectory may be shorter.
        longest: likewise at most.

    Raises:
        ScheduleError: there is no such partition.
    """
    calls = len(cost)
    within = cost.double().triu(1).cumsum(1)  # [s, t]: of a segment that starts at s and whose last call is t
    best = torch.full((count + 1, calls + 1), torch.inf, dtype=torch.float64)
    start = torch.zeros((count + 1, calls + 1), dtype=torch.int64)
    best[0, 0] = 0
    for k in range(1, count + 1):
        for end in range(1, calls + 1):
            least = 1 if end == calls else shortest
            firsts = torch.tensor(range(max(0, end - longest), end - least + 1), dtype=torch.int64)
            if len(firsts):
                totals = best[k - 1, firsts] + within[firsts, end - 1]
                place = int(totals.argmin())
                best[k, end], start[k, end] = totals[place], firsts[place]
    if not torch.isfinite(best[count, calls]):
        raise ScheduleError(
            f"{calls} calls cannot be cut into {count} segments of {shortest} to {longest}",
            remedy="Ask for more computing calls.",
        )
    found, end = [], calls
    for k in range(count, 0, -1):
        end = int(start[k, end])
        found.append(end)
    return found[::-1]


SCHEDULES: dict[str, Callable[[ScheduleTask], list[int]]] = {
    "uniform": uniform,
    "power": power,
    "partition": partition,
    "cosine": cosine,
}
"""Name -> rule."""
