"""A GPU for tests: the launcher that ships, with the emulator in the place of NVIDIA's driver, on CPU tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dcomp.kernels import dispatch
from dcomp.kernels.cuda import driver, loaded
from dcomp.kernels.cuda.calls import launch
from dcomp.kernels.cuda.compile import Image
from tests.support.emulated import emulator


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Let the emulator run all launches, and let it say where they leave the memory of their tensors.

    Raises:
        BuildError: there is no C++ compiler.
    """
    library = emulator().library

    def allowed(tensor: Tensor) -> int:
        library.emulator_allow(tensor.data_ptr(), tensor.nbytes)
        return tensor.data_ptr()

    library.emulator_forget()
    library.emulator_seed(0)
    with (
        driver.use(library),
        mock.patch.object(loaded.compiler, "nvrtc"),
        mock.patch.object(loaded.compiler, "image", return_value=Image(b"", "sm_86")),
        mock.patch.object(launch, "_address", allowed),
    ):
        yield
    library.emulator_forget()


@contextmanager
def layers_on_the_emulated_gpu() -> Iterator[list[tuple[str, str]]]:
    """Let operations take CPU tensors for those of the emulated GPU.

    Yields:
        Operation and row of each choice that is made, as they come.
    """
    choose, chosen = dispatch.choose, []

    def choose_for_gpu(operation: str, *, device: Any, **asked: Any) -> Any:
        choice = choose(operation, device="cuda", **asked)
        chosen.append((operation, choice.row))
        return choice

    dispatch._choose.cache_clear()
    with (
        emulated_gpu(),
        mock.patch.object(dispatch, "choose", choose_for_gpu),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True)),
    ):
        yield chosen
    dispatch._choose.cache_clear()
