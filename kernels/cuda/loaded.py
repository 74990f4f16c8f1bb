"""The kernels that are loaded into each device, compiled when they are first asked for."""

import functools
from typing import Any

from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as compiler
from dcomp.kernels.cuda import driver
from dcomp.kernels.cuda.compile import Image, Target
from dcomp.kernels.cuda.driver import DriverError, Module

OLDEST = (8, 0)  # compute capability: int8 products of this shape came with it


def defect(index: int) -> str | None:
    """Say why no kernel can run on a device, or None. What is wrong with a single kernel is not asked here."""
    try:
        return _defect(driver.library(), index)
    except DriverError as error:
        return str(error)


@functools.cache
def _defect(_: Any, index: int) -> str | None:
    try:
        device = driver.device(index)
        if device.capability < OLDEST:
            found, needed = ("{}.{}".format(*capability) for capability in (device.capability, OLDEST))
            return f"{device.name} has compute capability {found}, and kernels need {needed}"
        compiler.nvrtc()
    except (DriverError, BuildError) as error:
        return str(error)
    return None


def module(kernel: str, index: int) -> tuple[Module, Image]:
    """Return what holds a kernel of a device, with what was loaded.

    Raises:
        BuildError: it cannot be compiled, or the driver does not take it; and why.
    """
    try:
        return _module(driver.library(), compiler.part_of(kernel), index)
    except DriverError as error:
        raise BuildError(f"the driver does not load it ({error})") from error


@functools.cache
def _module(_: Any, part: tuple[str, ...], index: int) -> tuple[Module, Image]:
    capability = driver.device(index).capability
    unfit: Exception
    try:
        image = compiler.image(Target(capability), part)
        return Module(image.code, index), image
    except BuildError as error:  # no machine code for a device that is newer than the compiler
        unfit = error
    except DriverError as error:
        if not error.is_unfit_code:
            raise
        unfit = error
    # A driver that is older than the compiler takes PTX, which it compiles itself.
    image = compiler.image(Target(capability, isa_of(driver.version())), part)
    try:
        return Module(image.code, index), image
    except DriverError as error:
        raise BuildError(f"the driver loads neither machine code ({unfit}) nor PTX ({error})") from error


def isa_of(cuda: tuple[int, int]) -> tuple[int, int]:
    """Return the newest version of PTX that a driver of some version of CUDA reads.

    Source:
        Release notes of the PTX manual; Triton's `ptx_get_version` has the same.
    """
    major, minor = cuda
    if major >= 13:
        return major - 4, minor
    if major == 12:
        return 8, minor if minor < 6 else minor - 1
    return major - 4, minor
