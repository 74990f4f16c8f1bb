"""Kernels are compiled once and kept whole, and where they cannot be, there is one reason and no harm."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcomp.kernels import build_cache
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as compiler
from dcomp.kernels.cuda import self_test
from dcomp.kernels.cuda.compile import Nvrtc, Target, image, part_of
from dcomp.kernels.cuda.tiles import ENTRIES
from tests.support.fake_cuda import FakeNvrtc

SM86, PTX = Target((8, 6)), Target((8, 6), (8, 4))
TOKEN = ("quantize_token",)


def real_nvrtc() -> Nvrtc:
    try:
        return compiler.nvrtc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dcomp"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    made = FakeNvrtc()
    monkeypatch.setattr(compiler, "nvrtc", lambda: made)
    return made


def test_the_table_of_the_source_is_that_of_the_host() -> None:
    assert list(compiler.entries()) == list(ENTRIES)


def test_what_runs_in_a_sequence_is_compiled_together_and_all_else_alone() -> None:
    parts = {part_of(name) for name in ENTRIES}
    assert sorted(name for part in parts for name in part) == sorted(ENTRIES)
    for name in ENTRIES:
        assert set(self_test._BEFORE.get(name, ())) <= set(part_of(name))
    assert part_of("quantize_token") == ("quantize_token",)


def test_kernels_are_compiled_once(fake: FakeNvrtc, cache: Path) -> None:
    first, again = image(SM86, TOKEN), image(SM86, TOKEN)
    assert first == again
    assert fake.compiled == 1
    assert first.architecture == "sm_86"
    assert first.file is not None
    assert first.remark is None
    assert {file.suffix for file in cache.iterdir()} == {".cubin", ".lock"}
    assert first.file.stat().st_mode & 0o022 == 0


def test_other_targets_kernels_sources_and_compilers_have_files_of_their_own(
    fake: FakeNvrtc, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {image(target, TOKEN).file for target in (SM86, PTX, Target((8, 0)), Target((8, 6), (8, 5)))}
    files.add(image(SM86, ("unpack_int8",)).file)
    monkeypatch.setattr(fake, "version", (13, 1))
    files.add(image(SM86, TOKEN).file)
    sources = compiler._sources()
    monkeypatch.setattr(compiler, "_sources", lambda: sources | {"arguments.h": b"other"})
    files.add(image(SM86, TOKEN).file)
    monkeypatch.setattr(compiler, "_OPTIONS", ())
    files.add(image(SM86, TOKEN).file)
    assert len(files) == fake.compiled == 8


@pytest.mark.parametrize("damage", [b"", b"not code", None])
def test_a_file_that_is_not_whole_is_made_again(fake: FakeNvrtc, damage: bytes | None) -> None:
    first = image(SM86, TOKEN)
    assert first.file is not None
    whole = first.file.read_bytes()
    first.file.write_bytes(whole[:-7] if damage is None else damage)
    assert image(SM86, TOKEN) == first
    assert fake.compiled == 2
    assert first.file.read_bytes() == whole


def test_a_changed_bit_is_seen(fake: FakeNvrtc) -> None:
    first = image(SM86, TOKEN)
    assert first.file is not None
    whole = bytearray(first.file.read_bytes())
    whole[3] ^= 1
    first.file.write_bytes(whole)
    assert image(SM86, TOKEN) == first
    assert fake.compiled == 2


def test_in_a_folder_that_others_write_to_nothing_is_kept_or_read(fake: FakeNvrtc, cache: Path) -> None:
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    found = image(SM86, TOKEN)
    assert found.code
    assert found.file is None
    assert "written by others" in (found.remark or "")
    assert [*cache.iterdir()] == []


@pytest.mark.parametrize("problem", ["locked", "write"])
def test_in_a_folder_that_cannot_be_written_kernels_are_compiled_for_the_process(
    fake: FakeNvrtc, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    def refused(*_: object) -> Iterator[None]:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build_cache, problem, refused)
    found = image(SM86, TOKEN)
    assert found.code
    assert found.file is None
    assert "Read-only file system" in (found.remark or "")
    assert fake.compiled == 1


def test_on_a_full_disk_nothing_is_left_and_the_kernels_are_there(fake: FakeNvrtc, cache: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        found = image(SM86, TOKEN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.code
    assert "cannot be written" in (found.remark or "")
    assert {file.suffix for file in cache.iterdir()} <= {".lock"}


def test_kept_kernels_are_read_where_nothing_can_be_written(fake: FakeNvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    first = image(SM86, TOKEN)
    monkeypatch.setattr(build_cache, "locked", None)
    assert image(SM86, TOKEN) == first


def test_a_compiler_that_fails_leaves_nothing(fake: FakeNvrtc, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "problem", "out of patience")
    with pytest.raises(BuildError, match="out of patience"):
        image(SM86, TOKEN)
    assert {file.suffix for file in cache.iterdir()} <= {".lock"}


COMPILE = """
import sys, time
from dcomp.kernels.cuda import compile as compiler

class Slow:
    version = (13, 0)
    def architecture(self, target): return "sm_86"
    def compile(self, *_):
        with open(sys.argv[1], "a") as log: log.write("compiled\\n")
        time.sleep(1)
        return b"code"

compiler.nvrtc = Slow
print(compiler.image(compiler.Target((8, 6)), ("quantize_token",)).code)
"""


def test_of_two_processes_one_compiles_and_the_other_waits(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-P", "-c", COMPILE, str(log)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["b'code'\n"] * 2
    assert log.read_text() == "compiled\n"


def test_without_nvrtc_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_candidates", lambda: ["libnvrtc.so.none"])
    found = compiler._opened.__wrapped__()
    assert isinstance(found, BuildError)
    assert "pip install dcomp[cuda]" in str(found)


def test_a_broken_nvrtc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(compiler, "_candidates", lambda: [str(broken), "libnvrtc.so.none"])
    found = compiler._opened.__wrapped__()
    assert isinstance(found, BuildError)
    assert str(broken) in str(found)


def test_torchs_own_nvrtc_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"):
        file = tmp_path / "nvidia" / place
        file.parent.mkdir(parents=True)
        file.touch()
        file.with_name("libnvrtc-builtins.so.1").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for own, first in {None: "13", "12.6": "12", "13.0": "13"}.items():
        monkeypatch.setattr(compiler.torch.version, "cuda", own)
        names = [*compiler._candidates()]
        ours = [name for name in names if name.startswith(str(tmp_path))]
        assert [name.rsplit(".", 1)[1] for name in ours] == [first, "12" if first == "13" else "13"]
        assert names[-2:] in (["libnvrtc.so.13", "libnvrtc.so.12"], ["libnvrtc.so.12", "libnvrtc.so.13"])


def test_ptx_says_no_newer_version_than_the_driver_reads() -> None:
    text = b"//\n.version 9.0\n.target sm_86\n"
    assert compiler._at_most(text, (8, 4)) == text.replace(b"9.0", b"8.4")
    assert compiler._at_most(text, (9, 1)) == text


def test_hints_that_an_old_driver_does_not_know_are_left_out() -> None:
    text = b'.version 9.0\n\t.pragma "nounroll";\n\t.pragma "used_bytes_mask 240";\n\tadd.s32 %r1;\n'
    assert compiler._at_most(text, (8, 2)) == b'.version 8.2\n\t.pragma "nounroll";\n\tadd.s32 %r1;\n'
    assert b"used_bytes_mask" in compiler._at_most(text, (8, 3))


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="there is no ptxas")
@pytest.mark.parametrize(("capability", "isa"), [((8, 0), (7, 0)), ((12, 0), (8, 7))])
@pytest.mark.parametrize("name", ["conv_w4a8_64x64", "linear_w8a8_64x64", "quantize_group"])
def test_ptx_of_the_oldest_version_for_a_device_assembles(
    cache: Path, tmp_path: Path, capability: tuple[int, int], isa: tuple[int, int], name: str
) -> None:
    real_nvrtc()
    source, code = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_bytes(image(Target(capability, isa), part_of(name)).code.rstrip(b"\0"))
    command = ["ptxas", "-arch=sm_{}{}".format(*capability), str(source), "-o", str(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:400]
    assert "{}.{}".format(*isa).encode() in source.read_bytes().split(b".version ")[1][:8]


def test_machine_code_is_of_the_device_or_the_nearest_below_in_its_generation() -> None:
    nvrtc = real_nvrtc()
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)):
        assert nvrtc.architecture(Target(capability)) == "sm_{}{}".format(*capability)
    assert nvrtc.architecture(Target((8, 5))) == "sm_80"
    with pytest.raises(BuildError, match=r"compute capability 99\.x"):
        nvrtc.architecture(Target((99, 0)))
    assert nvrtc.architecture(Target((99, 0), (9, 9))).startswith("compute_1")


def test_nvrtc_says_what_is_wrong() -> None:
    nvrtc = real_nvrtc()
    with pytest.raises(BuildError, match="error: identifier"):
        nvrtc.compile(b"int f() { return missing; }", "sm_86", None)
    with pytest.raises(BuildError, match="invalid value for --gpu-architecture"):
        nvrtc.compile(b"", "sm_1", None)


@pytest.mark.parametrize("name", ["linear_w8a8_64x64", "quantize_sample"])
def test_nvrtc_compiles_the_kernels(cache: Path, name: str) -> None:
    real_nvrtc()
    found = image(SM86, part_of(name))
    assert found.file is not None
    assert found.code.startswith(b"\x7fELF")
    assert all(entry.encode() in found.code for entry in part_of(name))
    text = image(PTX, part_of(name)).code
    assert b".version 8.4" in text
    assert b".target sm_86" in text
    assert text.endswith(b"\0")


def test_processors_never_load_driver_or_compiler() -> None:
    code = (
        "import torch; from dcomp.kernels import dispatch, ops\n"
        "ops.quantize_token(torch.randn(3, 20)); dispatch.explain(['cpu'])\n"
        "print([line for line in open('/proc/self/maps') if 'libcuda.' in line or 'nvrtc' in line])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
