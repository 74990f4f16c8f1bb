"""What all calls of a plan may cost together: fewer products, milliseconds, or calls that compute everything."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from dcomp import UsageError

Measure = Literal["macs", "seconds", "calls"]

_UNITS: dict[str, tuple[str, Measure]] = {
    "x": ("x", "macs"),
    "gmacs": ("GMACs", "macs"),
    "ms": ("ms", "seconds"),
    "calls": ("calls", "calls"),
}
_GIGA = 1e9
_REMEDY = "Write for example --budget 2x, --budget 800ms, --budget 150GMACs or --budget 20calls."


@dataclass(frozen=True)
class Budget:
    """A bound on the cost of a trajectory for one picture, guidance included.

    Attributes:
        amount: positive; of `x` above 1.
        unit: `x`, times fewer multiply-accumulates of the denoiser; `GMACs`, its multiply-accumulates; `ms`, its time
            on this machine; or `calls`, calls that compute everything, whatever the others do.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read a budget such as `2x`.

        Raises:
            UsageError: the text is none, or nothing would be saved.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", text.strip(), re.IGNORECASE)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise UsageError(f"{text!r} is no budget", where="--budget", remedy=_REMEDY)
        budget = cls(float(match[1]), unit[0])
        if budget.amount <= (1 if budget.unit == "x" else 0):
            raise UsageError(f"A budget of {budget.name} saves nothing", where="--budget", remedy=_REMEDY)
        return budget

    @property
    def name(self) -> str:
        """As in a file of plans."""
        return f"{self.amount:g}{self.unit}"

    @property
    def measure(self) -> Measure:
        """What is bounded."""
        return _UNITS[self.unit.lower()][1]

    def limit(self, calls: int, macs: float, seconds: float) -> float:
        """Return the bound in calls that compute everything.

        Args:
            calls: T.
            macs: of one of them.
            seconds: of one of them.
        """
        return calls / self.amount if self.unit == "x" else self.amount / self._of_one(macs, seconds)

    def at(self, cost: float, calls: int, macs: float, seconds: float) -> "Budget":
        """Return the budget of this unit that a cost in calls that compute everything just keeps."""
        return replace(self, amount=calls / cost if self.unit == "x" else cost * self._of_one(macs, seconds))

    def _of_one(self, macs: float, seconds: float) -> float:
        return {"GMACs": macs / _GIGA, "ms": seconds * 1000, "calls": 1.0}[self.unit]
