"""Integer products by a second implementation, interpreted here and compiled for devices that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "triton_products.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(folder: Path, *words: str, **environment: str) -> Any:
    own = {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "0", **environment}
    command = [sys.executable, "-P", str(PROGRAM), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_triton_gives_the_products_of_the_definition_to_the_bit(tmp_path: Path) -> None:
    assert run(tmp_path, "interpret", TRITON_INTERPRET="1") == {"exact": True}


@pytest.mark.parametrize(
    ("capability", "instruction"),
    [("80", "mma.sync.aligned.m16n8k32"), ("90", "wgmma.mma_async.sync.aligned.m64n128k32")],
)
def test_triton_multiplies_int8_in_tensor_cores(tmp_path: Path, capability: str, instruction: str) -> None:
    for found in run(tmp_path, "compile", capability).values():
        assert found["products"]
        assert all(product.startswith(instruction) and "s32.s8.s8" in product for product in found["products"])
