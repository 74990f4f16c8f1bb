import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcomp import UsageError
from dcomp.compress.loader import load
from dcomp.compress.split import parts_of, quantized_layers
from dcomp.kernels import dispatch
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as compiler
from dcomp.kernels.cuda import driver
from dcomp.recipes import console
from dcomp.recipes.doctor import PACKAGES, examine
from tests.support.emulated_gpu import emulated_gpu
from tests.support.fake_cuda import FakeDriver, FakeNvrtc


def test_every_operation_has_a_row_with_a_reason() -> None:
    report = examine()
    rows = report["kernels"]
    assert {"quantize_static", "quantize_token", "linear_a8", "linear_a16", "conv2d_a8", "conv2d_a16"} <= {
        row["operation"] for row in rows
    }
    assert all(set(row) == {"operation", "format", "device", "row", "reason"} for row in rows)
    assert all(row.values() for row in rows)
    for device in ("cpu", "cuda"):
        assert {row["operation"] for row in rows if row["device"] == device} == {row["operation"] for row in rows}


def test_what_cannot_run_here_is_said_plainly() -> None:
    report = examine()
    elsewhere = [row for row in report["kernels"] if row["device"].startswith("cuda")]
    assert elsewhere
    problem = report["cuda"].get("problem")
    if problem is not None:
        assert all(problem in row["reason"] for row in elsewhere if row["operation"] != "attention")
    assert {row["row"] for row in elsewhere} <= {"cuda", "emulated", "torch"}


@pytest.fixture
def gpu() -> Iterator[None]:
    dispatch._choose.cache_clear()
    try:
        with emulated_gpu():
            yield
    except BuildError as error:
        pytest.skip(str(error))
    dispatch._choose.cache_clear()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_told_with_its_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiler, "nvrtc", FakeNvrtc)
    report = examine()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    facts = report["cuda"]
    assert (facts["driver"], facts["compiler"]) == ("13.0", "NVRTC 13.0 (fake)")
    (device,) = facts["devices"]
    assert (device["name"], device["compute_capability"], device["problem"]) == ("emulator", "8.6", None)
    assert {"linear_w8a8_64x64", "conv_w4a8_64x64", "quantize_token"} <= set(device["tested_kernels"])
    assert device["unusable_kernels"] == {}
    rows = [row for row in report["kernels"] if row["device"] == "cuda:0"]
    assert len(rows) == 18
    assert {row["row"] for row in rows if row["operation"] != "attention"} == {"cuda"}
    console.print_doctor(report)
    said = capsys.readouterr().out
    assert "emulator" in said
    assert len(said.splitlines()) < 80


def test_an_old_gpu_is_told_with_what_it_lacks() -> None:
    with driver.use(FakeDriver((7, 5))):
        dispatch._choose.cache_clear()
        report = examine()
        dispatch._choose.cache_clear()
    (device,) = report["cuda"]["devices"]
    assert "compute capability 7.5" in device["problem"]
    assert device["tested_kernels"] == []
    assert all("7.5" in r["reason"] for r in report["kernels"] if r["device"] == "cuda:0" and r["row"] == "emulated")


def test_a_folder_that_keeps_no_kernels_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    built = examine()["built"]
    assert built["folder"] is None
    assert "no folder to keep built kernels in" in built["problem"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dcomp").mkdir(mode=0o700)
    (tmp_path / "dcomp" / "kernel.so").write_bytes(b"12345")
    assert examine()["built"] == {"folder": str(tmp_path / "dcomp"), "problem": None, "files": 1, "bytes": 5}


NAME = "UNet2DConditionModel"
Models = Callable[[str], Path]


def test_layers_of_a_checkpoint_are_told_by_name(tiny_checkpoint: Models, capsys: pytest.CaptureFixture[str]) -> None:
    report = examine(tiny_checkpoint(NAME), "*.attn1.to_q")
    lines = report["layers"]
    assert lines
    assert {line["operation"] for line in lines} == {"quantize_token", "linear_a8"}
    assert all(line["layer"].endswith(".attn1.to_q") and line["scheme"] and line["reason"] for line in lines)
    assert {line["device"].split(":")[0] for line in lines} == {"cpu", "cuda"}
    console.print_doctor(report)
    said = capsys.readouterr().out
    assert "attn1.to_q" in said
    assert "Operations" not in said


def test_a_pattern_without_layers_names_some(tiny_checkpoint: Models, tiny_model: Models) -> None:
    with pytest.raises(UsageError, match=r"No quantized layer matches 'nothing'.*such as "):
        examine(tiny_checkpoint(NAME), "nothing")
    with pytest.raises(UsageError, match="Name a folder that dcomp quantized"):
        examine(tiny_model(NAME))


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "static_checkpoint"])
def test_layers_run_the_operations_that_they_are_said_to_run(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(request.getfixturevalue(fixture)(NAME))
    ran: list[tuple[str, dict[str, Any]]] = []
    choose = dispatch.choose

    def noting(operation: str, **asked: Any) -> Any:
        ran.append((operation, asked))
        return choose(operation, **asked)

    monkeypatch.setattr(dispatch, "choose", noting)
    checked = set()
    for layer in quantized_layers(pipe.unet).values():
        for part in parts_of(layer):
            conv = isinstance(part, torch.nn.Conv2d)
            channels = part.in_channels if conv else part.in_features
            x = torch.randn(1, channels, 6, 6) if conv else torch.randn(3, channels)
            ran.clear()
            part.int_forward(x)
            assert [operation for operation, _ in ran] == list(part.operations())
            for (operation, asked), (_, said) in zip(ran, part.operations().items(), strict=True):
                assert {"groups": 1} | said | asked == {"groups": 1} | asked
                checked.add(operation)
    assert len(checked) >= 3


def test_report_is_json_and_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    report = examine()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report["packages"]) == set(PACKAGES)
    assert report["memory_bytes"] > report["memory_free_bytes"] > 0
    console.print_doctor(report)
    assert len(capsys.readouterr().out.splitlines()) < 60


def test_settings_that_change_speed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert examine()["settings"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
