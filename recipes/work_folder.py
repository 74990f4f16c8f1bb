"""The hidden folder beside an output, where finished work waits for the end of a run.

One run has it at a time. It stays after an interruption, for the next run to go on with, and is removed, lock file and
all, as soon as no finished work lies in it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dcomp import DcompError, UsageError
from dcomp.calibrate.safetensors_file import ModelError
from dcomp.recipes.console import say


@contextmanager
def work_folder(output: Path, fresh: bool) -> Iterator[Path]:
    """Give the work folder of an output to one run, and tell an interrupted person how to go on.

    Args:
        output: the folder that the run makes; its work folder lies beside it.
        fresh: throw away what is in it.

    Raises:
        UsageError: the folder cannot be made.
        DcompError: another run has it, its content is damaged, or the disk is full.
    """
    root = output.parent / f".{output.name}.dcomp-work"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The output's folder cannot be written: {error.strerror}", where=str(root.parent), remedy="Use --output."
        ) from error
    lock = FileLock(root / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DcompError(
            "Another process is making this checkpoint",
            where=str(output),
            remedy="Wait until it is done, or choose another output.",
        ) from error
    try:
        if fresh:
            for entry in root.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
        yield root
    except KeyboardInterrupt:
        say(f"\nInterrupted. What is finished is kept in {root}; the same command goes on with it.")
        raise
    except (ModelError, SafetensorError) as error:
        where = getattr(error, "where", None) or str(root)
        if not where.startswith(str(root)):
            raise
        raise DcompError(
            f"Finished work is damaged: {getattr(error, 'problem', error)}",
            where=where,
            remedy="Run the same command again with --fresh.",
        ) from error
    except OSError as error:
        raise DcompError(
            f"The work folder cannot be written: {error.strerror or error}",
            where=str(root),
            remedy="Free some space and run the same command again; it goes on where it stopped.",
        ) from error
    finally:
        # While the lock is held: a process that waits for a removed lock file notices and starts over.
        if not any(entry.is_dir() for entry in (root.iterdir() if root.exists() else ())):
            shutil.rmtree(root, ignore_errors=True)
        lock.release()
