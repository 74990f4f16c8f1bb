"""What a run has worked out already, in JSON files that wait for it if it is interrupted.

A folder belongs to one question: whatever could change an answer is part of its name.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dcomp.calibrate.tree_file import replacing

T = TypeVar("T")
_MAX_BYTES = 256 << 20


class KeptResults:
    """Results by name.

    Args:
        root: a work folder; None keeps nothing.
        question: all that the results depend on, as JSON data.
    """

    def __init__(self, root: Path | None = None, question: Any = None) -> None:
        self._folder = None if root is None else root / digest(question)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Any], read: Callable[[Any], T]) -> T:
        """Return a result: read, if it was kept, else made and kept.

        What cannot be read is made again, be it cut off by a full disk or somebody else's: a folder may have come with
        the model.

        Args:
            name: that suits a file.
            make: works it out, as JSON data.
            read: returns what the data stands for.
        """
        if self._folder is None:
            return read(make())
        file = self._folder / f"{name}.json"
        try:
            if file.stat().st_size <= _MAX_BYTES:
                return read(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass
        data = make()
        with replacing(file) as partial:
            partial.write_text(json.dumps(data))
        return read(data)


def digest(data: Any) -> str:
    """Return a short name for JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
