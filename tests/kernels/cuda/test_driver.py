"""Devices, loading and launches, with a driver that does as it is told: what it gets, and what becomes of refusals."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dcomp.kernels import dispatch
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as compiler
from dcomp.kernels.cuda import driver, loaded
from dcomp.kernels.cuda.arguments import QuantizeStaticArguments
from dcomp.kernels.cuda.driver import DriverError, Module
from tests.support.fake_cuda import FakeDriver, FakeNvrtc


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture(autouse=True)
def nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvrtc:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = FakeNvrtc()
    monkeypatch.setattr(compiler, "nvrtc", lambda: made)
    return made


def refused(reason: str) -> None:
    """Check that products on a GPU are emulated, for a reason."""
    choice = dispatch.choose("linear_a8", device="cuda")
    assert choice.row == "emulated"
    assert reason in choice.reason
    with dispatch.use_backend("cuda"), pytest.raises(dispatch.KernelError, match="cannot run linear_a8"):
        dispatch.choose("linear_a8", device="cuda")


def test_a_torch_without_cuda_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(driver, "_opened", driver._opened.__wrapped__)
    refused("this torch was built without CUDA; exact integers in float64")


def test_a_missing_driver_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver, "_opened", driver._opened.__wrapped__)
    monkeypatch.setattr(driver.ctypes, "CDLL", absent)
    refused("there is no NVIDIA driver (libcuda.so.1)")


def test_a_driver_without_devices_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDevice(FakeDriver):
        def cuInit(self, _: int) -> int:  # noqa: N802
            return 100

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(driver, "_opened", driver._opened.__wrapped__)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: NoDevice())
    refused("the NVIDIA driver does not start (no CUDA-capable device is detected, 100)")


def test_a_missing_compiler_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise BuildError("there is no NVRTC")

    monkeypatch.setattr(compiler, "nvrtc", missing)
    with driver.use(FakeDriver()):
        refused("there is no NVRTC")


def test_a_compiler_that_fails_is_the_reason(nvrtc: FakeNvrtc) -> None:
    nvrtc.problem = "NVRTC failed (out of patience)"
    with driver.use(FakeDriver()):
        refused("NVRTC failed (out of patience)")


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_old_devices_are_refused(capability: tuple[int, int], nvrtc: FakeNvrtc) -> None:
    with driver.use(FakeDriver(capability)):
        refused("Fake 0 has compute capability {}.{}, and kernels need 8.0".format(*capability))
    assert nvrtc.compiled == 0


def test_a_device_is_described_by_the_driver() -> None:
    with driver.use(FakeDriver((9, 0), cuda=12040, devices=2)):
        assert driver.count() == 2
        assert driver.version() == (12, 4)
        assert driver.device(1) == driver.Device(1, "Fake 1", (9, 0), 4)
        with pytest.raises(DriverError, match="cuDeviceGet: unknown error, 101"):
            driver.device(2)


def test_the_stand_in_is_gone_after_its_block() -> None:
    with driver.use(FakeDriver()):
        assert driver.is_exchanged()
        assert driver.torch_device(0) == torch.device("cpu")
    assert not driver.is_exchanged()
    assert driver.torch_device(1) == torch.device("cuda:1")


def test_a_launch_is_in_the_devices_own_context_with_one_struct() -> None:
    fake = FakeDriver(devices=2)
    with driver.use(fake):
        kernel = Module(b"code", 1).kernel("some_kernel", 96, 1024)
        arguments = QuantizeStaticArguments(count=7)
        driver.launch(kernel, (3,), arguments)
        driver.launch(kernel, (3, 2), arguments)
    assert fake.launches == [
        ("some_kernel", (3, 1, 1), (96, 1, 1), 1024, 1001),
        ("some_kernel", (3, 2, 1), (96, 1, 1), 1024, 1001),
    ]
    assert fake.contexts == [None]


def test_what_the_driver_refuses_leaves_the_context_of_the_thread_alone() -> None:
    fake = FakeDriver()
    with driver.use(fake):
        kernel = Module(b"code", 0).kernel("some_kernel", 32, 0)
        fake.refusals[b"launch"] = 100
        with pytest.raises(DriverError, match="cuLaunchKernel: no CUDA-capable device is detected, 100"):
            driver.launch(kernel, (1,), QuantizeStaticArguments())
        fake.refusals[b"code"] = 209
        with pytest.raises(DriverError, match="cuModuleLoadData"):
            Module(b"code", 0)
    assert fake.contexts == [None]


def test_only_much_shared_memory_is_asked_for() -> None:
    fake = FakeDriver()
    with driver.use(fake):
        module = Module(b"code", 0)
        module.kernel("small", 32, 48 * 1024)
        module.kernel("large", 32, 48 * 1024 + 16)
    assert fake.attributes == [(8, 48 * 1024 + 16)]


def test_the_kernels_parameters_are_a_pointer_to_the_struct() -> None:
    seen = []

    class Reading(FakeDriver):
        def cuLaunchKernel(self, function: object, *rest: object) -> int:  # noqa: N802
            parameters = rest[8]
            address = parameters[0]  # type: ignore[index]
            seen.append(QuantizeStaticArguments.from_address(address).count)
            return 0

    with driver.use(Reading()):
        driver.launch(Module(b"", 0).kernel("k", 32, 0), (1,), QuantizeStaticArguments(count=12345))
    assert seen == [12345]


def test_code_is_loaded_once_for_each_device(nvrtc: FakeNvrtc) -> None:
    fake = FakeDriver(devices=2)
    with driver.use(fake):
        for _ in range(2):
            for index in (0, 1):
                module, image = loaded.module("quantize_token", index)
                assert module.device == index
                assert image.architecture == "sm_86"
        assert loaded.module("sample_range", 0)[0] is loaded.module("quantize_sample", 0)[0]
        assert loaded.module("linear_w8a8_64x64", 0)[0] is not loaded.module("quantize_token", 0)[0]
    assert len(fake.loaded) == 4
    assert nvrtc.compiled == 3


@pytest.mark.parametrize("code", [200, 209, 218, 222, 223])
def test_a_driver_that_is_older_than_the_compiler_gets_ptx_of_its_age(code: int) -> None:
    fake = FakeDriver(cuda=12040)
    fake.refusals[b"sm_"] = code
    with driver.use(fake):
        image = loaded.module("quantize_token", 0)[1]
    assert image.architecture == "compute_86"
    assert fake.loaded[0].startswith(b"compute_86 (8, 4)")


def test_a_device_that_is_newer_than_the_compiler_gets_ptx() -> None:
    fake = FakeDriver((13, 0))
    with driver.use(fake):
        assert loaded.module("quantize_token", 0)[1].architecture == "compute_120"
    assert fake.loaded[0].startswith(b"compute_120 (9, 0)")


def test_a_driver_that_takes_neither_is_the_reason() -> None:
    fake = FakeDriver()
    fake.refusals = {b"sm_": 209, b"compute_": 222}
    with driver.use(fake):
        refused("no kernel image is available, 209) nor PTX (cuModuleLoadData: unsupported toolchain, 222)")


def test_a_driver_without_memory_is_not_asked_for_more() -> None:
    fake = FakeDriver()
    fake.refusals = {b"sm_": 2}
    with driver.use(fake):
        refused("the driver does not load it (cuModuleLoadData: unknown error, 2)")
    assert fake.loaded == []


@pytest.mark.parametrize(
    ("cuda", "isa"),
    [((11, 8), (7, 8)), ((12, 0), (8, 0)), ((12, 5), (8, 5)), ((12, 6), (8, 5)), ((12, 8), (8, 7)), ((13, 0), (9, 0))],
)
def test_drivers_read_the_ptx_of_their_version(cuda: tuple[int, int], isa: tuple[int, int]) -> None:
    assert loaded.isa_of(cuda) == isa


def test_the_number_of_a_device_is_known_without_cuda() -> None:
    assert driver.index_of(torch.device("cuda:3")) == 3
    assert driver.index_of(torch.device("cuda")) == 0


def test_real_driver_functions_would_get_whole_pointers() -> None:
    """A pointer that ctypes takes for a C int would lose its upper half."""
    fake = FakeDriver()
    given: list[object] = []

    class Noting:
        def __getattr__(self, name: str) -> object:
            function = getattr(fake, name)

            def noting(*arguments: object) -> int:
                given.extend(arguments)
                return int(function(*arguments))

            return noting

    with driver.use(Noting()):
        driver.launch(Module(b"code", 0).kernel("k", 32, 0), (1,), QuantizeStaticArguments())
    whole = (ctypes._SimpleCData, ctypes.Array, bytes, type(ctypes.byref(ctypes.c_int())), type(None))
    assert all(isinstance(argument, whole) or (isinstance(argument, int) and argument < 2**31) for argument in given)
    assert len(given) > 10
