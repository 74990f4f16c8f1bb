"""The order of passes in the quantize stage, and what is said of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcomp.calibrate.tree_file import read_description
from dcomp.recipes import quantize_stage
from dcomp.recipes.run import record_calibration, run_recipe
from tests.support.checkpoints import short_recipe, with_stage

TEXT = "UNet2DConditionModel"


class _StoppedError(Exception):
    pass


def test_layers_of_time_are_chosen_together_and_before_all_blocks(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    recorded = quantize_stage.record_blocks

    def record(*args: Any) -> Any:
        seen["learned"] = args[3]
        return recorded(*args)

    def stop(_: Any, __: Any, reference: Any, folder: Path, **options: Any) -> None:
        seen.update(reference=reference, block=read_description(folder.parent / "time-block.safetensors"))
        raise _StoppedError

    monkeypatch.setattr(quantize_stage, "record_blocks", record)
    monkeypatch.setattr(quantize_stage, "reconstruct_blocks", stop)
    recipe = with_stage(short_recipe(TEXT), rounding="adaround", block_iterations=2, tune=0)
    with pytest.raises(_StoppedError):
        run_recipe(tiny_model(TEXT), recipe, tmp_path / "out")
    assert not [name for name in seen["learned"] if "time_emb" in name]
    assert not [name for name in (*seen["reference"].names, *seen["reference"].weights) if "time_emb" in name]
    features = seen["block"]["result"]["features"]
    assert features
    assert all(name.endswith("time_emb_proj") for name in features)
    if seen["block"]["result"]["kept"]:
        chosen = set(seen["block"]["schemes"])
        assert chosen == {*features, "time_embedding.linear_1", "time_embedding.linear_2"}


def test_a_budget_with_a_recorded_set_has_a_folder_for_its_work(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*args: Any) -> None:
        assert args[-2].is_dir()
        raise _StoppedError

    monkeypatch.setattr(quantize_stage, "allocate_bits", allocate)
    recipe = with_stage(short_recipe(TEXT), target_bits=7.0)
    record_calibration(tiny_model(TEXT), recipe, tmp_path / "set")
    with pytest.raises(_StoppedError):
        run_recipe(tiny_model(TEXT), recipe, tmp_path / "out", calibration=tmp_path / "set")
