"""What README.md and docs/ say, held against the program: commands, options, keys, messages, and the code in them."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from safetensors.numpy import load_file
from torch import nn

from dcomp.calibrate.structure import Role
from dcomp.cli import app
from dcomp.compress.checkpoint import ManifestFields, write_checkpoint
from dcomp.compress.layers import QuantLayer
from dcomp.compress.manifest import LayerRecord, Manifest, Totals
from dcomp.compress.policy import PRESETS
from dcomp.compress.quantize import LayerErrors
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import empty_layer
from dcomp.kernels.packing import PackedWeight
from dcomp.recipes.bench import BenchResult
from dcomp.recipes.doctor import examine
from dcomp.recipes.generate import generate
from dcomp.recipes.inspect import inspect
from dcomp.recipes.load import load_recipe
from dcomp.recipes.methods import METHODS, QUALITIES
from dcomp.recipes.run import RunResult, plan_recipe, record_calibration
from dcomp.recipes.schedule import ScheduleResult
from dcomp.recipes.schema import Calibration, PruneStage, QuantizeStage, Recipe, ScheduleStage
from dcomp.recipes.verdict import ValidationResult
from tests.support.quantized import BINS, quantized_pipeline
from tests.support.schemes import quantized_form
from tests.support.tiny import save_tiny_pipeline

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def inline(text: str) -> list[str]:
    """Code spans outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    """Each `dcomp COMMAND ...` of the fenced shell blocks, as command and arguments."""
    for text in TEXTS.values():
        for line in "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] == "dcomp":
                yield words[1], words[2:]


def options_of(command: Any) -> set[str]:
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")} | {"--help"}


def tables(text: str, heading: str) -> list[list[list[str]]]:
    """Tables under a heading, up to the next one: rows of cells, without the two rows of the head."""
    section = re.split(r"^#+ ", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    found: list[list[list[str]]] = [[]]
    for line in section.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def names(table: list[list[str]]) -> set[str]:
    """What stands in code spans in the first column."""
    return {name for row in table for name in re.findall(r"`([^`]+)`", row[0])}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline("UNet2DModel", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> tuple[Path, Manifest]:
    recipe = Recipe(stages=(QuantizeStage(),)).to_dict()
    layers = {"conv_in": LayerRecord(role="input", weight_bits=32, input_bits=32, bytes_before=1, bytes_after=1)}
    folder = model.parent / "compressed"
    return folder, write_checkpoint(quantized_pipeline(model), folder, ManifestFields(recipe, layers))


def test_the_readme_shows_the_tree_that_the_script_prints() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_tree.py"))
    shown = TEXTS["README.md"].split(script["BEGIN"])[1].split(script["END"])[0].strip()
    assert shown == script["tree"](), "run: python -P benchmarks/readme_tree.py --write"


def test_every_shell_line_parses() -> None:
    lines = list(shell_lines())
    assert len(lines) > 5
    for name, arguments in lines:
        assert name in COMMANDS, name
        COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("page", TEXTS)
def test_every_command_and_option_that_is_mentioned_exists(page: str) -> None:
    everywhere = set().union(*map(options_of, COMMANDS.values()), {"--version", "--write"})
    for span in inline(TEXTS[page]):
        command = re.match(r"dcomp ([a-z]+(?:-[a-z]+)*)\b", span)
        if command:
            assert command[1] in COMMANDS, span
        known = options_of(COMMANDS[command[1]]) if command else everywhere
        if command or span.startswith("--"):
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) <= known, span


def test_the_readme_names_every_command() -> None:
    assert {span.split()[1] for span in inline(TEXTS["README.md"]) if span.startswith("dcomp ")} >= set(COMMANDS)


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_that_are_mentioned_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    mentioned = [span[5:] for span in inline(TEXTS[page]) if re.fullmatch(r"make [a-z-]+", span)]
    mentioned += re.findall(r"^make ([a-z-]+)", "\n".join(blocks(TEXTS[page], "sh")), flags=re.MULTILINE)
    assert set(mentioned) <= set(targets)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", TEXTS[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        assert (folder / path).is_file(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)", (folder / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_the_recipes_of_the_page_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = blocks(TEXTS["recipes.md"], "yaml")
    for text in recipes:
        name = yaml.safe_load(text)["name"]
        Path(f"{name}.yaml").write_text(text)
        assert load_recipe(f"{name}.yaml").name == name
    assert len(recipes) == 5
    for name, arguments in shell_lines():
        if name in ("quantize", "compress"):
            options = COMMANDS[name].make_context(name, arguments).params
            keep = {"stages.0.keep": options.get("keep") or None}
            load_recipe(options["recipe"] or "w4a8", options["overrides"] or (), keep)


def test_the_page_of_recipes_lists_all_keys_and_their_defaults() -> None:
    prefixes = {"": Recipe, "calibration.": Calibration, "stages.0.": QuantizeStage, "stages.1.": ScheduleStage}
    prefixes["stages.prune."] = PruneStage
    known = {
        prefix + key: field.get_default(call_default_factory=True)
        for prefix, part in prefixes.items()
        for key, field in part.model_fields.items()
        if key not in ("calibration", "stages")
    }
    table = tables(TEXTS["recipes.md"], "## Keys")[0]
    said = {row[0].strip("`"): json.loads(row[1].strip("`")) for row in table}
    assert said == {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}


def test_the_page_of_recipes_has_every_preset_for_every_role() -> None:
    presets, reasons = tables(TEXTS["recipes.md"], "## Presets")
    order = ("w8a8", "w4a8", "w4a16", "w8a16", "w4a4", "float")
    assert names(presets) == set(Role) == names(reasons)
    assert [row[0].strip("`") for row in reasons] == list(Role), "roles in the order in which they apply"
    assert set(order) == set(PRESETS)
    for role, *labels in presets:
        schemes = [PRESETS[preset][Role(role.strip("`"))] for preset in order]
        assert labels == [scheme.label if scheme else "float" for scheme in schemes], role


def test_the_page_of_recipes_has_every_method_and_quality() -> None:
    for heading, known in (("### Methods", METHODS), ("### Qualities", QUALITIES)):
        said = {}
        for name, values in tables(TEXTS["recipes.md"], heading)[0]:
            said[name.strip("`")] = yaml.safe_load("{" + ", ".join(re.findall(r"`([^`]+)`", values)) + "}")
        assert said == known


def test_errors_of_layers_have_the_keys_of_the_page() -> None:
    entry = TEXTS["json.md"].split("An entry of `layer_errors` has ")[1].split("\n\n")[0]
    assert {name for name in inline(entry) if name.isidentifier()} == {field.name for field in fields(LayerErrors)}


def snippets() -> dict[str, Any]:
    scope: dict[str, Any] = {}
    for code in blocks(TEXTS["checkpoint-format.md"], "python"):
        exec(code, scope)
    return scope


def test_a_stranger_can_read_every_layer(model: Path, checkpoint: tuple[Path, Manifest]) -> None:
    denoiser = quantized_pipeline(model).denoiser
    tensors = load_file(checkpoint[0] / "unet" / "diffusion_pytorch_model.safetensors")
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, QuantLayer)}
    assert {layer.scheme.weight_bits for layer in layers.values()} == {4, 8}
    for name, layer in layers.items():
        packed = layer.packed()
        assert isinstance(packed, PackedWeight)
        read = snippets()["read_weight"](tensors, name, packed.in_channels)
        assert np.array_equal(read, packed.dequantize().numpy()), name


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("layer", [nn.Linear(48, 6), nn.Conv2d(48, 6, (2, 3))], ids=["linear", "conv"])
def test_a_stranger_can_undo_transforms_and_join_parts(layer: nn.Module, group_size: int | None) -> None:
    scheme = QScheme(4 if group_size else 8, group_size, smooth=True, rotate=True, rank=3)
    for boundaries in ((), (20,), (5, 32)):
        quantized = quantized_form(layer, replace(scheme, boundaries=boundaries))
        tensors = {f"x.{name}": tensor.numpy() for name, tensor in quantized.state_dict().items()}
        split, arguments = ("split_", (48, boundaries)) if boundaries else ("", (48,))
        read = snippets()[f"read_{split}weight"](tensors, "x", *arguments, rotate=True)
        expected = quantized.dequantize().movedim(1, -1).numpy()
        assert read.shape == expected.shape
        assert np.abs(read - expected).max() <= 1e-6 * np.abs(expected).max()


def test_the_byte_order_of_nibbles_is_as_written() -> None:
    tensors = {
        "x.qweight": np.array([[0x8F, 0x70]], dtype=np.uint8),
        "x.multiplier": np.array([[-15]], dtype=np.int8),
        "x.scale": np.array([0.5], dtype=np.float32),
    }
    assert snippets()["read_weight"](tensors, "x", 3).tolist() == [[7.5, 60.0, 0.0]]


def test_the_step_bin_of_the_page_is_the_clocks() -> None:
    for timestep in (1000.0, *BINS.timesteps, *BINS.boundaries, 0.0):
        assert snippets()["step_bin"](BINS.boundaries, timestep) == BINS.lookup(timestep)


def test_the_page_of_the_format_lists_all_keys(checkpoint: tuple[Path, Manifest]) -> None:
    page, folder = TEXTS["checkpoint-format.md"], checkpoint[0]
    section = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    keys, scheme = tables(page, "## `quantization_config` in the denoiser's config.json")
    assert names(keys) == set(section)
    assert names(scheme) == {field.name for field in fields(QScheme)}
    assert names(tables(page, "### Step bins")[0]) == set(section["step_bins"])
    manifest, layer, totals = tables(page, "## `dcomp.json`")
    text = (folder / "dcomp.json").read_text()
    assert names(manifest) == set(json.loads(text))
    assert names(layer) == set(LayerRecord.model_fields)
    assert names(totals) == set(Totals.model_fields)
    assert snippets()["manifest_is_intact"](text)
    assert not snippets()["manifest_is_intact"](text.replace('"conv_in"', '"conv_out"'))
    layer_of_all = empty_layer(nn.Linear(2, 2), QScheme(8), 1)
    said = {name.removeprefix("NAME.") for name in names(tables(page, "## Tensors of a quantized layer")[0])}
    assert said == {*layer_of_all._buffers, *layer_of_all._parameters}


def test_the_page_of_json_lists_all_keys(model: Path, checkpoint: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = checkpoint
    options = Calibration(samples=1, steps=1)
    documents = {
        "quantize --dry-run": plan_recipe(model, Recipe(calibration=options, stages=(QuantizeStage(),))).to_dict(),
        "quantize": RunResult(folder, manifest, {}, 1.0).to_dict(),
        "calibrate": record_calibration(model, Recipe(calibration=options), tmp_path / "calibration"),
        "validate": ValidationResult.model_fields,
        "bench": BenchResult.model_fields,
        "search-schedule": ScheduleResult(None, (), {}, {}, {}, {}, 1, None, (), (), 1.0).to_dict(),
        "generate": generate(model, ["picture"], tmp_path / "pictures", steps=1),
        "inspect": inspect(folder).to_dict(),
        "doctor": examine(),
    }
    for command, document in documents.items():
        assert names(tables(TEXTS["json.md"], f"## `dcomp {command} --json`")[0]) == set(document), command
    assert {re.split(" --", command)[0] for command in documents} == {
        name
        for name, command in COMMANDS.items()
        if "--json" in options_of(command) and name not in ("compress", "prune")
    }


def test_messages_of_the_troubleshooting_page_are_the_programs() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("kernels", "calibrate", "compress", "cachequant", "recipes")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    page = TEXTS["troubleshooting.md"]
    heads = re.findall(r"^## (.+)", page, flags=re.MULTILINE)
    messages = [message for head in heads for t in tables(page, f"## {head}") for message in names(t)]
    assert len(messages) > 20
    for message in messages:
        for part in message.split("..."):
            # A message of diffusers; a test of the loader meets it.
            assert part.strip() in source or message.startswith("Unknown quantization type"), message


def test_plain_diffusers_refuses_the_format_as_the_page_says() -> None:
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    with pytest.raises(ValueError, match="Unknown quantization type, got nobody"):
        DiffusersAutoQuantizer.from_dict({"quant_method": "nobody"})


def test_no_figure_stands_outside_its_markers() -> None:
    readme = TEXTS["README.md"]
    before, _, rest = readme.partition("<!-- figures:begin -->")
    _, found, after = rest.partition("<!-- figures:end -->")
    assert found
    assert not re.search(r"\d (dB|times|%|x )", before + after)
