"""Final latents of a few trajectories: the verdict on a change that one-step errors only suggest.

An error of one step that lies along the trajectory adds up over all steps, another one dies away, and no weighting of
single predictions tells them apart on every model. So what was learned from predictions is judged by whole
trajectories, with noise that no calibration saw.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.quality import geometric_mean, relative_errors
from dcomp.calibrate.tree_file import replacing

PICTURES = 16
FIRST_INDEX = 500_000  # of the noise, where neither calibration nor validation goes


class FinalLatents:
    """What a pipeline makes in float, to compare with later.

    Args:
        pipeline: in float now, compressed when `error` is asked for.
        prompts: of which the first `PICTURES` are used.
        settings: of the trajectories, as deployed.
        file: where the float model's latents are kept, so that a killed run goes on.
        progress: called with a text, the count done and the total.
    """

    def __init__(
        self,
        pipeline: OpenPipeline,
        prompts: Sequence[str],
        settings: Generation,
        file: Path,
        progress: Progress = silent,
    ) -> None:
        self._pipeline, self._settings, self._progress = pipeline, settings, progress
        self._prompts = list(prompts[:PICTURES])
        about = [self._prompts, repr(settings), torch.__version__]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        kept = load_file(file) if file.is_file() else {}
        if key not in kept:
            kept = {key: self._run("trajectories in float")}
            with replacing(file) as unfinished:
                save_file(kept, unfinished)
        self._original = kept[key]

    def deploy(self, settings: Generation) -> None:
        """Make the trajectories of what is compared with other settings than the original's from now on."""
        self._settings = settings

    def error(self) -> float:
        """Return the geometric mean of the pictures' relative errors."""
        return geometric_mean(relative_errors(self._original, self._run("trajectories")))

    def _run(self, text: str) -> Tensor:
        indices = range(FIRST_INDEX, FIRST_INDEX + len(self._prompts))
        latents = self._pipeline.run(
            self._prompts,
            indices,
            self._settings,
            decode=False,
            on_step=lambda done, total, _: self._progress(text, done, total),
        ).latents
        return latents.float().contiguous()
