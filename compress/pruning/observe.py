"""What a denoiser does on recorded rows: moments of what layers read, means of what they return."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import RowBatch, predict
from dcomp.compress.moments import WIDEST, Moments, input_moments

CHUNK_ROWS = 16
MEMORY_BYTES = 1 << 31  # of the moments of one pass


@dataclass(frozen=True)
class Observed:
    """What was seen.

    Attributes:
        moments: layer -> those of its inputs.
        means: layer -> mean of its outputs, `[O]`.
    """

    moments: dict[str, Moments]
    means: dict[str, Tensor]


def observe(
    denoiser: nn.Module,
    rows: RowBatch,
    read: Sequence[str],
    made: Sequence[str] = (),
    *,
    progress: Progress = silent,
) -> Observed:
    """Run all rows, once for as many layers as fit into memory, and keep what is asked for.

    Args:
        denoiser: in eval mode.
        rows: of its inputs.
        read: layers whose inputs matter.
        made: layers whose outputs matter.
        progress: called with a text, the count done and the total.
    """
    moments: dict[str, Moments] = {}
    sums: dict[str, tuple[Tensor, int]] = {}
    passes = _passes(denoiser, read)
    done, total = 0, len(passes) * len(rows)
    for number, names in enumerate(passes):
        with ExitStack() as stack, torch.no_grad():
            for name in names:

                def reads(layer: Any, args: Any, name: str = name) -> None:
                    here = input_moments(layer, args[0])
                    moments[name] = moments[name].merged(here) if name in moments else here

                stack.callback(denoiser.get_submodule(name).register_forward_pre_hook(reads).remove)
            for name in made if number == 0 else ():

                def makes(layer: Any, _: Any, output: Tensor, name: str = name) -> None:
                    flat = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
                    flat = flat.flatten(0, -2).double()
                    before, count = sums.get(name, (torch.zeros(flat.shape[1], dtype=torch.float64), 0))
                    sums[name] = before + flat.sum(0).cpu(), count + len(flat)

                stack.callback(denoiser.get_submodule(name).register_forward_hook(makes).remove)
            for chunk in rows.chunks(CHUNK_ROWS):
                progress("inputs of layers", done, total)
                predict(denoiser, chunk)
                done += len(chunk)
    progress("inputs of layers", total, total)
    return Observed(moments, {name: (sum_ / count).float() for name, (sum_, count) in sums.items()})


def _passes(denoiser: nn.Module, read: Sequence[str]) -> list[list[str]]:
    """Part layers so that the moments of each part fit into memory; one part at least."""
    passes: list[list[str]] = [[]]
    used = 0
    for name in read:
        weight: Any = denoiser.get_submodule(name).weight
        columns = weight[0].numel()
        needed = 8 * columns * min(columns, WIDEST)
        if passes[-1] and used + needed > MEMORY_BYTES:
            passes.append([])
            used = 0
        passes[-1].append(name)
        used += needed
    return passes
