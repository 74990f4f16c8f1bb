"""How long work reports where it is: one function, called with a text, the count done and the total."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(text: str, done: int, total: int) -> None:
    """Report nothing."""
