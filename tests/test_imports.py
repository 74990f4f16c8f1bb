"""What importing costs and touches, each in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "diffusers", "transformers", "numpy", "scipy", "matplotlib", "pydantic"}
LIST_MODULES = "import sys, json; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
REGISTERED = """
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING['dcomp'].__module__, AUTO_QUANTIZATION_CONFIG_MAPPING['dcomp'].__module__)
"""


def python(*arguments: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_dcomp_is_light(tmp_path: Path) -> None:
    loaded = set(json.loads(python("-c", f"import dcomp; {LIST_MODULES}", cwd=tmp_path)))
    assert loaded & HEAVY == set()


def test_help_is_light(tmp_path: Path) -> None:
    program = f"""
import sys
from dcomp.cli import main
sys.argv = ['dcomp', '--help']
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
{LIST_MODULES}
"""
    *page, modules = python("-c", program, cwd=tmp_path).splitlines()
    assert any("quantize" in line for line in page)
    assert set(json.loads(modules)) & HEAVY == set()


def test_module_form_works_inside_the_checkout() -> None:
    assert python("-m", "dcomp", "--version", cwd=ROOT).startswith("dcomp ")


@pytest.mark.slow
def test_loader_is_registered_when_dcomp_comes_first(tmp_path: Path) -> None:
    assert python("-c", f"import dcomp{REGISTERED}", cwd=tmp_path).split() == ["dcomp.compress.loader"] * 2


@pytest.mark.slow
def test_loader_is_registered_late_and_our_kernels_folder_does_no_harm() -> None:
    """With the checkout as the first entry of the path, `import kernels` finds our folder, as Hugging Face's would."""
    program = (
        "import kernels, diffusers, transformers; print(kernels.__file__); import diffusers.quantizers.auto, dcomp"
    )
    first, last = python("-c", program + REGISTERED, cwd=ROOT).splitlines()
    assert Path(first) == ROOT / "kernels" / "__init__.py"
    assert last.split() == ["dcomp.compress.loader"] * 2
