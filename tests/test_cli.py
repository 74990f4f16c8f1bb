"""The program as people meet it: exit codes, screens, JSON, and what is left on the disk."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import dcomp
from dcomp import DcompError, cli
from dcomp.calibrate.prompts import MAX_TEXT_BYTES
from dcomp.compress.manifest import check_manifest
from dcomp.recipes import console, peak_memory
from tests.support import hostile
from tests.support.checkpoints import checked_in_a_fork, file_hashes
from tests.support.tiny import save_tiny_pipeline

UNET, TEXT = "UNet2DModel", "UNet2DConditionModel"
COMMANDS = [
    *(
        "quantize",
        "prune",
        "compress",
        "calibrate",
        "validate",
        "search-schedule",
        "generate",
        "bench",
        "inspect",
        "doctor",
    ),
    "demo",
]
SHORT = ["--samples", "2", "--steps", "3", "--batch-size", "2"]
QUICK = [*SHORT, "--set", "stages.0.tune=0", "--set", "stages.0.rounding=nearest"]
SCREEN = 12  # lines that an error may take
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_pipeline(name, root / name) for name in (UNET, TEXT)}


@pytest.fixture(scope="module")
def checkpoint(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dcomp.recipes.run import run_recipe
    from tests.support.checkpoints import short_recipe

    with checked_in_a_fork():
        return run_recipe(models[UNET], short_recipe(UNET), tmp_path_factory.mktemp("checkpoint") / "out").output


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call `main` in this process, in an empty working folder; gives exit code, stdout and stderr."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("CI", "1")
    console._stdout.cache_clear()
    console._stderr.cache_clear()

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dcomp", *map(str, arguments)])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    with checked_in_a_fork():
        yield call


def program(*arguments: object, cwd: Path, **options: Any) -> "subprocess.Popen[str]":
    """Start the installed script."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(sys.executable).parent / "dcomp"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([script, *map(str, arguments)], cwd=cwd, env=environment, **(pipes | options))


def forked(*arguments: object, cwd: Path) -> "multiprocessing.context.ForkProcess":
    """Start `main` in a fork, which has everything imported; its screens are files beside the working folder."""

    def child() -> None:
        os.chdir(cwd)
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = cwd.with_suffix(f".{name}").open("w", buffering=1)
            os.dup2(file.fileno(), number)
            setattr(sys, name, file)
        console._stdout.cache_clear()
        console._stderr.cache_clear()
        # A shell lets what it starts in the background ignore Ctrl-C, and that is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["dcomp", *map(str, arguments)]
        with checked_in_a_fork():
            cli.main()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def left_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_one_screen(code: int, out: str, err: str, *, code_wanted: int, words: str) -> None:
    """One screen on stderr that names the problem and the remedy, and nothing on stdout."""
    screen = err[err.index("Error: ") :]
    assert code == code_wanted, err
    assert words in screen, err
    assert "   do: " in screen, err
    assert "Traceback" not in err
    assert out == ""
    assert len(screen.splitlines()) <= SCREEN
    assert len(screen) < 2_000


# Help and parsing


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options_that_the_command_takes(command: str, run: Run) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    known = {
        option
        for parameter in cli.typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }
    # A cut-off option would end in an ellipsis, so the names are whole.
    assert set(re.findall(r"(?<![\w-])--[a-z0-9-]+", out)) >= known
    assert "Examples" in out or len(out.splitlines()) < 80


def test_help_of_the_program_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert set(COMMANDS) == set(cli.typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["quantize"],
        ["quantize", "model", "--w2a2"],
        ["quantize", "model", "--samples", "0"],
        ["quantize", "model", "--samples", "many"],
        ["quantize", "model", "--seed", "-1"],
        ["validate", "out"],
        ["generate", "out"],
        ["bench", "out", "--against", "model", "--repeats", "1"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_parsed_is_wrong_use(arguments: list[str], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: dcomp" in err
    assert "Traceback" not in err
    assert left_in(Path.cwd()) == []


def test_version_is_the_packages(run: Run) -> None:
    assert run("--version")[:2] == (0, f"dcomp {dcomp.__version__}\n")


def test_debug_shows_where_an_error_comes_from(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCOMP_DEBUG", "1")
    with pytest.raises(DcompError, match="does not exist"):
        run("inspect", "missing")


# Wrong use and bad input


def test_a_missing_or_empty_folder_is_refused_by_every_command(models: dict[str, Path], run: Run) -> None:
    Path("empty").mkdir()
    for folder, words in (("missing", "does not exist"), ("empty", "empty")):
        for arguments in (
            ["quantize", folder, "-o", "out", *SHORT],
            ["compress", "w4a8", folder, "-o", "out"],
            ["calibrate", folder, "-o", "out", *SHORT],
            ["generate", folder, "a cat", "-o", "out"],
            ["inspect", folder],
            ["validate", models[UNET], "--against", folder, "--no-bench", *SHORT],
            ["bench", models[UNET], "--against", folder],
            ["bench", folder, "--against", models[UNET]],
        ):
            assert_one_screen(*run(*arguments), code_wanted=2, words=words)
            assert left_in(Path.cwd()) == ["empty"]


QUANTIZE: dict[str, tuple[list[str], str]] = {
    "two presets": (["--w4a8", "--w8a8"], "--w8a8 and --w4a8 exclude each other"),
    "a preset and a recipe": (["--w4a8", "--recipe", "w8a8"], "--w4a8 and --recipe exclude each other"),
    "4-bit inputs and another preset": (["--w8a8", "--w4a4"], "--w8a8 and --w4a4 exclude each other"),
    "unknown method": (["--method", "gtpq"], "Did you mean gptq?"),
    "unknown quality": (["--quality", "bests"], "Did you mean best?"),
    "unknown recipe": (["--recipe", "w4a9"], "Did you mean 'w4a8'?"),
    "unknown key": (["--set", "calibraton.steps=3"], "did you mean 'calibration'?"),
    "unknown key of a stage": (["--set", "stages.0.stepbins=3"], "did you mean 'step_bins'?"),
    "no key": (["--set", "steps"], "not KEY=VALUE"),
    "no steps": (["--steps", "0"], "calibration.steps"),
    "negative steps": (["--steps", "-3"], "calibration.steps"),
    "more steps than the schedule": (["--steps", "1001"], "1 to 1000 steps"),
    "unknown scheduler": (["--scheduler", "DDIMSheduler"], "did you mean DDIMScheduler"),
    "scheduler of another family": (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "no scheduler that can"),
    "unknown format": (["--format", "gguf"], "'dcomp', 'quanto' or 'bnb'"),
    "unknown layer": (["--keep", "mid_blok"], "mid_block"),
    "adapter that is not there": (["--lora", "style.safetensors"], "not found"),
    "adapter that is pickled": (["--lora", "pickled.bin"], "no .safetensors"),
    "adapter scale": (["--lora", "style.safetensors:big"], "not a number"),
    "no such device": (["--device", "cuda:99"], "dcomp doctor"),
    "no device at all": (["--device", "toaster"], "dcomp doctor"),
    "no calibration set": (["--calibration", "nothing"], "dcomp calibrate"),
    "prompts that are not there": (["--prompts", "nothing.txt"], "no such file"),
    "prompts that are empty": (["--prompts", "empty.txt"], "not one prompt"),
    "prompts that are blank": (["--prompts", "blank.txt"], "not one prompt"),
    "prompts that are binary": (["--prompts", "binary.txt"], "binary"),
    "prompts of 10 GB": (["--prompts", "huge.txt"], f"limit of {MAX_TEXT_BYTES}"),
    "prompts of another kind": (["--prompts", "prompts.docx"], ".parquet"),
    "a folder of prompts": (["--prompts", "./folder"], "folder"),
    "a column that is not there": (["--prompts", "table.csv", "--column", "captions"], "'captions'"),
    "a precision that a layer cannot have": (["--set", "stages.0.overrides={conv_in: w4a8}"], "conv_in: w4a8 is asked"),
    "a budget that cannot be met": (["--target-bits", "2"], "or more"),
    "a budget without a unit": (["--budget", "12"], "no budget"),
    "two budgets of a kind": (["--budget", "12MB", "--budget", "900KB"], "second budget"),
    "a picture of an unknown kind": (["--explain", "--plot", "errors.gif"], ".png"),
    "output that exists": (["-o", "folder"], "exists"),
    "output that is a file": (["-o", "blank.txt"], "not a folder"),
    "output below a file": (["-o", "blank.txt/out"], "--output"),
}


@pytest.mark.parametrize("case", QUANTIZE)
def test_wrong_use_of_quantize_takes_one_screen_and_leaves_nothing(
    case: str, models: dict[str, Path], run: Run
) -> None:
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n")
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    Path("pickled.bin").write_bytes(b"\x80\x02}q\x00.")
    Path("prompts.docx").write_text("a cat")
    Path("table.csv").write_text("caption,size\na cat,1\n")
    Path("folder").mkdir()
    Path("folder", "letter").touch()
    with Path("huge.txt").open("wb") as file:
        file.truncate(10 << 30)
    before = left_in(Path.cwd())
    options, words = QUANTIZE[case]
    output = [] if "-o" in options else ["-o", "out"]
    assert_one_screen(*run("quantize", models[TEXT], *SHORT, *output, *options), code_wanted=2, words=words)
    assert left_in(Path.cwd()) == before


HEADERS = ["length beyond the file", "length of 2**64 - 1", "offsets beyond the end", "shape that overflows", "no JSON"]


@pytest.mark.parametrize("case", [*hostile.FOLDERS, *HEADERS])
def test_a_damaged_model_takes_one_screen_and_leaves_nothing(case: str, models: dict[str, Path], run: Run) -> None:
    folder = Path(shutil.copytree(models[UNET], "model")).resolve()
    if case in HEADERS:
        content, words = hostile.HEADERS[case]
        (folder / "unet" / hostile.WEIGHTS).write_bytes(content)
    else:
        damage, words = hostile.FOLDERS[case]
        damage(folder)
    before = left_in(Path.cwd())
    result = run("quantize", "model", "-o", "out", *SHORT)
    assert_one_screen(*result, code_wanted=2, words=words)
    assert left_in(Path.cwd()) == before


def test_overlapping_tensors_are_refused(models: dict[str, Path], run: Run) -> None:
    shutil.copytree(models[UNET], "model")

    def overlap(header: dict[str, Any]) -> None:
        one, other = [name for name in header if name != "__metadata__"][:2]
        header[other] = header[one]

    hostile.edit_header(Path("model/unet") / hostile.WEIGHTS, overlap)
    assert_one_screen(*run("quantize", "model", "-o", "out", *SHORT), code_wanted=2, words="overlap")
    assert left_in(Path.cwd()) == ["model"]


def test_an_extra_tensor_is_refused(models: dict[str, Path], run: Run) -> None:
    shutil.copytree(models[UNET], "model")
    file = Path("model/unet") / hostile.WEIGHTS
    weights = load_file(file)
    save_file(weights | {"conv_extra.weight": weights["conv_in.weight"].clone()}, file, metadata={"format": "pt"})
    assert_one_screen(*run("quantize", "model", "-o", "out", *SHORT), code_wanted=2, words="conv_extra.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float, models: dict[str, Path], run: Run) -> None:
    shutil.copytree(models[UNET], "model")
    file = Path("model/unet") / hostile.WEIGHTS
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"].view(-1)[-1] = bad
    save_file(weights, file, metadata={"format": "pt"})
    result = run("quantize", "model", "-o", "out", *SHORT)
    assert_one_screen(*result, code_wanted=2, words="mid_block.resnets.0.conv1.weight")
    assert left_in(Path.cwd()) == ["model"]


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path, run: Run) -> None:
    for arguments in (["quantize", checkpoint], ["calibrate", checkpoint]):
        assert_one_screen(*run(*arguments, "-o", "out", *SHORT), code_wanted=2, words="quantized already")
    assert left_in(Path.cwd()) == []


@pytest.mark.parametrize("name", ["dcomp.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_tampered_checkpoint_is_refused(name: str, checkpoint: Path, run: Run) -> None:
    copy = Path(shutil.copytree(checkpoint, "copy"))
    text = (copy / name).read_text()
    (copy / name).write_text(text.replace(": 2", ": 3", 1) if name == "dcomp.json" else text + " ")
    assert (copy / name).read_text() != text
    assert_one_screen(*run("inspect", copy), code_wanted=1, words=name)
    with pytest.raises(DcompError, match=name):
        dcomp.load(copy)


def test_one_changed_bit_of_the_weights_is_found(checkpoint: Path, run: Run) -> None:
    copy = Path(shutil.copytree(checkpoint, "copy"))
    content = bytearray((copy / "unet" / hostile.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / "unet" / hostile.WEIGHTS).write_bytes(content)
    with pytest.raises(DcompError, match="content has changed"):
        dcomp.load(copy, check="full")


def test_what_dcomp_did_not_make_is_said_plainly(models: dict[str, Path], run: Run) -> None:
    assert_one_screen(*run("inspect", models[UNET]), code_wanted=1, words="not made by dcomp")
    with pytest.raises(DcompError, match="not made by dcomp"):
        dcomp.load(models[UNET])


def test_two_writers_at_once_do_not_mix(models: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from dcomp.recipes import screens

    seen: list[tuple[int, str, str]] = []

    def second(plan: Any, **_: Any) -> None:
        monkeypatch.setattr(screens, "print_plan", lambda plan, **_: None)
        seen.append(run("quantize", models[UNET], "-o", "out", *QUICK))

    monkeypatch.setattr(screens, "print_plan", second)
    code, _, err = run("quantize", models[UNET], "-o", "out", *QUICK)
    assert code == 0, err
    assert_one_screen(*seen[0], code_wanted=1, words="Another process")
    assert left_in(Path.cwd()) == ["out"]
    check_manifest("out")


def test_names_in_a_terminal_are_harmless(run: Run) -> None:
    _, _, err = run("inspect", "evil\x1b[2Jname")
    assert "\x1b" not in err
    assert "evil" in err


# JSON and dry runs

DOCS = Path(__file__).resolve().parents[1] / "docs" / "json.md"


def documented(command: str) -> set[str]:
    """The keys that docs/json.md promises for `dcomp COMMAND --json`."""
    section = DOCS.read_text().split(f"## `dcomp {command} --json`")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)}


VALIDATE_KEYS = {
    *("latent_rel_error", "psnr_db", "ssim", "fid", "bits_per_param", "bytes_original", "bytes_compressed"),
    *("denoiser_bytes_ratio", "macs_ratio", "speedup", "speedup_min", "speedup_max", "peak_bytes", "passed"),
    "thresholds",
}


def read_json(result: tuple[int, str, str], code: int = 0) -> Any:
    assert result[0] == code, result[2]
    return json.loads(result[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_dry_run_writes_nothing_and_tells_the_resolved_recipe(models: dict[str, Path], run: Run) -> None:
    before = file_hashes(models[TEXT])
    data = read_json(run("quantize", models[TEXT], "--w8a8", *SHORT, "--keep", "conv_in", "--dry-run", "--json"))
    assert set(data) == documented("quantize --dry-run")
    assert data["layers"]["conv_in"]["scheme"] is None
    assert data["recipe"]["calibration"]["steps"] == 3
    code, out, err = run("compress", "w8a8", models[TEXT], "--set", "calibration.steps=3", "--dry-run")
    assert (code, "Traceback" in err) == (0, False)
    assert "preset: w8a8" in out
    assert all(name in out for name in data["layers"])
    assert left_in(Path.cwd()) == []
    assert file_hashes(models[TEXT]) == before


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--w4a4"], {"preset": "w4a4", "rounding": "gptq", "rows": 256, "tune": 0}),
        (["--quality", "fast"], {"preset": "w4a8", "rounding": "gptq", "rows": 128, "tune": 0}),
        (["--quality", "best"], {"rounding": "gptq", "rows": 512, "tune": 200, "directions": 8}),
        (["--w8a8", "--method", "minmax"], {"preset": "w8a8", "rounding": "nearest", "inputs": "static", "tune": 0}),
        (["--method", "nearest", "--quality", "best"], {"rounding": "nearest", "rows": 512, "tune": 0}),
        (
            ["--budget", "100MB", "--budget", "40ms", "--budget", "1.5x"],
            {"max_megabytes": 100, "max_milliseconds": 40, "min_speedup": 1.5},
        ),
        (["--quality", "fast", "--set", "stages.0.tune=7"], {"rows": 128, "tune": 7}),
        (["--recipe", "own.yaml", "--method", "gptq"], {"preset": "w8a8", "rounding": "gptq", "rows": 9, "tune": 0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_methods_and_qualities_are_values_in_the_recipe(
    options: list[str], wanted: dict[str, Any], models: dict[str, Path], run: Run
) -> None:
    Path("own.yaml").write_text("stages: [{kind: quantize, preset: w8a8, rounding: nearest, rows: 9, tune: 3}]")
    data = read_json(run("quantize", models[UNET], *options, "--dry-run", "--json"))
    stage = data["recipe"]["stages"][0]
    assert {key: stage[key] for key in wanted} == wanted
    assert not {"method", "quality"} & {*stage, *data["recipe"]}


def test_quantize_generate_inspect_and_validate_speak_json(models: dict[str, Path], run: Run) -> None:
    Path("words.txt").write_text("a cat\na red house\n")
    arguments = ["quantize", models[TEXT], "-o", "out", "--scheduler", "EulerDiscrete", "--prompts", "words.txt"]
    result = read_json(run(*arguments, *QUICK, "--set", "stages.0.inputs=static", "--json"))
    assert set(result) == documented("quantize")
    assert result["output"] == "out"
    assert set(result["files"]) == set(file_hashes(Path("out"))) - {"dcomp.json"}
    entry = next(iter(result["layer_errors"].values()))
    assert set(entry) == {"weight", "output", "by_step", "int_vs_fake", "remarks"}
    assert all(f"`{key}`" in DOCS.read_text().split("An entry of `layer_errors`")[1][:1_000] for key in entry)

    report = read_json(run("inspect", "out", "--json"))
    assert set(report) == documented("inspect")
    assert report["recipe"]["calibration"]["scheduler"] == "EulerDiscrete"

    made = read_json(run("generate", "out", "a cat", "a dog", "--json"))
    assert set(made) == documented("generate")
    assert (made["steps"], made["unseen_timesteps"]) == (3, 0)
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in made["files"])

    validate = ["validate", "out", "--against", models[TEXT], "--samples", "2", "--no-bench", "--json"]
    figures = read_json(run(*validate, "--min-psnr", "10", "--junit", "junit.xml", "--html", "page"))
    assert set(figures) == documented("validate") > VALIDATE_KEYS
    assert figures["passed"] is True
    assert figures["settings"]["scheduler"] == "EulerDiscreteScheduler"
    assert figures["settings"]["steps"] == 3
    assert 0 < figures["latent_rel_error"] < 0.15
    assert figures["speedup"] is None
    assert left_in(Path("page")) == ["index.html", "report.json"]

    missed = run(*validate, "--min-psnr", "99")
    assert read_json(missed, code=3)["passed"] is False
    assert left_in(Path.cwd()) == ["junit.xml", "out", "page", "pictures", "words.txt"]


def test_prune_says_what_can_go_and_what_went(models: dict[str, Path], run: Run) -> None:
    code, out, err = run("prune", models[TEXT], *SHORT[:4], "--dry-run")
    assert (code, err) == (0, "")
    assert "mid_block.resnets.0:norm_groups" in out
    assert "at most, together" in out
    assert left_in(Path.cwd()) == []
    options = [*SHORT[:4], "--set", "stages.prune.rows=8", "--parameters", "0.25", "--pin", "mid_block", "-o", "cut"]
    code, out, err = run("prune", models[TEXT], *options)
    assert code == 0, err
    assert "parameters" in out
    assert "gone" in out or "stay" in out
    assert "mid_block" not in out
    assert out.rstrip().endswith('dcomp.load("cut")')
    data = read_json(run("prune", models[TEXT], *options, "--overwrite", "--method", "magnitude", "--json"))
    assert data["pruning"]["parameters_after"] <= 0.75 * data["pruning"]["parameters_before"]
    assert data["pruning"]["rank_correlation"] is None
    for more, words in (
        (["--parameters", "0.999"], "at most"),
        (["--method", "best"], "method"),
        (["--pin", "nobody"], "names nothing that can be cut"),
    ):
        assert_one_screen(*run("prune", models[TEXT], *SHORT[:4], *more, "-o", "new"), code_wanted=2, words=words)
    assert not Path("new").exists()


def test_a_recorded_set_serves_quantize(models: dict[str, Path], checkpoint: Path, run: Run) -> None:
    facts = read_json(run("calibrate", models[UNET], "-o", "set", *SHORT, "--json"))
    assert set(facts) == documented("calibrate")
    run("quantize", models[UNET], "-o", "out", *QUICK, "--calibration", "set", "--json")
    assert file_hashes(Path("out")) == file_hashes(checkpoint)
    other = run("quantize", models[TEXT], "-o", "other", *QUICK, "--calibration", "set")
    assert_one_screen(*other, code_wanted=2, words="recorded with another denoiser")
    assert left_in(Path.cwd()) == ["out", "set"]


def test_what_layers_cannot_have_is_listed_on_one_screen_by_every_form_of_the_command(
    models: dict[str, Path], run: Run
) -> None:
    narrow = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in "qkv"]
    narrow += [f"down_blocks.0.resnets.0.{layer}" for layer in ("conv1", "conv2", "time_emb_proj")]
    narrow += ["conv_in", "conv_out", "time_embedding.linear_1"]
    overrides = ", ".join(f"{name}: w4a8" for name in narrow)
    options = ["-o", "out", *QUICK, "--set", f"stages.0.overrides={{{overrides}, mid_block: w4a8}}"]
    for extra in ([], ["--dry-run"], ["--dry-run", "--json"], ["--json", "--explain"]):
        result = run("quantize", models[TEXT], *options, *extra)
        assert_one_screen(*result, code_wanted=2, words="layers cannot be quantized as asked, the first 10:")
    lines = result[2].splitlines()
    count = int(re.findall(r"Error: (\d+) layers", result[2])[0])
    assert 10 < count <= len(narrow)
    assert sum(line.strip().split(":")[0] in narrow for line in lines) == 10
    assert left_in(Path.cwd()) == []


def test_plans_are_searched_and_followed(checkpoint: Path, models: dict[str, Path], run: Run) -> None:
    shutil.copytree(checkpoint, "out")
    search = ["search-schedule", "out", "--steps", "8", "--samples", "2"]
    more = ["--against", models[UNET], "--plot", "plans.svg"]
    found = read_json(run(*search, "--budget", "1.3x", "--planner", "uniform", "--json", *more))
    assert set(found) == documented("search-schedule")
    assert [rung["name"] for rung in found["ladder"]] == ["1.3x"]
    assert "<svg" in Path("plans.svg").read_text()
    assert [plan["name"] for plan in found["plans"]] == ["1.3x"]
    assert left_in(Path("out")).count("dcomp_cache.json") == 1
    made = read_json(run("generate", "out", "a cat", "--steps", "8", "--plan", "1.3x", "--json"))
    assert (made["plan"], made["plan_fallbacks"]) == ("1.3x", 0)
    code, out, err = run(*search, "--budget", "1.3x", "--budget", "99x")
    assert code == 0, err
    assert "1.3x" in out
    assert "--plan 1.3x" in out
    assert re.search(r"No plan keeps 99x: with gaps of 6 calls [\d.]+x is the nearest", err)
    code, out, err = run("generate", "out", "a cat", "--plan", "1.3x")
    assert code == 0, err
    assert "Note: The plan 1.3x was made for 8 steps, and 3 are asked for." in err
    assert_one_screen(*run(*search, "--plot", "plans.gif"), code_wanted=2, words="ending")
    assert_one_screen(*run(*search, "--budget", "40mm"), code_wanted=2, words="is no budget")
    assert_one_screen(*run(*search, "--planner", "magic"), code_wanted=2, words="no planner 'magic'")
    assert_one_screen(*run(*search, "--correct", "magic"), code_wanted=2, words="no correction 'magic'")
    assert_one_screen(*run(*search, "--one-context"), code_wanted=2, words="does not run two contexts")
    nothing = run(*search, "--budget", "99x", "--planner", "uniform", "--json")
    assert nothing[0] == 3
    assert json.loads(nothing[1])["file"] is None


def test_a_set_of_other_settings_is_refused_or_warned_of(models: dict[str, Path], run: Run) -> None:
    run("calibrate", models[TEXT], "-o", "set", *SHORT)
    quantize = ["quantize", models[TEXT], "-o", "out", "--calibration", "set", "--dry-run"]
    other = run(*quantize, "--steps", "4")
    assert_one_screen(*other, code_wanted=2, words="recorded with steps 3 instead of 4")
    assert "--allow-mismatch" in other[2]
    other = run(*quantize, "--scheduler", "EulerDiscrete")
    assert_one_screen(*other, code_wanted=2, words="DDIMScheduler instead of EulerDiscreteScheduler")
    code, _, err = run(*quantize, "--steps", "4", "--allow-mismatch")
    assert code == 0, err
    assert "Note: The calibration set was recorded otherwise: steps 3 instead of 4." in err
    assert re.search(r"Note: The 4 timesteps to deploy are [\d.]+ in log-SNR from the nearest", err)


def test_quantize_explains_and_inspect_does_it_again(models: dict[str, Path], run: Run) -> None:
    code, out, err = run("quantize", models[UNET], "-o", "out", *QUICK, "--explain")
    assert code == 0, err
    table, _, rest = out.partition("Picture: out-errors.png\n")
    assert re.match(r"Worst 10 of \d+ quantized layers", table)
    assert 'dcomp.load("out")' in rest.splitlines()[-1]
    picture = Path("out-errors.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    code, again, err = run("inspect", "out", "--plot", "again.png")
    assert (code, err) == (0, "Picture: again.png\n")
    assert table.strip() in again
    assert Path("again.png").read_bytes() == picture
    assert len(again.splitlines()) < 50
    layers = read_json(run("inspect", "out", "--json"))["layers"]
    assert f"Worst 2 of {len(layers)} quantized" in run("inspect", "out", "--worst", "2")[1]
    refused = run("inspect", "out", "--plot", "again.gif")
    assert_one_screen(*refused, code_wanted=2, words="ending")
    assert left_in(Path.cwd()) == ["again.png", "out", "out-errors.png"]


def test_nothing_to_draw_is_a_note_after_a_run_and_an_error_when_asked_for(models: dict[str, Path], run: Run) -> None:
    result = run("quantize", models[TEXT], "--recipe", "float", "-o", "out", *SHORT, "--plot", "errors.png", "--json")
    assert "There is no picture" in result[2]
    assert read_json(result)["output"] == "out"
    assert_one_screen(*run("inspect", "out", "--plot", "errors.png"), code_wanted=2, words="no errors by step")
    assert left_in(Path.cwd()) == ["out"]


def test_doctor_speaks_json_and_is_silent_about_missing_kernels(run: Run) -> None:
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == documented("doctor")


def test_doctor_tells_of_the_layers_of_a_checkpoint(checkpoint: Path, run: Run) -> None:
    data = read_json(run("doctor", checkpoint, "--explain", "*conv*", "--json"))
    assert data["layers"]
    assert all("conv" in line["layer"] for line in data["layers"])
    assert_one_screen(*run("doctor", "--explain", "*conv*"), code_wanted=2, words="needs a checkpoint")


def measured_here(_: list[str], *, input: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Do in this process what `measure_peak` asks of a fresh one, which imports for ten seconds."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "stdin", io.StringIO(input))
        peak_memory._child()
    return subprocess.CompletedProcess([], 0, out.getvalue(), "")


def test_bench_speaks_json(
    models: dict[str, Path], checkpoint: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak_memory.subprocess, "run", measured_here)
    data = read_json(run("bench", checkpoint, "--against", models[UNET], "--repeats", "3", "--json"))
    assert set(data) == documented("bench")
    assert 0 < data["speedup_min"] <= data["speedup"] <= data["speedup_max"]


def test_the_line_that_loads_the_result_comes_last(models: dict[str, Path], run: Run) -> None:
    code, out, err = run("quantize", models[UNET], "--w8a8", *QUICK)
    assert code == 0, err
    assert out.splitlines()[-1] == f'import dcomp; pipe = dcomp.load("{UNET}-w8a8")'
    assert "Plan" in err
    assert left_in(Path.cwd()) == [f"{UNET}-w8a8"]


# The installed program


def test_the_installed_program_ends_with_the_code_of_its_error(tmp_path: Path) -> None:
    with program("inspect", "missing", cwd=tmp_path) as process:
        out, err = process.communicate()
    assert_one_screen(process.returncode, out, err, code_wanted=2, words="does not exist")
    assert err.startswith("Error: ")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(checkpoint: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with program("inspect", checkpoint, "--json", cwd=tmp_path, stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


LONG = ["--samples", "24", "--steps", "3", "--batch-size", "2", "--set", "calibration.max_calls=1", "--quality", "fast"]


@pytest.mark.slow
def test_a_run_that_is_killed_and_then_interrupted_goes_on_and_gives_the_same_bytes(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def screen(folder: Path, name: str = "stderr") -> str:
        return folder.with_suffix(f".{name}").read_text()

    whole, ended = tmp_path / "whole", tmp_path / "ended"
    for folder in (whole, ended):
        folder.mkdir()
    arguments = ["quantize", models[UNET], "-o", "out", *LONG]
    process = forked(*arguments, cwd=whole)
    process.join()
    assert process.exitcode == 0, screen(whole)

    work, finished = ended / ".out.dcomp-work", dict[Path, int]()
    for how in (signal.SIGKILL, signal.SIGINT):
        process = forked(*arguments, cwd=ended)
        deadline = time.monotonic() + 120
        while len(list(work.rglob("chunk-*.safetensors"))) <= len(finished):
            assert process.is_alive(), screen(ended)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid or 0, how)
        process.join()
        assert left_in(ended) == [".out.dcomp-work"]
        if how is signal.SIGINT:
            assert process.exitcode == 130
            assert "Traceback" not in screen(ended)
            assert "the same command goes on with it" in screen(ended)
            assert ".out.dcomp-work" in screen(ended)
        else:
            assert process.exitcode == -signal.SIGKILL
        now = {file: file.stat().st_mtime_ns for file in work.rglob("chunk-*.safetensors")}
        assert finished.items() <= now.items()  # what was done is not done again
        assert len(finished) < len(now) < 12
        finished = now
    process = forked(*arguments, cwd=ended)
    process.join()
    assert process.exitcode == 0, screen(ended)
    assert left_in(ended) == ["out"]
    assert screen(ended, "stdout").splitlines()[-1] == 'import dcomp; pipe = dcomp.load("out")'
    assert file_hashes(ended / "out") == file_hashes(whole / "out")
