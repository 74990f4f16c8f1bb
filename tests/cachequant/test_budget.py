"""Budgets of plans."""

import pytest

from dcomp import UsageError
from dcomp.cachequant.budget import Budget


@pytest.mark.parametrize(
    ("text", "name", "measure", "limit"),
    [
        ("2x", "2x", "macs", 25),
        (" 2.5 X", "2.5x", "macs", 20),
        ("150gmacs", "150GMACs", "macs", 15),
        ("800 ms", "800ms", "seconds", 16),
        ("20calls", "20calls", "calls", 20),
    ],
)
def test_a_budget_is_a_number_of_whole_calls(text: str, name: str, measure: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert (budget.name, budget.measure) == (name, measure)
    assert budget.limit(calls=50, macs=1e10, seconds=0.05) == pytest.approx(limit)
    assert Budget.parse(budget.name) == budget
    assert budget.at(limit, calls=50, macs=1e10, seconds=0.05).amount == pytest.approx(budget.amount)


@pytest.mark.parametrize("text", ["", "2", "x", "-2x", "2y", "1e3x", "nanx", "2x3", "1x", "0.5x", "0ms", "0calls"])
def test_what_is_no_budget_or_saves_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"no budget|saves nothing") as caught:
        Budget.parse(text)
    assert "--budget 2x" in caught.value.remedy
