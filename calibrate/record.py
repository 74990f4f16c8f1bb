"""Record a calibration set: what the denoiser is told on the pipeline's own trajectories, and what it answers.

The first batch decides the plan: which calls of which batches are kept within the bounds. A chunk appears whole or not
at all, so a killed recording goes on where it stopped; a folder that belongs to another model, other prompts or
settings is refused. Nothing is left out without a note.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor, nn

from dcomp.calibrate.calibration_set import (
    INDEX,
    SCHEMA,
    CalibrationError,
    CalibrationSet,
    RecordedCall,
    read_index,
    sha256_of_json,
)
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.mismatch import describe_components
from dcomp.calibrate.pipeline import Generation, OpenPipeline, prediction_of
from dcomp.calibrate.sampling import Sampling, spread
from dcomp.calibrate.shortened import Shortened
from dcomp.calibrate.tree_file import (
    encode,
    file_sha256,
    read_description,
    replacing,
    tensor_names,
    write_tree_file,
)

__all__ = ["CalibrationError", "CalibrationSet", "RecordedCall", "record_calibration_set", "spread"]

FEWEST_CALLS = 5  # prompts are given up before fewer calls than this are kept
_HEADER_BYTES = 200  # of a safetensors header, per tensor


def record_calibration_set(
    pipeline: OpenPipeline,
    prompts: Sequence[str],
    settings: Generation,
    folder: str | Path,
    *,
    max_calls: int = 25,
    max_bytes: int = 2 << 30,
    sampling: Sampling | None = None,
    along: Shortened | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Run the pipeline on all prompts and keep some calls of the trajectory, the same for every prompt.

    Args:
        pipeline: the deployed pipeline, in float.
        prompts: text, class numbers or names; for an unconditional pipeline only their number counts.
        settings: as deployed; `settings.batch_size` prompts make one chunk.
        folder: of the set; a partly recorded one of the same model, prompts and settings is finished.
        max_calls: most call indices kept of one trajectory.
        max_bytes: most bytes on disk. Calls, then whole batches, are left out evenly to stay below; `notes` says so.
        sampling: which calls; None spreads them evenly, with the first and the last.
        along: what shortens the trajectories, and leaves calls to choose from; None: all calls run.
        progress: called with denoiser calls done and their total.

    Raises:
        CalibrationError: the folder holds something else, another process writes to it, or the bounds are too small.
        TreeError: the denoiser gets an argument that cannot be stored, or the disk is full.
        UsageError, NotFiniteError: see `OpenPipeline.run`.
    """
    if max_calls < 1:
        raise CalibrationError(f"max_calls is {max_calls}", where="max_calls", remedy="Keep at least one call.")
    pipeline.check(prompts, settings)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        with lock:
            how = sampling or Sampling()
            with along.attached() if along else nullcontext():
                return _record(pipeline, list(prompts), settings, folder, max_calls, max_bytes, how, along, progress)
    except Timeout as error:
        raise CalibrationError(
            "Another process is recording this calibration set",
            where=str(folder),
            remedy="Wait for it, or use another folder.",
        ) from error
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise CalibrationError(
            f"The folder cannot be written: {error.strerror}", where=str(folder), remedy="Choose another folder."
        ) from error


def _record(
    pipeline: OpenPipeline,
    prompts: list[str],
    settings: Generation,
    folder: Path,
    max_calls: int,
    max_bytes: int,
    sampling: Sampling,
    along: Shortened | None,
    progress: Callable[[int, int], None] | None,
) -> CalibrationSet:
    model = pipeline.fingerprint()
    # Sets of the usual sampling and of whole trajectories are those of versions that knew no others.
    other: dict[str, Any] = {} if sampling.kind == "uniform" else {"sampling": sampling.to_dict()}
    other |= {"along": along.hash} if along else {}
    fingerprint = sha256_of_json([SCHEMA, model, asdict(settings), prompts, max_calls, max_bytes, *other.values()])
    index = read_index(folder)
    if index is not None and index["fingerprint"] != fingerprint:
        raise CalibrationError(
            "The folder holds a calibration set of another model, or of other prompts, settings or bounds",
            where=str(folder),
            remedy="Choose another folder, or delete this one to start afresh.",
        )
    first: _Recorder | None = None
    if index is None:
        count = -(-len(prompts) // settings.batch_size)
        first = _Recorder(
            pipeline,
            prompts[: settings.batch_size],
            lambda total: _chosen(along.calls if along else range(total), sampling, max_calls, settings.seed),
        )
        first.run(range(len(first.prompts)), settings, _part(progress, 0, count))
        kept, numbers, notes = _plan(first, count, max_bytes, folder)
        first.keep(kept)
        chunks = [_chunk(number, len(prompts), settings.batch_size) for number in numbers]
        index = {
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "model": model,
            "settings": asdict(settings),
            "prompts": prompts,
            "timesteps": first.timesteps,
            "kept_calls": kept,
            "chunks": chunks,
            "notes": notes,
            "components": describe_components(pipeline),
            **other,
        }
        _write_index(folder, index)
    plan = index
    for done, chunk in enumerate(plan["chunks"]):
        path = folder / chunk["file"]
        if path.exists():
            description = read_description(path)
            if description.get("fingerprint") != fingerprint:
                raise CalibrationError(
                    "The chunk belongs to another calibration set",
                    where=str(path),
                    remedy="Choose another folder, or delete this one to start afresh.",
                )
            chunk |= {"sha256": file_sha256(path), "calls": len(description["calls"])}
        else:
            recorder = first if first is not None and chunk["number"] == 0 else None
            if recorder is None:
                recorder = _Recorder(pipeline, prompts[chunk["first"] : chunk["end"]], lambda _: plan["kept_calls"])
                recorder.run(range(chunk["first"], chunk["end"]), settings, _part(progress, done, len(plan["chunks"])))
            description = {"fingerprint": fingerprint, "calls": recorder.calls}
            chunk |= {"sha256": write_tree_file(path, description, recorder.tensors), "calls": len(recorder.calls)}
        chunk["bytes"] = path.stat().st_size
        first = None
        _write_index(folder, plan)
    if progress:
        total = len(plan["chunks"]) * len(plan["timesteps"])
        progress(total, total)
    return CalibrationSet.open(folder)


def _chosen(calls: Sequence[int], sampling: Sampling, max_calls: int, seed: int) -> list[int]:
    return [calls[place] for place in sampling.choose(len(calls), max_calls, seed)]


class _Recorder:
    """Runs one batch and keeps some of its denoiser calls in memory."""

    def __init__(self, pipeline: OpenPipeline, prompts: list[str], choose: Callable[[int], list[int]]) -> None:
        self.prompts = prompts
        self.calls: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self.timesteps: list[float] = []
        self._pipeline = pipeline
        self._choose = choose
        self._clock = StepClock()
        self._class_ids = pipeline.class_ids(prompts) if pipeline.kind == "class" else None
        self._signature = inspect.signature(pipeline.denoiser.forward)
        self._pending: dict[str, Any] | None = None

    def run(self, indices: Sequence[int], settings: Generation, on_step: Callable[[int, int, Tensor], None]) -> None:
        """Run the trajectory; the decoder is not run."""
        denoiser = self._pipeline.denoiser
        hooks = [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after),
        ]
        try:
            self._pipeline.run(self.prompts, indices, settings, decode=False, clock=self._clock, on_step=on_step)
        finally:
            for hook in hooks:
                hook.remove()

    def keep(self, kept: list[int]) -> None:
        """Forget all calls but these."""
        self.calls = [call for call in self.calls if call["call"] in kept]
        used = set().union(*(_names(call) for call in self.calls))
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        clock = self._clock  # its own hook ran first
        if clock.call == len(self.timesteps):
            self.timesteps.append(clock.timestep)
        self._pending = None
        if clock.call in self._choose(len(self._pipeline.scheduler.timesteps)):
            names = list(self._signature.parameters)
            labels = self._signature.bind_partial(*args, **kwargs).arguments.get("class_labels")
            positional = [encode(value, self.tensors, name) for name, value in zip(names, args, strict=False)]
            self._pending = {
                "args": {"tuple": positional},
                "kwargs": {"dict": {name: encode(value, self.tensors, name) for name, value in kwargs.items()}},
                "call": clock.call,
                "step": clock.step,
                "timestep": clock.timestep,
                "condition_first": self._class_ids is not None
                and isinstance(labels, Tensor)
                and labels[: len(self.prompts)].tolist() == self._class_ids,
            }

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._pending is None:
            return
        call, prediction = self._pending, prediction_of(output)
        earlier = sum(other["call"] == call["call"] for other in self.calls)
        parts = len(prediction) // len(self.prompts)
        condition_first = call.pop("condition_first")
        call["contexts"] = _contexts(self._pipeline.kind, parts, earlier, condition_first)
        call["output"] = encode(prediction, self.tensors, "prediction")
        self.calls.append(call)
        self._pending = None


def _contexts(kind: str, parts: int, earlier: int, condition_first: bool) -> list[str]:
    """Name the guidance contexts of one call.

    Diffusers batches them as (uncond, cond), except where the class labels show the reverse, and runs them one after
    the other as cond, then uncond. What else a pipeline adds is numbered.
    """
    if kind == "unconditional":
        order = ["uncond"]
    elif parts == 1 or condition_first:
        order = ["cond", "uncond"]
    else:
        order = ["uncond", "cond"]
    order += [f"context{number}" for number in range(len(order), earlier + parts)]
    return order[earlier : earlier + parts]


def _plan(recorder: _Recorder, count: int, max_bytes: int, folder: Path) -> tuple[list[int], list[int], list[str]]:
    """Decide from the first chunk which calls and which chunks stay within the bounds."""
    wanted = sorted({call["call"] for call in recorder.calls})
    uses: dict[str, set[int]] = {}
    for call in recorder.calls:
        for name in _names(call):
            uses.setdefault(name, set()).add(call["call"])
    sizes = {name: tensor.nbytes + _HEADER_BYTES for name, tensor in recorder.tensors.items()}
    shared = sum(size for name, size in sizes.items() if len(uses[name]) > 1) + _HEADER_BYTES
    text = sum(2 * len(json.dumps(call)) for call in recorder.calls)  # quotes are escaped inside the metadata
    per_call = -(-(sum(size for name, size in sizes.items() if len(uses[name]) == 1) + text) // len(wanted))

    def affordable(chunks: int) -> int:
        return max(0, (max_bytes // chunks - shared) // per_call)

    calls, chunks = min(len(wanted), affordable(count)), count
    if calls < min(len(wanted), FEWEST_CALLS):
        calls = min(len(wanted), FEWEST_CALLS, affordable(1))
        chunks = min(count, max_bytes // (shared + calls * per_call))
    if calls < 1 or chunks < 1:
        raise CalibrationError(
            f"One call of one batch needs {shared + per_call} bytes, more than the bound of {max_bytes}",
            where="max_bytes",
            remedy="Allow more bytes, or use a smaller batch size.",
        )
    needed, free = chunks * (shared + calls * per_call), shutil.disk_usage(folder).free
    if needed > free:
        raise CalibrationError(
            f"The calibration set needs about {needed} bytes, and the disk has {free} left",
            where=str(folder),
            remedy="Make room, choose another folder, or lower the byte limit of the calibration set.",
        )
    notes = []
    if calls < len(wanted):
        notes.append(f"Kept {calls} of {len(wanted)} calls of each trajectory to stay within {max_bytes} bytes.")
    if chunks < count:
        notes.append(f"Kept {chunks} of {count} batches of prompts to stay within {max_bytes} bytes.")
    return [wanted[i] for i in spread(len(wanted), calls)], spread(count, chunks), notes


def _names(call: Mapping[str, Any]) -> set[str]:
    return set().union(*(tensor_names(call[part]) for part in ("args", "kwargs", "output")))


def _chunk(number: int, prompts: int, batch_size: int) -> dict[str, Any]:
    first = number * batch_size
    return {
        "number": number,
        "file": f"chunk-{number:05d}.safetensors",
        "first": first,
        "end": min(first + batch_size, prompts),
        "sha256": None,
        "calls": 0,
        "bytes": 0,
    }


def _part(progress: Callable[[int, int], None] | None, done: int, count: int) -> Callable[[int, int, Tensor], None]:
    def report(call: int, calls: int, _: Tensor) -> None:
        if progress:
            progress(done * calls + call, count * calls)

    return report


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    with replacing(folder / INDEX) as unfinished:
        unfinished.write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
