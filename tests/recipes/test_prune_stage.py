"""Pruning as a stage: from the command to a checkpoint that opens, and what comes before and after it."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dcomp
from dcomp import DcompError, UsageError
from dcomp.calibrate.pipeline import open_pipeline
from dcomp.compress.manifest import read_manifest
from dcomp.compress.pruning.cut import cuts_of
from dcomp.compress.pruning.recovery import RecoveryResult
from dcomp.compress.split import quantized_layers
from dcomp.recipes.bench import bench
from dcomp.recipes.generate import generate
from dcomp.recipes.load import load_recipe, parse_recipe
from dcomp.recipes.prune_stage import trajectories_to_learn_from
from dcomp.recipes.run import RunResult, plan_recipe, record_calibration, run_recipe
from dcomp.recipes.schema import PruneStage, Recipe
from dcomp.recipes.settings import generation_settings, settings_of_original
from dcomp.recipes.validate import validate
from tests.support.checkpoints import checked_in_a_fork, file_hashes
from tests.support.sweep import sweep
from tests.support.tiny import NAMES

TEXT, DIT = "UNet2DConditionModel", "DiTTransformer2DModel"
Models = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def quick_check() -> Iterator[None]:
    with checked_in_a_fork():
        yield


def recipe_of(name: str, *stages: dict[str, Any], **prune: Any) -> Recipe:
    calibration: dict[str, Any] = {"samples": 3, "steps": 3, "batch_size": 3}
    if name not in ("UNet2DModel", DIT):
        calibration |= {"height": 16, "width": 16}
    first = {"kind": "prune", "rows": 8, "proposals": 3, "round_to": 16} | prune
    return parse_recipe({"calibration": calibration, "stages": [first, *stages]}, where="test")


def count(folder: Path) -> int:
    """Parameters in the weight files of a denoiser."""
    total = 0
    for file in [*folder.glob("unet/*.safetensors"), *folder.glob("transformer/*.safetensors")]:
        with safe_open(file, "pt") as opened:
            total += sum(torch.Size(opened.get_slice(key).get_shape()).numel() for key in list(opened.keys()))
    return total


@pytest.fixture(scope="module")
def pruned(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("pruned")
    return run_recipe(tiny_model(TEXT), recipe_of(TEXT, parameters=0.25), folder / "out")


@pytest.mark.parametrize("name", sweep(NAMES, ["SD3Transformer2DModel"]))
def test_what_is_left_is_in_the_files(name: str, tiny_model: Models, tmp_path: Path) -> None:
    whole = count(tiny_model(name))
    result = run_recipe(tiny_model(name), recipe_of(name, parameters=0.2), tmp_path / "out")
    assert result.pruned is not None
    before, after = result.pruned.before.parameters, result.pruned.after.parameters
    assert after <= 0.8 * before
    assert before - after == whole - count(tmp_path / "out")  # files also hold tables of positions
    assert before == whole or name == "SD3Transformer2DModel"
    assert result.pruned.error == min(each.error for each in result.pruned.proposals)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.pruning == json.loads(json.dumps(result.pruned.to_dict()))
    generate(tmp_path / "out", ["1" if name == DIT else "a cat"], tmp_path / "pictures", steps=3)
    assert len([*(tmp_path / "pictures").glob("*.png")]) == 1


def test_the_best_of_the_choices_is_written(pruned: RunResult) -> None:
    found = pruned.pruned
    assert found is not None
    assert len(found.proposals) > 1
    assert found.additivity is not None
    opened: Any = dcomp.load(pruned.output)
    assert cuts_of(opened.unet) == found.cuts
    assert set(pruned.to_dict()["pruning"]) == set(found.to_dict())


@pytest.mark.parametrize("text", sweep(["errors of cuts", "trajectories", "writing and checking"], ["errors of cuts"]))
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes_as_another(
    text: str, pruned: RunResult, tiny_model: Models, tmp_path: Path
) -> None:
    recipe, seen = recipe_of(TEXT, parameters=0.25), list[str]()

    def stop(now: str, done: int, total: int) -> None:
        seen.append(now)
        if now == text and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_model(TEXT), recipe, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    begun = seen.count("errors of cuts")
    seen.clear()
    run_recipe(tiny_model(TEXT), recipe, tmp_path / "out", progress=lambda now, *_: seen.append(now))
    assert ("errors of cuts" in seen) == (text != "writing and checking")
    assert begun
    assert file_hashes(tmp_path / "out") == file_hashes(pruned.output)


def test_recovery_is_part_of_the_account_and_goes_on_where_it_was(tiny_model: Models, tmp_path: Path) -> None:
    options: dict[str, Any] = {"parameters": 0.3, "method": "magnitude", "recover": "norms", "recover_iterations": 40}
    recipe = recipe_of(DIT, **options)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"samples": 6})})
    whole = run_recipe(tiny_model(DIT), recipe, tmp_path / "whole").pruned
    assert whole is not None
    assert whole.recovery is not None
    assert (whole.error < whole.unrecovered) == (whole.recovery.best > 0)
    assert whole.error <= whole.unrecovered

    def stop(text: str, done: int, total: int) -> None:
        if text == "recovery" and done == 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcomp.compress.learning_run.SNAPSHOT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_model(DIT), recipe, tmp_path / "out", progress=stop)
        seen: list[int] = []
        run_recipe(
            tiny_model(DIT),
            recipe,
            tmp_path / "out",
            progress=lambda text, done, _: seen.append(done) if text == "recovery" else None,
        )
    assert seen[0] in (7, 8)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("iterations", "rows", "samples", "count"), [(10, 8, 256, 20), (10, 7, 256, 23), (99, 8, 5, 5)]
)
def test_hardly_a_row_is_learned_from_twice(iterations: int, rows: int, samples: int, count: int) -> None:
    """A step learns from 16 rows."""
    stage = PruneStage(recover="full", recover_iterations=iterations, recover_samples=samples)
    assert trajectories_to_learn_from(stage, rows) == count


@pytest.mark.parametrize(("iterations", "recorded"), [(2, None), (4, 11)])
def test_more_trajectories_are_recorded_where_those_at_hand_are_too_few(
    iterations: int, recorded: int | None, tiny_model: Models, tmp_path: Path
) -> None:
    """Three steps of two contexts each: 32 rows are those of six trajectories, 64 those of eleven."""
    recipe = recipe_of(DIT, parameters=0.2, method="magnitude", recover="norms", recover_iterations=iterations)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"samples": 6})})
    totals: set[int] = set()
    run_recipe(
        tiny_model(DIT),
        recipe,
        tmp_path / "out",
        progress=lambda text, _, total: totals.add(total) if text == "trajectories to learn from" else None,
    )
    assert totals == (set() if recorded is None else {3 * math.ceil(recorded / 3)})


def test_pruned_then_quantized_in_one_run(tiny_model: Models, tmp_path: Path) -> None:
    stages = {"kind": "quantize", "preset": "w4a8", "tune": 0, "rows": 16}
    result = run_recipe(tiny_model(DIT), recipe_of(DIT, stages, parameters=0.2), tmp_path / "out")
    opened: Any = dcomp.load(tmp_path / "out")
    assert quantized_layers(opened.transformer)
    assert cuts_of(opened.transformer) or opened.transformer.config.num_layers == 1
    assert result.manifest.totals.denoiser_bytes_ratio < 0.6
    assert {name for name, record in result.manifest.layers.items() if record.scheme} == {
        *quantized_layers(opened.transformer)
    }
    first, second = result.stages
    assert (first.name, second.name) == ("prune", "quantize")
    assert result.pruned is not None
    assert first.latent_error == result.pruned.error
    assert second.nbytes < 0.7 * first.nbytes
    assert first.macs == second.macs == result.pruned.after.macs / result.pruned.before.macs


@pytest.mark.slow
def test_all_stages_in_one_run(tiny_model: Models, tmp_path: Path, time_goes_by_products: pytest.MonkeyPatch) -> None:
    name = "UNet2DModel"
    stages = (
        {"kind": "quantize", "preset": "w8a8", "tune": 0, "rows": 16},
        {"kind": "schedule", "budgets": ["1.3x"], "samples": 2},
    )
    recipe = recipe_of(name, *stages, parameters=0.1)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"steps": 6})})
    result = run_recipe(tiny_model(name), recipe, tmp_path / "out")
    assert result.schedules is not None
    plans = [f"plan {plan.name}" for plan in result.schedules.plans]
    assert [row.name for row in result.stages] == ["prune", "quantize", *plans]
    assert all(0 < row.latent_error < 1 for row in result.stages)
    for row, plan in zip(result.stages[2:], result.schedules.plans, strict=True):
        assert row.macs == pytest.approx(result.stages[1].macs / plan.speedup)
        assert row.nbytes == result.stages[1].nbytes
    assert (tmp_path / "out" / "dcomp_cache.json").is_file() == bool(plans)


def test_what_was_made_of_the_whole_model_is_stale(pruned: RunResult, tiny_model: Models, tmp_path: Path) -> None:
    quantizing = load_recipe("w8a8", values={"calibration.samples": 3, "calibration.steps": 3, "stages.0.tune": 0})
    record_calibration(tiny_model(TEXT), quantizing, tmp_path / "set")
    with pytest.raises(DcompError, match="calibration set"):
        run_recipe(pruned.output, quantizing, tmp_path / "out", calibration=tmp_path / "set")
    assert not (tmp_path / "out").exists()


def test_a_pruned_checkpoint_is_quantized_and_not_pruned_again(pruned: RunResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pruned before"):
        plan_recipe(pruned.output, recipe_of(TEXT))
    quantizing = load_recipe("w8a8", values={"calibration.samples": 3, "calibration.steps": 3, "stages.0.tune": 0})
    result = run_recipe(pruned.output, quantizing, tmp_path / "out")
    opened: Any = dcomp.load(result.output)
    assert pruned.pruned is not None
    assert cuts_of(opened.unet) == pruned.pruned.cuts
    assert quantized_layers(opened.unet)
    with pytest.raises(UsageError, match="quantized already"):
        run_recipe(result.output, recipe_of(TEXT), tmp_path / "more")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more than there is": ({"parameters": 0.99}, "at most"),
    "smaller than can be": ({"max_megabytes": 0.001}, "at most"),
    "all pinned": ({"pin": ["*"]}, "at most nothing can go"),
    "a pattern of nothing": ({"pin": ["conv_out"]}, "names nothing that can be cut"),
    "a tie of nothing": ({"tie": [["mid_block.*", "nobody"]]}, "names nothing that can be cut"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_measured(case: str, tiny_model: Models, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        run_recipe(tiny_model(TEXT), recipe_of(TEXT, **options), tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_a_size_is_a_budget_too(tiny_model: Models, tmp_path: Path) -> None:
    name = "UNet2DModel"
    megabytes = 0.8 * 4 * count(tiny_model(name)) / 1e6
    result = run_recipe(
        tiny_model(name), recipe_of(name, max_megabytes=megabytes, macs=0.1, method="magnitude"), tmp_path / "out"
    )
    assert result.pruned is not None
    assert 4 * count(tmp_path / "out") <= megabytes * 1e6
    assert result.pruned.after.macs <= 0.9 * result.pruned.before.macs
    assert len(result.pruned.proposals) == 1


def test_ties_and_pins_are_kept_to(tiny_model: Models, tmp_path: Path) -> None:
    tie = (("*.attn1",), ("*.ff",))
    result = run_recipe(
        tiny_model("PixArtTransformer2DModel"),
        recipe_of("PixArtTransformer2DModel", parameters=0.1, tie=tie, pin=["transformer_blocks.?", "*.attn2"]),
        tmp_path / "out",
    )
    assert result.pruned is not None
    for leaf in ("attn1", "ff"):
        names = [name for name in result.pruned.cuts.removed if name.endswith(leaf)]
        widths = [len(kept) for name, kept in result.pruned.cuts.kept.items() if f".{leaf}:" in name]
        assert len(names) in (0, 2)
        assert len(widths) in (0, 2)
        assert len({*widths}) < 2
    assert not any("attn2" in name for name in result.pruned.cuts.removed)


def test_a_dry_run_says_what_can_go(tiny_model: Models) -> None:
    plan = plan_recipe(tiny_model(DIT), recipe_of(DIT, parameters=0.3))
    assert plan.outlook is not None
    data = plan.to_dict()["prunable"]
    assert data["needed"]["parameters"] == -int(-0.3 * count(tiny_model(DIT)) // 1)
    assert data["most"]["parameters"] > data["needed"]["parameters"]
    assert data["parts"]["transformer_blocks.1"]["kind"] == "block"
    assert data["left"] == {"transformer_blocks.0": "what follows the blocks reads its embedding of timestep and class"}
    assert PruneStage().parameters is None


def test_stages_are_named_by_their_kind(tmp_path: Path) -> None:
    recipe = load_recipe("prune", ["stages.prune.rows=7"], {"stages.prune.parameters": 0.4})
    assert recipe.prune is not None
    assert (recipe.prune.rows, recipe.prune.parameters) == (7, 0.4)
    with pytest.raises(UsageError, match="'quantize' is not one of the 1 items"):
        load_recipe("prune", ["stages.quantize.rows=7"])


def test_an_edited_manifest_is_noticed(pruned: RunResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pruned.output, tmp_path / "copy"))
    data = json.loads((copy / "dcomp.json").read_text())
    data["pruning"]["parameters_after"] = 1
    (copy / "dcomp.json").write_text(json.dumps(data))
    with pytest.raises(DcompError, match="its own hash"):
        dcomp.load(copy)
    assert open_pipeline(copy).denoiser is not None


@pytest.mark.slow
def test_guidance_that_was_learned_is_not_asked_of_the_pipeline_again(tiny_model: Models, tmp_path: Path) -> None:
    recover: dict[str, Any] = {"recover": "full", "recover_iterations": 12, "recover_guidance": True}
    short: dict[str, Any] = {"kind": "quantize", "preset": "w8a8", "rows": 8, "tune": 0, "rounding": "nearest"}
    recipe = recipe_of(TEXT, short, parameters=0.1, method="magnitude", **recover)
    calibration = recipe.calibration.model_copy(update={"samples": 4, "guidance": 3.0})
    out = tmp_path / "out"
    result = run_recipe(tiny_model(TEXT), recipe.model_copy(update={"calibration": calibration}), out)
    assert result.pruned is not None
    assert result.pruned.recovery is not None
    assert result.pruned.recovery.after < result.pruned.recovery.before
    assert result.manifest.guidance == result.pruned.guidance == 3.0
    assert [row.macs < 0.5 for row in result.stages] == [True, True]  # one context instead of two, and less of it
    assert generation_settings(out).guidance == 1.0
    assert settings_of_original(out, generation_settings(out)).guidance == 3.0
    with pytest.raises(UsageError, match="has learned a guidance of 3 and cannot be guided again by 4"):
        generate(out, ["a cat"], tmp_path / "pictures", guidance=4.0)
    found = validate(out, tiny_model(TEXT), samples=2, features=None, bench=False)
    assert found.macs_ratio < 0.5
    assert found.settings["guidance"] == 1.0
    assert bench(out, tiny_model(TEXT), repeats=3, generations=0, peak=False).macs_ratio < 0.5
    # The same pruned model through a second run: it still knows.
    floats = tmp_path / "floats"
    run_recipe(tiny_model(TEXT), recipe.without("quantize").model_copy(update={"calibration": calibration}), floats)
    again = parse_recipe({"calibration": {"samples": 3, "steps": 3}, "stages": [short]}, where="test")
    second = run_recipe(floats, again, tmp_path / "second").manifest
    assert second.guidance == 3.0
    assert second.recipe["calibration"]["guidance"] == 1.0


@pytest.mark.parametrize(
    ("name", "guidance"), [("UNet2DModel", None), (TEXT, 1.0), (DIT, 0.5), ("FluxTransformer2DModel", 3.5)]
)
def test_where_nothing_guides_no_guidance_is_learned(
    name: str, guidance: float | None, tiny_model: Models, tmp_path: Path
) -> None:
    recipe = recipe_of(name, parameters=0.1, recover="full", recover_guidance=True)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"guidance": guidance})})
    with pytest.raises(DcompError, match="There is no guidance to learn"):
        run_recipe(
            tiny_model(name),
            recipe,
            tmp_path / "out",
            progress=lambda text, *_: pytest.fail("too late") if "cuts" in text else None,
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="recover_guidance needs recover"):
        recipe_of(name, recover_guidance=True)


def test_guidance_that_could_not_be_learned_is_asked_of_the_pipeline_as_before(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_helped(*_: Any, **__: Any) -> RecoveryResult:
        return RecoveryResult(1.0, 1.0, 5, 0, "no better")

    monkeypatch.setattr("dcomp.recipes.prune_stage.recover", nothing_helped)
    options: dict[str, Any] = {"parameters": 0.1, "method": "magnitude", "recover": "full", "recover_guidance": True}
    recipe = recipe_of(TEXT, **options)
    calibration = recipe.calibration.model_copy(update={"guidance": 3.0})
    result = run_recipe(tiny_model(TEXT), recipe.model_copy(update={"calibration": calibration}), tmp_path / "out")
    assert result.pruned is not None
    assert result.manifest.guidance is None is result.pruned.guidance
    assert result.pruned.error == result.pruned.unrecovered
    assert generation_settings(tmp_path / "out").guidance == 3.0


@pytest.mark.parametrize("guidance", [0.5, 1e9, float("inf"), "7"])
def test_an_impossible_guidance_in_a_manifest_is_refused(guidance: Any, pruned: RunResult, tmp_path: Path) -> None:
    data = json.loads((pruned.output / "dcomp.json").read_text())
    (tmp_path / "dcomp.json").write_text(json.dumps(data | {"guidance": guidance}))
    with pytest.raises(DcompError):
        read_manifest(tmp_path)
