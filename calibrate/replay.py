"""Rows of a calibration set, joined into one call of the denoiser: a row is one sample in one guidance context.

A set holds calls as the pipeline made them, each with one timestep. A pass over the model wants rows from everywhere at
once: many timesteps, many trajectories, all contexts. What has a batch axis is found by shape, in every call; the rest
must be the same in all of them. N is the number of rows, P of guidance pairs.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from dcomp.calibrate.calibration_set import CalibrationError, CalibrationSet, RecordedCall
from dcomp.calibrate.pipeline import prediction_of
from dcomp.calibrate.structure import POSITIONS, TIMESTEP

Path = tuple[str | int, ...]
"""Where a leaf lies: position or name of the argument, then keys and positions inside it."""

_PAIR = ("uncond", "cond")
_MOST_SAMPLES = 1 << 20  # of one batch


@dataclass(frozen=True)
class RowBatch:
    """Arguments for one call of the denoiser over some rows, and what the float model answered to them.

    Attributes:
        args: positional arguments, batched along axis 0; the timestep is a tensor `[N]`.
        kwargs: keyword arguments, likewise.
        outputs: the recorded predictions, `[N, ...]`.
        timesteps: what the denoiser is told for each row, fp32 `[N]`.
        trajectories: which trajectory each row belongs to, int64 `[N]`; numbers with gaps.
        pairs: rows (uncond, cond) of the same latents, int64 `[P, 2]`; None where calls have other contexts than these.
        batched: which leaves of `args` and `kwargs` have a row axis.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Tensor
    timesteps: Tensor
    trajectories: Tensor
    pairs: Tensor | None
    batched: frozenset[Path]

    def __len__(self) -> int:
        return len(self.outputs)

    def take(self, indices: Tensor | Sequence[int]) -> "RowBatch":
        """Copy some rows, in the order given; a pair stays one if both of its rows are taken."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        args, kwargs = map_leaves(
            self.args, self.kwargs, lambda path, leaf: leaf[index] if path in self.batched else leaf
        )
        pairs = None
        if self.pairs is not None:
            place = {row: position for position, row in enumerate(index.tolist())}
            kept = [[place[u], place[c]] for u, c in self.pairs.tolist() if u in place and c in place]
            pairs = torch.tensor(kept, dtype=torch.int64).view(-1, 2)
        outputs, timesteps, trajectories = (rows[index] for rows in (self.outputs, self.timesteps, self.trajectories))
        return RowBatch(args, kwargs, outputs, timesteps, trajectories, pairs, self.batched)

    def chunks(self, size: int) -> Iterator["RowBatch"]:
        """Yield all rows in order, at most `size` at a time, but two where there are pairs.

        A pair is never torn apart if pairs are adjacent, as `gather_rows` makes them.
        """
        if self.pairs is not None:
            size = max(2, size - size % 2)
        for rows in torch.arange(len(self)).split(size):
            yield self.take(rows)


def gather_rows(calibration: CalibrationSet, count: int, seed: int = 0, *, denoiser: nn.Module) -> RowBatch:
    """Join rows that are spread evenly over calls and samples, each sample with all of its guidance contexts.

    Two calls, or two samples, differ by at most one in how often they are met, and no row is taken twice. The first
    rows alone are spread over the trajectory too. With the contexts uncond and cond, rows 2i and 2i + 1 are a pair.

    Args:
        calibration: read twice; only the rows are held in memory.
        count: most rows; one sample with all of its contexts is always taken.
        seed: decides which samples meet which calls.
        denoiser: gives the names of its arguments.

    Raises:
        CalibrationError: `count` is below 1, or calls differ in something that has no batch axis.
    """
    if count < 1:
        raise CalibrationError(f"{count} rows are asked for", where="count", remedy="Ask for at least one row.")
    names = list(inspect.signature(denoiser.forward).parameters)
    survey = _Survey()
    for index, call in enumerate(calibration.calls()):
        survey.add(index, call, names)
    places = survey.choose(count, seed)
    wanted: dict[int, list[int]] = {}
    for position, (index, _) in enumerate(places):
        wanted.setdefault(index, []).append(position)
    order: list[int] = []
    found: list[RowBatch] = []
    for index, call in enumerate(calibration.calls()):
        if index in wanted:
            rows = [places[position][1] for position in wanted[index]]
            found.append(_rows_of(call, rows, frozenset(survey.batched or ()), names))
            order += wanted[index]
    batch = _joined(found, names).take(torch.tensor(order).argsort())
    return replace(batch, pairs=torch.arange(len(batch)).view(-1, 2)) if survey.paired else batch


def predict(denoiser: nn.Module, rows: RowBatch) -> Tensor:
    """Return what a denoiser predicts for rows, `[N, ...]`, in the memory where they lie.

    They are brought to where the denoiser is, and its prediction back.
    """
    anywhere = next(chain(denoiser.parameters(), denoiser.buffers()), rows.outputs)
    args, kwargs = send_to_device((rows.args, rows.kwargs), anywhere.device)
    return prediction_of(denoiser(*args, **kwargs)).to(rows.outputs.device)


@dataclass
class _Survey:
    """What there is to choose from.

    Attributes:
        sites: for each (trajectory, call): context -> (index of the recorded call, its first row there).
        samples: samples of each trajectory.
        batched: leaves that have a batch axis in every call so far; None before the first.
    """

    sites: dict[tuple[int, int], dict[str, tuple[int, int]]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    batched: set[Path] | None = None

    @property
    def paired(self) -> bool:
        """Whether every call has the contexts of a guidance pair and no others."""
        return all(set(contexts) == set(_PAIR) for contexts in self.sites.values())

    def add(self, index: int, call: RecordedCall, names: Sequence[str]) -> None:
        """Take note of a recorded call."""
        batch = len(call.output)
        samples = batch // len(call.contexts)
        contexts = self.sites.setdefault((call.trajectory, call.call), {})
        contexts |= {context: (index, part * samples) for part, context in enumerate(call.contexts)}
        self.samples[call.trajectory] = samples
        batched = {
            path
            for path, leaf in leaves_of(call.args, call.kwargs).items()
            if _name(path, names) not in POSITIONS
            and (_is_time(path, names) or (isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == batch))
        }
        # A smaller last batch shows which of the other axes had the length of the batch by chance.
        self.batched = batched if self.batched is None else self.batched & batched

    def choose(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Return (index of the recorded call, row there) of the rows to take, in their order."""
        trajectories = sorted(self.samples)
        calls = sorted(
            set.intersection(*({c for t, c in self.sites if t == trajectory} for trajectory in trajectories))
        )
        samples = [(trajectory, sample) for trajectory in trajectories for sample in range(self.samples[trajectory])]
        shuffled = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        calls = [calls[i] for i in _spreading(len(calls))]
        rows_each = max(len(contexts) for contexts in self.sites.values())
        # Calls and samples are gone through side by side. Where both are at their start again, samples move on by one.
        lap = math.lcm(len(calls), len(samples))
        places = []
        for k in range(min(max(1, count // rows_each), len(calls) * len(samples))):
            trajectory, sample = samples[shuffled[(k + k // lap) % len(samples)]]
            contexts = self.sites[trajectory, calls[k % len(calls)]]
            for context in sorted(contexts, key=lambda name: (name not in _PAIR, name != _PAIR[0], name)):
                index, first = contexts[context]
                places.append((index, first + sample))
        return places


def _spreading(count: int) -> list[int]:
    """Return the numbers below `count` in an order whose every beginning is spread over them: bits reversed."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{width}b}"[::-1])


def _rows_of(call: RecordedCall, rows: Sequence[int], batched: frozenset[Path], names: Sequence[str]) -> RowBatch:
    """Take some rows of one recorded call."""
    times: list[Tensor] = []

    def expand(path: Path, leaf: Any) -> Any:
        if not _is_time(path, names):
            return leaf
        times.append(torch.as_tensor(leaf).reshape(-1).expand(len(call.output)))
        return times[-1]

    args, kwargs = map_leaves(call.args, call.kwargs, expand)
    samples = len(call.output) // len(call.contexts)
    trajectories = call.trajectory * _MOST_SAMPLES + torch.arange(len(call.output)) % samples
    return RowBatch(args, kwargs, call.output, times[0].float(), trajectories, None, batched).take(rows)


def _joined(parts: Sequence[RowBatch], names: Sequence[str]) -> RowBatch:
    """Put rows of several calls one after the other."""
    leaves = [leaves_of(part.args, part.kwargs) for part in parts]
    for path in set().union(*leaves) - set(leaves[0]).intersection(*leaves):
        raise _differing(_name(path, names), "form")

    def join(path: Path, leaf: Any) -> Any:
        others = [other[path] for other in leaves]
        if path in parts[0].batched:
            if len({(other.shape[1:], other.dtype) for other in others}) > 1:
                raise _differing(_name(path, names), "shape or type")
            return torch.cat(others)
        if not all(_same(leaf, other) for other in others):
            raise _differing(_name(path, names), "value, and has no batch axis")
        return leaf

    args, kwargs = map_leaves(parts[0].args, parts[0].kwargs, join)
    outputs, timesteps, trajectories = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("outputs", "timesteps", "trajectories")
    )
    return RowBatch(args, kwargs, outputs, timesteps, trajectories, None, parts[0].batched)


def _differing(name: str, what: str) -> CalibrationError:
    return CalibrationError(
        f"The recorded calls cannot be joined: `{name}` differs in {what}",
        where=name,
        remedy="Record the calibration set with options for which the pipeline passes this alike in every call.",
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _name(path: Path, names: Sequence[str]) -> str:
    return names[path[0]] if isinstance(path[0], int) else path[0]


def _is_time(path: Path, names: Sequence[str]) -> bool:
    return len(path) == 1 and _name(path, names) == TIMESTEP


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Path, Any]:
    """Return all leaves of arguments by where they lie."""
    leaves: dict[Path, Any] = {}
    map_leaves(args, kwargs, leaves.__setitem__)
    return leaves


def map_leaves(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Path, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy arguments, with `change(path, leaf)` at every leaf of dicts, lists and tuples."""

    def walk(path: Path, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk((*path, key), item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(walk((*path, i), item) for i, item in enumerate(value))
        return change(path, value)

    return tuple(walk((i,), value) for i, value in enumerate(args)), {
        name: walk((name,), value) for name, value in kwargs.items()
    }
