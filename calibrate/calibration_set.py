"""A calibration set on disk, read back: recorded denoiser calls, with the plan they were chosen by.

A folder holds `calibration.json` and one `chunk-*.safetensors` per generation batch. Everything is checked before it is
used: the index field by field, each chunk's header, and each chunk's hash when its calls are read. Writing one is the
business of `dcomp.calibrate.record`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dcomp import UsageError
from dcomp.calibrate.pipeline import Generation
from dcomp.calibrate.safetensors_file import read_json_object
from dcomp.calibrate.sampling import Sampling, SamplingError
from dcomp.calibrate.tree_file import decode, file_sha256, open_tensors, read_description

SCHEMA = 1
INDEX = "calibration.json"
_FIELDS: dict[str, type] = {
    "schema": int,
    "fingerprint": str,
    "model": str,
    "settings": dict,
    "prompts": list,
    "timesteps": list,
    "kept_calls": list,
    "chunks": list,
    "notes": list,
}


class CalibrationError(UsageError):
    """A calibration set that cannot be used, resumed or recorded."""


@dataclass
class RecordedCall:
    """One denoiser call.

    Attributes:
        args: positional arguments of the denoiser, ready to be passed again.
        kwargs: keyword arguments.
        output: the prediction.
        trajectory: which generation batch it belongs to.
        call: call index in the trajectory.
        step: scheduler step index.
        timestep: what the denoiser was told.
        contexts: guidance contexts in the order of the batch's equal parts, such as ("uncond", "cond").
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    trajectory: int
    call: int
    step: int
    timestep: float
    contexts: tuple[str, ...]


class CalibrationSet:
    """A finished calibration set on disk; open one with `CalibrationSet.open`.

    Attributes:
        folder: where it lies.
        model: fingerprint of the pipeline that it was recorded with, see `OpenPipeline.fingerprint`.
        settings: the fields of `Generation` that it was recorded with.
        prompts: the prompts whose calls are kept.
        notes: what was left out to stay within bounds, as sentences; empty when nothing was.
        timesteps: distinct timesteps of the kept calls, descending, in the units that the denoiser is told.
        all_timesteps: likewise of all calls of the trajectory.
        sampling: how the kept calls were chosen.
        components: what the pipeline was made of, see `mismatch.describe_components`; empty in sets of older versions.
        hash: sha256 of the settings, the prompts and the contents of all chunks in order.
        nbytes: bytes of all chunks.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder = folder
        self._chunks: list[dict[str, Any]] = index["chunks"]
        self.model: str = index["model"]
        self.settings: dict[str, Any] = index["settings"]
        self.sampling = _sampling_of(index)
        self.components: dict[str, dict[str, str]] = index.get("components", {})
        self.notes: tuple[str, ...] = tuple(index["notes"])
        self.prompts: list[str] = [
            prompt for chunk in self._chunks for prompt in index["prompts"][chunk["first"] : chunk["end"]]
        ]
        every: list[float] = index["timesteps"]
        self.timesteps = tuple(sorted({every[call] for call in index["kept_calls"]}, reverse=True))
        self.all_timesteps = tuple(sorted(set(every), reverse=True))
        self.nbytes = sum(chunk["bytes"] for chunk in self._chunks)
        hashes = [chunk["sha256"] for chunk in self._chunks]
        self.hash = sha256_of_json([SCHEMA, self.settings, self.prompts, hashes])

    @property
    def steps(self) -> int:
        """Scheduler steps of each trajectory."""
        return int(self.settings["steps"])

    def __len__(self) -> int:
        return sum(chunk["calls"] for chunk in self._chunks)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a finished set; the chunks' headers are checked now, their contents when they are read.

        Raises:
            CalibrationError: not a calibration set, unfinished, or chunks missing.
            ModelError: a file is damaged.
        """
        folder = Path(folder)
        index = read_index(folder)
        if index is None:
            raise CalibrationError(
                "There is no calibration set", where=str(folder), remedy="Record one with `dcomp calibrate`."
            )
        unfinished = [chunk["file"] for chunk in index["chunks"] if chunk["sha256"] is None]
        if unfinished:
            raise CalibrationError(
                f"The calibration set is not finished: {len(unfinished)} of {len(index['chunks'])} chunks are missing",
                where=str(folder),
                remedy="Run the command that recorded it again; it goes on where it stopped.",
            )
        for chunk in index["chunks"]:
            read_description(folder / chunk["file"])
        return cls(folder, index)

    def calls(self, device: str | torch.device = "cpu") -> Iterator[RecordedCall]:
        """Yield every recorded call, chunk by chunk, in the order of the trajectory.

        Tensors that are equal within a chunk may share memory: do not change them in place.

        Raises:
            CalibrationError: a chunk is not what was recorded.
        """
        for chunk in self._chunks:
            path = self.folder / chunk["file"]
            description = read_description(path)
            if file_sha256(path) != chunk["sha256"]:
                raise CalibrationError(
                    "The chunk is not the one that was recorded: its hash differs",
                    where=str(path),
                    remedy="Delete the calibration set and record it again.",
                )
            tensor = open_tensors(path, device)
            for call in description["calls"]:
                yield _to_call(call, chunk["number"], tensor, path)


def read_index(folder: Path) -> dict[str, Any] | None:
    """Read and check `calibration.json`; None when there is none.

    Raises:
        CalibrationError: it is no index of ours.
        ModelError: it is no JSON.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    index = read_json_object(path)
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(index.get(name), kind)]
    if wrong or not _consistent(index):
        raise CalibrationError(
            f"This is no index of a calibration set{': ' + ', '.join(wrong) if wrong else ''}",
            where=str(path),
            remedy="Choose another folder, or delete this one to start afresh.",
        )
    return index


def _consistent(index: Mapping[str, Any]) -> bool:
    numbers = {"number", "first", "end", "calls", "bytes"}
    return (
        index["schema"] == SCHEMA
        and _is_generation(index["settings"])
        and len(index["chunks"]) > 0
        and all(isinstance(text, str) for text in (*index["prompts"], *index["notes"]))
        and _is_sampling(index)
        and isinstance(index.get("along", ""), str)
        and _are_components(index.get("components", {}))
        and all(type(t) in (int, float) and math.isfinite(t) for t in index["timesteps"])
        and all(type(call) is int and 0 <= call < len(index["timesteps"]) for call in index["kept_calls"])
        and all(
            isinstance(chunk, dict)
            and set(chunk) == {*numbers, "file", "sha256"}
            and all(type(chunk[name]) is int and chunk[name] >= 0 for name in numbers)
            and chunk["file"] == f"chunk-{chunk['number']:05d}.safetensors"
            and isinstance(chunk["sha256"], str | None)
            and (chunk["sha256"] is None or chunk["calls"] > 0)
            for chunk in index["chunks"]
        )
    )


def _is_generation(settings: Mapping[str, Any]) -> bool:
    lowest = {"steps": 1, "batch_size": 1, "height": 1, "width": 1, "seed": 0}
    guidance = settings.get("guidance")
    return (
        set(settings) == {field.name for field in fields(Generation)}
        and all(
            type(settings[name]) is int and settings[name] >= low
            for name, low in lowest.items()
            if settings[name] is not None or name not in ("height", "width")
        )
        and (guidance is None or (type(guidance) in (int, float) and math.isfinite(guidance)))
    )


def _sampling_of(index: Mapping[str, Any]) -> Sampling:
    return Sampling.from_dict(index.get("sampling", {}))


def _is_sampling(index: Mapping[str, Any]) -> bool:
    try:
        return isinstance(index.get("sampling", {}), dict) and bool(_sampling_of(index))
    except SamplingError:
        return False


def _are_components(components: Any) -> bool:
    return isinstance(components, dict) and all(
        isinstance(part, dict) and all(isinstance(value, str) for value in part.values())
        for part in components.values()
    )


def sha256_of_json(value: Any) -> str:
    """Return the sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _to_call(node: Any, trajectory: int, tensor: Callable[[str], Tensor], path: Path) -> RecordedCall:
    try:
        return RecordedCall(
            args=decode(node["args"], tensor),
            kwargs=decode(node["kwargs"], tensor),
            output=decode(node["output"], tensor),
            trajectory=trajectory,
            call=node["call"],
            step=node["step"],
            timestep=node["timestep"],
            contexts=tuple(node["contexts"]),
        )
    except (KeyError, TypeError) as error:
        raise CalibrationError(
            f"A recorded call is incomplete: {error}",
            where=str(path),
            remedy="Delete the calibration set and record it again.",
        ) from error
