"""The checkout is the package: what pyproject.toml lists, what lies on disk and what the wheel holds are the same."""

import ast
import fnmatch
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = {name: ROOT.joinpath(*name.split(".")[1:]) for name in SETUPTOOLS["packages"]}
EXTRAS = PROJECT["project"]["optional-dependencies"]
NOT_SOURCE = shutil.ignore_patterns(".[!c]*", "__pycache__", "build", "dist", "*.egg-info", "demo-out")


def source_folders() -> Iterator[Path]:
    return (d for d in ROOT.iterdir() if d.is_dir() and not d.name.startswith(".") and d.name not in ("build", "dist"))


def modules() -> list[Path]:
    return sorted(file for folder in FOLDERS.values() for file in folder.glob("*.py"))


def copy_without_weights(source: str, target: str) -> None:
    """Copy a file; of weights only the name matters here, and compressing them would take seconds."""
    Path(target).touch() if source.endswith(".safetensors") else shutil.copy2(source, target)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist and wheel of a copy, so that no egg-info or build folder appears in the checkout."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE, copy_function=copy_without_weights)
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def test_listed_packages_are_the_folders_with_an_init() -> None:
    on_disk = {init.parent for folder in source_folders() for init in folder.rglob("__init__.py")}
    assert {FOLDERS[name] for name in FOLDERS if name != "dcomp"} == on_disk


def test_every_module_lies_in_a_listed_package() -> None:
    inside = {file for name, folder in FOLDERS.items() if name != "dcomp" for file in folder.rglob("*.py")}
    assert inside <= set(modules())


def test_every_data_file_of_a_package_is_packaged() -> None:
    for name, folder in FOLDERS.items():
        if name == "dcomp":
            continue
        patterns = SETUPTOOLS["package-data"].get(name, [])
        inner = [other for other in FOLDERS.values() if folder in other.parents]
        files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".py" and "__pycache__" not in f.parts]
        files = [f for f in files if not any(other in f.parents for other in inner)]
        names = [file.relative_to(folder).as_posix() for file in files]
        assert [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in patterns)] == []


def test_root_holds_three_python_files() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}


@pytest.mark.parametrize("package", [name for name in FOLDERS if name != "dcomp"])
def test_package_init_is_a_docstring_only(package: str) -> None:
    tree = ast.parse((FOLDERS[package] / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


def test_imports_are_absolute() -> None:
    files = [file for folder in source_folders() for file in folder.rglob("*.py")] + list(ROOT.glob("*.py"))
    nodes = ((file, node) for file in files for node in ast.walk(ast.parse(file.read_text())))
    dotted = [f"{file}:{node.lineno}" for file, node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    assert dotted == []


def test_every_third_party_import_is_declared() -> None:
    """At module level only dependencies; inside functions also the packages of the extras."""
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    optional = {canonicalize_name(Requirement(r).name) for name in EXTRAS if name != "dev" for r in EXTRAS[name]}
    provided_by = importlib.metadata.packages_distributions()
    for file in modules():
        tree = ast.parse(file.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(child) for function in functions for child in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dcomp"}:
                owners = {canonicalize_name(owner) for owner in provided_by.get(name, [name])}
                allowed = required | optional if id(node) in inside else required
                assert owners & allowed, f"{file}:{node.lineno} imports {name}, which pyproject.toml does not declare"


def test_pins_satisfy_the_declared_ranges() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    declared = [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *itertools.chain(*EXTRAS.values())]]
    outside = [r for r in declared if r.name != "dcomp" and not r.specifier.contains(pinned[canonicalize_name(r.name)])]
    assert outside == []
    assert "torchvision" not in pinned


def test_layers_import_downwards_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?\bmake ([a-z-]+)`", (ROOT / "README.md").read_text())) <= targets


def test_ci_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_wheel_holds_every_module_and_data_file_and_nothing_else(distributions: Path) -> None:
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = distributions / "source"
    expected = {
        file.relative_to(source).as_posix()
        for package in SETUPTOOLS["packages"]
        for pattern in ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for file in source.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    assert names == {f"dcomp/{name}" for name in expected}


def test_sdist_holds_what_a_test_run_needs(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    source = distributions / "source"
    tests = {file.relative_to(source).as_posix() for file in (source / "tests").rglob("*.py")}
    assert {"pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md", ".ci/run", ".ci/constraints.txt"} <= names
    assert tests <= names
    strangers = (name for name in names if name.endswith((".safetensors", ".pyc", ".parquet")))
    assert [name for name in strangers if not name.startswith("examples/emoji-sd/")] == []
