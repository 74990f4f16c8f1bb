"""A run of an optimizer that can be killed: which rows each step sees, how far it goes, and its state as a file.

A step depends on its number and the state before it only, so a run that goes on from a snapshot ends with the same bits
as one that never stopped.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcomp.calibrate.tree_file import replacing

SNAPSHOT_SECONDS = 20.0
_BETAS = (0.9, 0.99)


class StratifiedOrder:
    """An endless order of items: all once before any twice, and the classes spread evenly over each lap.

    Args:
        classes: integers `[n]`, the class of each item.
        seed: decides the order.
    """

    def __init__(self, classes: Tensor, seed: int) -> None:
        self._classes, self._seed = classes, seed
        self._lap, self._items = -1, classes

    def draw(self, first: int, count: int) -> Tensor:
        """Return the items at `count` places of the order from `first` on, int64."""
        length = len(self._classes)
        places = range(first, first + count)
        return torch.stack([self._order(place // length)[place % length] for place in places])

    def _order(self, lap: int) -> Tensor:
        if lap != self._lap:
            generator = torch.Generator().manual_seed((self._seed << 20) + lap)
            places = torch.empty(len(self._classes), dtype=torch.float64)
            for item_class in self._classes.unique():
                members = (self._classes == item_class).nonzero().flatten()
                shift = torch.rand(1, generator=generator, dtype=torch.float64)
                shuffled = members[torch.randperm(len(members), generator=generator)]
                places[shuffled] = (torch.arange(len(members)) + shift) / len(members)
            self._lap, self._items = lap, places.argsort(stable=True)
        return self._items


class CosineAdam:
    """Adam whose rates fall to 0 along a cosine.

    Args:
        groups: leaves and their first rate.
        iterations: steps until the rates are 0.
        warm_up: steps in which the rates rise to what the cosine says: the first ones of Adam are large for all leaves.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], iterations: int, warm_up: int = 0) -> None:
        self.leaves = [leaf for leaves, _ in groups for leaf in leaves]
        self._rates, self._iterations, self._warm_up = [rate for leaves, rate in groups if leaves], iterations, warm_up
        self._adam = torch.optim.Adam([{"params": list(leaves)} for leaves, _ in groups if leaves], betas=_BETAS)

    def step(self, iteration: int, loss: Callable[[], Tensor]) -> None:
        """Take a step down a loss, whose gradient is taken here."""
        fallen = (1 + math.cos(math.pi * iteration / self._iterations)) / 2
        if iteration < self._warm_up:
            fallen *= (iteration + 1) / self._warm_up
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * fallen
        self._adam.zero_grad()
        with torch.enable_grad():
            loss().backward()
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """Return leaves and moments by name; they share memory with those in use."""
        tensors = {f"leaf.{i}": leaf.detach() for i, leaf in enumerate(self.leaves)}
        for i, moments in self._adam.state_dict()["state"].items():
            tensors |= {f"{name}.{i}": value for name, value in moments.items()}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned; leaves are changed in place."""
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for key, value in tensors.items():
                name, _, i = key.rpartition(".")
                if name == "leaf":
                    self.leaves[int(i)].copy_(value)
                else:
                    moments.setdefault(int(i), {})[name] = value
        self._adam.load_state_dict(self._adam.state_dict() | {"state": moments})


class Snapshot:
    """The file that a run goes on from.

    Args:
        path: the file; None for a run that cannot be resumed.
        run: describes the run in full; a file with another description is not used.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self._path, self._run = path, run
        self._saved = time.monotonic()

    def read(self) -> dict[str, Tensor] | None:
        """Return what was written last, or None if there is nothing of this run."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                if (file.metadata() or {}).get("run") != self._run:
                    return None
                return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError):
            return None

    def write(self, tensors: Callable[[], dict[str, Tensor]], *, at_once: bool = False) -> None:
        """Replace the file, if the last time is long ago or `at_once`.

        Raises:
            TreeError: the file cannot be written.
        """
        if self._path is None or not (at_once or time.monotonic() - self._saved >= SNAPSHOT_SECONDS):
            return
        contents = {key: value.detach().contiguous() for key, value in tensors().items()}
        with replacing(self._path) as unfinished:
            save_file(contents, unfinished, metadata={"run": self._run})
        self._saved = time.monotonic()
