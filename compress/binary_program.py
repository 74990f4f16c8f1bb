"""Programs of zeros and ones, solved exactly by HiGHS: what the choices of bits and of cuts have in common.

The solver takes a limit as kept that is missed by a millionth. So what it finds is looked at in whole numbers,
forbidden if it is not right, and the program is solved again.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

_OBJECTIVE_RANGE = 1e4  # of numbers that the solver sees: its absolute tolerance of 1e-6 is then nothing
_ATTEMPTS = 50

Floats = NDArray[np.float64]


def minimise_binary(
    objective: Floats,
    constraints: Sequence[LinearConstraint],
    forbid: Callable[[Floats], LinearConstraint | None],
    *,
    nodes: int,
    upper: Floats | float = 1.0,
) -> tuple[Floats, float] | None:
    """Return zeros and ones with the least objective, and what no other ones are below; None if there are none.

    Args:
        objective: of each variable.
        constraints: that hold.
        forbid: called with a solution; returns None if it is right, else a constraint that it breaks.
        nodes: of the search tree, at most.
        upper: bound of each variable, 0 for those that are out.
    """
    peak = float(np.abs(objective).max())
    unit = _OBJECTIVE_RANGE / peak if peak > 0 else 1.0
    held = list(constraints)
    for _ in range(_ATTEMPTS):
        with _silent_stdout():
            result: Any = milp(
                objective * unit,
                integrality=np.ones(len(objective)),
                bounds=Bounds(0, upper),
                constraints=held,
                options={"mip_rel_gap": 0.0, "node_limit": nodes},
            )
        if result.x is None:
            return None
        broken = forbid(result.x)
        if broken is None:
            return result.x, float(result.mip_dual_bound) / unit
        held.append(broken)
    return None


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what native code prints: HiGHS has a forgotten line, which would end up in the JSON of a command."""
    try:
        stdout = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    flush, nothing = ctypes.CDLL(None).fflush, os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    flush(None)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nothing)
