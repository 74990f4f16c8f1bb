"""What stages and blocks return, compared with the whole model's: the loss of features of recovery.

Every stage that both models have is a tap. Features of stages differ a thousandfold in size, and their differences
count as parts of the teacher's mean square, so that no stage dominates (Zhang et al. 2024, LAPTOP-Diff, section 3.4).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.replay import RowBatch, predict
from dcomp.compress.pruning.cut import cuts_of, renamed
from dcomp.compress.pruning.units import Units

_FLOOR = 1e-6  # of a mean square
_CACHE_BYTES = 2 << 30


class FeatureLoss:
    """Compares features of a pruned denoiser with those of the whole one, which is asked once for each row.

    Args:
        teacher: the whole denoiser, in eval mode; it is not changed.
        student: the pruned one.
        units: of the teacher.
        rows: of the comparison.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, units: Units, rows: RowBatch) -> None:
        self._teacher, self._student, self._rows = teacher, student, rows
        places = {path: renamed(path, cuts_of(student), units) for path in _stages(teacher)}
        self.taps = tuple((path, place) for path, place in places.items() if place is not None)
        self._cache: dict[int, list[Tensor]] = {}
        self._cached = 0

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Within a `with` block, collect what the student's stages return."""
        with _listening(self._student, [place for _, place in self.taps]) as found:
            yield found

    def loss(self, found: list[Tensor], rows: Tensor) -> Tensor:
        """Return the mean over all taps of the squared difference as a part of the teacher's mean square.

        Args:
            found: what the student's stages returned for the rows, in one call.
            rows: their numbers.
        """
        total = torch.zeros(())
        for mine, theirs in zip(found, self._features(rows), strict=True):
            size = theirs.square().mean().clamp_min(_FLOOR)
            total = total + (mine.float() - theirs).square().mean() / size
        return total / max(1, len(found))

    def _features(self, rows: Tensor) -> list[Tensor]:
        """Return what the teacher's stages return, rounded to bfloat16 as in the cache, whether or not it has room."""
        numbers = rows.tolist()
        unknown = [number for number in numbers if number not in self._cache]
        fresh: dict[int, list[Tensor]] = {}
        if unknown:
            batch = self._rows.take(unknown)
            with _listening(self._teacher, [path for path, _ in self.taps]) as found, torch.no_grad():
                predict(self._teacher, batch)
            for place, number in enumerate(unknown):
                fresh[number] = [tensor[place].to(torch.bfloat16) for tensor in found]
                nbytes = sum(tensor.nbytes for tensor in fresh[number])
                if self._cached + nbytes <= _CACHE_BYTES:
                    self._cache[number] = fresh[number]
                    self._cached += nbytes
        known = [self._cache.get(number) or fresh[number] for number in numbers]
        return [torch.stack(tensors).float() for tensors in zip(*known, strict=True)]


def _stages(denoiser: nn.Module) -> Iterator[str]:
    """Yield the stages of a U-Net, or the blocks of a transformer."""
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{name}.{place}" for place in range(len(child)))
        elif name == "mid_block":
            yield name


@contextmanager
def _listening(denoiser: nn.Module, paths: list[str]) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        found.extend(each.cpu() for each in outputs if isinstance(each, Tensor))

    with ExitStack() as stack:
        for path in paths:
            stack.callback(denoiser.get_submodule(path).register_forward_hook(hook).remove)
        yield found
