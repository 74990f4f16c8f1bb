import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import dcomp
from dcomp import DcompError, UsageError
from dcomp.calibrate.adapters import fuse_lora
from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.compress.checkpoint import ManifestFields, write_checkpoint
from dcomp.compress.manifest import check_manifest
from dcomp.compress.quantize import quantize_denoiser
from dcomp.compress.split import quantized_layers
from dcomp.recipes.generate import generate
from dcomp.recipes.inspect import inspect
from dcomp.recipes.load import load_recipe
from dcomp.recipes.methods import settings_of
from dcomp.recipes.plan import Plan, make_plan
from dcomp.recipes.run import RunResult, default_output, plan_recipe, quantize, record_calibration, run_recipe
from dcomp.recipes.schema import Recipe
from tests.support.checkpoints import checked_in_a_fork, file_hashes, save_lora, short_recipe, with_stage
from tests.support.sweep import sweep
from tests.support.tiny import XL, load_pipeline, tiny_pipeline

UNET, TEXT, DIT = "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"
SIX = [UNET, TEXT, DIT, "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]
Models = Callable[[str], Path]


@pytest.fixture(autouse=True, scope="module")
def quick_check() -> Iterator[None]:
    with checked_in_a_fork():
        yield


def prompts_for(pipeline: OpenPipeline) -> list[str]:
    return {"class": ["1", "goldfish"], "text": ["a cat", "a red house"]}.get(pipeline.kind, ["", ""])


def settings_for(name: str, **changes: Any) -> Generation:
    size = 16 if name.startswith("Flux") else None
    return Generation(**{"steps": 3, "batch_size": 2, "height": size, "width": size} | changes)


def pictures(folder: Path, name: str, **options: Any) -> torch.Tensor:
    pipeline = open_pipeline(folder, **options)
    images = pipeline.run(prompts_for(pipeline), [0, 1], settings_for(name)).images
    assert images is not None
    return images


def left_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "inputs"),
    sweep(
        [*((name, "dynamic") for name in SIX), (UNET, "static"), (TEXT, "static")],
        [(TEXT, "dynamic"), (DIT, "dynamic"), (UNET, "static")],
    ),
)
def test_every_architecture_becomes_a_checkpoint_that_stays_close(
    name: str, inputs: str, tiny_model: Models, tiny_checkpoint: Models, static_checkpoint: Models
) -> None:
    folder = {"dynamic": tiny_checkpoint, "static": static_checkpoint}[inputs](name)
    manifest = check_manifest(folder)
    records = [record for record in manifest.layers.values() if record.scheme]
    assert sum(r.bytes_after for r in records) < 0.35 * sum(r.bytes_before for r in records)
    pipe = dcomp.load(folder, check="full")
    original, compressed = open_pipeline(tiny_model(name)), OpenPipeline(pipe, folder)
    quantized = quantized_layers(compressed.denoiser)
    assert len(quantized) == sum(record.scheme is not None for record in manifest.layers.values()) > 10
    # Other noise than the calibration's, the same timesteps.
    settings, prompts = settings_for(name, seed=5), prompts_for(original)
    expected = original.run(prompts, [8, 9], settings)
    found = compressed.run(prompts, [8, 9], settings)
    assert found.images is not None
    assert expected.images is not None
    assert found.images.shape == expected.images.shape
    assert found.images.isfinite().all()
    assert found.latents.isfinite().all()
    error = (found.latents - expected.latents).norm() / expected.latents.norm()
    # Four bits move every layer of a random model by about 7%; its trajectory must not add that up.
    assert 0 < error < 0.15
    clock = compressed.denoiser.dcomp_clock
    assert (clock.bins.count if clock.bins else None, clock.unseen) == (3 if inputs == "static" else None, 0)


@pytest.mark.parametrize("preset", ["float", "no stages"])
@pytest.mark.parametrize("name", [TEXT, DIT])
def test_a_recipe_that_changes_no_layer_gives_the_very_same_pictures(
    name: str, preset: str, tiny_model: Models, tmp_path: Path
) -> None:
    recipe = short_recipe(name, "float") if preset == "float" else Recipe(name="nothing")
    result = run_recipe(tiny_model(name), recipe, tmp_path / "out")
    assert torch.equal(pictures(tmp_path / "out", name), pictures(tiny_model(name), name))
    assert result.errors == {}
    assert all(record.scheme is None for record in result.manifest.layers.values())


def test_layers_of_timestep_and_pooled_text_leave_the_memory_if_the_recipe_says_so(
    tiny_model: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run_recipe(tiny_model(XL), with_stage(short_recipe(XL), ahead="offload"), out)
    (note,) = (note for note in result.notes if "run" in note and "in the file between" in note)
    assert "added_cond_kwargs.text_embeds" in note
    denoisers = [dcomp.load(out).unet, dcomp.load(out, ahead="off").unet]
    there = [sum(tensor.nbytes for tensor in (*d.parameters(), *d.buffers())) for d in denoisers]
    assert 0.1 < 1 - there[0] / there[1] < 0.3
    untold, off = (generate(out, ["a cat"], tmp_path / str(ahead), ahead=ahead)["files"] for ahead in (None, "off"))
    one, other = (np.array(Image.open(files[0])).astype(int) for files in (untold, off))
    assert abs(one - other).mean() < 1  # float sums depend on the number of rows, and may move a code
    nothing = run_recipe(tiny_model(TEXT), with_stage(short_recipe(TEXT), ahead="on"), tmp_path / "nothing")
    assert any(note.startswith("ahead: no layer") for note in nothing.notes)


SAVED = """
import sys
import dcomp, torch
from diffusers import DiffusionPipeline
from dcomp.calibrate.pipeline import picture_generator
torch.set_num_threads(1)
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    conditions = {"prompt": ["a cat", "a red house"]} if hasattr(pipe, "tokenizer") else {"class_labels": [1, 1]}
    generators = [picture_generator(0, 0), picture_generator(0, 1)]
    torch.save(pipe(**conditions, generator=generators, num_inference_steps=3, output_type="pt").images, out)
"""


@pytest.mark.slow
def test_pictures_of_a_fresh_process_are_those_from_before_saving(tiny_model: Models, tmp_path: Path) -> None:
    before, arguments = {}, []
    for name in (TEXT, DIT):
        pipeline, settings = open_pipeline(tiny_model(name)), settings_for(name)
        prompts = prompts_for(pipeline)
        plan, _ = make_plan(pipeline, short_recipe(name), prompts)
        schemes = {key: decision.scheme for key, decision in plan.decisions.items() if decision.scheme}
        recorded = record_calibration_set(pipeline, prompts, settings, tmp_path / name / "calibration")
        bins = StepBins.uniform(recorded.timesteps, 25, pipeline.scheduler)
        quantize_denoiser(pipeline.denoiser, recorded, schemes, bins, tmp_path / name / "work")
        images = pipeline.run(prompts, [0, 1], settings).images
        assert images is not None
        before[tmp_path / f"{name}.pt"] = images
        write_checkpoint(pipeline, tmp_path / name / "out", ManifestFields(recipe={}))
        arguments += [str(tmp_path / name / "out"), str(tmp_path / f"{name}.pt")]
    program = [sys.executable, "-P", "-W", "ignore", "-c", SAVED, *arguments]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for file, images in before.items():
        after = torch.load(file)
        assert torch.equal(torch.as_tensor(after).permute(0, 3, 1, 2) if after.shape[-1] == 3 else after, images)


@pytest.fixture(scope="module")
def whole(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """An uninterrupted run."""
    return run_recipe(tiny_model(UNET), short_recipe(UNET), tmp_path_factory.mktemp("whole") / "out")


def test_the_same_recipe_gives_the_same_bytes_wherever_it_is_written(
    whole: RunResult, tiny_model: Models, tmp_path: Path
) -> None:
    again = run_recipe(tiny_model(UNET), short_recipe(UNET), tmp_path / "elsewhere" / "other")
    assert file_hashes(again.output) == file_hashes(whole.output)
    assert again.errors == whole.errors
    seeds = [with_stage(short_recipe(UNET, seed=seed), inputs="static") for seed in (0, 1)]
    weights = [
        file_hashes(run_recipe(tiny_model(UNET), recipe, tmp_path / f"{seed}").output)[
            "unet/diffusion_pytorch_model.safetensors"
        ]
        for seed, recipe in enumerate(seeds)
    ]
    assert weights[0] != weights[1]


def test_the_resolved_recipe_in_the_manifest_makes_the_same_checkpoint(
    whole: RunResult, tiny_model: Models, tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(whole.manifest.recipe))
    again = quantize(tiny_model(UNET), tmp_path / "out", tmp_path / "recipe.json")
    assert file_hashes(again.output) == file_hashes(whole.output)


@pytest.fixture(scope="module")
def recorded(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibration set of the same run."""
    folder = tmp_path_factory.mktemp("recorded") / "set"
    record_calibration(tiny_model(UNET), short_recipe(UNET), folder)
    return folder


def interrupt_at(text: str, done: int) -> Callable[[str, int, int], None]:
    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (text, done):
            raise KeyboardInterrupt

    return progress


def test_interrupted_runs_go_on_and_end_with_the_same_bytes(
    whole: RunResult, tiny_model: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for text, done in (
        ("calibration set", 1),
        ("layers", 0),
        ("layers", 7),
        ("layers", 20),
        ("integers against floats", 0),
        ("writing and checking", 0),
    ):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_model(UNET), short_recipe(UNET), output, progress=interrupt_at(text, done))
        assert not output.exists()
        assert left_in(tmp_path) == [".out.dcomp-work"]
        assert str(tmp_path / ".out.dcomp-work") in capsys.readouterr().err.replace("\n", "")
    result = run_recipe(tiny_model(UNET), short_recipe(UNET), output)
    assert file_hashes(output) == file_hashes(whole.output)
    assert result.errors == whole.errors
    assert [name for name in left_in(tmp_path) if name != "out"] == []


def test_tuning_goes_on_where_it_stopped_and_is_told_of(whole: RunResult, tiny_model: Models, tmp_path: Path) -> None:
    recipe = with_stage(short_recipe(UNET), tune=4)
    tuned = run_recipe(tiny_model(UNET), recipe, tmp_path / "tuned")
    for text, done in (("tuning", 0), ("tuning", 3)):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_model(UNET), recipe, tmp_path / "out", progress=interrupt_at(text, done))
    again = run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    assert file_hashes(again.output) == file_hashes(tuned.output)
    assert again.errors == tuned.errors
    assert [note for note in tuned.notes if note.startswith("Tuning")] == list(set(tuned.notes) - set(whole.notes))
    # Four steps of tuning change values, never the grid: the layers' errors are those from before.
    assert {name: (e.weight, e.output) for name, e in tuned.errors.items()} == {
        name: (e.weight, e.output) for name, e in whole.errors.items()
    }


@pytest.mark.slow
def test_corrections_by_step_are_told_of_and_resumed(tiny_model: Models, tmp_path: Path) -> None:
    recipe = with_stage(short_recipe(TEXT, samples=6), correct=True, directions=0)
    corrected = run_recipe(tiny_model(TEXT), recipe, tmp_path / "corrected")
    for text, done in (("corrections", 0), ("corrections", 9), ("integers against floats", 0)):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_model(TEXT), recipe, tmp_path / "out", progress=interrupt_at(text, done))
    again = run_recipe(tiny_model(TEXT), recipe, tmp_path / "out")
    assert file_hashes(again.output) == file_hashes(corrected.output)
    denoiser = dcomp.load(corrected.output, check="full").unet
    layers = {name for name, layer in quantized_layers(denoiser).items() if layer.scheme.corrected}
    records = {name: r for name, r in corrected.manifest.layers.items() if "corrected at each step" in (r.reason or "")}
    assert layers == set(records)
    (note,) = [note for note in corrected.notes if "corrections by step" in note]
    assert note.startswith(f"{len(layers)} of {len(quantized_layers(denoiser))} layers")
    assert denoiser.dcomp_clock.bins.count == 3  # though no range is static
    for name, record in records.items():
        module = denoiser.get_submodule(name)
        assert record.bytes_after == sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@pytest.mark.slow
def test_folded_factors_are_told_of_and_resumed(tiny_model: Models, tmp_path: Path) -> None:
    recipe = with_stage(short_recipe(UNET, "w4a4"), tune=2)
    folded = run_recipe(tiny_model(UNET), recipe, tmp_path / "folded")
    for text, done in (("layers", 20), ("tuning", 1)):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_model(UNET), recipe, tmp_path / "out", progress=interrupt_at(text, done))
    again = run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    assert file_hashes(again.output) == file_hashes(folded.output)
    plain = run_recipe(tiny_model(UNET), with_stage(recipe, fold=False), tmp_path / "plain")
    layers, others = (quantized_layers(dcomp.load(tmp_path / name).unet) for name in ("folded", "plain"))
    records = json.loads((tmp_path / "folded" / "dcomp.json").read_text())["layers"]
    lost = {name for name, record in records.items() if "smoothed by " in record["reason"]}
    smoothed = lost | {name for name, layer in layers.items() if layer.scheme.smooth}
    assert lost
    assert not any(layers[name].scheme.smooth or not layers[name].scheme.folded for name in lost)
    (note,) = [note for note in folded.notes if "what makes their input" in note]
    assert note.startswith(f"The smoothing of {len(lost)} of {len(smoothed)} smoothed layers")
    assert not any("what makes their input" in note for note in plain.notes)
    assert not any(layer.scheme.folded for layer in others.values())
    assert any(layer.scheme.smooth for name, layer in others.items() if name in lost)


@pytest.mark.parametrize("name", sweep([UNET, DIT], [UNET]))
def test_four_bit_inputs_run_in_integers_after_a_round_over_the_disk(
    name: str, tiny_model: Models, tmp_path: Path
) -> None:
    recipe = with_stage(short_recipe(name, "w4a4"), rotate=True, rank=4, split="all")
    result = run_recipe(tiny_model(name), recipe, tmp_path / "out")
    pipe = dcomp.load(tmp_path / "out", check="full")
    original, compressed = open_pipeline(tiny_model(name)), OpenPipeline(pipe, tmp_path / "out")
    layers = quantized_layers(compressed.denoiser)
    assert layers.keys() == result.errors.keys()
    assert {layer.execution for layer in layers.values()} == {"int"}
    four = [layer.scheme for layer in layers.values() if layer.scheme.input_bits == 4]
    assert four
    assert all(scheme.rank == 4 for scheme in four)
    for layer, made in layers.items():  # reasons tell what was done, not what was planned
        assert (", rotated" in (result.manifest.layers[layer].reason or "")) == made.scheme.rotate
    assert all(error.int_vs_fake is not None and error.int_vs_fake <= 1e-5 for error in result.errors.values())
    prompts, settings = prompts_for(original), settings_for(name, seed=5)
    expected, found = (p.run(prompts, [8, 9], settings, decode=False).latents for p in (original, compressed))
    assert 0 < (found - expected).norm() < 0.25 * expected.norm()


@pytest.mark.slow
def test_methods_rank_as_the_literature_says(tiny_model: Models, tmp_path: Path) -> None:
    set_ = tmp_path / "set"
    record_calibration(tiny_model(TEXT), short_recipe(TEXT), set_)
    error = {}
    for method in ("minmax", "nearest", "gptq"):
        recipe = with_stage(short_recipe(TEXT), **settings_of(method, "fast"))
        result = run_recipe(tiny_model(TEXT), recipe, tmp_path / method, calibration=set_)
        outputs = torch.tensor([layer.output for layer in result.errors.values()])
        error[method] = float(outputs.square().mean().sqrt())
    assert error["gptq"] < error["nearest"] < error["minmax"]


def test_work_of_another_recipe_is_not_taken_over(whole: RunResult, tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            tiny_model(UNET),
            short_recipe(UNET, "w8a8"),
            tmp_path / "out",
            progress=interrupt_at("integers against floats", 0),
        )
    run_recipe(tiny_model(UNET), short_recipe(UNET), tmp_path / "out")
    assert file_hashes(tmp_path / "out") == file_hashes(whole.output)


def test_fresh_throws_the_work_away(whole: RunResult, tiny_model: Models, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_model(UNET), short_recipe(UNET), output, progress=interrupt_at("integers against floats", 0))
    weights = {file: file.stat().st_ino for file in tmp_path.rglob("layers/*.safetensors")}
    assert weights
    seen = []

    def progress(text: str, done: int, total: int) -> None:
        if text == "layers" and done == 0:
            seen.append([file for file in weights if file.exists()])

    run_recipe(tiny_model(UNET), short_recipe(UNET), output, fresh=True, progress=progress)
    assert seen == [[]]
    assert file_hashes(output) == file_hashes(whole.output)


def test_a_recorded_calibration_set_gives_the_same_bytes(whole: RunResult, tiny_model: Models, tmp_path: Path) -> None:
    facts = record_calibration(tiny_model(UNET), short_recipe(UNET), tmp_path / "set")
    assert (facts["calls"], facts["prompts"], facts["timesteps"]) == (3, 2, 3)
    assert facts["sha256"] == whole.manifest.calibration_sha256
    before = file_hashes(tmp_path / "set")
    seen = []
    result = run_recipe(
        tiny_model(UNET),
        short_recipe(UNET),
        tmp_path / "out",
        calibration=tmp_path / "set",
        progress=lambda text, done, total: seen.append(text),
    )
    assert "calibration set" not in seen
    assert file_hashes(result.output) == file_hashes(whole.output)
    assert file_hashes(tmp_path / "set") == before


def test_the_manifest_tells_what_a_given_set_was_recorded_with(tiny_model: Models, tmp_path: Path) -> None:
    record_calibration(tiny_model(UNET), short_recipe(UNET, seed=3), tmp_path / "set")
    recipe = load_recipe("w4a8", (), {"stages.0.tune": 0})
    result = run_recipe(tiny_model(UNET), recipe, tmp_path / "out", calibration=tmp_path / "set")
    calibration = result.manifest.recipe["calibration"]
    assert (calibration["steps"], calibration["seed"], calibration["samples"]) == (3, 3, 2)


def test_settings_that_a_given_set_contradicts_are_refused(tiny_model: Models, tmp_path: Path) -> None:
    record_calibration(tiny_model(UNET), short_recipe(UNET), tmp_path / "set")
    asked = short_recipe(UNET, samples=9, steps=5)
    with pytest.raises(UsageError, match="recorded with samples 2 instead of 9, steps 3 instead of 5"):
        run_recipe(tiny_model(UNET), asked, tmp_path / "out", calibration=tmp_path / "set")
    assert not (tmp_path / "out").exists()


def test_a_plan_refuses_what_a_run_would_refuse(tiny_model: Models, tmp_path: Path) -> None:
    model, folder = tiny_model(UNET), tmp_path / "set"
    record_calibration(model, short_recipe(UNET), folder)
    assert plan_recipe(model, load_recipe("w8a8"), calibration=folder).recipe.calibration.steps == 3
    refused = {
        "steps 3 instead of 4": short_recipe(UNET, steps=4),
        "scheduler DDPMScheduler instead of DDIMScheduler": short_recipe(UNET, scheduler="DDIMScheduler"),
        "conv_in: W4A8 is asked for by name": with_stage(short_recipe(UNET), overrides={"conv_in": "W4A8"}),
        "cannot be as small": with_stage(short_recipe(UNET), target_bits=1.0),
    }
    for words, recipe in refused.items():
        with pytest.raises(UsageError, match=re.escape(words)) as planned:
            plan_recipe(model, recipe, calibration=folder)
        seen: list[str] = []
        with pytest.raises(UsageError) as ran:
            run_recipe(
                model,
                recipe,
                tmp_path / "out",
                calibration=folder,
                progress=lambda text, done, total, seen=seen: seen.append(text),
                on_plan=lambda plan, seen=seen: seen.append("plan"),
            )
        assert str(ran.value) == str(planned.value)
        assert seen == [], "refused before the plan is shown"
    assert left_in(tmp_path) == ["set"]
    allowed = plan_recipe(model, short_recipe(UNET, steps=4), calibration=folder, allow_mismatch=True)
    assert allowed.recipe.calibration.steps == 4
    assert any("in log-SNR from the nearest" in note for note in allowed.notes)


def test_the_advice_names_only_what_helps(tiny_model: Models, tmp_path: Path) -> None:
    record_calibration(tiny_model(UNET), short_recipe(UNET), tmp_path / "set")
    for changes, words in (
        ({"steps": 4}, "pass --allow-mismatch to deploy with them"),
        ({"steps": 4, "seed": 9}, "or leave seed out and pass --allow-mismatch"),
        ({"seed": 9}, "Leave these options out, or record another set with `dcomp calibrate`."),
    ):
        with pytest.raises(UsageError) as caught:
            plan_recipe(tiny_model(UNET), short_recipe(UNET, **changes), calibration=tmp_path / "set")
        assert words in caught.value.remedy


def test_a_dead_channel_is_told_of_in_notes_manifest_and_inspection(tmp_path: Path) -> None:
    pipe = tiny_pipeline(UNET)
    with torch.no_grad():
        pipe.unet.conv_norm_out.weight[0], pipe.unet.conv_norm_out.bias[0] = 0, 0
        pipe.unet.mid_block.resnets[0].conv1.weight[3:6] = 0
    pipe.save_pretrained(tmp_path / "model")
    result = run_recipe(tmp_path / "model", short_recipe(UNET), tmp_path / "out")
    (note,) = [note for note in result.notes if "told nothing" in note]
    dead = "1 of 32 input channels is always 0: 0"
    empty = "3 of 64 output channels are made with weights that are all 0: 3, 4, 5"
    assert note == (
        "2 layers have channels or ranges that told nothing in calibration: "
        f"mid_block.resnets.0.conv1 ({empty}), conv_out ({dead})."
    )
    told = {layer.name: layer.remarks for layer in inspect(result.output).layers if layer.remarks}
    assert told == {"conv_out": [dead], "mid_block.resnets.0.conv1": [empty]}
    assert result.errors["conv_out"].remarks == (dead,)


def test_a_calibration_set_of_another_model_is_refused(tiny_model: Models, tmp_path: Path) -> None:
    other = tiny_pipeline(UNET, seed=1)
    other.save_pretrained(tmp_path / "other")
    record_calibration(tmp_path / "other", short_recipe(UNET), tmp_path / "set")
    record_calibration(tiny_model(DIT), short_recipe(DIT), tmp_path / "set of another kind")
    before = left_in(tmp_path)
    for name, words in (("set", "other weights of the unet"), ("set of another kind", "another denoiser")):
        with pytest.raises(UsageError, match=words) as caught:
            run_recipe(tiny_model(UNET), short_recipe(UNET), tmp_path / "out", calibration=tmp_path / name)
        assert "dcomp calibrate" in caught.value.remedy
        assert left_in(tmp_path) == before


def test_another_scheduler_is_part_of_the_checkpoint(tiny_model: Models, tmp_path: Path) -> None:
    recipe = with_stage(short_recipe(TEXT, scheduler="EulerDiscrete"), inputs="static")
    run_recipe(tiny_model(TEXT), recipe, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert config["_class_name"] == "EulerDiscreteScheduler"
    old = json.loads((tiny_model(TEXT) / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_start"] == old["beta_start"]
    check_manifest(tmp_path / "out")
    opened = open_pipeline(tmp_path / "out")
    assert type(opened.scheduler).__name__ == "EulerDiscreteScheduler"
    found = opened.run(["a cat", "a red house"], [0, 1], settings_for(TEXT)).latents
    assert (opened.denoiser.dcomp_clock.bins.count, opened.denoiser.dcomp_clock.unseen) == (3, 0)
    expected = open_pipeline(tiny_model(TEXT), scheduler="EulerDiscrete")
    reference = expected.run(["a cat", "a red house"], [0, 1], settings_for(TEXT)).latents
    assert (found - reference).norm() < 0.15 * reference.norm()


def test_adapters_are_fused_into_what_is_written(tiny_model: Models, tmp_path: Path) -> None:
    unet = save_lora(TEXT, tmp_path / "unet", "unet", ["to_q", "to_v"])
    text = save_lora(TEXT, tmp_path / "text", "text_encoder", ["q_proj", "v_proj"])
    specs = (f"{unet}:0.5", str(text))
    fused = load_pipeline(tiny_model(TEXT))
    fuse_lora(fused, specs)
    recipe = short_recipe(TEXT, "float").model_copy(update={"lora": specs})
    result = run_recipe(tiny_model(TEXT), recipe, tmp_path / "out")
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(tiny_model(TEXT) / component / f"{file}.safetensors")
        stored = load_file(tmp_path / "out" / component / f"{file}.safetensors")
        expected = getattr(fused, component).state_dict()
        assert stored.keys() == before.keys()
        assert any(not torch.equal(stored[name], before[name]) for name in stored)
        assert all(torch.equal(stored[name], expected[name]) for name in stored)
    loras = result.manifest.loras
    assert [(lora["name"], lora["scale"], list(lora["components"])) for lora in loras] == [
        (unet.name, 0.5, ["unet"]),
        (text.name, 1.0, ["text_encoder"]),
    ]
    assert str(tmp_path) not in json.dumps(loras)


def test_a_quantized_denoiser_holds_the_adapter_too(tiny_model: Models, tmp_path: Path) -> None:
    file = save_lora(TEXT, tmp_path / "unet", "unet", ["to_q", "to_v"])
    recipe = short_recipe(TEXT, "w8a16").model_copy(update={"lora": (str(file),)})
    run_recipe(tiny_model(TEXT), recipe, tmp_path / "out")
    fused, plain = load_pipeline(tiny_model(TEXT)), load_pipeline(tiny_model(TEXT))
    fuse_lora(fused, [str(file)])
    denoiser: Any = dcomp.load(tmp_path / "out").unet
    adapted = [name for name, _ in denoiser.named_modules() if name.rpartition(".")[2] in ("to_q", "to_v")]
    assert len(adapted) > 4
    for name in adapted:
        found = denoiser.get_submodule(name).dequantize()
        wanted, old = (pipe.unet.get_submodule(name).weight for pipe in (fused, plain))
        assert (found - wanted).norm() < 0.012 * wanted.norm() < (found - old).norm()


def test_a_peft_adapter_can_be_put_on_a_loaded_checkpoint(tiny_checkpoint: Models) -> None:
    pipe: Any = dcomp.load(tiny_checkpoint(TEXT))
    pipeline = OpenPipeline(pipe, tiny_checkpoint(TEXT))

    def latents() -> torch.Tensor:
        return pipeline.run(["a cat", "a red house"], [0, 1], settings_for(TEXT), decode=False).latents

    before = latents()
    targets = ["to_q", "to_k", "to_v"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    pipe.unet.requires_grad_(False)
    changed = latents()
    assert changed.isfinite().all()
    assert (changed - before).norm() > 1e-2 * before.norm()
    pipe.unet.disable_adapters()
    assert torch.equal(latents(), before)
    pipe.unet.enable_adapters()
    assert torch.equal(latents(), changed)


def test_a_checkpoint_with_components_in_several_dtypes_opens_in_one(tiny_checkpoint: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint(TEXT), tmp_path / "half")
    whole: Any = dcomp.load(folder)
    whole.text_encoder.half().save_pretrained(folder / "text_encoder")
    for dtype, wanted in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        pipe: Any = dcomp.load(folder, torch_dtype=dtype, check="none")
        assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {wanted}
        made = pipe("a cat", num_inference_steps=1, output_type="latent").images
        assert bool(made.isfinite().all())


def test_an_adapter_that_starts_at_nothing_changes_nothing(tiny_checkpoint: Models) -> None:
    sd3 = "SD3Transformer2DModel"
    pipe: Any = dcomp.load(tiny_checkpoint(sd3))
    pipeline = OpenPipeline(pipe, tiny_checkpoint(sd3))
    before = pipeline.run(["a cat"], [0], settings_for(sd3), decode=False).latents
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    pipe.transformer.requires_grad_(False)
    assert torch.equal(pipeline.run(["a cat"], [0], settings_for(sd3), decode=False).latents, before)


def test_layers_kept_by_hand_stay_in_float(tiny_model: Models, tmp_path: Path) -> None:
    recipe = short_recipe(UNET)
    stage = recipe.stages[0].model_copy(update={"keep": ("mid_block",), "overrides": {"conv_in": "w8a8"}})
    result = run_recipe(tiny_model(UNET), recipe.model_copy(update={"stages": (stage,)}), tmp_path / "out")
    layers = result.manifest.layers
    kept = [name for name in layers if name.startswith("mid_block.")]
    assert kept
    assert all(layers[name].scheme is None and "'mid_block'" in (layers[name].reason or "") for name in kept)
    assert layers["conv_in"].scheme == "W8A8"
    assert set(result.errors) == {name for name, record in layers.items() if record.scheme}


def test_the_plan_comes_before_any_weight_is_touched(tiny_model: Models, tmp_path: Path) -> None:
    order: list[str] = []

    def on_plan(plan: Plan) -> None:
        order.append(f"plan of {plan.denoiser}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            tiny_model(UNET),
            short_recipe(UNET),
            tmp_path / "out",
            on_plan=on_plan,
            progress=lambda text, done, total: order.append(text),
        )
    assert order == ["plan of UNet2DModel"]


def test_an_existing_output_is_kept_unless_it_may_be_replaced(
    whole: RunResult, tiny_model: Models, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(whole.output, tmp_path / "out"))
    before = file_hashes(output)
    with pytest.raises(UsageError, match="exists"):
        run_recipe(tiny_model(UNET), short_recipe(UNET), output)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            tiny_model(UNET),
            short_recipe(UNET, "w8a8"),
            output,
            overwrite=True,
            progress=interrupt_at("writing and checking", 0),
        )
    assert file_hashes(output) == before
    run_recipe(tiny_model(UNET), short_recipe(UNET, "w8a8"), output, overwrite=True)
    assert check_manifest(output).recipe["name"] == "w8a8"
    assert [name for name in left_in(tmp_path) if name != "out"] == []


def test_a_second_run_of_the_same_output_is_kept_out(tiny_model: Models, tmp_path: Path) -> None:
    work = tmp_path / ".out.dcomp-work"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(DcompError, match="Another process is making") as caught:
        run_recipe(tiny_model(UNET), short_recipe(UNET), tmp_path / "out")
    assert caught.value.exit_code == 1
    assert work.exists()  # it belongs to the first


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "more steps than the schedule has": ({"steps": 1001}, "1001 steps"),
    "guidance of an unconditional model": ({"guidance": 2.0}, "no guidance"),
    "prompts of an unconditional model": ({"prompts": "words.txt"}, "takes no prompts"),
    "a height that it does not take": ({"height": 64}, "no height"),
    "a scheduler that does not exist": ({"scheduler": "DDIMSheduler"}, "did you mean DDIMScheduler"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_use_leaves_nothing_behind(case: str, tiny_model: Models, tmp_path: Path) -> None:
    values, message = BAD[case]
    with pytest.raises(UsageError) as caught:
        run_recipe(tiny_model(UNET), short_recipe(UNET, **values), tmp_path / "out")
    assert message in str(caught.value)
    assert left_in(tmp_path) == []


def test_missing_models_and_quantized_ones_leave_nothing_behind(tiny_checkpoint: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        run_recipe(tmp_path / "model", short_recipe(UNET), tmp_path / "out")
    with pytest.raises(UsageError, match="quantized already"):
        run_recipe(tiny_checkpoint(UNET), short_recipe(UNET), tmp_path / "out")
    assert left_in(tmp_path) == []


def test_an_output_inside_of_the_model_is_refused_before_any_work(tiny_model: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(UNET), tmp_path / "model"))
    before = sorted(model.rglob("*"))
    seen: list[str] = []
    with pytest.raises(UsageError, match="overlap"):
        run_recipe(model, short_recipe(UNET), model / "out", progress=lambda text, done, total: seen.append(text))
    assert seen == []
    assert sorted(model.rglob("*")) == before


def test_a_weight_that_is_not_finite_is_named(tiny_model: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model(UNET), tmp_path / "model"))
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DcompError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        run_recipe(model, short_recipe(UNET), tmp_path / "out")
    assert left_in(tmp_path) == ["model"]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_at_any_point_loses_no_finished_work(
    whole: RunResult, tiny_model: Models, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for nbytes in (100, 3_000, 30_000, 200_000):
        with largest_file(nbytes), pytest.raises(DcompError, match=r"cannot be written|disk is full") as caught:
            run_recipe(tiny_model(UNET), short_recipe(UNET), output)
        assert caught.value.exit_code == 1
        assert left_in(tmp_path) == [".out.dcomp-work"]
        assert not [file for file in tmp_path.rglob("*") if "unfinished" in file.name]
    run_recipe(tiny_model(UNET), short_recipe(UNET), output)
    assert file_hashes(output) == file_hashes(whole.output)


@pytest.mark.parametrize("damaged", ["layers/*.safetensors", "calibration/*.safetensors", "calibration/*.json"])
def test_damaged_work_is_an_error_that_fresh_solves(
    damaged: str, whole: RunResult, tiny_model: Models, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(tiny_model(UNET), short_recipe(UNET), output, progress=interrupt_at("integers against floats", 0))
    file = next((tmp_path / ".out.dcomp-work").rglob(damaged))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DcompError, match="damaged") as caught:
        run_recipe(tiny_model(UNET), short_recipe(UNET), output)
    assert "--fresh" in caught.value.remedy
    run_recipe(tiny_model(UNET), short_recipe(UNET), output, fresh=True)
    assert file_hashes(output) == file_hashes(whole.output)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(f"settings.{key}", bad) for key in ("steps", "batch_size", "seed", "height") for bad in ("2", -1, 1.5)],
        *[("settings.guidance", bad) for bad in ("2", float("nan"))],
        ("chunks", []),
        ("timesteps", [float("inf")] * 3),
        ("kept_calls", [7]),
    ],
)
def test_a_calibration_set_that_makes_no_sense_is_refused(
    key: str, value: Any, recorded: Path, tiny_model: Models, tmp_path: Path
) -> None:
    shutil.copytree(recorded, tmp_path / "set")
    index = tmp_path / "set" / "calibration.json"
    content = json.loads(index.read_text())
    *outer, last = key.split(".")
    (content[outer[0]] if outer else content)[last] = value
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        run_recipe(tiny_model(UNET), short_recipe(UNET), tmp_path / "out", calibration=tmp_path / "set")
    assert str(index) in (caught.value.where or "")
    assert left_in(tmp_path) == ["set"]


def test_result_says_how_to_load_it_and_is_json(whole: RunResult) -> None:
    data = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert data["load"] == f'import dcomp; pipe = dcomp.load("{whole.output}")'
    found: dict[str, Any] = {}
    exec(data["load"], found)
    assert isinstance(found["pipe"], DiffusionPipeline)
    assert set(data["layer_errors"]) == set(whole.errors)
    assert data["files"] == {name: value for name, value in file_hashes(whole.output).items() if name != "dcomp.json"}


def test_default_output_is_named_after_model_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert default_output(".", short_recipe(UNET)) == Path("my-model-w4a8")
    assert default_output("owner/name", short_recipe(UNET, "w8a8")) == Path("name-w8a8")
    assert os.listdir(tmp_path / "my-model") == []
