import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from dcomp.calibrate.calibration_set import CalibrationError, CalibrationSet
from dcomp.calibrate.clock import log_snr_function
from dcomp.calibrate.mismatch import check_matches
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from tests.support import tiny

SD = "UNet2DConditionModel"
AS_RECORDED = Generation(steps=4, height=16, width=16, guidance=3.0)
Fresh = Callable[..., OpenPipeline]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_pipeline(SD, tmp_path_factory.mktemp("model") / SD)


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    folder = tmp_path_factory.mktemp("set")
    return record_calibration_set(open_pipeline(model), ["a cat", "a dog"], AS_RECORDED, folder)


def test_the_same_pipeline_and_settings_match(recorded: CalibrationSet, model: Path) -> None:
    pipeline = open_pipeline(model)
    assert check_matches(recorded, pipeline, AS_RECORDED) == []
    assert check_matches(recorded, pipeline, replace(AS_RECORDED, seed=9, batch_size=1), allow_mismatch=True) == []


def test_a_default_is_what_it_stands_for(model: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(model)
    recorded = record_calibration_set(pipeline, ["a"], Generation(steps=2), tmp_path)
    assert check_matches(recorded, pipeline, Generation(steps=2, guidance=7.5, height=16, width=16)) == []
    with pytest.raises(CalibrationError, match=r"guidance 7\.5 instead of 7; width 16 instead of 24"):
        check_matches(recorded, pipeline, Generation(steps=2, guidance=7, width=24))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 8}, "steps 4 instead of 8"),
        ({"guidance": 5.0}, "guidance 3 instead of 5"),
        ({"guidance": None}, "guidance 3 instead of 7.5"),
        ({"height": 24}, "height 16 instead of 24"),
        ({"steps": 5, "width": 8}, "steps 4 instead of 5; width 16 instead of 8"),
    ],
)
def test_other_settings_are_refused_by_name(
    change: dict[str, Any], words: str, recorded: CalibrationSet, model: Path
) -> None:
    with pytest.raises(CalibrationError, match=f"{re.escape(words)} .*--allow-mismatch"):
        check_matches(recorded, open_pipeline(model), replace(AS_RECORDED, **change))


def test_another_scheduler_is_refused_by_name(recorded: CalibrationSet, model: Path) -> None:
    other = open_pipeline(model, scheduler="EulerDiscreteScheduler")
    with pytest.raises(CalibrationError) as error:
        check_matches(recorded, other, AS_RECORDED)
    assert "otherwise: scheduler DDIMScheduler instead of EulerDiscreteScheduler (" in str(error.value)
    changed = open_pipeline(model)
    changed.pipe.scheduler = DDIMScheduler.from_config(changed.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(CalibrationError, match="another configuration of the scheduler DDIMScheduler"):
        check_matches(recorded, changed, AS_RECORDED)


def test_other_weights_may_be_allowed_but_not_another_architecture(recorded: CalibrationSet, model: Path) -> None:
    trained = open_pipeline(model)
    next(trained.denoiser.parameters()).add_(1e-3)
    with pytest.raises(CalibrationError, match=r"other weights of the unet.*--allow-mismatch"):
        check_matches(recorded, trained, AS_RECORDED)
    assert "other weights of the unet" in check_matches(recorded, trained, AS_RECORDED, allow_mismatch=True)[0]
    other = open_pipeline(model)
    other.pipe.unet = tiny.tiny_denoiser("UNet2DConditionModel-linear")
    with pytest.raises(CalibrationError, match="another denoiser: another configuration of the unet") as error:
        check_matches(recorded, other, AS_RECORDED, allow_mismatch=True)
    assert "allow" not in error.value.remedy


def test_the_distance_is_that_of_the_timesteps(recorded: CalibrationSet, model: Path) -> None:
    pipeline = open_pipeline(model)
    notes = check_matches(recorded, pipeline, replace(AS_RECORDED, steps=8, guidance=4.0), allow_mismatch=True)
    assert notes[0] == "The calibration set was recorded otherwise: steps 4 instead of 8."
    assert notes[1] == "The calibration set was recorded otherwise: guidance 3 instead of 4."
    log_snr = log_snr_function(pipeline.scheduler, 999)
    pipeline.scheduler.set_timesteps(8)
    told = [float(t) for t in pipeline.scheduler.timesteps]
    distances = [min(abs(log_snr(t) - log_snr(known)) for known in recorded.timesteps) for t in told]
    assert notes[2].startswith(
        f"The 8 timesteps to deploy are {sum(distances) / 8:.3g} in log-SNR from the nearest calibrated one on "
        f"average, and {max(distances):.3g} at most."
    )
    assert max(distances) > 0.1


def test_the_distance_of_the_same_timesteps_is_none(recorded: CalibrationSet, model: Path) -> None:
    notes = check_matches(recorded, open_pipeline(model), replace(AS_RECORDED, guidance=4.0), allow_mismatch=True)
    assert notes[-1].startswith("The 4 timesteps to deploy are 0 in log-SNR from")


def test_a_set_of_an_older_version_cannot_say_what_differs(model: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(model)
    record_calibration_set(pipeline, ["a"], AS_RECORDED, tmp_path)
    index = tmp_path / "calibration.json"
    content = json.loads(index.read_text())
    del content["components"]
    index.write_text(json.dumps(content))
    old = CalibrationSet.open(tmp_path)
    assert check_matches(old, pipeline, AS_RECORDED) == []
    with pytest.raises(CalibrationError, match="too old to tell which"):
        check_matches(old, open_pipeline(model, scheduler="EulerDiscreteScheduler"), AS_RECORDED)


def test_checking_changes_nothing(recorded: CalibrationSet, model: Path) -> None:
    pipeline = open_pipeline(model)
    before = pipeline.fingerprint(), torch.get_rng_state()
    check_matches(recorded, pipeline, replace(AS_RECORDED, steps=2), allow_mismatch=True)
    assert pipeline.fingerprint() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
