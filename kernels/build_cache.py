"""The user's folder of what is compiled on this machine: nobody else writes to it, and each file is made once."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_TIMEOUT = 300  # seconds


class BuildError(Exception):
    """Something cannot be built here, and why: a reason for the dispatch table, which then has other rows."""


def folder() -> Path:
    """Return the folder, made now if it is not there yet.

    Raises:
        BuildError: there is none, or others can write to it; what they could have put there is not loaded.
    """
    try:
        found = path()
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = found.stat()
    except (OSError, RuntimeError) as error:  # the latter without a home
        raise BuildError(f"there is no folder to keep built kernels in ({error})") from error
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"the folder of built kernels can be written by others: {found}")
    return found


def path() -> Path:
    """Return where the folder is or would be.

    Raises:
        RuntimeError: there is no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcomp"


def usage() -> tuple[int, int]:
    """Return the number of files and of bytes in the folder, without making it."""
    try:
        sizes = [file.stat().st_size for file in path().iterdir() if file.is_file()]
    except (OSError, RuntimeError):
        return 0, 0
    return len(sizes), sum(sizes)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file of the folder; another process that wants it waits.

    Raises:
        OSError: the folder cannot be written, or the other process does not finish.
    """
    with FileLock(file.with_suffix(".lock"), timeout=_TIMEOUT):
        yield


def write(file: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write to a path beside the file, and put the result in its place: readers never see a part of it.

    Raises:
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        unfinished = Path(scratch) / file.name
        fill(unfinished)
        unfinished.replace(file)
