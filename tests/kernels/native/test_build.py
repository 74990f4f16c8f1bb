"""Where the C++ library cannot be built it is absent, without harm and with a reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.native import rows
from dcomp.kernels.native.build import library_file

needs_compiler = pytest.mark.skipif(rows.defect() is not None, reason=f"{rows.defect()}")

# What a process finds that starts with some environment, as `row reason`.
FOUND = (
    "import torch; from dcomp.kernels import dispatch, ops, qparams;"
    "x = torch.randn(3, 20); choice = dispatch.choose('quantize_token');"
    "assert all(map(torch.equal, ops.quantize_token(x), qparams.quantize_token(x)));"
    "print(choice.row, choice.reason)"
)


def found(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", FOUND], capture_output=True, text=True, env=os.environ | environment, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/g++", "there is no C++ compiler"),
        ("false", "the C++ compiler failed"),
        ("", "no C++ compiler"),
        ("'g++", "CXX is no command"),
    ],
)
def test_without_a_compiler_torch_does_it(compiler: str, reason: str, tmp_path: Path) -> None:
    path = {"PATH": str(tmp_path)} if not compiler else {}
    said = found(CXX=compiler, XDG_CACHE_HOME=str(tmp_path), **path)
    assert said.startswith("cpu ")
    assert reason in said


@needs_compiler
def test_what_a_compiler_does_not_know_is_left_out(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-mavx512bf16*) echo "error: unknown flag" >&2; exit 1; esac\nexec g++ "$@"\n'
    )
    old.chmod(0o755)
    said = found(CXX=str(old), XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith("native ")
    assert said.strip().endswith(("(generic)", "(avx2)", "(avx512)"))


def test_a_folder_that_others_write_to_is_not_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dcomp").mkdir()
    (tmp_path / "dcomp").chmod(0o777)
    with pytest.raises(BuildError, match="written by others"):
        library_file()


def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = found(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert said.startswith("cpu ")
    assert "no folder to keep built kernels in" in said


@needs_compiler
def test_two_processes_build_one_library_and_a_broken_one_is_built_again(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", FOUND]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert all(process.communicate()[0].startswith("native ") for process in both)
    libraries = [*(tmp_path / "dcomp").glob("*.so")]
    assert len(libraries) == 1
    libraries[0].write_bytes(b"not a library")
    assert found(XDG_CACHE_HOME=str(tmp_path)).startswith("native ")
    assert libraries[0].stat().st_size > 10_000
    assert {path.suffix for path in (tmp_path / "dcomp").iterdir()} == {".so", ".lock"}
