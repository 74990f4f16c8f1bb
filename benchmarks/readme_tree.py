"""Print the README's tree: every source file with the first sentence that it says about itself.

    python -P benchmarks/readme_tree.py [--write]

Modules speak by their docstring, YAML, shell and make files by their first comment, Markdown by its first paragraph.
`--write` puts the tree between the README's markers. A file that says nothing about itself is an error.
"""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree:begin -->", "<!-- tree:end -->"
WIDTH = 120
# Folders that are no packages have no docstring of their own.
FOLDERS = {
    "benchmarks": "Scripts that make the figures and this tree",
    "docs": "What does not fit into a docstring",
    "examples": "The embedded pipeline, and a ready CI job",
    "tests": "One file for each module, and tiny real models in support/",
}
FILES = {"benchmarks": ["*.py"], "docs": ["*.md"], "examples": ["*.yml", "*/*.md", "*/*.py"], "tests": []}


def main(
    write: Annotated[bool, typer.Option("--write", help="Change the README instead of printing.")] = False,
) -> None:
    """Print the tree, or put it into the README."""
    if not write:
        print(tree())
        return
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{readme} has no {BEGIN} ... {END}")
    readme.write_text(f"{head}{BEGIN}\n{tree()}\n{END}{tail}", encoding="utf-8")


def tree() -> str:
    """Return the tree as a fenced block."""
    entries = list(_entries())
    column = max(len(name) for name, _ in entries) + 2
    lines = []
    for name, text in entries:
        first, *more = textwrap.wrap(text, WIDTH - column)
        lines += [f"{name:<{column}}{first}", *(" " * column + line for line in more)]
    return "\n".join(["```text", *lines, "```"])


def first_sentence(path: Path) -> str:
    """Return what a file says about itself, without its full stop."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".md":
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
        text = "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()
    else:
        comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#") and line[:2] != "#!"]
        text = comments[0] if comments else ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0].removesuffix(".")
    if not sentence:
        raise SystemExit(f"{path.relative_to(ROOT)} says nothing about itself: write its first sentence")
    return sentence


def _entries() -> Iterator[tuple[str, str]]:
    """Yield name and sentence of every line, packages in the order of their layers, lowest first."""
    for path in sorted(ROOT.glob("*.py")):
        yield path.name, first_sentence(path)
    for package in _packages():
        folder = ROOT / package
        yield f"{package}/", first_sentence(folder / "__init__.py")
        patterns = ("*.py", "*/*.yaml", "*/*.py", "*/*/*.py")
        for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
            name = path.relative_to(folder).as_posix()
            if name != "__init__.py":
                yield f"  {name.removesuffix('__init__.py')}", first_sentence(path)
    for name, text in FOLDERS.items():
        yield f"{name}/", text
        for path in sorted(path for pattern in FILES[name] for path in (ROOT / name).glob(pattern)):
            yield f"  {path.relative_to(ROOT / name).as_posix()}", first_sentence(path)
    for name in ("Makefile", ".ci/run"):
        yield name, first_sentence(ROOT / name)


def _packages() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers: list[str] = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [name.removeprefix("dcomp.") for layer in reversed(layers) for name in layer.split(" | ")]
    return [name for name in names if (ROOT / name).is_dir()]


if __name__ == "__main__":
    typer.run(main)
