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


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_without_a_compiler_that_works_torch_does_it(tmp_path: Path) -> None:
    said = found(CXX="false", XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith("cpu ")
    assert "the C++ compiler failed" in said


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/g++", r"there is no C\+\+ compiler"),
        ("", r"no C\+\+ compiler"),
        ("'g++", "CXX is no command"),
    ],
)
def test_a_compiler_that_is_not_there_is_a_reason(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=reason):
        library_file()


@needs_compiler
def test_what_a_compiler_does_not_know_is_left_out(tmp_path: Path) -> None:
    refuse = 'case "$*" in *-mavx512bf16*) echo "error: unknown flag" >&2; exit 1; esac'
    old = script(tmp_path / "old", f'{refuse}\nexec g++ "$@" -O0')  # slow code, made fast
    said = found(CXX=old, XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith("native ")
    assert said.strip().endswith(("(generic)", "(avx2)", "(avx512)"))


def test_a_folder_that_others_write_to_is_not_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "dcomp").mkdir()
    (tmp_path / "dcomp").chmod(0o777)
    with pytest.raises(BuildError, match="written by others"):
        library_file()


def test_a_folder_that_cannot_be_made_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="no folder to keep built kernels in"):
        library_file()


@needs_compiler
def test_two_processes_build_one_library_and_a_broken_one_is_built_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    link = f'echo linked >>{log}; sleep 2; while [ "$1" != -o ]; do shift; done; cp {library_file()} "$2"'
    made_before = script(tmp_path / "g++", f'case "$*" in *-shared*) {link}; esac')
    command = [sys.executable, "-P", "-c", FOUND]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": made_before}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert all(process.communicate()[0].startswith("native ") for process in both)
    assert log.read_text() == "linked\n"
    [library] = (tmp_path / "dcomp").glob("*.so")
    whole = library.read_bytes()
    library.write_bytes(b"not a library")
    assert found(XDG_CACHE_HOME=str(tmp_path), CXX=made_before).startswith("native ")
    assert library.read_bytes() == whole
    assert {path.suffix for path in (tmp_path / "dcomp").iterdir()} == {".so", ".lock"}
