import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dcomp import DcompError, UsageError
from dcomp.compress.manifest import CheckpointError, read_manifest
from dcomp.recipes import screens
from dcomp.recipes.inspect import Inspection, inspect
from tests.support import hostile
from tests.support.checkpoints import short_recipe, with_stage

NAME = "UNet2DModel"
Models = Callable[[str], Path]


@pytest.fixture
def report(tiny_checkpoint: Models) -> Inspection:
    return inspect(tiny_checkpoint(NAME))


@pytest.fixture
def copy(tiny_checkpoint: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(NAME), tmp_path / "copy"))


def test_every_layer_is_told_with_bits_bytes_and_error(report: Inspection, tiny_checkpoint: Models) -> None:
    records = read_manifest(tiny_checkpoint(NAME)).layers
    assert {layer.name for layer in report.layers} == set(records)
    assert [layer.position for layer in report.layers] == list(range(len(records)))
    assert [report.layers[0].name, report.layers[-1].name] == ["time_embedding.linear_1", "conv_out"]
    schemes = {layer.scheme for layer in report.layers}
    assert schemes == {"W4A8", "W8A8", "W8A16"}
    for layer in report.layers:
        assert layer.scheme == f"W{layer.weight_bits:g}A{layer.input_bits:g}"
        assert layer.bytes_after < layer.bytes_before * (0.3 if layer.weight_bits == 4 else 0.6)
        assert 0 < (layer.weight_error or 0) < (0.12 if layer.weight_bits == 4 else 0.012)
        assert 0 < (layer.output_error or 0) < 0.2
        assert len(layer.error_by_step) == 3
        assert min(layer.error_by_step) <= (layer.output_error or 0) <= max(layer.error_by_step)
        assert layer.reason
        assert layer.rounding == "gptq"
        assert layer.remarks == []
        assert layer.worst_step == layer.error_by_step.index(max(layer.error_by_step))
        split = [text for text in layer.transforms if text.startswith("split at")]
        assert bool(split) == (", split at" in layer.reason)
    assert len(report.timesteps) == 3
    assert report.timesteps == sorted(report.timesteps, reverse=True)
    errors = [layer.output_error or 0 for layer in report.worst]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == len(report.layers)
    assert report.left_in_float == []


def test_facts_come_from_the_recipe_and_the_files(report: Inspection, static_checkpoint: Models) -> None:
    recipe = with_stage(short_recipe(NAME), rounding="gptq").to_dict()
    assert (report.denoiser, report.step_bins, report.recipe) == ("UNet2DModel", 0, recipe)
    static = inspect(static_checkpoint(NAME))
    assert static.step_bins == 3
    assert dict(static.facts())["calibrated"] == "2 trajectories of 3 steps, tables of 3 steps"
    facts = dict(report.facts())
    assert facts["calibrated"] == "2 trajectories of 3 steps"
    assert facts["layers in float"] == "none"
    assert facts["made from"].startswith("UNet2DModel (")


def test_report_is_json(report: Inspection) -> None:
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["schema_version"] == 1
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in report.layers]
    assert set(data["totals"]) == {"bytes_original", "bytes_compressed", "denoiser_bytes_ratio", "bits_per_param"}


def names_in_tree(shown: str) -> Iterator[str]:
    """Put the indented names of the tree together; lines with nothing but a name are modules around layers."""
    path: list[str] = []
    for line in shown.partition("\nlayer ")[2].splitlines()[1:]:
        own, *rest = line.split()
        path[(len(line) - len(line.lstrip())) // 2 :] = [own]
        if len(rest) > 1 and rest[1][:2] in ("W4", "W8"):
            yield ".".join(path)


@pytest.mark.parametrize("layers", [True, False])
def test_screen_counts_every_layer(layers: bool, report: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    screens.print_inspection(report, layers)
    shown = capsys.readouterr().out
    if layers:
        assert sorted(names_in_tree(shown)) == sorted(layer.name for layer in report.layers)
    else:
        rows = [line.split() for line in shown.splitlines()]
        assert sum(int(row[2]) for row in rows if len(row) > 3 and row[1][:2] in ("W4", "W8")) == len(report.layers)


def test_the_tree_is_in_order_of_execution(report: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    screens.print_inspection(report, True)
    shown = list(names_in_tree(capsys.readouterr().out))
    first: dict[str, int] = {}
    for place, layer in enumerate(report.layers):
        first.setdefault(layer.name.partition(".")[0], place)
    roots = list(dict.fromkeys(name.partition(".")[0] for name in shown))
    assert roots == sorted(first, key=first.__getitem__)


def test_the_default_screen_has_the_worst_layers_and_why(
    report: Inspection, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = replace(report.layers[3], remarks=["1 of 32 input channels is constant: 4"])
    layers = [*report.layers[:3], odd, *report.layers[4:]]
    screens.print_inspection(replace(report, layers=layers), worst=3)
    out = capsys.readouterr().out
    assert f"Worst 3 of {len(layers)} quantized layers" in out
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[4:] if len(row) > 3 and row[2] == "gptq"] == [x.name for x in report.worst[:3]]
    worst = report.worst[0]
    step = worst.worst_step
    assert step is not None
    assert f"{step + 1} of 3, t {report.timesteps[step]:.4g}: {worst.error_by_step[step]:.2%}" in out
    assert worst.reason is not None
    assert worst.reason[:20] in out
    assert re.search(rf"{re.escape(odd.name)} +1 of 32 input channels is constant: 4", out)


def test_a_manifest_of_an_older_version_is_read(copy: Path) -> None:
    file = copy / "dcomp.json"
    content = json.loads(file.read_text())
    del content["timesteps"], content["sha256"]
    for layer in content["layers"].values():
        del layer["position"], layer["remarks"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(content | {"sha256": digest}))
    report = inspect(copy)
    assert report.timesteps == []
    names = [layer.name for layer in report.layers]
    assert names == sorted(names)  # no number has two digits in this model
    file.write_text(json.dumps(content | {"sha256": digest, "timesteps": [1.0]}))
    with pytest.raises(CheckpointError, match="its own hash"):
        inspect(copy)


def test_no_weight_is_read(copy: Path, report: Inspection) -> None:
    path = copy / "unet" / hostile.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert inspect(copy).layers == report.layers


@pytest.mark.parametrize(
    "name", ["dcomp.json", "unet/config.json", "model_index.json", "scheduler/scheduler_config.json"]
)
def test_a_changed_file_is_named(name: str, copy: Path) -> None:
    text = (copy / name).read_text()
    (copy / name).write_text(text.replace('"0.', '"1.', 1) if name == "dcomp.json" else text + " ")
    with pytest.raises(CheckpointError, match=f"{name}: ") as caught:
        inspect(copy)
    assert caught.value.exit_code == 1


def test_what_is_no_checkpoint_is_said_in_its_own_words(tiny_model: Models, tmp_path: Path) -> None:
    with pytest.raises(DcompError, match="not made by dcomp"):
        inspect(tiny_model(NAME))
    with pytest.raises(UsageError, match="does not exist"):
        inspect(tmp_path / "missing")
    with pytest.raises(UsageError, match="empty"):
        inspect(tmp_path)
