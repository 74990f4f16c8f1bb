"""What the benchmark of quantization measures of dcomp: methods, options on top of one, and the rungs of the ladder."""

from dataclasses import dataclass, replace
from typing import Any

BITS = ("w8a16", "w8a8", "w4a8", "w4a16", "w4a4")


@dataclass(frozen=True)
class Setting:
    """A named row of the matrix, an option on top of one, or a rung of the ladder.

    Attributes:
        name: as printed.
        changes: keys of the quantize stage, on top of those of the base or of the rungs before; with a prefix also keys
            of the calibration (`calibration.sampling`).
        only: presets where it can change anything; empty for all.
        base: the method that an option is compared with.
    """

    name: str
    changes: dict[str, Any]
    only: tuple[str, ...] = ()
    base: str = ""


def methods() -> dict[str, Setting]:
    """Return the rows of the matrix by name."""
    from dcomp.recipes.methods import settings_of

    rows = (
        Setting("minmax", settings_of("minmax", None)),
        Setting("nearest", settings_of("nearest", None)),
        Setting("gptq", settings_of("gptq", None)),
        Setting("adaround", settings_of("adaround", None)),
        Setting("default", {}),
        Setting("directions", {"directions": 8}, ("w4a8", "w4a16", "w4a4")),
        Setting("best", settings_of(None, "best")),
    )
    return {row.name: row for row in rows}


def options() -> dict[str, Setting]:
    """Return single choices by name, each on top of a method."""
    few, a4 = {"inputs": "static", "step_bins": 5}, ("w4a4",)
    rows = (
        Setting("no split", {"split": "none"}, base="gptq"),
        Setting("8 calls of a trajectory, uniform", {"calibration.max_calls": 8}, base="gptq"),
        Setting(
            "8 calls of a trajectory, normal",
            {"calibration.max_calls": 8, "calibration.sampling": "normal"},
            base="gptq",
        ),
        Setting("5 tables of ranges, uniform", few, ("w8a8",), "gptq"),
        Setting("5 tables of ranges, by drift", {**few, "bins": "drift"}, ("w8a8",), "gptq"),
        Setting("5 tables of ranges, by log-SNR", {**few, "bins": "log_snr"}, ("w8a8",), "gptq"),
        Setting("step-wise correction", {"correct": True}, base="gptq"),
        Setting("no smoothing", {"smooth": False}, a4, "gptq"),
        Setting("no rotation", {"rotate": False}, a4, "gptq"),
        Setting("no directions", {"directions": 0}, a4, "gptq"),
        Setting("low-rank branch for directions", {"directions": 0, "rank": 16}, a4, "gptq"),
        Setting("low-rank branch beside directions", {"rank": 16}, a4, "gptq"),
        Setting("tuned codes", {"tune": 200, "tune_rounding": True}, ("w4a8", "w4a4"), "default"),
    )
    known = methods()
    return {row.name: replace(row, changes={**known[row.base].changes, **row.changes}) for row in rows}


def ladder() -> tuple[Setting, ...]:
    """Return the rungs in order; one whose keys or values this version does not know is left out, and named."""
    from dcomp.recipes.methods import settings_of
    from dcomp.recipes.schema import QuantizeStage

    stage = QuantizeStage()
    return (
        Setting("minmax", {**settings_of("minmax", None), "temporal": "layers"}),
        Setting("+ calibrated ranges", {"weight_range": "mse", "input_range": "mse", "step_bins": stage.step_bins}),
        Setting("+ dynamic ranges", {"inputs": "dynamic"}, ("w8a8", "w4a8")),
        Setting("+ groups of inputs", {"input_group": stage.input_group}, ("w4a4",)),
        Setting("+ split", {"split": stage.split}),
        Setting("+ smoothing and rotation", {"smooth": stage.smooth, "rotate": stage.rotate}, ("w4a4",)),
        Setting("+ directions in float", {"directions": stage.directions}, ("w4a4",)),
        Setting("+ temporal tables", {"temporal": "choose"}),
        Setting("+ second-order rounding", {"rounding": "gptq"}),
        Setting("+ tuning", {"tune": stage.tune}),
    )
