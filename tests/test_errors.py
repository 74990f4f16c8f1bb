"""Every error of the package says what is wrong, where, and what to do."""

import ast
from pathlib import Path

import pytest

from dcomp import DcompError, UsageError

ROOT = Path(__file__).resolve().parents[1]


def sources() -> dict[Path, ast.Module]:
    packages = ("compress", "calibrate", "cachequant", "kernels", "recipes")
    files = [*ROOT.glob("*.py"), *(file for name in packages for file in (ROOT / name).glob("*.py"))]
    return {file: ast.parse(file.read_text()) for file in files}


def error_classes(trees: dict[Path, ast.Module]) -> dict[str, ast.ClassDef]:
    """Classes that descend from `DcompError`, by name."""
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = {"DcompError": classes["DcompError"]}
    while True:
        new = {
            name: node
            for name, node in classes.items()
            if name not in found and any(isinstance(base, ast.Name) and base.id in found for base in node.bases)
        }
        if not new:
            return found
        found |= new


def test_message_names_problem_place_and_remedy() -> None:
    error = DcompError("The scale is zero", where="unet.conv_in", remedy="Calibrate with more samples.")
    assert str(error) == "The scale is zero (unet.conv_in). Calibrate with more samples."
    assert (error.problem, error.where, error.remedy) == error.args


def test_place_is_optional() -> None:
    assert str(DcompError("The disk is full", remedy="Free 3 GB.")) == "The disk is full. Free 3 GB."


def test_remedy_is_required() -> None:
    with pytest.raises(TypeError, match="remedy"):
        DcompError("Something is wrong")  # type: ignore[call-arg]


def test_exit_codes_tell_wrong_use_from_failure() -> None:
    assert (DcompError.exit_code, UsageError.exit_code) == (1, 2)
    assert issubclass(UsageError, DcompError)


def test_every_error_made_in_the_package_has_a_remedy() -> None:
    trees = sources()
    classes = error_classes(trees)
    own_signature = {
        name
        for name, node in classes.items()
        if name != "DcompError" and any(getattr(member, "name", "") == "__init__" for member in node.body)
    }
    plain = set(classes) - own_signature
    bare = [
        f"{file.name}:{node.lineno}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in plain
        if not any(keyword.arg in ("remedy", None) for keyword in node.keywords)
    ]
    assert len(classes) > 2
    assert bare == []


def test_error_classes_are_documented_and_named_error() -> None:
    classes = error_classes(sources())
    assert [name for name, node in classes.items() if not name.endswith("Error") or not ast.get_docstring(node)] == []
