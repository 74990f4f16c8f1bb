"""Build the C++ library on this machine, once for each version of sources, torch and compiler.

Only g++ (or another compiler that `CXX` names) and the headers that torch carries are needed; it takes seconds. The
sources of kernels are compiled for each instruction set that the compiler knows, and which one runs is chosen when the
library is loaded.
"""

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dcomp.kernels import build_cache
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.compiler import compiler, run

_SOURCES = Path(__file__).parent
_STABLE_ABI = "0x020a000000000000"  # of torch 2.10, the oldest that dcomp takes
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-fwrapv", "-ffp-contract=off", "-Wno-psabi")
_AVX512 = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_OF_X86 = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}


def library_file() -> Path:
    """Return the library for this machine, built now if it is not there yet.

    Raises:
        BuildError: there is no compiler, it fails, or there is no folder of the user's own to keep the result in.
    """
    command = compiler()
    file = build_cache.folder() / f"native-{_key(command)}.so"
    if not file.is_file():
        try:
            with build_cache.locked(file):
                if not file.is_file():
                    build_cache.write(file, lambda unfinished: _build(command, unfinished))
        except OSError as error:
            raise BuildError(f"the folder of built kernels cannot be written ({error})") from error
    return file


def _key(compiler: list[str]) -> str:
    """Return what decides the bytes of the library, as a hash."""
    version = run([*compiler, "--version"])
    digest = hashlib.sha256(repr((compiler, version, torch.__version__, _commands(compiler, _sets()))).encode())
    for source in sorted(_SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _commands(compiler: list[str], sets: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Return the command that compiles each object, by its name; the output is not part of it."""
    torchs = [f"-DTORCH_TARGET_VERSION={_STABLE_ABI}", "-isystem", str(Path(torch.__file__).parent / "include")]
    commands = {file.stem: [*torchs, "-c", str(file)] for file in sorted(_SOURCES.glob("ops_*.cpp"))}
    there = [f"-DDCOMP_HAS_{name.upper()}" for name in sets]
    commands["instruction_set"] = [*there, "-c", str(_SOURCES / "instruction_set.cpp")]
    for name, flags in {"generic": (), **sets}.items():
        commands[name] = [f"-DDCOMP_ISA={name}", *flags, "-c", str(_SOURCES / "isa.cpp")]
    return {name: [*compiler, *_OPTIONS, *words] for name, words in commands.items()}


def _sets() -> dict[str, tuple[str, ...]]:
    """Return the instruction sets of this kind of processor, beside the generic one, with their flags."""
    return _OF_X86 if platform.machine().lower() in ("x86_64", "amd64") else {}


def _is_known(compiler: list[str], flags: tuple[str, ...]) -> bool:
    try:
        run([*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull])
    except BuildError:
        return False
    return True


def _build(compiler: list[str], library: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    commands = _commands(compiler, {name: flags for name, flags in _sets().items() if _is_known(compiler, flags)})
    objects = [str(library.with_name(f"{name}.o")) for name in commands]
    with ThreadPoolExecutor() as pool:
        made = pool.map(run, ([*words, "-o", out] for words, out in zip(commands.values(), objects, strict=True)))
        for _ in made:  # raises what went wrong
            pass
    run([*compiler, "-shared", *objects, "-o", str(library), f"-L{libraries}", "-ltorch_cpu", "-lc10"])
