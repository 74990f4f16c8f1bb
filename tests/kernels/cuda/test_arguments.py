"""The structs that kernels take are the same in C++ and in Python."""

import ctypes
import re

import pytest

from dcomp.kernels.cuda import arguments
from dcomp.kernels.emulator.build import KERNELS
from tests.support.emulated import emulator

HEADER = (KERNELS / "cuda" / "arguments.h").read_text()
MIRRORS = {
    name: kind
    for name, kind in vars(arguments).items()
    if isinstance(kind, type) and issubclass(kind, ctypes.Structure)
}


def test_every_struct_has_a_mirror():
    assert set(re.findall(r"^struct (\w+) {", HEADER, re.MULTILINE)) == set(MIRRORS)


@pytest.mark.parametrize("name", MIRRORS)
def test_fields_lie_where_the_compiler_puts_them(name):
    mirror = MIRRORS[name]
    offsets = [f"{field} {getattr(mirror, field).offset}" for field, *_ in mirror._fields_]
    assert emulator().library.emulator_layout(name.encode()).decode() == " ".join(
        [str(ctypes.sizeof(mirror)), *offsets]
    )


@pytest.mark.parametrize("name", MIRRORS)
def test_all_fields_of_the_header_are_there(name):
    body = HEADER[HEADER.index(f"struct {name} {{") :]
    lines = [line.split("//")[0] for line in body[: body.index("};")].splitlines()[1:]]
    declared = [re.sub(r"^\s*(const )?\w+\*?", "", line.strip()) for line in "".join(lines).split(";") if line.strip()]
    fields = [field.strip() for line in declared for field in line.split(",")]
    assert fields == [field for field, *_ in MIRRORS[name]._fields_]


@pytest.mark.parametrize("name", MIRRORS)
def test_only_the_end_is_padded(name):
    mirror = MIRRORS[name]
    sizes = [ctypes.sizeof(kind) for _, kind in mirror._fields_]
    assert sizes == sorted(sizes, reverse=True)
    assert ctypes.sizeof(mirror) - sum(sizes) in (0, 4)
