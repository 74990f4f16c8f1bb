"""Choices of cuts, against all that there are."""

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.compress.pruning.choose import ChoiceError, Chosen, Constraints, Option, Problem
from dcomp.compress.pruning.costs import Saving
from dcomp.compress.pruning.cut_list import CutList

LISTS = ("blocks.0", "blocks.1", "blocks.2")


def problem_of(seed: int, constraints: Constraints = Constraints()) -> Problem:  # noqa: B008
    """Three blocks with two sites each, one of them only narrower; all have costs and errors at random."""
    draw = random.Random(seed)

    def option(site: str, label: str, cuts: CutList) -> Option:
        return Option(site, label, cuts, draw.randint(0, 20) / 4, Saving(draw.randint(1, 30), draw.randint(0, 30)))

    options: dict[str, list[Option]] = {}
    around: dict[str, tuple[str, ...]] = {}
    for block in LISTS:
        options[block] = [option(block, "gone", CutList(frozenset({block})))]
        around[block] = ()
        for name in ("attn", "ff"):
            site = f"{block}.{name}"
            widths = [option(site, f"{n} of 3", CutList(kept={f"{site}:heads": (*range(n),)})) for n in (2, 1)]
            gone = [option(site, "gone", CutList(frozenset({site})))] if name == "attn" else []
            options[site], around[site] = widths + gone, (block,)
    return Problem(options, around, constraints)


def every_choice(problem: Problem) -> Iterator[tuple[Option, ...]]:
    """All of them: a block is gone, or each of its sites has an option or none."""
    ways = []
    for block in LISTS:
        inside = [site for site in problem.options if problem.around[site] == (block,)]
        within = itertools.product(*([None, *problem.options[site]] for site in inside))
        ways.append([(problem.options[block][0],), *(tuple(o for o in picked if o) for picked in within)])
    rules = problem.constraints
    for picked in itertools.product(*ways):
        taken = {option.site: option for options in picked for option in options}
        removed = {site for option in taken.values() for site in option.cuts.removed}
        labels = [{taken[site].label if site in taken else None for site in tied} for tied in rules.tied]
        runs = [[key for key, _ in itertools.groupby(site in removed for site in line)] for line in rules.contiguous]
        allowed = all(len(one) == 1 for one in labels) and all(run.count(True) < 2 for run in runs)
        staying = {*rules.pinned, *(outer for site in rules.pinned for outer in problem.around[site])}
        if allowed and not staying & taken.keys():
            yield tuple(taken.values())


def names(options: tuple[Option, ...]) -> frozenset[tuple[str, str]]:
    return frozenset((option.site, option.label) for option in options)


def saved(options: tuple[Option, ...]) -> Saving:
    return Saving(sum(o.saving.parameters for o in options), sum(o.saving.macs for o in options))


RULES = [
    Constraints(),
    Constraints(pinned=frozenset({"blocks.1.attn", "blocks.2"})),
    Constraints(tied=(("blocks.0.attn", "blocks.1.attn", "blocks.2.attn"),)),
    Constraints(contiguous=(LISTS,)),
    Constraints(frozenset({"blocks.0"}), (("blocks.0.ff", "blocks.1.ff"),), (LISTS,)),
]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(RULES), st.integers(0, 120), st.integers(0, 120))
def test_no_choice_is_better(seed: int, rules: Constraints, parameters: int, macs: int) -> None:
    problem, needed = problem_of(seed, rules), Saving(parameters, macs)
    able = [
        options
        for options in every_choice(problem)
        if saved(options).parameters >= parameters and saved(options).macs >= macs
    ]
    if not able:
        with pytest.raises(ChoiceError, match="at most"):
            problem.best(needed)
        return
    (chosen,) = problem.best(needed)
    assert names(chosen.options) in map(names, able)
    assert chosen.saving == saved(chosen.options)
    assert chosen.error == pytest.approx(min(sum(o.error for o in options) for options in able))
    most = problem.most()
    assert most.parameters == max(saved(options).parameters for options in every_choice(problem))
    assert most.macs == max(saved(options).macs for options in every_choice(problem))


@pytest.mark.parametrize("seed", range(5))
def test_the_next_best_ones_come_in_their_order(seed: int) -> None:
    problem = problem_of(seed)
    errors = sorted(
        sum(o.error for o in options) for options in every_choice(problem) if saved(options).parameters >= 40
    )
    found = problem.best(Saving(40, 0), 6)
    assert [one.error for one in found] == pytest.approx(errors[:6])
    assert len({names(one.options) for one in found}) == 6


def test_a_larger_budget_costs_more_and_names_what_can_go() -> None:
    problem = problem_of(3)
    errors = [problem.best(Saving(needed, 0))[0].error for needed in range(10, problem.most().parameters, 10)]
    assert errors == sorted(errors)
    with pytest.raises(ChoiceError, match=f"at most {problem.most().parameters:,} parameters"):
        problem.best(Saving(10_000, 0))


def test_cuts_of_a_choice_are_those_of_its_options() -> None:
    chosen = Chosen(
        (
            Option("a", "gone", CutList(frozenset({"a"})), 1.0, Saving(1, 1)),
            Option("b", "1 of 3", CutList(kept={"b:heads": (2,)}), 1.0, Saving(1, 1)),
        ),
        2.0,
        Saving(2, 2),
    )
    assert chosen.cuts == CutList(frozenset({"a"}), {"b:heads": (2,)})
