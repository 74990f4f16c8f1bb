import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcomp import UsageError
from dcomp.calibrate import quality
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.compress.manifest import MANIFEST, LayerRecord, Manifest, Source, Totals
from dcomp.recipes.load import load_recipe
from dcomp.recipes.trajectories import SampleFolder
from dcomp.recipes.validate import FIRST_INDEX, ValidationResult, validate
from dcomp.recipes.verdict import RULES, check, check_thresholds
from tests.support.tiny import save_tiny_pipeline

PROMISED = {
    *("latent_rel_error", "psnr_db", "ssim", "fid", "bits_per_param", "bytes_original", "bytes_compressed"),
    *("denoiser_bytes_ratio", "macs_ratio", "speedup", "speedup_min", "speedup_max", "peak_bytes"),
    *("passed", "thresholds"),
}
SHORT: dict[str, Any] = {"samples": 5, "steps": 2, "batch_size": 2, "bench": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("validate")
    return {
        "text": save_tiny_pipeline("UNet2DConditionModel", root / "text"),
        "other": save_tiny_pipeline("UNet2DConditionModel", root / "other", seed=1),
        "class": save_tiny_pipeline("DiTTransformer2DModel", root / "class"),
        "free": save_tiny_pipeline("UNet2DModel", root / "free"),
    }


@pytest.fixture(scope="module")
def different(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ValidationResult:
    return validate(
        models["other"],
        models["text"],
        prompts=["a cat", "a <b>dog</b>"],
        features="pixel",
        thresholds={"min_psnr": 5.0, "max_latent_error": 1e-6},
        work=tmp_path_factory.mktemp("work"),
        **SHORT,
    )


@pytest.mark.parametrize("name", ["text", "class", "free"])
def test_pipeline_against_itself_has_no_error_at_all(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(models[name], tmp_path / "copy")  # both sides are really run
    result = validate(copy, models[name], thresholds={"max_latent_error": 0.0, "min_psnr": quality.MAX_DB}, **SHORT)
    assert result.passed
    assert result.latent_rel_error == 0.0
    assert result.psnr_db == quality.MAX_DB
    assert {point.high for point in result.error_by_step} == {0.0}
    assert result.denoiser_bytes_ratio == result.macs_ratio == 1.0
    assert result.layers == result.left_in_float == []


def test_result_has_the_promised_keys_and_survives_json(different: ValidationResult) -> None:
    data = json.loads(json.dumps(different.to_dict(), allow_nan=False))
    assert set(data) >= PROMISED
    assert {"schema_version", "per_prompt", "error_by_step", "layers", "settings", "left_in_float"} <= set(data)
    assert ValidationResult.model_validate(data) == ValidationResult.model_validate(different.to_dict())


def test_figures_follow_from_those_of_the_samples(different: ValidationResult) -> None:
    assert [p.prompt for p in different.per_prompt] == ["a cat", "a <b>dog</b>", "a cat", "a <b>dog</b>", "a cat"]
    for key in ("latent_rel_error", "psnr_db", "ssim"):
        values = [getattr(p, key) for p in different.per_prompt]
        assert getattr(different, key) == pytest.approx(sum(values) / len(values))
    assert 0 < different.latent_rel_error < math.inf
    assert different.psnr_db_of_mean_mse <= different.psnr_db
    assert different.error_by_step[-1].mean == pytest.approx(different.latent_rel_error)
    assert len(different.error_by_step) == 2
    assert different.extractor == "pixel/1"
    assert different.fid > 0


def test_one_missed_threshold_fails_the_whole(different: ValidationResult) -> None:
    assert different.thresholds["min_psnr"].passed
    assert not different.thresholds["max_latent_error"].passed
    assert not different.passed


def test_pictures_come_worst_first_in_eight_bits(different: ValidationResult) -> None:
    ranks = [pair.rank for pair in different.pictures]
    psnrs = [pair.result.psnr_db for pair in different.pictures]
    assert ranks == [1, 2, 3, 4, 5]
    assert psnrs == sorted(psnrs)
    assert different.pictures[0].original.shape == (16, 16, 3)
    assert "pictures" not in different.to_dict()


def test_settings_and_layers_come_from_the_checkpoints_manifest(models: dict[str, Path], tmp_path: Path) -> None:
    """A manifest beside float weights: what it says is taken over, whatever it says."""
    checkpoint = shutil.copytree(models["text"], tmp_path / "checkpoint")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house\na blue house\n")
    values = {"calibration.steps": 3, "calibration.seed": 7, "calibration.prompts": str(prompts)}
    sizes = {"bytes_before": 400, "bytes_after": 100}
    layers = {
        "conv_in": LayerRecord(role="input", scheme="W8A16", weight_bits=8, input_bits=16, weight_error=0.01, **sizes),
        "conv_out": LayerRecord(role="output", weight_bits=32, input_bits=32, reason="kept by hand", **sizes),
    }
    manifest = Manifest(
        dcomp_version="0",
        packages={},
        source=Source(name="text", sha256="0" * 64),
        recipe=load_recipe("w8a8", (), values).to_dict(),
        layers=layers,
        totals=Totals(bytes_original=2, bytes_compressed=1, denoiser_bytes_ratio=0.5, bits_per_param=16.0),
        files={},
    )
    (checkpoint / MANIFEST).write_text(manifest.sealed().to_json())
    result = validate(checkpoint, models["text"], samples=3, batch_size=2, bench=False)
    assert (result.settings["steps"], result.seed, len(result.error_by_step)) == (3, 7, 3)
    assert [p.prompt for p in result.per_prompt] == ["a red house", "a blue house", "a red house"]
    assert [(layer["name"], layer["scheme"]) for layer in result.layers] == [("conv_in", "W8A16"), ("conv_out", None)]
    assert result.left_in_float == [{"name": "conv_out", "role": "output", "reason": "kept by hand"}]


def test_noise_is_held_out_from_calibration(models: dict[str, Path], different: ValidationResult) -> None:
    pipeline = open_pipeline(models["text"])
    own = pipeline.run(["a cat"], [FIRST_INDEX], Generation(steps=2), decode=True).images[0]
    shown = next(pair for pair in different.pictures if pair.result.index == 0)
    assert (torch.from_numpy(shown.original).permute(2, 0, 1) / 255 - own).abs().max() < 0.51 / 255
    assert FIRST_INDEX > 65_536  # calibration numbers its samples from 0, and has no more


class Interrupted:
    """Progress that stops the run as Ctrl-C would, once so many samples of the compressed side are done."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, text: str, done: int, total: int) -> None:
        if text == "compressed pictures" and done == self.samples:
            raise KeyboardInterrupt


def test_interrupted_run_goes_on_where_it_stopped(models: dict[str, Path], tmp_path: Path) -> None:
    whole = validate(models["other"], models["text"], work=tmp_path / "whole", **SHORT)
    with pytest.raises(KeyboardInterrupt):
        validate(models["other"], models["text"], work=tmp_path / "work", progress=Interrupted(4), **SHORT)
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*.safetensors")}
    assert len(finished) == 3 + 2
    resumed = validate(models["other"], models["text"], work=tmp_path / "work", **SHORT)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert resumed.to_dict() == whole.to_dict()


def test_default_work_folder_is_kept_on_interruption_and_removed_on_success(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(models["other"], tmp_path / "copy")
    with pytest.raises(KeyboardInterrupt):
        validate(copy, models["text"], progress=Interrupted(2), **SHORT)
    work = tmp_path / ".copy.dcomp-validation"
    assert work.is_dir()
    assert str(work) in capsys.readouterr().err
    validate(copy, models["text"], **SHORT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_damaged_and_foreign_chunks_are_made_anew(models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = open_pipeline(models["free"])
    folder = SampleFolder(tmp_path, pipeline, ["", "", ""], Generation(steps=2, batch_size=2))
    folder.make(pipeline, lambda done, total: None)
    expected = [folder.read(number).latents for number in (0, 1)]
    cut, foreign = sorted(folder.folder.iterdir())
    cut.write_bytes(cut.read_bytes()[:-5])
    save_file({name: t + 1 if t.is_floating_point() else t for name, t in load_file(foreign).items()}, foreign)
    folder.make(pipeline, lambda done, total: None)
    for number, latents in enumerate(expected):
        assert torch.equal(folder.read(number).latents, latents)


def test_anything_that_changes_the_samples_changes_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = open_pipeline(models["text"])
    base = Generation(steps=2)
    folders = [
        SampleFolder(tmp_path, pipeline, ["a"], base),
        SampleFolder(tmp_path, pipeline, ["b"], base),
        SampleFolder(tmp_path, pipeline, ["a"], Generation(steps=3)),
        SampleFolder(tmp_path, pipeline, ["a"], Generation(steps=2, seed=1)),
        SampleFolder(tmp_path, pipeline, ["a"], base, first_index=1),
        SampleFolder(tmp_path, open_pipeline(models["other"]), ["a"], base),
        SampleFolder(tmp_path, open_pipeline(models["text"], scheduler="PNDMScheduler"), ["a"], base),
    ]
    assert len({folder.folder for folder in folders}) == len(folders)
    assert SampleFolder(tmp_path, open_pipeline(models["text"]), ["a"], base).folder == folders[0].folder


def test_pictures_that_are_not_finite_never_pass(models: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(models["text"], tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"][0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    result = validate(broken, models["text"], features="random-conv", **SHORT)
    assert not result.passed
    assert result.non_finite_images == 5
    assert result.latent_rel_error == 0.0
    assert result.psnr_db is result.ssim is result.fid is None
    assert json.dumps(result.to_dict(), allow_nan=False)
    assert any("not finite" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("thresholds", "options", "message"),
    [
        ({"min_pnsr": 20.0}, {}, "did you mean 'min_psnr'"),
        ({"min_psnr": 101.0}, {}, "cannot be reached"),
        ({"min_ssim": 1.01}, {}, "cannot be reached"),
        ({"max_latent_error": -0.1}, {}, "cannot be reached"),
        ({"max_fid_change": 1.0}, {}, "needs a feature extractor"),
        ({"min_speedup": 1.0}, {}, "needs the speed measurement"),
        ({"min_psnr": math.nan}, {}, "not a number"),
        ({"min_psnr": "20"}, {}, "not a number"),
        ({}, {"samples": 0}, "0 samples"),
        ({}, {"samples": 1, "features": "pixel"}, "at least 2"),
        ({}, {"features": "inception"}, "no feature extractor"),
        ({}, {"prompts": []}, "empty"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_any_picture_is_made(
    thresholds: dict[str, Any], options: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        validate(models["other"], models["text"], thresholds=thresholds, work=tmp_path, **(SHORT | options))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_ssim_of_tiny_pictures_is_refused_and_two_problems_are_told_at_once(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="no SSIM"):
        validate(models["free"], models["free"], thresholds={"min_ssim": 0.5}, **SHORT)
    with pytest.raises(UsageError, match=r"min_psnr 200 .*; max_latent_error -1 "):
        check_thresholds({"min_psnr": 200, "max_latent_error": -1}, features=None, bench=True)


def test_pipelines_that_cannot_be_compared_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="class"):
        validate(models["class"], models["text"], **SHORT)
    renamed = shutil.copytree(models["text"], tmp_path / "renamed")
    index = json.loads((renamed / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (renamed / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="different schedulers, DDIMScheduler and DDPMScheduler"):
        validate(renamed, models["text"], **SHORT)
    both = validate(renamed, models["text"], scheduler="DDIMScheduler", **SHORT)
    assert both.latent_rel_error == 0.0


@pytest.mark.parametrize("name", RULES)
def test_limit_itself_is_good_enough_and_a_missing_value_is_not(name: str) -> None:
    key, relation, _, _ = RULES[name]
    worse = 0.4 if relation == ">=" else 0.6
    assert check(name, 0.5, {key: 0.5}).passed
    assert not check(name, 0.5, {key: worse}).passed
    assert not check(name, 0.5, {key: None}).passed
