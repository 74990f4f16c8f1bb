"""What compilers make of the CUDA kernels, and what the emulator counts: facts that need no GPU.

    python benchmarks/static_bars.py [--write]

The kernels are compiled for each architecture by NVRTC, as when they are used, and disassembled by cuobjdump and
nvdisasm: those on PATH, or those of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or triton. Registers,
spills and stack are the compiler's; instructions are counted in the innermost loop that has products of a tensor core;
resident blocks follow from registers, shared memory and threads. Wavefronts of shared memory and sectors of global
memory are the emulator's, over whole tiles. Nothing here says how fast a kernel is.

`--write` puts the tables into docs/kernels.md, between two marks.
"""

import argparse
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as nvrtc
from dcomp.kernels.cuda.tiles import ENTRIES

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- static bars: begin -->", "<!-- static bars: end -->"
_TOOLS = ("cuobjdump", "nvdisasm")
_PRODUCTS = ("IMMA", "HMMA")  # of integers, of float16


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share (CUDA C++ Programming Guide, technical specifications by compute capability)."""

    shared_memory: int
    blocks: int
    threads: int
    registers: int = 65536


ARCHITECTURES = {
    80: Multiprocessor(163 << 10, 32, 2048),
    86: Multiprocessor(99 << 10, 16, 1536),
    89: Multiprocessor(99 << 10, 24, 1536),
    90: Multiprocessor(227 << 10, 32, 2048),
    120: Multiprocessor(99 << 10, 24, 1536),
}
_RESERVED = 1 << 10  # of shared memory, for each block


@dataclass(frozen=True)
class Facts:
    """Of a kernel on an architecture.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        spills: instructions that store to or load from local memory.
        blocks: that a multiprocessor holds at once.
        products: of tensor cores in the hot loop; 0 if there are none.
        instructions: in the hot loop.
        copies: asynchronous copies in the hot loop.
        opcodes: of all instructions, with their modifiers.
    """

    registers: int
    stack: int
    spills: int
    blocks: int
    products: int
    instructions: int
    copies: int
    opcodes: frozenset[str]

    @property
    def instructions_per_product(self) -> float:
        """Instructions of the hot loop, those of tensor cores among them, for each of these."""
        return self.instructions / self.products


class MissingToolError(Exception):
    """There is no compiler or no disassembler, and which."""


def kernels_of(architecture: int) -> list[str]:
    """Return the kernels that an architecture may run: without tensor cores for nibbles, ptxas makes bytes of them."""
    return [name for name in ENTRIES if architecture in (80, 86, 89) or not name.startswith("linear_w4a4")]


def facts(architecture: int, kernels: Sequence[str]) -> dict[str, Facts]:
    """Return what there is to know of compiled kernels.

    Raises:
        MissingToolError: there is no compiler or disassembler.
    """
    folder = tools()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernels.cubin"
        try:
            file.write_bytes(nvrtc.image(nvrtc.Target(divmod(architecture, 10)), tuple(kernels)).code)
        except BuildError as error:
            raise MissingToolError(str(error)) from error
        usage = _run([str(folder / "cuobjdump"), "-res-usage", str(file)], folder)
        assembly = _run([str(folder / "cuobjdump"), "-sass", str(file)], folder)
    used = {m[1]: m[2] for m in re.finditer(r"Function (\w+):\s*(.*)", usage)}
    texts = {m[1]: m[2] for m in re.finditer(r"Function : (\w+)\n(.*?)(?=\n\t\tFunction|\Z)", assembly, re.DOTALL)}
    return {name: _facts(architecture, name, used[name], _instructions(texts[name])) for name in kernels}


@functools.cache
def tools() -> Path:
    """Return the folder of the disassembler's programs.

    Raises:
        MissingToolError: there is none.
    """
    on_path = shutil.which("cuobjdump")
    if on_path and shutil.which("nvdisasm"):
        return Path(on_path).parent
    for package, folders in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            for found in sorted(Path(place).glob(folders)):
                if all((found / tool).is_file() for tool in _TOOLS):
                    return found
    raise MissingToolError(
        "there is no cuobjdump with nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def _run(command: list[str], folder: Path | None = None) -> str:
    path = os.pathsep.join([str(folder or ""), os.environ.get("PATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    return done.stdout + done.stderr


def _instructions(text: str) -> list[tuple[int, str]]:
    """Return address and text of each instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", text)
    return [(int(address, 16), instruction.strip()) for address, instruction in found]


def _facts(architecture: int, name: str, usage: str, instructions: list[tuple[int, str]]) -> Facts:
    used = dict(pair.split(":") for pair in usage.split() if ":" in pair)
    loop = [_operation(text) for text in _hot_loop(instructions)]
    operations = [_operation(text) for _, text in instructions]
    registers = int(used["REG"])
    return Facts(
        registers=registers,
        stack=int(used["STACK"]),
        spills=sum(operation in ("STL", "LDL") for operation in operations),
        blocks=_blocks(ARCHITECTURES[architecture], registers, name),
        products=sum(operation in _PRODUCTS for operation in loop),
        instructions=len(loop),
        copies=loop.count("LDGSTS"),
        opcodes=frozenset(_opcode(text) for _, text in instructions),
    )


def _hot_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """Return the last stretch that a backward branch repeats and that has products of a tensor core.

    One that lies in another is passed twice for each pass of that: the two halves of a stage of nibbles in blocks of
    32. What comes before it are corrections.
    """
    loops = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            loop = {at: other for at, other in instructions if int(branch[1], 16) <= at <= address}
            if any(_operation(other) == "IMMA" for other in loop.values()):
                loops.append(loop)
    if not loops:
        return []
    last = max(loops, key=lambda loop: (min(loop), -len(loop)))
    around = [loop for loop in loops if loop.keys() > last.keys()]
    return [*last.values(), *(min(around, key=len).values() if around else ())]


def _operation(text: str) -> str:
    return _opcode(text).split(".")[0]


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _blocks(limits: Multiprocessor, registers: int, name: str) -> int:
    entry = ENTRIES[name]
    of_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256 to a warp
    return min(
        limits.registers // (of_warp * (entry.threads // 32)),
        limits.shared_memory // (entry.shared_memory + _RESERVED),
        limits.threads // entry.threads,
        limits.blocks,
    )


@dataclass(frozen=True)
class Traffic:
    """Of a product in whole tiles, counted by the emulator.

    Attributes:
        wavefronts: of shared memory, for each product of a tensor core.
        conflicts: wavefronts more than without bank conflicts.
        sectors: of global memory, against the bytes that were asked for.
    """

    wavefronts: float
    conflicts: int
    sectors: float


def traffic(name: str) -> Traffic:
    """Count what a product moves, four steps deep; of nibbles all steps that 1024 channels have."""
    import torch

    from tests.support.attention import attend
    from tests.support.emulated import emulator
    from tests.support.nibbles import Operands
    from tests.support.products import Int4Weight, conv, linear

    entry, generator = ENTRIES[name], torch.Generator().manual_seed(0)
    if name.startswith("attention"):
        width = int(name.split("_")[1])
        q, k = (torch.zeros(1, 1, tokens, width, dtype=torch.int8) for tokens in (entry.rows, 256))
        emulator().counts()
        attend(emulator(), q, torch.ones(1, 1, entry.rows), k, torch.ones(1, 1, 256), k.float(), width=width)
        return _moved(emulator().counts())
    group = None if "channel" in name else 64 if "w4" in name else 0
    shape = (entry.columns, 256) if name.startswith("linear") else (entry.columns, 1, 1, 256)
    if group == 0:
        weight = image = torch.zeros(shape, dtype=torch.int8)
    else:
        made = Int4Weight(generator, shape, group)
        weight, image = made.fragments, made.image
    ones = torch.ones(entry.columns)
    emulator().counts()
    if "w4a4" in name:
        block = 64 if "group64" in name else 32
        Operands(generator, (entry.rows, entry.columns, 1024), (block, block), block).run(emulator(), name)
    elif name.startswith("linear"):
        q = torch.zeros(entry.rows, 256, dtype=torch.int8)
        linear(emulator(), name, q, weight, entry.columns, (torch.ones(entry.rows), ones))
    else:
        q = torch.zeros(1, entry.rows // 8, 8, 256, dtype=torch.uint8)
        zero, sums = torch.zeros(1, dtype=torch.uint8), image.flatten(1).sum(1, dtype=torch.int32)
        conv(emulator(), name, q, zero, weight, sums, (1, 1), (torch.ones(1), ones))
    return _moved(emulator().counts())


def _moved(counts: dict[str, int]) -> Traffic:
    return Traffic(
        wavefronts=counts["wavefronts"] / counts["products"],
        conflicts=counts["wavefronts"] - counts["ideal_wavefronts"],
        sectors=counts["sectors"] * 32 / counts["copied_bytes"],
    )


def tables(found: dict[int, dict[str, Facts]]) -> str:
    """Return Markdown tables of all kernels on some architectures."""
    names = " / ".join(str(architecture) for architecture in found)
    lines = [
        f"Registers, resident blocks and instructions are for sm_{names}, of w4a4 for sm_80 / 86 / 89. Spills and stack"
        " are 0 in all of them.",
        "",
        "| product | registers | resident blocks | instructions per tensor-core product | wavefronts per product |"
        " bank conflicts | sectors / bytes asked |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    others = ["", "| other kernel | registers |", "| --- | --- |"]
    for name in ENTRIES:
        of_kernel = [facts[name] for facts in found.values() if name in facts]
        assert not any(facts.spills or facts.stack for facts in of_kernel), name
        registers = " / ".join(str(facts.registers) for facts in of_kernel)
        if not of_kernel[0].products:
            others.append(f"| `{name}` | {registers} |")
            continue
        blocks = " / ".join(str(facts.blocks) for facts in of_kernel)
        instructions = " / ".join(f"{facts.instructions_per_product:.2f}" for facts in of_kernel)
        moved = traffic(name)
        lines.append(
            f"| `{name}` | {registers} | {blocks} | {instructions} | {moved.wavefronts:.2f} | {moved.conflicts} |"
            f" {moved.sectors:.2f} |"
        )
    return "\n".join([*lines, *others])


def main() -> None:
    """Print the tables, and write them into the documentation if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    write = parser.parse_args().write
    sys.path.append(str(ROOT))  # for tests.support; nothing here would take our folder `kernels` for another package
    text = tables({architecture: facts(architecture, kernels_of(architecture)) for architecture in ARCHITECTURES})
    print(text)
    if write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        _, after = rest.split(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
