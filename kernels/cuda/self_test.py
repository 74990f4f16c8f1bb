"""A kernel is trusted on a device once it has given exact results there.

Nobody can test kernels on all GPUs. So each is run at its first use, on the small shapes of `exact_cases`. One that
fails is not used, which is said once; one that passes is not tested again with the same code, driver and device.
"""

import hashlib
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from dcomp.kernels import build_cache
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import driver, exact_cases, loaded
from dcomp.kernels.cuda.compile import Image
from dcomp.kernels.cuda.driver import DriverError, Kernel
from dcomp.kernels.cuda.tiles import ENTRIES

_BEGUN, _PASSED = b"begun", b"passed"
_BEFORE = {
    "quantize_sample": ("sample_range",),
    "quantize_group": ("group_peak",),
    "key_value_tiles": ("key_value_moments",),
    "group_norm_static": ("group_norm_moments",),
    "group_norm_sample": ("group_norm_moments", "group_norm_range"),
}
_lock = threading.RLock()


class UnusableError(Exception):
    """A kernel that is not used on a device, and why."""


def kernels(name: str, index: int) -> tuple[Kernel, ...]:
    """Return a kernel of a device that is right there, after those that must run before it.

    Raises:
        UnusableError: it is not right, or is not there; or it was not tested yet, and a CUDA graph is being recorded.
    """
    if driver.is_capturing() and not is_known(name, index):
        raise UnusableError("it cannot be tested while a CUDA graph is recorded")
    found = _found(driver.library(), name, index)
    if isinstance(found, str):
        raise UnusableError(found)
    return found


def defect(name: str, index: int) -> str | None:
    """Say why a kernel is not used on a device, or None."""
    try:
        kernels(name, index)
    except UnusableError as error:
        return str(error)
    return None


def is_known(name: str, index: int) -> bool:
    """Whether it is known of a kernel if it can be used, without compiling or running anything."""
    return (driver.library(), name, index) in _states


def known(index: int) -> dict[str, str | None]:
    """Return what is wrong with each kernel of a device that was tried so far, or None where it is right."""
    used = driver.library()
    found = {name: state for (library, name, number), state in _states.items() if (library, number) == (used, index)}
    return {name: state if isinstance(state, str) else None for name, state in found.items()}


_Found = tuple[Kernel, ...] | str
_states: dict[tuple[Any, str, int], _Found] = {}


def _found(library: Any, name: str, index: int) -> _Found:
    state = (library, name, index)
    if state not in _states:
        with _lock:
            if state not in _states:
                _states[state] = _tried(name, index)
    return _states[state]


def _tried(name: str, index: int) -> _Found:
    """Load a kernel and test it; say what is wrong otherwise."""
    try:
        module, image = loaded.module(name, index)
        entries = (ENTRIES[entry] for entry in (*_BEFORE.get(name, ()), name))
        found = tuple(module.kernel(entry.name, entry.threads, entry.shared_memory) for entry in entries)
    except (BuildError, DriverError) as error:
        return str(error)
    problem = _tested(name, index, found, image)
    if problem is None:
        return found
    warnings.warn(f"dcomp does not use its CUDA kernel {name} on {driver.device(index).name}: {problem}", stacklevel=2)
    return problem


def _tested(name: str, index: int, found: tuple[Kernel, ...], image: Image) -> str | None:
    """Say what is wrong with a kernel, or None; a pass is kept beside the compiled code."""
    if image.file is None:
        return _test(name, index, found)
    device, version = driver.device(index), driver.version()
    key = hashlib.sha256(repr((name, image.file.name, version, device.name)).encode()).hexdigest()[:16]
    file = image.file.with_name(f"{name}-{key}.tested")
    if _content(file) == _PASSED:
        return None
    try:
        with build_cache.locked(file):
            before = _content(file)
            if before == _PASSED:
                return None
            if before == _BEGUN:  # by a process that did not live to say how it ended
                return f"a process died in its self-test; delete {file} to have it tested again"
            _write(file, _BEGUN)
            left = None
            try:
                problem = _test(name, index, found)
                left = _PASSED if problem is None else None if _is_alive(index) else _BEGUN
            finally:
                _write(file, left)
            return problem
    except OSError:  # a folder that cannot be written keeps nothing
        return _test(name, index, found)


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink(missing_ok=True)
    else:
        build_cache.write(file, lambda unfinished: unfinished.write_bytes(content))


def _is_alive(index: int) -> bool:
    """Whether a device still works for this process; a kernel that touches wrong memory ends that."""
    try:
        return bool(torch.ones(1, device=driver.torch_device(index)).item())
    except RuntimeError:
        return False


def _test(name: str, index: int, found: tuple[Kernel, ...]) -> str | None:
    """Say in which case a kernel is not exact, or None."""
    device = driver.torch_device(index)
    try:
        with torch.no_grad():
            for case in range(exact_cases.COUNT):
                pairs = exact_cases.results(name, found, case, device)
                if not all(torch.equal(result.cpu(), expected) for result, expected in pairs):
                    return f"it failed its self-test (case {case + 1} of {exact_cases.COUNT})"
    except (DriverError, RuntimeError) as error:
        return f"it failed its self-test ({str(error).splitlines()[0]})"
    return None
