"""The file `dcomp_cache.json`: plans of one model on one trajectory, careful to fast, and what each was seen to do.

It is read as untrusted input. A plan fits the model, the scheduler and the number of steps that it was made for, and
says so: with anything else it is refused, because a tensor that is reused at the wrong place spoils a picture silently.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dcomp.cachequant.plan import CachePlan, PlanError
from dcomp.calibrate.model_files import read_json_object
from dcomp.calibrate.tree_file import replacing

FILE = "dcomp_cache.json"
VERSION = 1
MAX_FILE_BYTES, MAX_PLANS, _MAX_TEXT = 16 << 20, 64, 200
QUALITY = {"careful": 45.0, "balanced": 35.0, "fast": 28.0}  # PSNR in dB that a plan of a class has at least
_AGAIN = "Make plans again with `dcomp search-schedule`."


@dataclass(frozen=True)
class Trajectory:
    """What plans were made for.

    Attributes:
        model: hash of the weights.
        denoiser: its class.
        scheduler: its class.
        scheduler_sha256: hash of its config.
        steps: scheduler steps.
    """

    model: str
    denoiser: str
    scheduler: str
    scheduler_sha256: str
    steps: int

    def difference(self, other: "Trajectory") -> str | None:
        """Say in what another one differs; None if in nothing."""
        if self.denoiser != other.denoiser:
            return f"the denoiser {self.denoiser}, and this is {other.denoiser}"
        if self.model != other.model:
            return "other weights"
        if self.steps != other.steps:
            return f"{self.steps} steps, and {other.steps} are asked for"
        if (self.scheduler, self.scheduler_sha256) != (other.scheduler, other.scheduler_sha256):
            return f"{self.scheduler}, and this is {other.scheduler}, or one of other settings"
        return None


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan and its worth.

    Attributes:
        name: such as "2x".
        plan: the plan.
        speedup: multiply-accumulates of all calls by those that are left.
        expected_error: relative error of the final latents that the planner expected; None if it does not say.
        error: the same, measured with prompts and noise that the search had not seen.
        psnr: of these pictures in dB.
    """

    name: str
    plan: CachePlan
    speedup: float
    expected_error: float | None
    error: float
    psnr: float


@dataclass(frozen=True)
class PlanSet:
    """Plans for one trajectory, slowest first."""

    trajectory: Trajectory
    plans: tuple[MeasuredPlan, ...]

    def choose(self, name: str) -> MeasuredPlan:
        """Return the plan of a name, the best that is at least so fast (`2.5x`), or the fastest of a quality (`fast`).

        Raises:
            PlanError: there is none.
        """
        for plan in self.plans:
            if plan.name == name:
                return plan
        match = re.fullmatch(r"(\d+(?:\.\d+)?)x", name)
        fast = [plan for plan in self.plans if match and plan.speedup >= float(match[1]) * (1 - 1e-6)]
        good = [plan for plan in self.plans if plan.psnr >= QUALITY.get(name, math.inf)]
        if fast:
            return max(fast, key=lambda plan: plan.psnr)
        if good:
            return max(good, key=lambda plan: plan.speedup)
        names = ", ".join(f"{plan.name} ({plan.psnr:.1f} dB)" for plan in self.plans)
        raise PlanError(f"There is no plan {name[:40]!r}", where=names, remedy="Choose one of these names.")

    def write(self, file: Path) -> None:
        """Write the file in one step."""
        plans = [
            {
                "name": each.name,
                "speedup": each.speedup,
                "expected_error": each.expected_error,
                "error": each.error,
                "psnr": each.psnr,
                "plan": each.plan.to_dict(),
            }
            for each in self.plans
        ]
        data = {"version": VERSION, "trajectory": vars(self.trajectory), "plans": plans}
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(data | {"sha256": _hash(data)}, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            PlanError: there is no such file, or it was edited or damaged.
            ModelError: it is too large or no JSON.
        """
        if not file.is_file():
            raise PlanError("There are no plans", where=str(file), remedy="Make some with `dcomp search-schedule`.")
        data = read_json_object(file, max_bytes=MAX_FILE_BYTES)
        found = data.pop("sha256", None)
        if data.get("version") != VERSION or found != _hash(data):
            raise PlanError("The file of plans was changed or is damaged", where=str(file), remedy=_AGAIN)
        about: Any = data.get("trajectory")
        plans: Any = data.get("plans")
        good = (
            isinstance(about, dict)
            and set(about) == {"model", "denoiser", "scheduler", "scheduler_sha256", "steps"}
            and type(about["steps"]) is int
            and all(isinstance(v, str) and len(v) <= _MAX_TEXT for k, v in about.items() if k != "steps")
            and isinstance(plans, list)
            and 0 < len(plans) <= MAX_PLANS
            and all(map(_is_measured, plans))
        )
        if not good:
            raise PlanError("The file of plans has another form than dcomp writes", where=str(file), remedy=_AGAIN)
        return cls(
            Trajectory(**about), tuple(MeasuredPlan(**{**p, "plan": CachePlan.from_dict(p["plan"])}) for p in plans)
        )


def _is_measured(plan: Any) -> bool:
    numbers = ("speedup", "error", "psnr")
    return (
        isinstance(plan, dict)
        and set(plan) == {"name", "plan", "expected_error", *numbers}
        and isinstance(plan["name"], str)
        and len(plan["name"]) <= _MAX_TEXT
        and all(_is_number(plan[name]) for name in numbers)
        and (plan["expected_error"] is None or _is_number(plan["expected_error"]))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
