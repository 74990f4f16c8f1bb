"""What a run has worked out already, in JSON files that wait for it if it is interrupted.

A folder belongs to one question: whatever could change an answer is part of its name.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcomp.calibrate.tree_file import replacing


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

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a result as JSON data: read, if it was kept, else made and kept.

        Args:
            name: that suits a file.
            make: works it out.
        """
        if self._folder is None:
            return make()
        file = self._folder / f"{name}.json"
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError):  # not there, or cut off by a full disk
            value = make()
        with replacing(file) as partial:
            partial.write_text(json.dumps(value))
        return value


def digest(data: Any) -> str:
    """Return a short name for JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
