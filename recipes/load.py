"""A recipe's name or path, plus overrides, to a checked `Recipe`, with the place of every error.

Reading is bounded and safe: YAML by `safe_load` without aliases, at most `MAX_BYTES`.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dcomp import UsageError
from dcomp.recipes.schema import KINDS, Recipe

MAX_BYTES = 1 << 20


class RecipeError(UsageError):
    """A recipe that cannot be read or does not say what a recipe can say."""


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, a few bytes of which can stand for gigabytes, and without keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"alias in line {event.start_mark.line + 1}; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"key '{key.value[:80]}' given twice, in line {key.start_mark.line + 1}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def builtin_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(Path(f.name).stem for f in (files("dcomp.recipes") / "builtin").iterdir() if f.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Recipe:
    """Resolve a recipe.

    Args:
        source: a built-in name, or a YAML or JSON file.
        overrides: `key.path=value` items, values in YAML; list items by number or, of stages,
            by kind (`stages.0.preset=w8a8`, `stages.quantize.preset=w8a8`).
        values: the same as a mapping of key paths to plain values; those that are None are left out.

    Raises:
        RecipeError: not found, too large, not YAML, or with keys or values that a recipe cannot have.
    """
    data = _read(source)
    for key, value in (values or {}).items():
        if value is not None:
            _set(data, key, value, place=key)
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise RecipeError(
                f"'{item}' is not KEY=VALUE", where="--set", remedy="Write for example --set stages.0.step_bins=10."
            )
        _set(data, key.strip(), _parse(text, where=f"--set {key}"), place=f"--set {key}")
    return parse_recipe(data, where=str(source))


def parse_recipe(data: object, where: str) -> Recipe:
    """Check plain data against the recipe's schema; all problems are reported at once."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_explain(dict(e)) for e in error.errors()]
        raise RecipeError(
            "The recipe does not fit: " + "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else ""),
            where=where,
            remedy="Correct these keys; `dcomp quantize --dry-run` prints a complete recipe.",
        ) from error


def _read(source: str | Path) -> Any:
    builtin = files("dcomp.recipes") / "builtin" / f"{source}.yaml"
    if isinstance(source, str) and source in builtin_names():
        return _parse(builtin.read_text(), where=source)
    path = Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(str(source), builtin_names(), n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise RecipeError(
            f"There is no recipe '{source}'",
            remedy=f"{hint}Built-in recipes are {', '.join(builtin_names())}; or give a YAML file.",
        )
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(
            f"The recipe has {path.stat().st_size:,} bytes",
            where=str(path),
            remedy=f"A recipe has at most {MAX_BYTES:,}.",
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "The recipe is not readable UTF-8 text", where=str(path), remedy="Give a YAML file."
        ) from error
    return _parse(text, where=str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(f"Not valid YAML: {first}", where=place, remedy="Correct the syntax there.") from error


def _set(data: Any, key: str, value: Any, place: str) -> None:
    """Set a dotted key in nested plain data, making missing mappings on the way."""
    parts = key.split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(data, list):
            part = _number_of(data, part)
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(data):
                raise RecipeError(
                    f"'{part}' is not one of the {len(data)} items",
                    where=place,
                    remedy="Count the list's items from 0.",
                )
            part = int(part)  # type: ignore[assignment]
        elif not isinstance(data, dict):
            raise RecipeError(
                f"'{'.'.join(parts[:position])}' holds no further keys", where=place, remedy="Shorten the key."
            )
        if last:
            data[part] = value
        else:
            if isinstance(data, dict) and not isinstance(data.get(part), dict | list):
                data[part] = {}
            data = data[part]


def _number_of(stages: list[Any], name: str) -> str:
    """Return the number of the stage of a kind; any other text as it is."""
    kinds = [stage.get("kind", "quantize") if isinstance(stage, dict) else None for stage in stages]
    return str(kinds.index(name)) if name in KINDS and name in kinds else name


def _explain(error: dict[str, Any]) -> str:
    place = ".".join(str(p) for n, p in enumerate(error["loc"]) if not _is_kind(error["loc"], n))
    if error["type"] != "extra_forbidden":
        return f"{place or 'the whole'}: {error['msg'][:200]}"
    known = _keys_at(Recipe, error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    return f"unknown key '{place}'" + (f", did you mean '{near[0]}'?" if near else f", known are {', '.join(known)}")


def _is_kind(location: Sequence[Any], number: int) -> bool:
    """Whether a part of an error's location is pydantic's name of a stage's kind."""
    return number > 0 and isinstance(location[number - 1], int) and location[number] in KINDS


def _keys_at(model: Any, location: Sequence[Any]) -> list[str]:
    """Return the field names of the model found by following an error's location into a model type."""
    if get_origin(model) in (Union, UnionType, tuple, list) or get_origin(model) is not None:
        found = [
            _keys_at(a, location[1:] if location and isinstance(location[0], int) else location)
            for a in get_args(model)
        ]
        return next((keys for keys in found if keys), [])
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    if location and location[0] in KINDS and "kind" in model.model_fields:
        return _keys_at(model, location[1:]) if model.model_fields["kind"].default == location[0] else []
    if not location:
        return list(model.model_fields)
    field = model.model_fields.get(str(location[0]))
    return _keys_at(field.annotation, location[1:]) if field else []
