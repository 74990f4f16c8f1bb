"""Tiny denoisers with recorded rows of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.replay import gather_rows
from dcomp.compress.pruning.costs import Costs, measure_costs
from dcomp.compress.pruning.importance import Subject
from dcomp.compress.pruning.units import find_units
from tests.support.tiny import save_tiny_pipeline

ROWS = 12


def subject_of(
    pipeline: OpenPipeline, folder: Path, change: Callable[[nn.Module], None] | None = None, rows: int = ROWS
) -> Subject:
    """Record rows of a tiny pipeline, changed first if there is a change."""
    if change:
        change(pipeline.denoiser)
    prompts = ["1", "2", "3"] if pipeline.kind == "class" else ["a cat", "a dog", "a bee"]
    prompts *= -(-rows // (4 * ROWS))
    sizes = {"height": 16, "width": 16} if pipeline.kind == "text" else {}
    recorded = record_calibration_set(pipeline, prompts, Generation(steps=4, **sizes), folder)
    found = gather_rows(recorded, rows, denoiser=pipeline.denoiser)
    guidance = pipeline.guidance(None)
    settings = Generation(steps=3, **sizes)

    def latents(number: int) -> Tensor:
        one = slice(number, number + 1)
        return pipeline.run(prompts[one], [number], settings, gradients=torch.is_grad_enabled()).latents

    units = find_units(pipeline.denoiser)
    return Subject(pipeline.denoiser, units, found, guidance, latents=latents, trajectories=2)


def costs_of(subject: Subject) -> Costs:
    """What a call for one row costs."""
    one = subject.rows.take([0, 1])
    return measure_costs(subject.denoiser, subject.units, one.args, one.kwargs)


@pytest.fixture
def make_subject(tmp_path: Path) -> Callable[..., Subject]:
    def make(name: str, change: Callable[[nn.Module], None] | None = None, rows: int = ROWS) -> Subject:
        pipeline = open_pipeline(save_tiny_pipeline(name, tmp_path / "source"))
        return subject_of(pipeline, tmp_path / "calibration", change, rows)

    return make
