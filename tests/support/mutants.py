"""Many copies of the CUDA kernels in one library, each with a bug: compilers spend most time on what copies share."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcomp.kernels.emulator.build import FOLDERS, KERNELS, library_file
from tests.support.emulated import Emulator
from tests.support.mutations import Mutation

_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


class Mutant(Emulator):
    """The copy of this number, as an emulator of its own."""

    def __init__(self, library: Path, number: int) -> None:
        super().__init__(library)
        self.number = number

    def run(self, name: str, *launch: Any, **fields: Any) -> None:
        super().run(f"{name}_of_{self.number}", *launch, **fields)


def mutants(
    copies: Sequence[tuple[Mutation | None, Mapping[str, str]]], scratch: Path, libraries: Path
) -> list[Mutant]:
    """Return a copy of the sources for each bug; without one for None.

    Args:
        copies: bug, and name and C++ type of the kernels that are wanted of the copy.
        scratch: an empty folder for sources.
        libraries: a folder of libraries, which is searched first.
    """
    for folder in FOLDERS:
        shutil.copytree(KERNELS / folder, scratch / folder)
    headers = '#include <cmath>\n#include "../emulator/emulator.h"\n'
    text = headers + "".join(_copy(number, *copy) for number, copy in enumerate(copies))
    (scratch / "cuda" / "kernels.cu").write_text(text)
    entries = [
        f"{name}_of_{number}, copy_{number}::{name}" for number, (_, names) in enumerate(copies) for name in names
    ]
    library = library_file(libraries, kernels=scratch, entries=entries, optimize="-O0")
    return [Mutant(library, number) for number in range(len(copies))]


def _copy(number: int, mutation: Mutation | None, kernels: Mapping[str, str]) -> str:
    """Return all kernels in a namespace of their own."""
    texts = {file.name: file.read_text() for file in (KERNELS / "cuda").iterdir() if file.is_file()}
    if mutation:
        assert texts[mutation.file].count(mutation.old) == 1
        texts[mutation.file] = texts[mutation.file].replace(mutation.old, mutation.new)
    texts["../emulator/primitives.h"] = (KERNELS / "emulator" / "primitives.h").read_text()
    names = "".join(f"using {name} = {kernel};\n" for name, kernel in kernels.items())
    return (
        f"namespace copy_{number} {{ namespace emulator = dcomp::emulator; }}\n"
        f"#define dcomp copy_{number}\n"
        f"{_included(texts, 'kernels.cu')}\n"
        f"namespace dcomp {{\n{names}}}\n"
        "#undef dcomp\n"
    )


def _included(texts: dict[str, str], name: str) -> str:
    """Return a text with those that it includes, each once; takes them out of `texts`."""
    text = texts.pop(name, "").replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda include: _included(texts, include[1]), text)
