"""Kernels in the emulator: each is launched as the host launches it, on CPU tensors, and touches nothing else."""

import ctypes
import functools
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcomp.kernels import build_cache
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.tiles import ENTRIES
from dcomp.kernels.emulator.build import library_file

SEEDS = (0, 1, 2)  # orders of warps


def seed_of(test: str) -> int:
    """Return the order of warps for a test: a kernel has so many tests that it sees all of them."""
    return SEEDS[zlib.crc32(test.encode()) % len(SEEDS)]


class EmulatorError(Exception):
    """What the emulator found."""


class Emulator:
    """A built library."""

    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_count_names.restype = ctypes.c_char_p
        self.library.emulator_layout.restype = ctypes.c_char_p
        self.library.emulator_allow.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def seed(self, seed: int) -> None:
        """Choose the order of warps."""
        self.library.emulator_seed(seed)

    def counts(self) -> dict[str, int]:
        """Return what was counted since the last call."""
        names = self.library.emulator_count_names().decode().split()
        numbers = (ctypes.c_uint64 * len(names))()
        self.library.emulator_counts(numbers)
        return dict(zip(names, numbers, strict=True))

    def launch(self, name: str, grid: tuple[int, int], kind: Any, **fields: Any) -> None:
        """Run a kernel as the table of entry points says; otherwise like `run`."""
        self.run(name, grid, ENTRIES[name].threads, ENTRIES[name].shared_memory, kind, **fields)

    def run(self, name: str, grid: tuple[int, int], threads: int, shared_memory: int, kind: Any, **fields: Any) -> None:
        """Run a kernel.

        Args:
            name: of the entry point.
            grid: columns and rows of blocks.
            threads: of a block.
            shared_memory: bytes of a block.
            kind: struct that the kernel takes.
            fields: what is in it; tensors are the memory that the kernel may touch.

        Raises:
            EmulatorError: the launch is refused, or the kernel fails.
        """
        tensors = [value for value in fields.values() if isinstance(value, Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors)
        self.library.emulator_forget()
        for tensor in tensors:
            self.library.emulator_allow(tensor.data_ptr(), tensor.nbytes)
        given = {key: value.data_ptr() if isinstance(value, Tensor) else value for key, value in fields.items()}
        arguments = kind(**given)
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), None, name.encode())
        self._call("cuFuncSetAttribute", function, 8, shared_memory)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        shape = (*grid, 1, threads, 1, 1, shared_memory)
        self._call("cuLaunchKernel", function, *shape, None, parameters, None)

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            raise EmulatorError(f"{self.library.emulator_error().decode()} ({code})")


@functools.cache
def emulator() -> Emulator:
    """Return the emulator with all kernels."""
    return Emulator(library_file(build_cache.folder()))


def grid_of(name: str, rows: int, columns: int) -> tuple[int, int]:
    """Return how many tiles of a kernel lie beside and below each other."""
    entry = ENTRIES[name]
    return -(-columns // entry.columns), -(-rows // entry.rows)


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory in which an element that was not written shows."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 99).to(dtype)


def type_of(tensor: Tensor) -> int:
    """Return the number that kernels know a float type by."""
    return FLOAT_TYPE[tensor.dtype]


def of_all_workers(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the workers of a run of tests share."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
