"""The cache plan: for every denoiser call of a trajectory, which zones are predicted instead of computed, and how.

A plan is a table (call, zone) -> name of a predictor, or calls with their weights; what is not in it is computed.
Everything else follows from the table: the calls that a name stands for, and how long a tensor must be kept. So it can
be checked before a tensor exists, and every schedule of the literature is one. Letters: T calls of the trajectory.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from dcomp import UsageError
from dcomp.cachequant.correction import Correction
from dcomp.cachequant.predict import PREDICTORS
from dcomp.cachequant.tensors import weighted
from dcomp.cachequant.zones import Zone

Reads = tuple[tuple[int, float], ...]
"""Calls before, ascending, each with the weight of what it computed."""
Action = str | Reads
"""What replaces a zone: the name of a predictor, which reads the last calls that computed the zone, or what is read."""
Actions = Mapping[str, Action]
"""Of one call: zone -> what replaces it."""

VERSION = 1
MAX_CALLS, MAX_ZONES, MAX_READS, MAX_WEIGHT = 10_000, 256, 8, 1e3
_RESTART = "Make the plan again with `dcomp search-schedule`."


class PlanError(UsageError):
    """A plan that contradicts itself, usually from a file that was edited."""


@dataclass(frozen=True)
class Prediction:
    """What replaces a zone in one call.

    Attributes:
        calls: whose tensors are read, ascending.
        weights: of these.
        correction: of their sum.
    """

    calls: tuple[int, ...]
    weights: tuple[float, ...]
    correction: Correction | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return what stands for a tensor, from those of the calls."""
        total = weighted(tensors, self.weights)
        return total if self.correction is None else self.correction.apply(total)


@dataclass(frozen=True)
class CachePlan:
    """Which zones are predicted in which calls.

    Attributes:
        zones: that actions may name. One may lie within another, and is then not run where the other is predicted.
        timesteps: of the T calls in order, as the denoiser is told them; several calls may have the same one.
        places: of the T calls on the axis of extrapolation, strictly monotonic, such as their log-SNR.
        actions: of the T calls. The first has none.
        contexts: denoiser calls that guidance makes at each of the T, one after another.
        unrounded: calls in which quantized layers multiply their inputs as they are: slower, and nearer to float.
        corrections: (call, zone) -> what is done to what is predicted there.
    """

    zones: tuple[Zone, ...]
    timesteps: tuple[float, ...]
    places: tuple[float, ...]
    actions: tuple[Actions, ...]
    contexts: int = 1
    unrounded: frozenset[int] = frozenset()
    corrections: Mapping[tuple[int, str], Correction] = field(default_factory=dict)
    _by_name: dict[str, Zone] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {zone.name: zone for zone in self.zones})
        self._check()

    @property
    def calls(self) -> int:
        """T."""
        return len(self.timesteps)

    def computes(self, call: int, zone: str) -> bool:
        """Whether all that is kept of a zone is computed in a call, be it from predictions inside the zone."""
        own = self._by_name[zone]
        return not any(self._by_name[name].silences(own) for name in self.actions[call])

    @cached_property
    def predictions(self) -> tuple[dict[str, Prediction], ...]:
        """For each call: zone -> what replaces it."""
        found: list[dict[str, Prediction]] = []
        computed: dict[str, list[int]] = {zone.name: [] for zone in self.zones}
        for call, actions in enumerate(self.actions):
            row = {}
            for zone, action in actions.items():
                row[zone] = replace(
                    self._prediction(action, computed[zone], call), correction=self.corrections.get((call, zone))
                )
            found.append(row)
            for zone in computed:
                if self.computes(call, zone):
                    computed[zone].append(call)
        return tuple(found)

    def _prediction(self, action: Action, computed: Sequence[int], call: int) -> Prediction:
        if not isinstance(action, str):
            return Prediction(tuple(read for read, _ in action), tuple(weight for _, weight in action))
        rule = PREDICTORS[action]
        nodes = computed[-rule.nodes :]
        axis: Sequence[float] = range(self.calls) if rule.by_call else self.places
        return Prediction(tuple(nodes), rule.weights([axis[node] for node in nodes], axis[call]))

    @cached_property
    def last_reads(self) -> dict[str, dict[int, int]]:
        """Zone -> computing call -> the last call that reads what it computed; those that nobody reads are missing."""
        reads: dict[str, dict[int, int]] = {zone.name: {} for zone in self.zones}
        for call, row in enumerate(self.predictions):
            for zone, prediction in row.items():
                reads[zone].update(dict.fromkeys(prediction.calls, call))
        return reads

    def peak_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return the most memory that kept tensors take at a time.

        Args:
            sizes: zone -> bytes of what is kept of one call.
        """

        def during(call: int) -> int:
            return sum(
                sizes[zone] * sum(made <= call <= last for made, last in reads.items())
                for zone, reads in self.last_reads.items()
            )

        return self.contexts * max(map(during, range(self.calls)))

    def computed_calls(self, zone: str) -> int:
        """Return in how many of the T calls a zone runs."""
        return sum(self.computes(call, zone) for call in range(self.calls))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        corrections: dict[int, dict[str, Any]] = {}
        for (call, zone), correction in self.corrections.items():
            corrections.setdefault(call, {})[zone] = correction.to_dict()
        return {
            "version": VERSION,
            "contexts": self.contexts,
            "zones": [zone.to_dict() for zone in self.zones],
            "calls": [
                {
                    "timestep": timestep,
                    "place": place,
                    **({"predict": dict(actions)} if actions else {}),
                    **({"correct": corrections[call]} if call in corrections else {}),
                    **({"unrounded": True} if call in self.unrounded else {}),
                }
                for call, (timestep, place, actions) in enumerate(
                    zip(self.timesteps, self.places, self.actions, strict=True)
                )
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote, from a file that may have been edited.

        Raises:
            PlanError: something is missing, unknown, out of bounds or contradicts something else.
        """
        _require(isinstance(data, dict) and set(data) == {"version", "contexts", "zones", "calls"}, "its fields")
        _require(data["version"] == VERSION, f"version {VERSION}, which this dcomp reads")
        zones, calls = data["zones"], data["calls"]
        _require(isinstance(zones, list) and len(zones) <= MAX_ZONES, "the list of zones")
        _require(isinstance(calls, list) and 0 < len(calls) <= MAX_CALLS, "the list of calls")
        for number, call in enumerate(calls):
            keys = {"timestep", "place", "predict", "correct", "unrounded"}
            _require(isinstance(call, dict) and {"timestep", "place"} <= set(call) <= keys, f"call {number}")
            _require(isinstance(call.get("predict", {}), dict), f"the predictions of call {number}")
            _require(isinstance(call.get("correct", {}), dict), f"the corrections of call {number}")
            _require(call.get("unrounded", True) is True, f"the inputs of call {number}")
        return cls(
            tuple(Zone.from_dict(zone) for zone in zones),
            tuple(call["timestep"] for call in calls),
            tuple(call["place"] for call in calls),
            tuple({zone: _action(action) for zone, action in call.get("predict", {}).items()} for call in calls),
            data["contexts"],
            frozenset(number for number, call in enumerate(calls) if "unrounded" in call),
            {
                (number, zone): _correction(data, number)
                for number, call in enumerate(calls)
                for zone, data in call.get("correct", {}).items()
            },
        )

    def to_json(self) -> str:
        """Return the plan as text of a file."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def _check(self) -> None:
        numbers = (*self.timesteps, *self.places)
        _require(
            0 < self.calls <= MAX_CALLS and len(self.places) == len(self.actions) == self.calls,
            "as many places and actions as calls",
        )
        _require(
            all(type(n) in (int, float) and math.isfinite(n) for n in numbers), "timesteps and places that are numbers"
        )
        _require(self.unrounded <= {*range(self.calls)}, "the calls whose inputs are not rounded")
        for call, zone in self.corrections:
            known = 0 <= call < self.calls and zone in self.actions[call]
            _require(known, f"a prediction of {str(zone)[:40]!r} in call {call}, which has a correction")
        _require(type(self.contexts) is int and 1 <= self.contexts <= 16, "1 to 16 contexts")
        _require(len(self._by_name) == len(self.zones) <= MAX_ZONES, "zones of different names")
        steps = [after - before for before, after in zip(self.places, self.places[1:], strict=False)]
        _require(all(s > 0 for s in steps) or all(s < 0 for s in steps), "places in a strict order")
        computed: dict[str, list[int]] = {name: [] for name in self._by_name}
        for call, actions in enumerate(self.actions):
            for zone, action in actions.items():
                _require(zone in computed, f"the zone {str(zone)[:40]!r} that call {call} names")
                _check_action(action, computed[zone], f"{zone!r} before call {call}")
            for zone in computed:
                if self.computes(call, zone):
                    computed[zone].append(call)


def nearest_call(timesteps: Sequence[float], timestep: float, start: int = 0, tolerance: float = 1e-3) -> int | None:
    """Return the first call from `start` on that has a timestep, up to a tolerance relative to it; None without one."""
    for call in range(start, len(timesteps)):
        if abs(timesteps[call] - timestep) <= tolerance * max(1e-6, abs(timestep)):
            return call
    return None


def _check_action(action: Any, computed: Sequence[int], what: str) -> None:
    if isinstance(action, str):
        _require(action in PREDICTORS, f"a known predictor for {what}")
        _require(len(computed) >= PREDICTORS[action].nodes, f"enough calls that compute {what}")
        return
    _require(isinstance(action, tuple) and 0 < len(action) <= MAX_READS, f"a predictor for {what}")
    good = all(
        isinstance(read, tuple)
        and len(read) == 2
        and type(read[0]) is int
        and type(read[1]) in (int, float)
        and abs(read[1]) <= MAX_WEIGHT
        for read in action
    )
    _require(good, f"calls and weights for {what}")
    reads = [read for read, _ in action]
    _require(reads == sorted(set(reads)) and {*reads} <= {*computed}, f"calls that compute {what} and are read there")


def _action(data: Any) -> Any:
    """Return what stands in a file as an action; what is none is found by the plan's check."""
    return tuple(tuple(read) if isinstance(read, list) else read for read in data) if isinstance(data, list) else data


def _correction(data: Any, call: int) -> Correction:
    try:
        return Correction.from_dict(data)
    except ValueError as error:
        raise PlanError(f"A correction of call {call} in the cache plan is none: {error}", remedy=_RESTART) from error


def _require(good: bool, what: str) -> None:
    if not good:
        raise PlanError(f"The cache plan lacks {what}", remedy=_RESTART)
