"""Trajectories in which some denoiser calls do not run, as under a cache plan; calibration may follow one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Shortened(Protocol):
    """What shortens a trajectory."""

    @property
    def hash(self) -> str:
        """Hash of what it does."""

    @property
    def calls(self) -> Sequence[int]:
        """Calls in which all of the denoiser runs, ascending; the first is one of them."""

    def attached(self) -> AbstractContextManager[object]:
        """Make a `with` block in which the pipeline's trajectories are shortened."""
