import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcomp.calibrate.model_files import read_safetensors_header
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.compress.manifest import read_manifest
from dcomp.compress.policy import Treatment
from dcomp.compress.scheme import SchemeError
from dcomp.recipes.load import parse_recipe
from dcomp.recipes.plan import first_call, treatment_of, weight_bits
from dcomp.recipes.run import plan_recipe
from dcomp.recipes.schema import QuantizeStage
from tests.support.checkpoints import file_hashes, short_recipe

UNET, FLUX = "UNet2DModel", "FluxTransformer2DModel"
SIX = [
    *(UNET, "UNet2DConditionModel", "DiTTransformer2DModel"),
    *("PixArtTransformer2DModel", "SD3Transformer2DModel", FLUX),
]
Models = Callable[[str], Path]


@pytest.mark.parametrize("name", SIX)
def test_planned_bytes_are_the_bytes_that_are_written(name: str, tiny_model: Models, tiny_checkpoint: Models) -> None:
    plan = plan_recipe(tiny_model(name), short_recipe(name))
    manifest = read_manifest(tiny_checkpoint(name))
    assert manifest.totals.bits_per_param == pytest.approx(plan.coverage.bits_per_param, rel=1e-9)
    folder = next(path for path in tiny_checkpoint(name).iterdir() if path.name in ("unet", "transformer"))
    stored: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        for key, info in read_safetensors_header(file).tensors.items():
            layer = key.partition(".parts.")[0] if ".parts." in key else key.rpartition(".")[0]
            stored[layer] = stored.get(layer, 0) + info.nbytes
    for layer, (before, after) in plan.layer_bytes.items():
        assert stored[layer] == after < before
    assert plan.coverage.bytes_before == 4 * plan.coverage.parameters
    assert {layer: decision.reason for layer, decision in plan.decisions.items()} == {
        layer: record.reason for layer, record in manifest.layers.items()
    }


def test_planning_writes_nothing(tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = file_hashes(tiny_model(UNET))
    plan_recipe(tiny_model(UNET), short_recipe(UNET))
    assert file_hashes(tiny_model(UNET)) == before
    assert os.listdir(tmp_path) == []


def test_presets_are_planned_in_the_order_of_their_sizes(tiny_model: Models) -> None:
    plans = {
        preset: plan_recipe(tiny_model(UNET), short_recipe(UNET, preset))
        for preset in ("float", "w8a16", "w4a16", "w4a8", "w4a4")
    }
    assert plans["float"].coverage.ratio == 1.0
    assert 0.25 < plans["w8a16"].coverage.ratio < 0.32
    for preset in ("w4a16", "w4a8", "w4a4"):
        assert 0.125 < plans[preset].coverage.ratio < plans["w8a16"].coverage.ratio
    assert len({plan.macs for plan in plans.values()}) == 1
    assert plans["float"].seconds < plans["w8a16"].seconds


def test_plan_is_json_and_its_recipe_gives_the_same_plan(tiny_model: Models) -> None:
    plan = plan_recipe(tiny_model(UNET), short_recipe(UNET))
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    recipe = parse_recipe(data["recipe"], where="plan")
    assert recipe.hash() == short_recipe(UNET).hash()
    assert plan_recipe(tiny_model(UNET), recipe).to_dict()["layers"] == data["layers"]
    assert data["layers"].keys() == plan.decisions.keys()


def test_pictures_are_planned_in_the_size_that_is_asked_for(tiny_model: Models) -> None:
    small = plan_recipe(tiny_model(FLUX), short_recipe(FLUX)).macs
    large = plan_recipe(tiny_model(FLUX), short_recipe(FLUX, height=32, width=32)).macs
    assert large > small


def test_the_first_call_is_returned_and_the_pipeline_is_as_before(tiny_model: Models) -> None:
    pipeline = open_pipeline(tiny_model("UNet2DConditionModel"))
    settings = Generation(steps=3)
    before = pipeline.run(["a cat"], [0], settings).latents
    args, kwargs = first_call(pipeline, ["a cat"], settings)
    latents, timestep = args[:2]
    assert latents.shape == (2, 4, 8, 8)  # both contexts of guidance
    assert float(timestep) == float(pipeline.scheduler.timesteps[0])
    assert "encoder_hidden_states" in kwargs
    assert torch.equal(pipeline.run(["a cat"], [0], settings).latents, before)


def test_patterns_that_name_no_layer_are_refused(tiny_model: Models) -> None:
    recipe = short_recipe(UNET)
    for change in ({"keep": ("mid_blok",)}, {"overrides": {"mid_blok": "W8A8"}}):
        stage = recipe.stages[0].model_copy(update=change)
        with pytest.raises(SchemeError, match="'mid_blok'") as caught:
            plan_recipe(tiny_model(UNET), recipe.model_copy(update={"stages": (stage,)}))
        assert "mid_block" in caught.value.remedy


def test_overrides_beat_the_preset_and_every_preset_name_is_a_label(tiny_model: Models) -> None:
    recipe = short_recipe(UNET, "float")
    for label in ("w8a8", "W4A16", "float"):
        stage = recipe.stages[0].model_copy(update={"overrides": {"mid_block": label}})
        plan = plan_recipe(tiny_model(UNET), recipe.model_copy(update={"stages": (stage,)}))
        schemes = {decision.scheme.label if decision.scheme else "float" for decision in plan.decisions.values()}
        assert label.upper() in {scheme.upper() for scheme in schemes}
        assert "float" in schemes


def test_keys_of_the_stage_reach_the_schemes(tiny_model: Models) -> None:
    recipe = short_recipe(UNET, "w4a4")
    values = {
        "weight_range": "minmax", "input_range": "minmax", "rounding": "adaround", "inputs": "static", "split": "all",
        "smooth": False, "rotate": True, "rank": 3, "input_group": 16,
    }  # fmt: skip
    assert treatment_of(QuantizeStage.model_validate(values)) == Treatment(**values)  # type: ignore[arg-type]
    stage = recipe.stages[0].model_copy(update=values)
    plan = plan_recipe(tiny_model(UNET), recipe.model_copy(update={"stages": (stage,)}))
    schemes = [decision.scheme for decision in plan.decisions.values() if decision.scheme]
    four, eight = ([s for s in schemes if s.input_bits == bits] for bits in (4, 8))
    assert {(s.weight_range, s.input_range, s.rounding, s.smooth) for s in schemes} == {
        ("minmax", "minmax", "adaround", False)
    }
    assert {(s.rotate, s.rank, s.input_group) for s in four} == {(True, 3, 16)}
    assert {(s.rotate, s.rank, s.input_granularity) for s in eight} == {(False, 0, "tensor")}
    assert len([s for s in four if s.boundaries]) > 0


@pytest.mark.parametrize(("preset", "bits"), [("w4a8", 4), ("w4a16", 4), ("w4a4", 4), ("w8a8", 8), ("w8a16", 8)])
def test_weight_bits_are_those_of_the_presets_name(preset: str, bits: int) -> None:
    assert weight_bits(QuantizeStage.model_validate({"preset": preset})) == bits
