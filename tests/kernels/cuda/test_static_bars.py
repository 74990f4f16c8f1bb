"""Bars for what compilers make of the kernels; where there is no compiler or disassembler, only the emulator's."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcomp.kernels.cuda.tiles import ENTRIES, LOW_RANK

static_bars = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "static_bars.py")))
PRODUCTS = [name for name, entry in ENTRIES.items() if entry.columns]
ATTENTION = [name for name in ENTRIES if name.startswith("attention")]
LARGE = "_128x128"
# Instructions for each product of a tensor core, in tiles of 128x128; larger tiles need fewer.
BARS = {
    "linear_w8a8": 5.5,
    "linear_w4a8_channel": 5.5,
    "linear_w4a8": 11.5,
    "linear_w4a4_group64": 12.0,
    "linear_w4a4_group32": 11.0,
    "conv_w8a8": 6.5,
    "conv_w4a8_channel": 6.5,
    "conv_w4a8": 11.5,
}
# The same of attention, softmax among them, which is less for each product the wider a head is.
OF_HEADS = {48: 8.5, 64: 7.75, 80: 7.75, 128: 6.25, 160: 5.75}
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
        if name in ATTENTION:
            width, rows = int(name.split("_")[1]), ENTRIES[name].rows
            products = 64 * -(-width // 32) * 32 // (8 * 32) + 64 * width // (8 * 16)
            assert of_kernel.products == products * rows // 16 // (ENTRIES[name].threads // 32), "one tile of keys"
            assert of_kernel.instructions_per_product <= OF_HEADS[width], (name, architecture)
            assert of_kernel.blocks * ENTRIES[name].threads >= 256
            continue
        if name not in PRODUCTS:
            assert of_kernel.products == 0
            continue
        stem, size = name.replace(LOW_RANK, "").rsplit("_", 1)
        rows, columns = (int(side) for side in size.split("x"))
        warps = ENTRIES[name].threads // 32
        steps = 2 if stem == "linear_w4a4_group32" else 1
        assert of_kernel.products == steps * rows * columns * 64 // (16 * 8 * 32) // warps, "the hot loop is one step"
        assert of_kernel.copies >= 3, "the hot loop holds the copies of a step"
        if size == "64x64":
            assert of_kernel.blocks >= 3
            continue
        bar = ON_SM_90.get(stem, BARS[stem]) if architecture == 90 else BARS[stem]
        assert of_kernel.instructions_per_product <= bar, (name, architecture)
        assert of_kernel.blocks >= (2 if name.endswith(LARGE) and "w4a4" not in name else 1)


# What the primitives of PTX become: a wrong type or width would show here.
OPCODES = {
    "linear_w8a8": {"IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "DEPBAR.LE", "F2FP.BF16.PACK_AB"},
    "linear_w4a8": {"IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "LDS.128", "LDS.64"},
    "linear_w4a4_group64": {"IMMA.16864.U4.S4", "IDP.2A.LO.S16.U8", "IDP.2A.HI.S16.U8", "PRMT"},
    "linear_w4a4_group32": {"IMMA.16832.U4.S4", "IDP.2A.LO.S16.U8", "IDP.2A.HI.S16.U8", "PRMT"},
    "conv_w8a8": {"IMMA.16832.U8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"},
}
OF_ATTENTION = {"IMMA.16832.S8.S8", "HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.128", "MUFU.EX2", "FFMA"}
# Beside what corrections of nibbles are multiplied by.
CORRECTIONS = {"linear_w4a4_group64": {"IMMA.16832.S8.S8"}, "linear_w4a4_group32": {"IMMA.16832.S8.S8"}}


FIRST = [*(f"{stem}{LARGE}" for stem in OPCODES), "attention_64", "low_rank_token"]


def test_one_architecture_keeps_the_bars():
    found = facts(86, FIRST)
    assert_bars(86, found)
    assert "HMMA.1688.F32.TF32" in found["low_rank_token"].opcodes
    assert found["attention_64"].opcodes >= OF_ATTENTION
    for stem, opcodes in OPCODES.items():
        assert opcodes <= found[f"{stem}{LARGE}"].opcodes
        products = {opcode for opcode in found[f"{stem}{LARGE}"].opcodes if opcode.startswith("IMMA")}
        assert len(products - CORRECTIONS.get(stem, set())) == 1
    # A product of nibbles is as deep as two of int8, or one.
    of_int8 = found[f"linear_w4a8{LARGE}"].instructions_per_product
    assert found[f"linear_w4a4_group64{LARGE}"].instructions_per_product < 2 * of_int8


@pytest.mark.slow
@pytest.mark.parametrize("architecture", static_bars.ARCHITECTURES)
def test_all_architectures_keep_the_bars(architecture):
    """Of all but the largest tiles; of the smallest ones on the oldest and the newest alone. The script takes all."""
    tiles = (LARGE, "_64x64") if architecture in (80, 120) else (LARGE,)
    names = [name for name in static_bars.kernels_of(architecture) if name not in PRODUCTS or name.endswith(tiles)]
    apart = FIRST if architecture == 86 else ()  # see above
    found = facts(architecture, [name for name in names if name not in apart])
    assert_bars(architecture, found)


@pytest.mark.parametrize("name", [*PRODUCTS, *ATTENTION])
def test_no_product_wastes_memory_cycles(name):
    moved = static_bars.traffic(name)
    assert moved.conflicts == 0
    assert moved.sectors == 1
    if name in ATTENTION:
        assert moved.wavefronts <= (3 if ENTRIES[name].rows == 16 * ENTRIES[name].threads // 32 else 1.75)
        return
    size = name.rsplit("_", 1)[1]
    # Multipliers and corrections are read too.
    bars = {"256x128": 2, "128x128": 2.75, "64x64": 4} if "w4a4" in name else {"256x128": 1.5, "128x128": 2, "64x64": 3}
    assert moved.wavefronts <= bars[size]


def test_the_tables_of_the_documentation_are_of_these_kernels():
    text = static_bars.DOCUMENT.read_text()
    table = text[text.index(static_bars.BEGIN) : text.index(static_bars.END)]
    assert all(f"| `{name}` |" in table for name in ENTRIES)
