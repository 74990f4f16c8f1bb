import json

import pytest

from dcomp.recipes import console
from dcomp.recipes.doctor import PACKAGES, examine


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
    elsewhere = [row for row in examine()["kernels"] if row["device"] == "cuda"]
    assert elsewhere
    assert all("no CUDA kernels" in row["reason"] and row["row"] != "cpu" for row in elsewhere)


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
