"""Prompts for calibration and validation: read from a file or data set, or built in.

A source is a file (`.txt` one prompt a line, `.csv`, `.json`, `.jsonl`, `.parquet`), or a data set of the `datasets`
package as `name` or `name:column`. Files are hostile until they passed: their size is looked at before they are opened,
and never more is read than the prompts that are asked for need. Class-conditional pipelines take class numbers or names
the same way; unconditional ones need no prompts. Too few prompts are an answer, not an error: the caller sees the
length. Order is kept, nothing is drawn at random.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dcomp import UsageError
from dcomp.calibrate.default_prompts import DEFAULT_PROMPTS

MAX_TEXT_BYTES = 64 << 20
MAX_PROMPT_CHARS = 4000
MAX_COLUMN_NAMES = 12  # shown in an error
DEFAULT_CLASSES = 1000
COLUMNS = ("prompt", "caption", "text", "label", "class")
SUFFIXES = (".txt", ".csv", ".json", ".jsonl", ".parquet")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class PromptError(UsageError):
    """Prompts that cannot be read as given."""


def read_prompts(
    source: str | Path | None,
    count: int,
    kind: str,
    column: str | None = None,
    *,
    model: Path | None = None,
    classes: Sequence[int] = (),
) -> list[str]:
    """Return the first `count` prompts of a source, or all of them where it holds fewer.

    Args:
        source: a file, a data set, or None for the defaults: `prompts.txt` of the model folder if there is one, else
            a built-in neutral list (text) or class numbers spread evenly (class).
        count: how many are wanted.
        kind: `text`, `class` or `unconditional`; the last gives `count` empty prompts and takes no source.
        column: of a table, or key of JSON objects; without it the first of `COLUMNS` that is there, or the only one.
        model: the pipeline's folder.
        classes: that the defaults are taken from; the first `DEFAULT_CLASSES` numbers unless given.

    Raises:
        PromptError: the source is missing, too large, of an unknown kind, empty or damaged, or a prompt is too long.
    """
    if count < 1:
        raise PromptError(f"{count} prompts were asked for", where="samples", remedy="Ask for at least one.")
    if kind == "unconditional":
        if source is not None:
            raise PromptError(
                "This model takes no prompts",
                where=str(source),
                remedy="Leave the prompts out: it makes what it likes.",
            )
        return [""] * count
    if source is None:
        own = model / "prompts.txt" if model else None
        if own is None or not own.is_file():
            return _defaults(kind, count, classes or range(DEFAULT_CLASSES))
        source = own
    prompts = list(itertools.islice(_checked(_read(source, column), str(source)), count))
    if not prompts:
        raise PromptError("There is not one prompt in it", where=str(source), remedy="Write one prompt on each line.")
    return prompts


def _defaults(kind: str, count: int, classes: Sequence[int]) -> list[str]:
    if kind == "text":
        return list(DEFAULT_PROMPTS[:count])
    several = len(classes)
    places = (index * several // count if count <= several else index % several for index in range(count))
    return [str(classes[place]) for place in places]


def _read(source: str | Path, column: str | None) -> Iterator[Any]:
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        return _read_file(path, column)
    suffix = Path(text).suffix.lower()
    if path.exists() and not path.is_dir():
        raise PromptError("This is not a regular file", where=text, remedy="Pass a file with one prompt on each line.")
    if not path.exists() and (suffix in SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise PromptError("There is no such file", where=text, remedy="Check the path of the prompts.")
    name, _, inner = (text, "", "") if path.exists() else text.partition(":")
    return _read_data_set(name, column or inner or None)


def _read_file(path: Path, column: str | None) -> Iterator[Any]:
    suffix, where = path.suffix.lower(), str(path)
    if suffix not in SUFFIXES:
        raise PromptError(
            f"Prompts cannot be read from a file that ends in {suffix or 'nothing'!r}",
            where=where,
            remedy=f"Use one of {', '.join(SUFFIXES)}.",
        )
    if suffix == ".parquet":
        return _read_parquet(path, column)
    text = _read_text(path)
    if suffix == ".txt":
        return (line for line in text.splitlines() if line.strip())
    if suffix == ".csv":
        return _read_csv(text, column, where)
    return _read_json(text, suffix == ".jsonl", column, where)


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise PromptError(
            f"The file has {size} bytes, more than the limit of {MAX_TEXT_BYTES}",
            where=str(path),
            remedy="Cut it down to the prompts that are needed, or store it as parquet.",
        )
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"The file cannot be read: {error.strerror}", where=str(path), remedy="Check its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The file is binary, or not UTF-8 text: byte {error.start}",
            where=str(path),
            remedy="Save it as UTF-8 text, or give it the ending that says what it is.",
        ) from error
    if "\0" in text:
        raise PromptError(
            "The file is binary, not text", where=str(path), remedy="Pass a file with one prompt on each line."
        )
    return text


def _read_csv(text: str, column: str | None, where: str) -> Iterator[Any]:
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        chosen = _choose_column([name for name in rows.fieldnames or [] if name], column, where)
        for row in rows:
            yield row.get(chosen)
    except csv.Error as error:
        raise PromptError(
            f"This is not valid CSV: {error}", where=where, remedy="Quote prompts that hold commas or quotes."
        ) from error


def _read_json(text: str, lines: bool, column: str | None, where: str) -> Iterator[Any]:
    try:
        if lines:
            rows: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise PromptError(
            f"This is not valid JSON: {str(error)[:200]}",
            where=where,
            remedy="Use a list of strings or of objects; one value a line in .jsonl.",
        ) from error
    if isinstance(rows, dict):  # {"prompts": [...]}, as a table's column
        rows = rows[_choose_column([key for key, value in rows.items() if isinstance(value, list)], column, where)]
    if not isinstance(rows, list):
        raise PromptError("The JSON is not a list of prompts", where=where, remedy="Use a list of strings or objects.")
    for row in rows:
        yield row[_choose_column(list(row), column, where)] if isinstance(row, dict) else row


def _read_parquet(path: Path, column: str | None) -> Iterator[Any]:
    try:
        parquet: Any = import_module("pyarrow.parquet")
        pyarrow: Any = import_module("pyarrow")
    except ImportError as error:
        raise PromptError(
            "Reading parquet needs the package `pyarrow`",
            where=str(path),
            remedy="Run `pip install 'dcomp[datasets]'`, or use a .txt file.",
        ) from error
    kinds = pyarrow.types
    try:
        with parquet.ParquetFile(path) as file:
            names = {field.name: field.type for field in file.schema_arrow}
            readable = (kinds.is_string, kinds.is_large_string, kinds.is_integer)
            usable = [name for name, kind in names.items() if any(test(kind) for test in readable)]
            chosen = _choose_column(usable, column, str(path))
            place = [field.path for field in map(file.schema.column, range(len(file.schema)))].index(chosen)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).column(place).total_uncompressed_size
                if size > MAX_TEXT_BYTES:
                    raise PromptError(
                        f"Column {chosen!r} holds {size} bytes in a row group, more than the limit of {MAX_TEXT_BYTES}",
                        where=str(path),
                        remedy="Write it with smaller row groups, or choose another column.",
                    )
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[chosen]):
                    yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise PromptError(
            f"This is not a readable parquet file: {str(error)[:200]}",
            where=str(path),
            remedy="Check that the file is whole.",
        ) from error


def _read_data_set(name: str, column: str | None) -> Iterator[Any]:
    if not Path(name).is_dir() and not _NAME.fullmatch(name):
        raise PromptError(
            "This is neither a file nor the name of a data set", where=name[:80], remedy="Pass a file of prompts."
        )
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            "There is no such file, and reading data sets needs the package `datasets`",
            where=name,
            remedy="Check the path, or run `pip install 'dcomp[datasets]'`.",
        ) from error
    try:
        rows: Any = datasets.load_dataset(name, split="train", streaming=True)
        first: Mapping[str, Any] = next(iter(rows), {})
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise PromptError(
            f"There is no file of this name, and no data set: {reason}",
            where=name,
            remedy="Check the path, or the name and the connection.",
        ) from error
    chosen = _choose_column([key for key, value in first.items() if isinstance(value, str | int)], column, name)
    return (row[chosen] for row in rows)


def _choose_column(names: Iterable[Any], column: str | None, where: str) -> str:
    present = [str(name) for name in names]
    wanted = [column] if column is not None else [*COLUMNS, *(f"{name}s" for name in COLUMNS)]
    for name in wanted:
        if name in present:
            return name
    if column is None and len(present) == 1:
        return present[0]
    shown = ", ".join(name[:40] for name in present[:MAX_COLUMN_NAMES]) or "none"
    more = f" and {len(present) - MAX_COLUMN_NAMES} more" if len(present) > MAX_COLUMN_NAMES else ""
    raise PromptError(
        f"There is no column {column!r}" if column is not None else "It is not clear which column holds the prompts",
        where=where,
        remedy=f"Name one of the columns that hold text or numbers: {shown}{more}.",
    )


def _checked(values: Iterable[Any], where: str) -> Iterator[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str) and type(value) is not int:
            raise PromptError(
                f"Prompt {row + 1} is no text but {type(value).__name__}",
                where=where,
                remedy="Use text, or whole numbers for classes.",
            )
        text = str(value).strip()
        if len(text) > MAX_PROMPT_CHARS:
            raise PromptError(
                f"Prompt {row + 1} has {len(text)} characters, more than the limit of {MAX_PROMPT_CHARS}",
                where=where,
                remedy="Shorten it; text encoders read a few hundred at most.",
            )
        if text:
            yield text
