"""The largest resident memory of a fresh process that opens a pipeline and makes one batch of pictures.

A process of its own, because a process never gives back its peak; and a short trajectory, because all steps need the
same. What the imports alone need is reported apart: for a small model it is most of the peak.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from dcomp import DcompError
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.recipes.peak_resident import peak_resident

STEPS = 2


class PeakMemoryError(DcompError):
    """The process that measures memory failed."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of resident memory: the peak, and what was there before the pipeline was opened."""

    peak: int
    imports: int


def measure_peak(
    model: str | Path,
    prompts: Sequence[str],
    settings: Generation,
    *,
    scheduler: str | None = None,
    device: str = "cpu",
) -> PeakMemory:
    """Open a pipeline and make one batch of pictures in a fresh process, and return that process's peak.

    Raises:
        PeakMemoryError: the process failed; the error carries its last line.
    """
    job = {
        "model": str(model),
        "prompts": list(prompts),
        "settings": asdict(settings),
        "scheduler": scheduler,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    # -P: a checkout in the current folder must not shadow installed packages.
    command = [sys.executable, "-P", "-c", "from dcomp.recipes.peak_memory import _child; _child()"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PeakMemoryError(
            f"The process that measures memory failed: {last[:500]}",
            where=str(model),
            remedy="A negative exit code means that it ran out of memory; try fewer samples or --no-bench.",
        )
    return PeakMemory(**json.loads(lines[-1]))


def _child() -> None:
    """Serve `measure_peak` in its process: a job on stdin, its answer as the last line of stdout."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    imports = psutil.Process().memory_info().rss
    pipeline = open_pipeline(job["model"], scheduler=job["scheduler"], device=job["device"])
    settings, prompts = Generation(**job["settings"]), job["prompts"]
    pipeline.run(prompts, range(len(prompts)), replace(settings, steps=min(settings.steps, STEPS)))
    print(json.dumps({"peak": peak_resident(), "imports": imports}))
