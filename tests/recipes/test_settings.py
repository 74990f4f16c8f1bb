from collections.abc import Callable
from pathlib import Path

import pytest

from dcomp import DcompError
from dcomp.calibrate.pipeline import Generation
from dcomp.recipes.schema import Calibration
from dcomp.recipes.settings import calibration_of, generation_settings
from tests.support.checkpoints import short_recipe

NAME = "FluxTransformer2DModel"
Models = Callable[[str], Path]


def test_a_checkpoint_brings_the_settings_that_it_was_calibrated_with(tiny_checkpoint: Models) -> None:
    folder = tiny_checkpoint(NAME)
    assert calibration_of(folder) == short_recipe(NAME).calibration
    assert generation_settings(folder) == Generation(steps=3, batch_size=2, height=16, width=16)


def test_given_settings_come_first(tiny_checkpoint: Models) -> None:
    found = generation_settings(tiny_checkpoint(NAME), steps=7, guidance=0.0, seed=9, batch_size=1)
    assert found == Generation(steps=7, guidance=0.0, seed=9, batch_size=1, height=16, width=16)


def test_any_other_model_gets_the_defaults(tiny_model: Models, tmp_path: Path) -> None:
    default = Calibration()
    expected = Generation(steps=default.steps, batch_size=default.batch_size)
    for model in (tiny_model(NAME), tmp_path / "missing", "owner/name"):
        assert calibration_of(model) is None
        assert generation_settings(model) == expected


def test_a_damaged_manifest_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "dcomp.json").write_text("{")
    with pytest.raises(DcompError, match="JSON"):
        generation_settings(tmp_path)
