"""Bars for what compilers make of the kernels; where there is no compiler or disassembler, only the emulator's."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcomp.kernels.cuda.tiles import ENTRIES

static_bars = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "static_bars.py")))
PRODUCTS = [name for name, entry in ENTRIES.items() if entry.rows]
LARGE = "_128x128"
# Instructions for each product of a tensor core, in tiles of 128x128; larger tiles need fewer.
BARS = {
    "linear_w8a8": 5.5,
    "linear_w4a8_channel": 5.5,
    "linear_w4a8": 11.5,
    "conv_w8a8": 6.5,
    "conv_w4a8_channel": 6.5,
    "conv_w4a8": 11.5,
}
ON_SM_90 = {"linear_w8a8": 6.0, "linear_w4a8_channel": 6.0}


def facts(architecture, names):
    try:
        return static_bars.facts(architecture, names)
    except static_bars.MissingToolError as error:
        pytest.skip(str(error))


def assert_bars(architecture, found):
    for name, of_kernel in found.items():
        assert of_kernel.stack == 0, name
        assert of_kernel.spills == 0, name
        if not ENTRIES[name].rows:
            assert of_kernel.products == 0
            continue
        stem, size = name.rsplit("_", 1)
        rows, columns = (int(side) for side in size.split("x"))
        warps = ENTRIES[name].threads // 32
        assert of_kernel.products == rows * columns * 64 // (16 * 8 * 32) // warps, "the hot loop is one step of K"
        assert of_kernel.copies >= 3, "the hot loop holds the copies of a step"
        if size == "64x64":
            assert of_kernel.blocks >= 3
            continue
        bar = ON_SM_90.get(stem, BARS[stem]) if architecture == 90 else BARS[stem]
        assert of_kernel.instructions_per_product <= bar, (name, architecture)
        assert of_kernel.blocks >= (2 if name.endswith(LARGE) else 1)


# What the primitives of PTX become: a wrong type or width would show here.
OPCODES = {
    "linear_w8a8": {"IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "DEPBAR.LE", "F2FP.BF16.PACK_AB"},
    "linear_w4a8": {"IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "LDS.128", "LDS.64"},
    "conv_w8a8": {"IMMA.16832.U8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"},
}


def test_branches_are_multiplied_in_tf32():
    found = facts(86, ["low_rank_token"])
    assert_bars(86, found)
    assert "HMMA.1688.F32.TF32" in found["low_rank_token"].opcodes


def test_one_architecture_keeps_the_bars():
    found = facts(86, [f"{stem}{LARGE}" for stem in OPCODES])
    assert_bars(86, found)
    for stem, opcodes in OPCODES.items():
        assert opcodes <= found[f"{stem}{LARGE}"].opcodes
        products = {opcode for opcode in found[f"{stem}{LARGE}"].opcodes if opcode.startswith("IMMA")}
        assert len(products) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", static_bars.ARCHITECTURES)
def test_all_architectures_keep_the_bars(architecture):
    """Of the tiles that are used most; the script compiles all of them, which takes minutes."""
    assert_bars(architecture, facts(architecture, [name for name in ENTRIES if name not in PRODUCTS or LARGE in name]))


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_product_wastes_memory_cycles(name):
    moved = static_bars.traffic(name)
    assert moved.conflicts == 0
    assert moved.sectors == 1
    assert moved.wavefronts <= (1.5 if name.endswith("256x128") else 2 if name.endswith(LARGE) else 3)


def test_the_tables_of_the_documentation_are_of_these_kernels():
    text = static_bars.DOCUMENT.read_text()
    table = text[text.index(static_bars.BEGIN) : text.index(static_bars.END)]
    assert all(f"| `{name}` |" in table for name in ENTRIES)
