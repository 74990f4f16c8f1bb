"""Seeded samples of one pipeline as chunk files: what a killed validation goes on from.

A chunk is a pure function of (model, prompts, settings, index range): it is written atomically under a name that its
fingerprint is part of, skipped when its file exists, and recomputed when that file is damaged. Samples are never all in
memory. Files are safetensors: `latents` fp32 [n, ...], `images` fp32 [n, C, H, W], `blanked` bool [n] (pictures that
the pipeline's own safety checker replaced), `unseen` int64 (timesteps that a quantized denoiser was not calibrated
for), and for the first samples `step_latents` fp32 [n', S, ...], the latents after each of S scheduler steps.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcomp import DcompError, __version__
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.pipeline import Generation, OpenPipeline

CURVE_SAMPLES = 16  # samples whose latents are kept after every step


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of a pipeline; see the module for the tensors."""

    latents: Tensor
    images: Tensor
    blanked: Tensor
    unseen: int
    step_latents: Tensor | None


class SampleFolder:
    """The chunk files of one pipeline with one set of prompts and settings.

    Args:
        root: folder for any number of pipelines and settings.
        pipeline: what makes the samples.
        prompts: one for each sample, `N` in all.
        settings: `batch_size` samples make a chunk.
        first_index: number of the first sample; noise depends on the seed and this number.
        plan: cache plan that the pipeline follows, as JSON data.
    """

    def __init__(
        self,
        root: Path,
        pipeline: OpenPipeline,
        prompts: Sequence[str],
        settings: Generation,
        first_index: int = 0,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self.prompts = list(prompts)
        self.settings = settings
        self.first_index = first_index
        self.ranges = [
            range(first, min(first + settings.batch_size, len(prompts)))
            for first in range(0, len(prompts), settings.batch_size)
        ]
        facts = {
            "model": pipeline.fingerprint(),
            "prompts": self.prompts,
            "settings": asdict(settings),
            "first_index": first_index,
            "plan": plan,
            "device": str(next(pipeline.denoiser.parameters()).device),
            "versions": [__version__, torch.__version__],
        }
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.folder = root / self.fingerprint[:24]

    def make(self, pipeline: OpenPipeline, progress: Callable[[int, int], None]) -> None:
        """Run the pipeline for every chunk that is not there yet; `progress` gets samples done and their total.

        Raises:
            DcompError: the disk is full or the folder not writable.
        """
        for indices in self.ranges:
            progress(indices.start, len(self.prompts))
            if self._read(indices) is None:
                self._write(indices, self._sample(pipeline, indices))
        progress(len(self.prompts), len(self.prompts))

    def read(self, number: int) -> Chunk:
        """Return a finished chunk, that of `ranges[number]`."""
        indices = self.ranges[number]
        chunk = self._read(indices)
        if chunk is None:
            raise DcompError(
                "A finished chunk of samples is gone or damaged",
                where=str(self._file(indices)),
                remedy="Run the same command again; only this chunk is made anew.",
            )
        return chunk

    def _sample(self, pipeline: OpenPipeline, indices: range) -> dict[str, Tensor]:
        curve = max(0, min(indices.stop, CURVE_SAMPLES) - indices.start)
        prompts = [self.prompts[i] for i in indices]
        numbers = [self.first_index + i for i in indices]
        before = _unseen(pipeline)
        trajectory = pipeline.run(prompts, numbers, self.settings, keep_steps=curve > 0)
        assert trajectory.images is not None  # run() decodes unless told not to
        tensors = {
            "latents": trajectory.latents.float().cpu(),
            "images": trajectory.images.float().cpu(),
            "blanked": torch.tensor([place in trajectory.blanked for place in range(len(prompts))]),
            "unseen": torch.tensor(_unseen(pipeline) - before),
        }
        if trajectory.step_latents:
            tensors["step_latents"] = torch.stack([latents[:curve].float() for latents in trajectory.step_latents], 1)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def _file(self, indices: range) -> Path:
        return self.folder / f"{indices.start:06}-{indices.stop:06}.safetensors"

    def _read(self, indices: range) -> Chunk | None:
        try:
            with safe_open(self._file(indices), framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError):
            return None
        if not {"latents", "images", "blanked", "unseen"} <= set(tensors) or len(tensors["images"]) != len(indices):
            return None
        return Chunk(
            latents=tensors["latents"],
            images=tensors["images"],
            blanked=tensors["blanked"],
            unseen=int(tensors["unseen"]),
            step_latents=tensors.get("step_latents"),
        )

    def _write(self, indices: range, tensors: dict[str, Tensor]) -> None:
        file = self._file(indices)
        temporary = file.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"fingerprint": self.fingerprint})
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            raise DcompError(
                f"Samples cannot be stored: {str(error)[:200]}",
                where=str(self.folder),
                remedy="Free some space or name another work folder; finished chunks are kept.",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _unseen(pipeline: OpenPipeline) -> int:
    clock: StepClock | None = getattr(pipeline.denoiser, "dcomp_clock", None)
    return clock.unseen if clock else 0
