"""A kernel started with tensors: checked, aligned, the struct filled in."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dcomp.kernels.cuda import driver
from dcomp.kernels.cuda.driver import Kernel

MOST_ROWS_OF_BLOCKS = 65535  # of a grid, along its second axis
_ELEMENTS = 16  # that a thread of a quantizer has at least, if there are so many


def launch(
    kernel: Kernel, grid: tuple[int, ...], struct: type[Any], tensors: Mapping[str, Tensor | None], **sizes: float
) -> None:
    """Start a kernel; `tensors` and `sizes` are the fields of its struct.

    Raises:
        RuntimeError: for tensors of several devices.
    """
    devices = {tensor.device for tensor in tensors.values() if tensor is not None}
    if len(devices) > 1:  # a kernel that reads memory of another device takes the whole process down
        raise RuntimeError(f"Tensors of one operation lie on {' and '.join(sorted(map(str, devices)))}")
    # Kernels load 16 bytes at once; a view may begin anywhere. What they write was made for them, and is aligned.
    aligned = {name: t.clone() if t is not None and t.data_ptr() % 16 else t for name, t in tensors.items()}
    pointers = {name: None if tensor is None else _address(tensor) for name, tensor in aligned.items()}
    driver.launch(kernel, grid, struct(**pointers, **sizes))


def blocks_for(kernel: Kernel, elements: int) -> int:
    """Return how many blocks share elements: enough for the device, none of them idle."""
    enough = 8 * driver.device(kernel.device).multiprocessors
    return max(1, min(enough, -(-elements // (kernel.threads * _ELEMENTS))))


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()
