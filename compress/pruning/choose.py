"""Which of many cuts to make: those whose errors add up to the least among all that save enough.

Each site has options, of which one or none is taken; a part within another one has no say where that is removed. It is
a knapsack with multiple choice, solved exactly, as in `allocation.py` for bits. Errors of cuts are taken to
add up, which is what they are measured for (Zhang et al. 2024, LAPTOP-Diff, section 3.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import LinearConstraint

from dcomp import UsageError
from dcomp.compress.binary_program import Floats, minimise_binary
from dcomp.compress.pruning.costs import Saving
from dcomp.compress.pruning.cut_list import CutList

NODES = 50_000  # of the search tree


class ChoiceError(UsageError):
    """A budget or constraints that no choice meets."""


@dataclass(frozen=True)
class Option:
    """One way to cut a site.

    Attributes:
        site: its name.
        label: of the way; tied sites choose the same one.
        cuts: what goes.
        error: what it adds to the error of the model; not negative.
        saving: what it saves.
    """

    site: str
    label: str
    cuts: CutList
    error: float
    saving: Saving


@dataclass(frozen=True)
class Constraints:
    """What a choice must keep to.

    Attributes:
        pinned: sites that stay whole, and with them those around them.
        tied: sets of sites that choose options of the same label, or none of them any.
        contiguous: lists of sites, in order, of which those that are removed must lie side by side.
    """

    pinned: frozenset[str] = frozenset()
    tied: tuple[tuple[str, ...], ...] = ()
    contiguous: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The choice.

    Attributes:
        options: that were taken.
        error: the sum of their errors.
        saving: of all of them.
    """

    options: tuple[Option, ...]
    error: float
    saving: Saving

    @property
    def cuts(self) -> CutList:
        """All cuts."""
        removed: frozenset[str] = frozenset().union(*(option.cuts.removed for option in self.options))
        kept: dict[str, tuple[int, ...]] = {}
        for option in self.options:
            kept |= option.cuts.kept
        return CutList(removed, kept)


@dataclass(frozen=True)
class Problem:
    """Options, and how they exclude each other.

    Attributes:
        options: site -> its options; to leave it whole is none of them.
        around: site -> sites that it lies in.
        constraints: that hold as well.
    """

    options: Mapping[str, Sequence[Option]]
    around: Mapping[str, Sequence[str]]
    constraints: Constraints = field(default_factory=Constraints)

    def most(self) -> Saving:
        """Return the most that can be saved of each."""
        found = [self._solve([-getattr(o.saving, key) for o in self.able()], Saving(0, 0), []) for key in _KEYS]
        return Saving(*(getattr(one.saving, key) for one, key in zip(found, _KEYS, strict=True) if one))

    def best(self, needed: Saving, count: int = 1) -> list[Chosen]:
        """Return the choices with the least errors that save enough, best first, and no two alike.

        Args:
            needed: the least that must be saved.
            count: choices at most.

        Raises:
            ChoiceError: nothing saves enough.
        """
        found: list[Chosen] = []
        while len(found) < count:
            one = self._solve([o.error for o in self.able()], needed, found)
            if one is None:
                break
            found.append(one)
        if not found:
            most = self.most()
            raise ChoiceError(
                f"The budget asks for {_words(needed)}, and at most {_words(most)} can go",
                where="budget",
                remedy="Ask for less, pin less, or let narrower parts be chosen.",
            )
        return found

    def able(self) -> list[Option]:
        """Return the options that no pin forbids."""
        pinned = self.constraints.pinned
        staying = pinned.union(*(self.around.get(site, ()) for site in pinned))
        return [option for site, found in self.options.items() if site not in staying for option in found]

    def _solve(self, objective: Sequence[float], needed: Saving, unlike: Sequence[Chosen]) -> Chosen | None:
        """Return the choice with the least objective that differs from others; None if there is none."""
        options = self.able()
        if not options:
            return Chosen((), 0.0, Saving(0, 0)) if needed == Saving(0, 0) and not unlike else None
        rows, limits = self._rows(options)
        for key in _KEYS:
            if (enough := getattr(needed, key)) > 0:
                rows.append([-getattr(option.saving, key) / enough for option in options])
                limits.append(-1.0)
        for other in unlike:
            self._forbid([option in other.options for option in options], rows, limits)
        starts = self._starts(options, rows, limits)
        values = np.array([*objective, *[0.0] * starts])

        def taken(x: Floats) -> list[bool]:
            return [bool(value > 0.5) for value in x[: len(options)]]

        def choice(x: Floats) -> Chosen:
            return _chosen([option for option, one in zip(options, taken(x), strict=True) if one])

        def forbid(x: Floats) -> LinearConstraint | None:
            saving = choice(x).saving
            if all(getattr(saving, key) >= getattr(needed, key) for key in _KEYS):
                return None
            own: list[list[float]] = []
            limit: list[float] = []
            self._forbid(taken(x), own, limit)
            return LinearConstraint(_padded(own, len(values)), ub=limit)

        constraints = [LinearConstraint(_padded(rows, len(values)), ub=limits)]
        found = minimise_binary(values, constraints, forbid, nodes=NODES)
        return choice(found[0]) if found else None

    @staticmethod
    def _forbid(taken: Sequence[bool], rows: list[list[float]], limits: list[float]) -> None:
        """Add a row that this very choice breaks."""
        rows.append([1.0 if one else -1.0 for one in taken])
        limits.append(sum(taken) - 1.0)

    def _rows(self, options: Sequence[Option]) -> tuple[list[list[float]], list[float]]:
        """Return rows and limits: one option of a site and of all around it, and equal labels of tied ones."""
        rows, limits = [], []
        for site in self.options:
            chain = {site, *self.around.get(site, ())}
            rows.append([float(option.site in chain) for option in options])
            limits.append(1.0)
        for first, *others in self.constraints.tied:
            for label in sorted({option.label for option in options if option.site in (first, *others)}):
                mine = [float(option.site == first and option.label == label) for option in options]
                for other in others:
                    theirs = [float(option.site == other and option.label == label) for option in options]
                    difference = [a - b for a, b in zip(mine, theirs, strict=True)]
                    rows += [difference, [-value for value in difference]]
                    limits += [0.0, 0.0]
        return rows, limits

    def _starts(self, options: Sequence[Option], rows: list[list[float]], limits: list[float]) -> int:
        """Add rows that let what is removed of a list begin once; return how many variables they need."""
        count = 0
        for sites in self.constraints.contiguous:
            first = count
            for place, site in enumerate(sites):
                before = sites[place - 1] if place else None
                own = [float(_removes(o, site)) - float(before is not None and _removes(o, before)) for o in options]
                rows.append([*own, *[0.0] * count, -1.0])  # a start where a site is removed and the one before is not
                limits.append(0.0)
                count += 1
            rows.append([0.0] * (len(options) + first) + [1.0] * (count - first))
            limits.append(1.0)
        return count


_KEYS = ("parameters", "macs")


def _removes(option: Option, site: str) -> bool:
    return site in option.cuts.removed


def _chosen(options: Sequence[Option]) -> Chosen:
    saving = Saving(0, 0)
    for option in options:
        saving += option.saving
    return Chosen(tuple(options), sum(option.error for option in options), saving)


def _padded(rows: Sequence[Sequence[float]], width: int) -> Floats:
    return np.array([[*row, *[0.0] * (width - len(row))] for row in rows])


def _words(saving: Saving) -> str:
    texts = [f"{saving.parameters:,} parameters"] if saving.parameters else []
    texts += [f"{saving.macs:,} multiply-accumulates"] if saving.macs else []
    return " and ".join(texts) or "nothing"
