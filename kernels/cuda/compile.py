"""Compile CUDA kernels for one kind of GPU, once for each version of sources and compiler, with NVRTC alone.

NVRTC is NVIDIA's compiler as a library: no toolkit, no headers and no other compiler are needed. It comes with torch's
own CUDA packages or with `dcomp[cuda]`, and is opened when a kernel is first wanted for a GPU. A product in tiles takes
seconds to compile, so each is compiled by itself when it is first used.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dcomp.kernels import build_cache
from dcomp.kernels.build_cache import BuildError

_SOURCES = Path(__file__).parent
_MAIN = "kernels.cu"
# Floats must round as in `qparams`, whose operations are not contracted. NVRTC takes generic lambdas of device
# functions for functions of the host unless it is told that there are none.
_OPTIONS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space")
_OLDEST = 12  # NVRTC of CUDA; older ones do not know some architectures' way to say `sm_`
_DIGEST = hashlib.sha256().digest_size
_ENTRY = re.compile(r"^ *ENTRY\((\w+), (.+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """What code is made for.

    Attributes:
        capability: of the device, as (8, 6).
        isa: None for machine code; a version of PTX, as (8, 4), for code that the driver compiles.
    """

    capability: tuple[int, int]
    isa: tuple[int, int] | None = None


@dataclass(frozen=True)
class Image:
    """Compiled kernels.

    Attributes:
        code: what `cuModuleLoadData` takes; PTX ends with a zero byte.
        architecture: what it is for, as "sm_86", or "compute_86" for PTX.
        file: where it is kept, or None.
        remark: why it is not kept, or None.
    """

    code: bytes
    architecture: str
    file: Path | None = None
    remark: str | None = None


def entries() -> dict[str, str]:
    """Return the kernels that there are: name and C++ type, as the table in the source has them."""
    return dict(_ENTRY.findall((_SOURCES / _MAIN).read_text()))


# Kernels that run one after the other.
_SEQUENCES = (
    ("sample_range", "quantize_sample"),
    ("group_peak", "quantize_group"),
    ("key_value_moments", "key_value_tiles"),
    ("group_norm_moments", "group_norm_range", "group_norm_static", "group_norm_sample"),
)


def part_of(kernel: str) -> tuple[str, ...]:
    """Return the kernels that are compiled together with one: what goes before or after it, and no other."""
    return next((sequence for sequence in _SEQUENCES if kernel in sequence), (kernel,))


def image(target: Target, part: tuple[str, ...]) -> Image:
    """Return kernels for a target: kept ones, or new ones, which takes seconds.

    A file that is not whole is made again. Where none can be kept, kernels are compiled for this process.

    Raises:
        BuildError: there is no NVRTC, or it fails.
    """
    compiler = nvrtc()
    architecture = compiler.architecture(target)
    program = _program(part)
    key = _key(compiler, architecture, target.isa, program)

    def compiled() -> bytes:
        return compiler.compile(program, architecture, target.isa)

    try:
        file = build_cache.folder() / f"{part[-1]}-{architecture}-{key}{'.ptx' if target.isa else '.cubin'}"
    except BuildError as error:
        return Image(compiled(), architecture, remark=str(error))
    code = _read(file)
    if code is not None:
        return Image(code, architecture, file)
    try:
        with build_cache.locked(file):
            code = _read(file)
            if code is None:
                file.unlink(missing_ok=True)
                code = compiled()
                kept = code + hashlib.sha256(code).digest()  # behind the code, where tools that read it do not look
                build_cache.write(file, lambda unfinished: unfinished.write_bytes(kept))
    except OSError as error:
        remark = f"the folder of built kernels cannot be written ({error})"
        return Image(code or compiled(), architecture, remark=remark)
    return Image(code, architecture, file)


def _read(file: Path) -> bytes | None:
    """Return what is kept in a file; None if there is none, or it is not what was written."""
    try:
        kept = file.read_bytes()
    except OSError:
        return None
    code, digest = kept[:-_DIGEST], kept[-_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _program(part: tuple[str, ...]) -> bytes:
    """Return the text that is compiled: the source with a table of some kernels alone."""
    known = entries()
    table = " ".join(f"ENTRY({name}, {known[name]})" for name in part)
    return f'#define DCOMP_ENTRIES(ENTRY) {table}\n#include "{_MAIN}"\n'.encode()


def _key(compiler: "Nvrtc", architecture: str, isa: tuple[int, int] | None, program: bytes) -> str:
    digest = hashlib.sha256(repr((_OPTIONS, compiler.version, architecture, isa, program)).encode())
    for name, text in _sources().items():
        digest.update(name.encode() + text)
    return digest.hexdigest()[:16]


def _sources() -> dict[str, bytes]:
    files = (file for pattern in ("*.cu", "*.cuh", "*.h") for file in _SOURCES.glob(pattern))
    return {file.name: file.read_bytes() for file in sorted(files)}


def nvrtc() -> "Nvrtc":
    """Return the compiler, opened now if it has not been.

    Raises:
        BuildError: there is none that can be used, and why.
    """
    found = _opened()
    if isinstance(found, BuildError):
        raise found
    return found


@functools.cache
def _opened() -> "Nvrtc | BuildError":
    problem = "it is not installed; `pip install dcomp[cuda]` does that"
    for name in _candidates():
        try:
            return Nvrtc(name)
        except (OSError, AttributeError) as error:
            if "/" in name:  # a library that is there
                problem = str(error).splitlines()[0]
        except BuildError as error:
            problem = str(error)
    return BuildError(f"NVIDIA's compiler library NVRTC cannot be used: {problem}")


def _candidates() -> Iterator[str]:
    """Yield libraries, best first: of torch's own CUDA version, then of any other, then where the system looks."""
    own = (torch.version.cuda or "").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    libraries = [
        library
        for folder in folders
        for pattern in ("cu[0-9]*/lib", "cuda_nvrtc/lib")
        for place in folder.glob(pattern)
        for library in place.glob("libnvrtc.so.*")
    ]
    libraries += Path(torch.__file__).parent.glob("lib/libnvrtc.so.*")
    libraries += Path(sys.prefix).glob("lib/libnvrtc.so.*")  # of conda
    for library in sorted(libraries, key=lambda file: (file.suffix == f".{own}", file.suffix), reverse=True):
        yield str(library)
    for major in dict.fromkeys([own, "13", "12"]):
        if major:
            yield f"libnvrtc.so.{major}"


class Nvrtc:
    """The compiler library.

    Attributes:
        name: its path, or the name that the system found it by.
        version: of CUDA, as (13, 0).
    """

    def __init__(self, name: str) -> None:
        # It asks for a second library by name, which the system does not find in a folder of packages.
        for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*") if "/" in name else ():
            with contextlib.suppress(OSError):  # of another version; the right one is missed when something is compiled
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(name)
        self.name = name
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        if major.value < _OLDEST:
            raise BuildError(f"{name} is of CUDA {major.value}.{minor.value}, and {_OLDEST} is needed")

    def architecture(self, target: Target) -> str:
        """Return the name of a target: the device's own, or the nearest below that this compiler knows.

        Raises:
            BuildError: machine code for the device cannot be made, only PTX.
        """
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        major, minor = target.capability
        below = [divmod(arch, 10) for arch in known if arch <= 10 * major + minor]
        # Machine code runs on later devices of the same generation, PTX on all later ones.
        fit = [arch for arch in below if target.isa or arch[0] == major]
        if not fit:
            version = "{}.{}".format(*self.version)
            raise BuildError(f"NVRTC of CUDA {version} knows no device of compute capability {major}.x")
        return "{}_{}{}".format("compute" if target.isa else "sm", *max(fit))

    def compile(self, program: bytes, architecture: str, isa: tuple[int, int] | None) -> bytes:
        """Return machine code, or PTX that says it is of version `isa` or older.

        Args:
            program: source text, which may include the files of this folder.
            architecture: as `architecture` names it.
            isa: as a target has it.

        Raises:
            BuildError: the compiler fails.
        """
        headers = _sources()
        texts = (ctypes.c_char_p * len(headers))(*headers.values())
        names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_OPTIONS)]
        job = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(job), program, b"dcomp.cu", len(headers), texts, names)
        try:
            words = (ctypes.c_char_p * len(options))(*options)
            if self._library.nvrtcCompileProgram(job, len(options), words):
                raise BuildError(f"NVRTC failed ({_first_error(self._bytes('ProgramLog', job))})")
            if isa is None:
                return self._bytes("CUBIN", job)
            return _at_most(self._bytes("PTX", job), isa)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(job))

    def _bytes(self, what: str, job: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", job, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", job, text)
        return text.raw

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            text = self._library.nvrtcGetErrorString(code)
            raise BuildError(f"{function} failed ({(text or b'?').decode()})")


def _first_error(log: bytes) -> str:
    lines = [line for line in log.rstrip(b"\0").decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "?").strip()[:200]


def _at_most(ptx: bytes, isa: tuple[int, int]) -> bytes:
    """Make PTX say that it is of no later version than `isa`, so that an older driver reads it.

    A compiler writes its own version whatever is used, as Triton knows too. The kernels use nothing newer than 7.0, but
    for hints about bytes of loads that are not needed, which came with 8.3.
    """

    def lower(line: re.Match[bytes]) -> bytes:
        found = int(line[1]), int(line[2])
        return b".version %d.%d" % min(found, isa)

    if isa < (8, 3):
        ptx = re.sub(rb'^\s*\.pragma "used_bytes_mask [^;]*;\n', b"", ptx, flags=re.MULTILINE)
    return re.sub(rb"^\.version (\d+)\.(\d+)", lower, ptx, count=1, flags=re.MULTILINE)
