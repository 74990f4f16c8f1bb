"""Who decides about the calls of a trajectory: a plan, or a search that tries things out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dcomp.cachequant.plan import CachePlan, Prediction, nearest_call
from dcomp.cachequant.zones import Zone


@dataclass(frozen=True)
class CallOrder:
    """What is to be done in one call of the denoiser.

    Attributes:
        predictions: zone -> what replaces it; all others run.
        keep: zones whose tensors will be read later.
        forget: (zone, call) that nothing reads after this call.
        unrounded: whether quantized layers multiply their inputs as they are.
    """

    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    forget: tuple[tuple[str, int], ...] = ()
    unrounded: bool = False


class Guide(Protocol):
    """Whoever decides about calls: a plan, or a search that tries things out."""

    zones: tuple[Zone, ...]

    def place(self, timestep: float, before: int | None) -> int | None:
        """Return the index of the call with this timestep that follows call `before`; None if there is none."""

    def order(self, call: int) -> CallOrder:
        """Return what is to be done in a call."""


class PlanGuide:
    """Lets a plan decide."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan, self.zones = plan, plan.zones
        gone: dict[int, list[tuple[str, int]]] = {}
        for zone, reads in plan.last_reads.items():
            for made, last in reads.items():
                gone.setdefault(last, []).append((zone, made))
        self._orders = [
            CallOrder(
                plan.predictions[call],
                frozenset(zone for zone, reads in plan.last_reads.items() if call in reads),
                tuple(gone.get(call, ())),
                call in plan.unrounded,
            )
            for call in range(plan.calls)
        ]

    def place(self, timestep: float, before: int | None) -> int | None:
        """The next call of the plan, else a later one that has this timestep: a trajectory may start late."""
        return nearest_call(self.plan.timesteps, timestep, 0 if before is None else before + 1)

    def order(self, call: int) -> CallOrder:
        """What the plan's table says."""
        return self._orders[call]
