"""The pruning pass: score what can be cut, choose within a budget, and look at the best choices as a whole.

Errors of single cuts only nearly add up. So the best few choices are made, and judged by what the caller judges by; how
well sums and errors of whole choices agree is measured on choices at random, and told.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import spearmanr
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.compress.pruning.choose import Chosen, Constraints, Option, Problem
from dcomp.compress.pruning.costs import Costs, Saving, sites
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.importance import Scorer, Subject, at_random, learned, magnitude, reconstruction, taylor
from dcomp.compress.pruning.options import altered, errors_of, in_units, list_options, measured_options

PROPOSALS = 4  # choices that are made and judged
CHECKED = 12  # choices at random, for how well errors add up
_OF_CHECKED = (3, 8)  # cuts of each


@dataclass(frozen=True)
class Method:
    """How errors of cuts are known.

    Attributes:
        scorer: orders the members of each group.
        measured: each cut is tried; else scores are summed up.
        made_up: what stays makes up for what goes.
    """

    scorer: Scorer
    measured: bool
    made_up: bool


METHODS: dict[str, Method] = {
    "reconstruction": Method(reconstruction, measured=True, made_up=True),
    "magnitude": Method(magnitude, measured=False, made_up=False),
    "taylor": Method(taylor, measured=False, made_up=False),
    "random": Method(at_random, measured=False, made_up=False),
    "masks": Method(learned, measured=False, made_up=True),
}
"""Name -> method. The default is that of LAPTOP-Diff for parts and of optimal brain compression within groups."""


@dataclass(frozen=True)
class Scored:
    """All ways to cut a denoiser.

    Attributes:
        problem: options with their errors.
        units: of errors, at each step; None where they were not measured.
    """

    problem: Problem
    units: Tensor | None


@dataclass(frozen=True)
class Made:
    """A choice that was made.

    Attributes:
        chosen: what goes.
        denoiser: without it.
    """

    chosen: Chosen
    denoiser: nn.Module


@dataclass(frozen=True)
class Additivity:
    """How well errors of single cuts tell those of many.

    Attributes:
        correlation: rank correlation of sums with measured errors; None if one of them does not vary.
        ratio: median of measured errors over sums.
        count: of choices.
    """

    correlation: float | None
    ratio: float
    count: int


def score(
    subject: Subject,
    costs: Costs,
    method: str,
    *,
    constraints: Constraints | None = None,
    round_to: int = 1,
    keep: Callable[[str, Callable[[], list[float]]], list[float]] = lambda _, measure: measure(),
) -> Scored:
    """Return all ways to cut a denoiser, with their errors.

    Args:
        subject: what is cut.
        costs: of it.
        method: key of `METHODS`.
        constraints: that a choice must keep to.
        round_to: see `options.list_options`.
        keep: see `options.measured_options`.

    Raises:
        UsageError: there is no such method, or nothing can be cut.
    """
    if method not in METHODS:
        raise UsageError(
            f"There is no pruning method {method!r}", where="method", remedy=f"Use one of {', '.join(METHODS)}."
        )
    if not subject.units.parts and not subject.units.groups:
        raise UsageError(
            "Nothing in this denoiser is understood well enough to be cut",
            where=type(subject.denoiser).__name__,
            remedy="Quantize it instead.",
        )
    how = METHODS[method]
    options = list_options(subject, costs, how.scorer(subject), round_to=round_to)
    problem = Problem(options, dict(sites(subject.units)), constraints or Constraints())
    if not how.measured:
        return Scored(problem, None)
    able = {option.site for option in problem.able()}
    options, units = measured_options(subject, {site: options[site] for site in options if site in able}, keep)
    return Scored(replace(problem, options=options), units)


def proposals(
    subject: Subject, problem: Problem, needed: Saving, method: str, count: int = PROPOSALS
) -> Iterator[Made]:
    """Yield the best choices within a budget, made, and not judged; the best one first.

    Beside the best of all there are those of parts alone and of widths alone, which a sum of errors may rank wrongly.
    """
    kinds: list[Mapping[str, Sequence[Option]]] = [
        problem.options,
        {site: [o for o in found if o.cuts.removed] for site, found in problem.options.items()},
        {site: [o for o in found if not o.cuts.removed] for site, found in problem.options.items()},
    ]
    seen: list[CutList] = []
    for place, options in enumerate(kinds):
        part = Problem(options, problem.around, problem.constraints)
        try:
            found = part.best(needed, max(1, count - 2) if place == 0 else 1)
        except UsageError:
            if place == 0:
                raise
            continue
        for chosen in found:
            if chosen.cuts not in seen and len(seen) < count:
                seen.append(chosen.cuts)
                yield Made(chosen, altered(subject, chosen.cuts, made_up=METHODS[method].made_up))


def additivity(subject: Subject, scored: Scored, count: int = CHECKED) -> Additivity:
    """Compare sums of measured errors with errors of choices at random (LAPTOP-Diff, section 3.3)."""
    assert scored.units is not None
    problem = scored.problem
    draw = random.Random(subject.seed)
    every = [option for found in problem.options.values() for option in found]
    sums, joint = [], []
    for place in range(count):
        subject.progress("errors of several cuts", place, count)
        taken: dict[str, Option] = {}
        for option in draw.sample(every, min(len(every), draw.randint(*_OF_CHECKED))):
            chain = {option.site, *problem.around[option.site]}
            around_taken = any(option.site in problem.around[site] for site in taken)
            if not chain & taken.keys() and not around_taken:
                taken[option.site] = option
        cuts = Chosen(tuple(taken.values()), 0.0, Saving(0, 0)).cuts
        joint.append(in_units(errors_of(subject, altered(subject, cuts)), scored.units))
        sums.append(sum(option.error for option in taken.values()))
    subject.progress("errors of several cuts", count, count)
    varies = len({*sums}) > 1 and len({*joint}) > 1
    ratios = sorted(one / other for one, other in zip(joint, sums, strict=True) if other > 0)
    return Additivity(
        float(spearmanr(sums, joint).statistic) if varies else None,
        ratios[len(ratios) // 2] if ratios else float("nan"),
        count,
    )
