"""Calibration along the trajectory that a cache plan makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcomp import UsageError
from dcomp.cachequant.plan import CachePlan, PlanError
from dcomp.cachequant.plan_set import MeasuredPlan, PlanSet
from dcomp.cachequant.zones import find_zones
from dcomp.calibrate.calibration_set import CalibrationError
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.recipes.along import along_plan
from dcomp.recipes.bench import record_calls
from dcomp.recipes.run import record_calibration, run_recipe
from dcomp.recipes.schedule import trajectory_of
from tests.support.checkpoints import checked_in_a_fork, short_recipe

Models = Callable[[str], Path]
UNET, STEPS = "UNet2DModel", 6
SETTINGS = Generation(steps=STEPS, batch_size=2)
# Of the six calls the third is not run, and of the fifth the deep part is not.
ROWS: tuple[dict[str, str], ...] = ({}, {}, {"all": "linear"}, {}, {"deep1": "reuse"}, {})


@pytest.fixture
def pipeline(tiny_model: Models) -> OpenPipeline:
    return open_pipeline(tiny_model(UNET))


@pytest.fixture
def plans(pipeline: OpenPipeline, tmp_path: Path) -> Path:
    """A file with two plans, one of which computes everything."""
    args, kwargs = record_calls(pipeline, [""], SETTINGS)[0]
    zones = [zone for zone in find_zones(pipeline.denoiser, args, kwargs) if zone.name in ("all", "deep1")]
    told: list[float] = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda _, args: told.append(float(args[1])))
    pipeline.run([""], [0], SETTINGS, decode=False)
    hook.remove()
    places = tuple(map(float, range(STEPS)))
    both = (
        MeasuredPlan(name, CachePlan(tuple(zones), tuple(told), places, rows), 1.5, None, 0.1, 30)
        for name, rows in (("1x", ({},) * STEPS), ("2x", ROWS))
    )
    file = tmp_path / "plans.json"
    PlanSet(trajectory_of(pipeline.source, pipeline, STEPS), tuple(both)).write(file)
    return file


def test_calls_that_compute_are_recorded_at_the_latents_of_the_plan(
    pipeline: OpenPipeline, plans: Path, tmp_path: Path
) -> None:
    along = along_plan(f"{plans}:2x", pipeline, STEPS)
    assert along.calls == [0, 1, 3, 5]
    recorded = record_calibration_set(pipeline, ["", ""], SETTINGS, tmp_path / "set", along=along)
    whole = record_calibration_set(pipeline, ["", ""], SETTINGS, tmp_path / "whole")
    assert [call.call for call in recorded.calls()] == [0, 1, 3, 5]
    assert recorded.all_timesteps == whole.all_timesteps
    inputs: list[Any] = []
    with along.attached():
        hook = pipeline.denoiser.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
        pipeline.run(["", ""], range(2), SETTINGS, decode=False)
        hook.remove()
    same = {call.call: call.args[0] for call in whole.calls()}
    for call in recorded.calls():
        assert torch.equal(call.args[0], inputs[call.call])
        assert torch.equal(call.args[0], same[call.call]) == (call.call < 3), "until a call is predicted"
        with torch.no_grad():
            assert torch.equal(call.output, pipeline.denoiser(*call.args, **call.kwargs)[0])
    few = record_calibration_set(pipeline, ["", ""], SETTINGS, tmp_path / "few", along=along, max_calls=2)
    assert [call.call for call in few.calls()] == [0, 5]


def test_a_set_along_another_plan_is_another_set(pipeline: OpenPipeline, plans: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("2x", "2x"):
        recorded = record_calibration_set(
            pipeline, ["", ""], SETTINGS, folder, along=along_plan(f"{plans}:{name}", pipeline, STEPS)
        )
    for other in (None, along_plan(f"{plans}:1x", pipeline, STEPS)):
        with pytest.raises(CalibrationError, match="another model"):
            record_calibration_set(pipeline, ["", ""], SETTINGS, folder, along=other)
    assert len(recorded) == 4


def test_a_plan_that_does_not_fit_is_refused(tiny_model: Models, pipeline: OpenPipeline, plans: Path) -> None:
    with pytest.raises(PlanError, match="made for 6 steps, and 7 are asked for"):
        along_plan(f"{plans}:2x", pipeline, 7)
    with pytest.raises(PlanError, match="made for the denoiser UNet2DModel"):
        along_plan(f"{plans}:2x", open_pipeline(tiny_model("DiTTransformer2DModel")), STEPS)
    with pytest.raises(PlanError, match="4x"):
        along_plan(f"{plans}:4x", pipeline, STEPS)


def test_a_recipe_quantizes_along_a_plan(tiny_model: Models, plans: Path, tmp_path: Path) -> None:
    model, digests = tiny_model(UNET), set()
    facts = record_calibration(model, short_recipe(UNET, steps=STEPS, along=f"{plans}:2x"), tmp_path / "set")
    assert facts["calls"] == 4
    with checked_in_a_fork():
        for name in ("2x", "1x"):
            recipe = short_recipe(UNET, steps=STEPS, along=f"{plans}:{name}")
            digests.add(run_recipe(model, recipe, tmp_path / name).manifest.calibration_sha256)
        again = run_recipe(model, short_recipe(UNET, steps=STEPS), tmp_path / "given", calibration=tmp_path / "set")
        with pytest.raises(UsageError, match="follows no other plan"):
            run_recipe(model, recipe, tmp_path / "both", calibration=tmp_path / "set")
    assert facts["sha256"] in digests
    assert len(digests) == 2
    assert again.manifest.calibration_sha256 == facts["sha256"]
