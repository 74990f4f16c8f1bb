"""Compile the CUDA sources with the emulator: a library with the functions of NVIDIA's driver, for tests.

No GPU, no CUDA toolkit and no header of either is needed, only g++ or another compiler that `CXX` names.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dcomp.kernels import build_cache
from dcomp.kernels.compiler import compiler, run

KERNELS = Path(__file__).parents[1]
FOLDERS = ("cuda", "emulator")
_OPTIONS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fwrapv",
    "-ffp-contract=off",  # floats round as the primitives say
    "-fno-gnu-unique",  # two libraries in a process share nothing
    "-U_FORTIFY_SOURCE",  # it takes a jump to another fiber's stack for an error
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DDCOMP_EMULATOR",
)


def library_file(folder: Path, *, kernels: Path = KERNELS, entries: Sequence[str] = (), optimize: str = "-O2") -> Path:
    """Return the library, compiled now if the folder has none of these sources and options.

    Args:
        folder: of libraries, their names hold a hash.
        kernels: folder with `cuda/` and `emulator/`.
        entries: pairs of name and kernel, as "linear_w8a8_64x64, LinearW8A8<Tile64x64<3>>", to leave all others out.
        optimize: option of the compiler.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    cxx = compiler()
    listed = " ".join(f"ENTRY({entry})" for entry in entries)
    command = [*cxx, *_OPTIONS, optimize, *([f"-DDCOMP_ENTRIES(ENTRY)={listed}"] if entries else [])]
    digest = hashlib.sha256(repr((run([*cxx, "--version"]), command)).encode())
    for name in FOLDERS:
        for file in sorted((kernels / name).glob("*.[ch]*")):
            digest.update(file.name.encode() + file.read_bytes())
    source = str(kernels / "emulator" / "driver.cpp")  # copies of it elsewhere make the same library
    library = folder / f"emulator-{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        with build_cache.locked(library):
            if not library.is_file():
                build_cache.write(library, lambda unfinished: run([*command, source, "-o", str(unfinished)]))
    return library
