"""NVIDIA's driver: devices, compiled kernels loaded into them, and launches on torch's stream.

The library is opened when a GPU is first asked about. Another with the same functions can stand in for it, and then
kernels run on the memory of CPU tensors.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# What says that code does not suit the device or the driver: invalid image or PTX, no code for the device, a version of
# PTX or a library for it that the driver does not know.
_UNFIT = (200, 209, 218, 222, 223)
_MAJOR, _MINOR = 75, 76  # of cuDeviceGetAttribute: compute capability
_MULTIPROCESSORS = 16
_DYNAMIC_SHARED_MEMORY = 8  # of cuFuncSetAttribute
_WITHOUT_ASKING = 48 * 1024

_stand_in: Any = None


class DriverError(Exception):
    """The driver is not there or refuses something, and why.

    Attributes:
        code: the driver's, or None.
    """

    def __init__(self, problem: str, code: int | None = None) -> None:
        super().__init__(problem)
        self.code = code

    @property
    def is_unfit_code(self) -> bool:
        """Whether the device or this driver takes no such compiled code."""
        return self.code in _UNFIT


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        capability: its compute capability, as (8, 6).
    """

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class Kernel:
    """A kernel that is loaded into a device.

    Attributes:
        threads, shared_memory: of each block that is launched; bytes.
    """

    name: str
    device: int
    threads: int
    shared_memory: int
    handle: ctypes.c_void_p
    context: ctypes.c_void_p


def is_exchanged() -> bool:
    """Whether something stands in for the driver, so that device memory is that of the processor."""
    return _stand_in is not None


@contextmanager
def use(library: Any) -> Iterator[None]:
    """Let a library stand in for the driver within a `with` block, in all threads."""
    global _stand_in
    before, _stand_in = _stand_in, library
    try:
        yield
    finally:
        _stand_in = before


def library() -> Any:
    """Return the library that is used; what is known of its devices is kept by it.

    Raises:
        DriverError: there is no driver.
    """
    return _opened() if _stand_in is None else _stand_in


@functools.cache
def _opened() -> ctypes.CDLL:
    if torch.version.cuda is None:
        raise DriverError("this torch was built without CUDA")
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError("there is no NVIDIA driver (libcuda.so.1)") from error
    code = found.cuInit(0)
    if code:
        raise DriverError(f"the NVIDIA driver does not start ({_text(found, code)})", code)
    return found


def count() -> int:
    """Return the number of devices.

    Raises:
        DriverError: there is no driver.
    """
    found = ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(found))
    return found.value


def version() -> tuple[int, int]:
    """Return the version of CUDA that the driver is of.

    Raises:
        DriverError: there is no driver.
    """
    found = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(found))
    return found.value // 1000, found.value % 1000 // 10


def device(index: int) -> Device:
    """Return what the driver says of a device.

    Raises:
        DriverError: there is no driver, or no such device.
    """
    return _device(library(), index)


@functools.cache
def _device(_: Any, index: int) -> Device:
    handle = _handle(index)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
        return value.value

    name = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", name, len(name), handle)
    capability = attribute(_MAJOR), attribute(_MINOR)
    return Device(index, name.value.decode(errors="replace"), capability, attribute(_MULTIPROCESSORS))


def _handle(index: int) -> ctypes.c_int:
    handle = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), index)
    return handle


@functools.cache
def _context(_: Any, index: int) -> ctypes.c_void_p:
    """Return the context that torch uses of a device; it is never given back."""
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _handle(index))
    return context


@contextmanager
def _current(context: ctypes.c_void_p) -> Iterator[None]:
    """Make a context the thread's own for a while: torch's device may be another, or a new thread have none."""
    _call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Module:
    """Compiled code that is loaded into a device, and stays.

    Raises:
        DriverError: the driver does not take it.
    """

    def __init__(self, code: bytes, index: int) -> None:
        self.device, self._context = index, _context(library(), index)
        self._handle = ctypes.c_void_p()
        with _current(self._context):
            _call("cuModuleLoadData", ctypes.byref(self._handle), code)

    def kernel(self, name: str, threads: int, shared_memory: int) -> Kernel:
        """Return a kernel by its name.

        Args:
            name: as the source has it.
            threads: of its blocks.
            shared_memory: bytes of its blocks.

        Raises:
            DriverError: there is none of this name, or the device has not so much shared memory.
        """
        handle = ctypes.c_void_p()
        with _current(self._context):
            _call("cuModuleGetFunction", ctypes.byref(handle), self._handle, name.encode())
            if shared_memory > _WITHOUT_ASKING:
                _call("cuFuncSetAttribute", handle, _DYNAMIC_SHARED_MEMORY, shared_memory)
        return Kernel(name, self.device, threads, shared_memory, handle, self._context)


def launch(kernel: Kernel, grid: Sequence[int], arguments: ctypes.Structure) -> None:
    """Start a kernel on torch's current stream of its device. Nothing is waited for or allocated.

    Tensors that it reads or writes may be freed right after: torch gives their memory out again on the same stream.

    Args:
        kernel: where to run and what.
        grid: number of blocks, one to three axes, none of them 0.
        arguments: the one struct that it takes.

    Raises:
        DriverError: the driver refuses.
    """
    stream = None if is_exchanged() else torch.cuda.current_stream(kernel.device).cuda_stream
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    shape = (*(*grid, 1, 1)[:3], *(kernel.threads, 1, 1), kernel.shared_memory)
    with _current(kernel.context):
        _call("cuLaunchKernel", kernel.handle, *shape, ctypes.c_void_p(stream), parameters, None)


def torch_device(index: int) -> torch.device:
    """Return where tensors of a device are."""
    return torch.device("cpu") if is_exchanged() else torch.device("cuda", index)


def index_of(device: torch.device) -> int:
    """Return the number of a device; of one without, that of the current one."""
    if device.index is not None:
        return device.index
    return 0 if is_exchanged() or not torch.cuda.is_initialized() else torch.cuda.current_device()


def wait(index: int) -> None:
    """Wait for all that torch's current stream of a device was given."""
    if not is_exchanged():
        torch.cuda.current_stream(index).synchronize()


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph, in which nothing may be waited for."""
    return not is_exchanged() and torch.cuda.is_current_stream_capturing()


def _call(function: str, *arguments: Any) -> None:
    used = library()
    code = getattr(used, function)(*arguments)
    if code:
        raise DriverError(f"{function}: {_text(used, code)}", code)


def _text(used: Any, code: int) -> str:
    text = ctypes.c_char_p()
    used.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode(errors='replace')}, {code}"
