"""A kernel that is not right is found at its first use and left alone, once and with a reason."""

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcomp.kernels import dispatch
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import driver, loaded, rows, self_test
from dcomp.kernels.cuda.arguments import LinearArguments
from dcomp.kernels.cuda.calls import launch
from dcomp.kernels.cuda.compile import Image
from dcomp.kernels.cuda.tiles import ENTRIES
from tests.support.emulated import emulator

NORMS = ("group_norm", "layer_norm")
FIRST_PASSES = ("sample_range", "group_peak", "key_value_moments")


class Driver:
    """The emulator with a fault of some kind in its launches.

    Attributes:
        fault: None, "wrong" for a kernel that leaves half of a sum out, or "broken" for one that fails.
        launches: how many there were.
        cuda: version of the driver.
    """

    def __init__(self, fault: str | None = None) -> None:
        self.fault, self.launches, self.cuda = fault, 0, 13000
        self._library = emulator().library
        self._library.emulator_forget()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.cuda
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        self.launches += 1
        if self.fault == "wrong":
            LinearArguments.from_address(rest[8][0]).depth //= 2
        if self.fault == "broken":
            return 719
        if isinstance(self.fault, BaseException):
            raise self.fault
        return int(self._library.cuLaunchKernel(function, *rest))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let all kernels be compiled to a file of this folder."""
    file = tmp_path / "code.cubin"
    monkeypatch.setattr(loaded.compiler, "nvrtc", lambda: None)
    monkeypatch.setattr(loaded.compiler, "image", lambda *_: Image(b"", "sm_86", file))
    try:
        emulator()
    except BuildError as error:
        pytest.skip(str(error))
    dispatch._choose.cache_clear()
    yield tmp_path
    dispatch._choose.cache_clear()


def results(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.tested"))]


@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in FIRST_PASSES and not n.startswith(NORMS)])
def test_right_kernels_pass_and_are_not_tested_again(name: str, kept: Path) -> None:
    first = Driver()
    with driver.use(first):
        assert self_test.defect(name, 0) is None
        assert self_test.is_known(name, 0)
    passes = 2 if name in ("quantize_sample", "quantize_group", "key_value_tiles") else 1
    assert first.launches == 3 * passes
    assert results(kept) == [b"passed"]
    again = Driver()  # as another process
    with driver.use(again):
        assert not self_test.is_known(name, 0)
        assert self_test.defect(name, 0) is None
    assert again.launches == 0
    assert {file.suffix for file in kept.iterdir()} == {".tested", ".lock"}


def test_another_driver_and_another_kernel_are_tested_for_themselves(kept: Path) -> None:
    with driver.use(Driver()):
        assert self_test.defect("linear_w8a8_64x64", 0) is None
        assert self_test.defect("linear_w4a8_64x64", 0) is None
    newer = Driver()
    newer.cuda = 13010
    with driver.use(newer):
        assert self_test.defect("linear_w8a8_64x64", 0) is None
    assert newer.launches == 3
    assert results(kept) == [b"passed"] * 3


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_kernel_that_is_not_right_is_left_alone_with_one_warning(fault: str, kept: Path) -> None:
    bad = Driver(fault)
    with driver.use(bad):
        with pytest.warns(UserWarning, match="does not use its CUDA kernel linear_w8a8_64x64 on emulator") as said:
            choice = dispatch.choose("linear_a8", device="cuda")
        assert len(said) == 1
        launches = bad.launches
        assert choice.row == "emulated"
        assert "CUDA kernel linear_w8a8_64x64: it failed its self-test (" in choice.reason
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dispatch._choose.cache_clear()
            assert dispatch.choose("linear_a8", device="cuda") == choice
        assert bad.launches == launches
        bad.fault = None
        assert dispatch.choose("conv2d_a8", device="cuda").row == "cuda"
    assert results(kept) == [b"passed"]
    with driver.use(Driver()):  # as another process: there it may be right
        assert self_test.defect("linear_w8a8_64x64", 0) is None


def test_larger_tiles_fail_alone() -> None:
    bad = Driver()
    q, scale = torch.ones(300, 64, dtype=torch.int8), torch.ones(300)
    stored = rows.Stored(torch.ones(200, 64, dtype=torch.int8), None)
    with driver.use(bad):
        assert dispatch.choose("linear_a8", device="cuda").row == "cuda"
        bad.fault = "wrong"
        with pytest.warns(UserWarning, match="linear_w8a8_128x128"):
            assert self_test.defect("linear_w8a8_128x128", 0) is not None
        bad.fault = None
        y = rows.linear_a8(q, scale, stored, torch.ones(200), None)
    assert torch.equal(y, torch.full((300, 200), 64.0))


def test_a_test_that_is_interrupted_is_taken_up_again(kept: Path) -> None:
    stopped = Driver()
    stopped.fault = KeyboardInterrupt()  # type: ignore[assignment]
    with driver.use(stopped):
        with pytest.raises(KeyboardInterrupt):
            self_test.defect("quantize_token", 0)
        assert results(kept) == []
        stopped.fault = None
        assert self_test.defect("quantize_token", 0) is None


def test_a_kernel_that_broke_the_device_is_not_tried_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_is_alive", lambda _: False)
    with driver.use(Driver("broken")), pytest.warns(UserWarning, match="quantize_token"):
        assert self_test.defect("quantize_token", 0) is not None
    assert results(kept) == [b"begun"]
    later = Driver()
    with driver.use(later), pytest.warns(UserWarning, match="a process died in its self-test; delete"):
        assert "a process died in its self-test; delete" in (self_test.defect("quantize_token", 0) or "")
    assert later.launches == 0
    next(kept.glob("*.tested")).unlink()
    with driver.use(Driver()):
        assert self_test.defect("quantize_token", 0) is None


DIES = """
import os, sys
from pathlib import Path
from dcomp.kernels.cuda import driver, loaded, self_test
from dcomp.kernels.cuda.compile import Image
from tests.support.emulated import emulator

class Deadly:
    def __getattr__(self, name):
        return getattr(emulator().library, name)
    def cuLaunchKernel(self, *_):
        os._exit(9)

loaded.compiler.nvrtc = lambda: None
loaded.compiler.image = lambda *_: Image(b"", "sm_86", Path(sys.argv[1]))
with driver.use(Deadly()):
    self_test.defect("quantize_token", 0)
"""


def test_a_kernel_that_killed_a_process_is_not_tried_again(kept: Path) -> None:
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", "-c", DIES, str(kept / "code.cubin")]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    later = Driver()
    with driver.use(later), pytest.warns(UserWarning, match="a process died"):
        assert self_test.defect("quantize_token", 0) is not None
    assert later.launches == 0


def test_where_nothing_can_be_kept_kernels_are_tested_in_each_process(
    monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    (kept / "file").touch()
    for file in (None, kept / "file" / "code.cubin"):
        monkeypatch.setattr(loaded.compiler, "image", lambda *_, file=file: Image(b"", "sm_86", file, "no room"))
        for _ in range(2):
            fresh = Driver()
            with driver.use(fresh):
                assert self_test.defect("quantize_token", 0) is None
                assert "compiled for this process alone, because no room" in rows.remark("quantize_token", 8, 0)
            assert fresh.launches == 3


def test_a_kernel_that_the_code_lacks_is_a_reason() -> None:
    class Lacking(Driver):
        def cuModuleGetFunction(self, *_: Any) -> int:  # noqa: N802
            return 500

    with driver.use(Lacking()):
        assert "cuModuleGetFunction" in (self_test.defect("quantize_token", 0) or "")


def test_memory_that_a_kernel_must_not_touch_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end to end tests see an access beyond a tensor: here one element of the output is not allowed."""
    fresh = Driver()

    def one_less(tensor: torch.Tensor) -> int:
        fresh.emulator_allow(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes - 1))
        return tensor.data_ptr()

    monkeypatch.setattr(launch, "_address", one_less)
    with driver.use(fresh), pytest.warns(UserWarning, match="outside all buffers"):
        assert self_test.defect("quantize_token", 0) is not None
    fresh.emulator_forget()
