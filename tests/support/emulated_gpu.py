"""A GPU for tests: the launcher that ships, with the emulator in the place of NVIDIA's driver, on CPU tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from dcomp.kernels.cuda import calls, driver, loaded
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
        mock.patch.object(calls, "_address", allowed),
    ):
        yield
    library.emulator_forget()
