"""A drawing as a file of its own: PNG, SVG or PDF, equal for equal drawings."""

from pathlib import Path
from typing import Any

from dcomp import DcompError, UsageError

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture_file(file: Path) -> None:
    """Refuse a file name that no picture can have, before any work is done for it.

    Raises:
        UsageError: its ending is unknown.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(
            "The ending of the picture's file is unknown", where=str(file), remedy=f"End it in {' or '.join(SUFFIXES)}."
        )


def new_figure(width: float, height: float, dpi: int = 120) -> Any:
    """Return an empty figure of some inches, without pyplot: no global state, whatever the user's backend is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure; the folder is made if needed.

    Raises:
        UsageError: the ending is unknown.
        DcompError: the file cannot be written.
    """
    from matplotlib import rc_context

    check_picture_file(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Neither a time nor a version in the file: equal drawings give equal files.
        times = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        with rc_context({"svg.hashsalt": "dcomp"}):
            figure.savefig(file, metadata=times[file.suffix.lower()])
    except OSError as error:
        raise DcompError(
            f"The picture cannot be written: {error.strerror or error}", where=str(file), remedy="Name another place."
        ) from error
