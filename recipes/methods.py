"""Named settings of the quantize stage: one method of the literature alone, or how much time to spend.

A name stands for values of recipe keys and for nothing else: the resolved recipe, which is written beside the result,
holds the values and not the name.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from dcomp import UsageError

METHODS: dict[str, dict[str, Any]] = {
    # What every table carries as its baseline: no calibration beyond the extremes of weights and inputs.
    "minmax": {
        "rounding": "nearest",
        "inputs": "static",
        "step_bins": 1,
        "weight_range": "minmax",
        "input_range": "minmax",
        "split": "none",
        "smooth": False,
        "rotate": False,
        "directions": 0,
        "input_group": 0,
        "tune": 0,
    },
    "nearest": {"rounding": "nearest", "tune": 0},
    "gptq": {"rounding": "gptq", "tune": 0},
    "adaround": {"rounding": "adaround", "tune": 0},
}
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"rows": 128, "tune": 0},
    "default": {},
    "best": {"rows": 512, "directions": 8},  # longer tuning, and of codes too, made final latents no better
}


def settings_of(method: str | None, quality: str | None) -> dict[str, Any]:
    """Return the stage's keys for a method and a quality; where both set one, the method decides.

    Raises:
        UsageError: there is no such method or quality.
    """
    return {**_named("quality", quality, QUALITIES), **_named("method", method, METHODS)}


def _named(what: str, name: str | None, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise UsageError(
            f"There is no {what} {name!r}",
            where=f"--{what}",
            remedy=(f"Did you mean {near[0]}? " if near else "") + f"Use {', '.join(known)}.",
        )
    return known[name]
