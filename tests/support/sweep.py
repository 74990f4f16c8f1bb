"""Sweeps over many cases: a few run by default, the others with the slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Mark as slow the cases of a parametrized test that are not among the quick ones; these must be cases too."""
    every, first = list(cases), list(quick)
    assert all(case in every for case in first)
    return [case if case in first else slow(*(case if isinstance(case, tuple) else (case,))) for case in every]


def slow(*values: Any) -> Any:
    """Mark one case as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)
