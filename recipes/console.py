"""What people see: progress, tables, errors. The one place that knows rich.

Results go to stdout, progress, plans and errors to stderr. Bars and colours appear on a terminal only; anywhere else,
and where `NO_COLOR` or `CI` is set, progress is a plain line every half minute. Nothing is markup: prompts, layer names
and paths are printed as they are, with control characters made visible.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from dcomp import DcompError
from dcomp.calibrate.progress import Progress

PLAIN_SECONDS = 30.0  # between two progress lines where there is no terminal
PLAIN_WIDTH = 160  # of tables where there is no terminal to ask
"""`progress(text, done, total)`: what is being done, and how much of it."""


def is_interactive() -> bool:
    """Return whether bars and colours may be shown on stderr."""
    return sys.stderr.isatty() and not _wants_plain()


@contextmanager
def progress() -> Iterator[Progress]:
    """Show progress while the block runs; calls with a new text begin a new line."""
    if not is_interactive():
        yield PlainProgress(say)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}", style="dim", markup=False),
    )
    with Bars(*columns, console=_stderr()) as bars:
        tasks: dict[str, TaskID] = {}

        def report(text: str, done: int, total: int) -> None:
            known = tasks.get(text)
            if known is None or (done == 0 and bars.tasks[known].finished):
                known = tasks[text] = bars.add_task(visible(text), total=total or None, memory="")
            bars.update(known, completed=done, total=total or None, memory=bytes_text(_memory()))

        yield report


class PlainProgress:
    """Progress as lines of text: at the start, every half minute, and at the end of each piece of work.

    Args:
        write: receives the lines.
        clock: seconds, monotonic.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._text: str | None = None
        self._started = self._printed = 0.0
        self._first = 0  # done when the work began: what a resumed run found finished says nothing about its speed
        self._finished = False

    def __call__(self, text: str, done: int, total: int) -> None:
        """Tell how far the work called `text` is."""
        now = self._clock()
        if text != self._text or (self._finished and done < total):
            self._text, self._started, self._first, self._finished = text, now, done, False
        elif self._finished or (done < total and now - self._printed < PLAIN_SECONDS):
            return
        self._printed, self._finished = now, done >= total
        elapsed = now - self._started
        parts = [f"{visible(text)}: {done}/{total}", f"{time_text(elapsed)} elapsed"]
        if self._first < done < total:
            parts.append(f"about {time_text(elapsed * (total - done) / (done - self._first))} left")
        self._write(", ".join([*parts, f"{bytes_text(_memory())} of memory"]))


def say(text: str) -> None:
    """Print a line for people on stderr."""
    _stderr().print(Text(visible(text, keep="\n")), soft_wrap=True)


def print_json(data: object) -> None:
    """Print one JSON document on stdout, in ASCII: no encoding of stdout, and no odd file name, can spoil it."""
    print(json.dumps(data, indent=2, allow_nan=False))


def print_error(error: DcompError) -> None:
    """Print the problem, its place and the remedy on stderr."""
    screen = _stderr()
    screen.print(Text.assemble(("Error: ", "bold red"), visible(error.problem, keep="\n")), soft_wrap=True)
    if error.where:
        screen.print(Text.assemble(("   in: ", "bold"), visible(error.where)), soft_wrap=True)
    screen.print(Text.assemble(("   do: ", "bold green"), visible(error.remedy, keep="\n")), soft_wrap=True)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
    on: Literal["stdout", "stderr"] = "stdout",
) -> None:
    """Print a table; columns whose numbers are in `right` are aligned to the right."""
    table = Table(
        title=Text(visible(title), style="bold") if title else None,
        title_justify="left",
        show_header=any(columns),
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    for number, column in enumerate(columns):
        table.add_column(Text(visible(column)), justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(visible(value_text(cell))) for cell in row))
    (_stdout() if on == "stdout" else _stderr()).print(table)


def print_facts(title: str, facts: Mapping[str, Any], *, on: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print named values, one a line; lists of values are joined, mappings and lists of mappings become more lines."""
    print_table(title, ("", ""), list(_flatten(facts)), on=on)


def print_validation(result: Any, html: Path | None = None) -> None:
    """Print the verdict, the thresholds and the figures of a `ValidationResult`."""
    screen = _stdout()
    good = ("PASSED", "bold green") if result.thresholds else ("MEASURED, no thresholds given", "bold")
    verdict = good if result.passed else ("NOT GOOD ENOUGH", "bold red")
    screen.print(
        Text.assemble(verdict, f"  {visible(result.compressed)}  against  {visible(result.original)}"), soft_wrap=True
    )
    if result.thresholds:
        rows = [
            (name, value_text(check.value), f"{check.relation} {value_text(check.limit)}", mark_text(check.passed))
            for name, check in result.thresholds.items()
        ]
        print_table("Thresholds", ("", "measured", "wanted", ""), rows, right=(1, 2))
    print_table("Figures", ("", "value", ""), result.figures(), right=(1,))
    for warning in result.warnings:
        say(f"Note: {warning}")
    if html is not None:
        screen.print(Text(f"Report: {visible(str(html / 'index.html'))}"), soft_wrap=True)


def print_doctor(report: Mapping[str, Any]) -> None:
    """Print what `dcomp doctor` found: the chosen kernels as a table, or those of layers if some were asked for."""
    if report["layers"]:
        print_records("Layers", report["layers"])
        return
    apart = ("kernels", "layers", "cuda", "built")
    print_facts("Machine", {key: value for key, value in report.items() if key not in apart})
    print_facts("Kernels of our own", {"compiled": report["built"], "cuda": report["cuda"]})
    # Where there is no GPU, all of its rows have one reason, which is told above.
    rows = report["kernels"] if report["cuda"]["devices"] else [r for r in report["kernels"] if r["device"] == "cpu"]
    print_records("Operations", rows)


def print_records(
    title: str, records: Sequence[Mapping[str, Any]], *, on: Literal["stdout", "stderr"] = "stdout"
) -> None:
    """Print mappings as the rows of one table; the columns are their keys, in order of appearance."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[record.get(column, "") for column in columns] for record in records]
    numeric = [n for n, c in enumerate(columns) if any(_is_number(r.get(c)) for r in records)]
    print_table(title, [column.replace("_", " ") for column in columns], rows, right=numeric, on=on)


def mark_text(passed: bool) -> Text:
    """Return a word in the colour of its meaning."""
    return Text("ok", style="green") if passed else Text("missed", style="bold red")


def value_text(value: object) -> str:
    """Return a short text of a value: four significant digits, `-` for None, `yes` or `no`."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def bytes_text(count: float | None) -> str:
    """Return a number of bytes in decimal units, such as `12.6 MB`."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def time_text(seconds: float) -> str:
    """Return a duration as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def visible(text: object, keep: str = "") -> str:
    """Return text with control characters and lone surrogates escaped: a prompt must not steer a terminal."""
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name} · ")
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping | list | tuple) for v in value):
            for number, item in enumerate(value):
                yield from _flatten(item if isinstance(item, Mapping) else {"": item}, f"{name} {number} · ")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(value_text(v) for v in value) or "-"
        elif "bytes" in key.split("_") and type(value) is int:
            yield name, bytes_text(value)
        else:
            yield name, value_text(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _memory() -> int:
    return int(psutil.Process().memory_info().rss)


def _wants_plain() -> bool:
    return bool(os.environ.get("NO_COLOR") or os.environ.get("CI")) or os.environ.get("TERM") == "dumb"


# One of each for the whole process, so that a line printed while a bar is shown does not tear it.
@functools.cache
def _stderr() -> Console:
    return _console(stderr=True)


@functools.cache
def _stdout() -> Console:
    return _console(stderr=False)


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    plain = _wants_plain() or not stream.isatty()
    return Console(
        stderr=stderr,
        no_color=plain or None,
        force_terminal=False if plain else None,
        width=PLAIN_WIDTH if not stream.isatty() else None,
        markup=False,
        highlight=False,
        emoji=False,
    )
