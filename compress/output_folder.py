"""The folder of a checkpoint appears completely or not at all.

It is built beside its final place under a temporary name and renamed when it is on the disk. A killed run leaves the
old folder, the new one, or a temporary folder that the next run removes. A lock keeps a second writer out. What goes
into the folder is not known here, but for the two files by which a checkpoint that may be replaced is recognised.
"""

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dcomp import UsageError
from dcomp.compress.manifest import MANIFEST, CheckpointError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class OutputError(UsageError):
    """An output folder that cannot be used."""


def check_output(output: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse an output that exists, unless it is a dcomp checkpoint that may be replaced.

    Args:
        output: folder to make.
        overwrite: whether a checkpoint may be replaced.
        source: folder that it is made from; the two may not overlap.

    Raises:
        OutputError: says what is in the way.
    """
    if source is not None and source.is_dir():
        _refuse_overlap(output, source)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError("The output is not a folder", where=str(output), remedy="Choose another output")
    if not output.exists() or not os.listdir(output):
        return
    if not overwrite:
        raise OutputError("The output folder exists", where=str(output), remedy="Choose another output or --overwrite")
    if not (output / MANIFEST).is_file() or not (output / "model_index.json").is_file():
        raise OutputError(
            "The output folder is no dcomp checkpoint, so it is not replaced",
            where=str(output),
            remedy="Remove it yourself or choose another output",
        )


@contextmanager
def writing(output: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """Give a temporary folder that becomes `output` when the block ends, and vanishes when it raises."""
    with disk_errors(output, needed):
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output):
            _clean_up(output)
            check_output(output, overwrite)
            free = shutil.disk_usage(output.parent).free
            if free < needed:
                raise _disk_full(output, needed, free)
            temporary = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
            temporary.mkdir()
            try:
                yield temporary
                _publish(temporary, output)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep a second writer of the same output out; it is refused at once."""
    lock = FileLock(f"{output}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            "Another process is writing this checkpoint",
            where=str(output),
            remedy="Wait until it is done, or choose another output",
        ) from error
    try:
        yield
    finally:
        # While it is held: a process that waits for a removed lock file notices and starts over.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def disk_errors(output: Path, needed: int) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into errors for people; `needed` bytes are named."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise _disk_full(output, needed, shutil.disk_usage(_existing(output)).free) from error
        raise CheckpointError(
            f"The checkpoint cannot be written: {error.strerror or error}",
            where=str(output),
            remedy="Check the permissions of the output folder",
        ) from error


def sync_folders(folder: Path) -> None:
    """Make sure that the names of all files below a folder are on the disk."""
    for current, _, _ in os.walk(folder):
        sync_folder(Path(current))


def sync_folder(folder: Path) -> None:
    """Make sure that the names in one folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_overlap(output: Path, source: Path) -> None:
    one, other = output.resolve(), source.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise OutputError(
            "The output would overlap the model it is made from",
            where=str(output),
            remedy="Choose an output outside of the model folder",
        )


def _clean_up(output: Path) -> None:
    """Remove what a killed run left; put an old folder back that was moved away and never replaced."""
    for entry in os.scandir(output.parent):
        if entry.name.startswith(f".{output.name}.replaced-") and not output.exists():
            os.replace(entry.path, output)
        elif entry.name.startswith((f".{output.name}.partial-", f".{output.name}.replaced-")):
            shutil.rmtree(entry.path)


def _publish(temporary: Path, output: Path) -> None:
    """Give the new folder its name; the old one, if any, ends under the temporary name."""
    if not output.exists() or not os.listdir(output):
        os.replace(temporary, output)
    elif not _exchange(temporary, output):
        old = output.parent / f".{output.name}.replaced-{uuid.uuid4().hex[:8]}"
        os.replace(output, old)
        os.replace(temporary, output)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, where the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _disk_full(output: Path, needed: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"The disk is full: {needed} bytes are needed and {free} are free",
        where=str(output),
        remedy="Free some space or choose an output on another disk; nothing was left behind",
    )
