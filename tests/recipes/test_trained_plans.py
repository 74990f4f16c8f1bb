"""Plans of the embedded pipeline, which has been trained: there errors mean something."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcomp.recipes.demo import embedded_model
from dcomp.recipes.generate import generate
from dcomp.recipes.schedule import ScheduleResult, search_schedule

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("time_goes_by_products")]
STEPS, SAMPLES = 10, 2
OPTIONS: dict[str, Any] = {"budgets": ("1.5x",), "steps": STEPS, "guidance": 4.0, "samples": SAMPLES}


@pytest.fixture(scope="module")
def searched(
    time_goes_by_products: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ScheduleResult]:
    file = tmp_path_factory.mktemp("plans") / "plans.json"
    return file, search_schedule(embedded_model(), output=file, **OPTIONS)


def test_expected_errors_are_within_twice_the_measured_ones(searched: tuple[Path, ScheduleResult]) -> None:
    _, result = searched
    assert result.additivity is not None
    assert 0.5 < result.additivity.median_ratio < 2


def test_plans_are_better_than_equal_distances_and_than_fewer_steps(
    searched: tuple[Path, ScheduleResult], tmp_path: Path
) -> None:
    _, result = searched
    uniform = search_schedule(embedded_model(), output=tmp_path / "plans.json", planner="uniform", **OPTIONS)
    theirs = {each.name: each.psnr for each in uniform.plans}
    for each in result.plans:
        assert each.psnr > theirs.get(each.name, 0.0)
        assert each.psnr > result.fewer_steps[each.name][1] + 2
    assert [each.name for each in result.plans] == ["1.5x"]


def test_a_fresh_process_makes_the_same_pictures(searched: tuple[Path, ScheduleResult], tmp_path: Path) -> None:
    file, _ = searched
    here, there = tmp_path / "here", tmp_path / "there"
    options: dict[str, Any] = {"plan": f"{file}:1.5x", "steps": STEPS, "guidance": 4.0, "seed": 3}
    made = generate(embedded_model(), ["a red heart"], here, **options)
    assert not made["notes"]
    words = ["generate", str(embedded_model()), "a red heart", "--output", str(there), "--plan", f"{file}:1.5x"]
    words += ["--steps", str(STEPS), "--guidance", "4.0", "--seed", "3"]
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(torch.get_num_threads())
    }  # which decides the order of sums
    subprocess.run([sys.executable, "-P", "-m", "dcomp", *words], check=True, env=environment, capture_output=True)
    (one,), (other,) = (sorted(folder.glob("*.png")) for folder in (here, there))
    distance = np.asarray(Image.open(one), np.int16) - np.asarray(Image.open(other), np.int16)
    assert np.abs(distance).max() <= 1  # of 255: where arrays begin in memory also decides the order of sums
