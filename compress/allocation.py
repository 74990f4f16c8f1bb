"""Mixed precision: one scheme for each layer, so that the errors add up to the least within a budget.

Errors of layers are taken to add up, which is what `sensitivity.py` measures them for. The choice is an integer
program, a knapsack with one item out of each group of layers, solved by HiGHS; its result is checked in whole bytes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint

from dcomp import UsageError
from dcomp.compress.binary_program import minimise_binary

NODES = 20_000  # of the search tree; what is not proven by then is told as the gap


class AllocationError(UsageError):
    """Options or budgets that no choice fits."""


@dataclass(frozen=True)
class Option:
    """One way to store and run a layer.

    Attributes:
        layer: its name.
        label: of the way; layers of a group choose the same one.
        nbytes: size of the layer as stored.
        error: what it adds to the error of the model, in a unit that all options share.
        cost: time of one call, in a unit that all options share; 0 if there is no budget for it.
    """

    layer: str
    label: str
    nbytes: int
    error: float
    cost: float = 0.0


@dataclass(frozen=True)
class Allocation:
    """The chosen options.

    Attributes:
        chosen: the option of each layer, in the order of the layers given.
        error: the sum of their errors.
        nbytes: size of everything, what has no options included.
        cost: the sum of their costs.
        bits: average over all parameters.
        bound: no choice within the budgets has an error below this.
    """

    chosen: dict[str, Option]
    error: float
    nbytes: int
    cost: float
    bits: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the error may be from the least possible one, as a part of it."""
        return max(0.0, self.error - self.bound) / self.error if self.error > 0 else 0.0


def allocate(
    options: Mapping[str, Sequence[Option]],
    *,
    parameters: int,
    max_bytes: int | None = None,
    target_bits: float | None = None,
    max_cost: float | None = None,
    fixed_bytes: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Allocation:
    """Choose an option for each layer with the least sum of errors within all budgets.

    The result depends on nothing but the options: neither on the order of layers nor on the machine. Of two options of
    a layer with equal errors the smaller is taken.

    Args:
        options: layer -> its options.
        parameters: number of all parameters, also of what stays float.
        max_bytes: of the whole model.
        target_bits: largest average over all parameters, what stays float included.
        max_cost: largest sum of costs.
        fixed_bytes: size of everything that has no options.
        groups: layer -> name of a group whose layers must choose the same label; others choose alone.

    Raises:
        AllocationError: no budget, a layer without options, values that are no sizes or errors, or a budget that
            cannot be met; the smallest that can be is named.

    Source:
        Zhao et al. 2024, MixDQ, section 4.3, with bytes or costs in the place of average bits.
    """
    if max_bytes is None and target_bits is None and max_cost is None:
        raise AllocationError("There is no budget", where="allocate", remedy="Give bytes, bits or a cost.")
    limits = [max_bytes, None if target_bits is None else math.floor(target_bits * parameters / 8)]
    budget = min((limit for limit in limits if limit is not None), default=None)
    items = _items(options, groups or {})
    problem = _Problem(items, None if budget is None else budget - fixed_bytes, max_cost)
    _require_reachable(problem, fixed_bytes, parameters)
    picked, bound = problem.solve()
    by_layer = {option.layer: option for item in picked for option in item.options}
    chosen = {layer: by_layer[layer] for layer in options}
    nbytes = fixed_bytes + sum(option.nbytes for option in chosen.values())
    return Allocation(
        chosen,
        math.fsum(option.error for option in chosen.values()),
        nbytes,
        math.fsum(option.cost for option in chosen.values()),
        8 * nbytes / max(1, parameters),
        bound,
    )


@dataclass(frozen=True)
class _Item:
    """One choice for a whole group: the options of its layers with the same label."""

    options: tuple[Option, ...]

    @property
    def nbytes(self) -> int:
        return sum(option.nbytes for option in self.options)

    @property
    def error(self) -> float:
        return math.fsum(option.error for option in self.options)

    @property
    def cost(self) -> float:
        return math.fsum(option.cost for option in self.options)


def _items(options: Mapping[str, Sequence[Option]], groups: Mapping[str, str]) -> list[list[_Item]]:
    """Return the choices of each group, groups in the order of their first names; the dominated are left out."""
    members: dict[tuple[bool, str], list[str]] = {}
    for layer in sorted(options):
        _check(layer, options[layer])
        members.setdefault((layer in groups, groups.get(layer, layer)), []).append(layer)
    choices = []
    for layers in members.values():
        by_label = [{option.label: option for option in options[layer]} for layer in layers]
        common = [label for label in by_label[0] if all(label in other for other in by_label)]
        if not common:
            raise AllocationError(
                "The layers of a group have no option in common",
                where=", ".join(layers[:3]),
                remedy="Give them options of the same labels, or take them apart.",
            )
        choices.append(_undominated([_Item(tuple(other[label] for other in by_label)) for label in common]))
    return choices


def _check(layer: str, options: Sequence[Option]) -> None:
    def good(option: Option) -> bool:
        numbers = (option.error, option.cost)
        return option.layer == layer and option.nbytes >= 0 and all(math.isfinite(n) and n >= 0 for n in numbers)

    labels = [option.label for option in options]
    if not options or len(set(labels)) < len(labels) or not all(map(good, options)):
        raise AllocationError(
            "A layer needs options of different labels, with sizes, errors and costs that are finite and not negative",
            where=f"{layer}: {', '.join(labels) or 'no options'}",
            remedy="Leave out options that could not be measured.",
        )


def _undominated(items: Sequence[_Item]) -> list[_Item]:
    """Leave out choices that are no better in anything than another one; ascending by error, then bytes, then cost."""
    kept: list[_Item] = []
    for item in sorted(items, key=lambda item: (item.error, item.nbytes, item.cost, item.options[0].label)):
        if all(item.nbytes < other.nbytes or item.cost < other.cost for other in kept):
            kept.append(item)
    return kept


@dataclass(frozen=True)
class _Problem:
    """Choices of all groups, and what they may take together; None for no limit."""

    groups: list[list[_Item]]
    max_bytes: int | None
    max_cost: float | None

    def least_bytes(self) -> int:
        return sum(min(item.nbytes for item in group) for group in self.groups)

    def least_cost(self) -> float:
        return math.fsum(min(item.cost for item in group) for group in self.groups)

    def solve(self) -> tuple[list[_Item], float]:
        """Return the choice of each group and a lower bound of the sum of errors.

        Raises:
            AllocationError: no choice meets both budgets.
        """
        return self._minimise(lambda item: item.error)

    def fewest_bytes(self) -> int:
        """Return the fewest bytes that the budget of costs leaves possible."""
        picked, _ = _Problem(self.groups, None, self.max_cost)._minimise(lambda item: item.nbytes)
        return sum(item.nbytes for item in picked)

    def _minimise(self, objective: Callable[[_Item], float]) -> tuple[list[_Item], float]:
        """Solve in excesses over the least of each group, as parts of the room that is left.

        A choice that exceeds a budget is forbidden by the items that are too much together.
        """
        if not self.groups:
            return [], 0.0
        values = [[objective(item) for item in group] for group in self.groups]
        floor = math.fsum(min(group) for group in values)
        excess = np.array([value - min(group) for group in values for value in group], dtype=float)
        rows, fits = self._rows()
        constraints = [self._one_each(), *(LinearConstraint(row[None], ub=[1]) for row in rows)]
        starts = np.cumsum([0, *map(len, self.groups[:-1])])

        def forbid(x: Any) -> LinearConstraint | None:
            where = self._picked(x)
            excluded = self._too_much(self._items_at(where))
            if not excluded:
                return None
            row = np.zeros((1, len(excess)))
            row[0, [starts[g] + where[g] for g in excluded]] = 1
            return LinearConstraint(row, ub=[len(excluded) - 1])

        found = minimise_binary(excess, constraints, forbid, nodes=NODES, upper=fits)
        if found is None:
            raise AllocationError(
                "No choice was found that meets all budgets",
                where="budgets",
                remedy="Allow more bytes or a higher cost.",
            )
        picked = self._items_at(self._picked(found[0]))
        return picked, min(floor + max(0.0, found[1]), math.fsum(objective(item) for item in picked))

    def _items_at(self, places: Sequence[int]) -> list[_Item]:
        return [group[place] for group, place in zip(self.groups, places, strict=True)]

    def _budgets(self) -> Iterator[tuple[float, Callable[[_Item], float]]]:
        """Yield the room that each budget leaves over the least of all groups, and the excess of a choice."""
        if self.max_bytes is not None:
            yield self.max_bytes - self.least_bytes(), lambda item: item.nbytes
        if self.max_cost is not None:
            yield self.max_cost - self.least_cost(), lambda item: item.cost

    def _rows(self) -> tuple[list[Any], Any]:
        """Return a row of excesses for each budget, as parts of its room, and 1 for choices that fit by themselves."""
        rows: list[Any] = []
        fits = np.ones(sum(map(len, self.groups)))
        for room, value in self._budgets():
            over = [value(item) - min(map(value, group)) for group in self.groups for item in group]
            fits *= [o <= room for o in over]
            rows.append(np.array(over, dtype=float) / max(room, 1e-300))
        return [np.where(fits == 1, row, 0.0) for row in rows], fits

    def _too_much(self, picked: Sequence[_Item]) -> list[int]:
        """Return groups whose choices together exceed a budget, few of them; none if all budgets are kept."""
        for room, value in self._budgets():
            over = [value(item) - min(map(value, group)) for item, group in zip(picked, self.groups, strict=True)]
            found: list[int] = []
            for group in sorted(range(len(over)), key=lambda i: -over[i]):
                found.append(group)
                if math.fsum(over[i] for i in found) > room * (1 + 1e-12):
                    return found
        return []

    def _one_each(self) -> LinearConstraint:
        matrix = np.zeros((len(self.groups), sum(map(len, self.groups))))
        first = 0
        for row, group in enumerate(self.groups):
            matrix[row, first : first + len(group)] = 1
            first += len(group)
        return LinearConstraint(matrix, lb=1, ub=1)

    def _picked(self, x: Any) -> list[int]:
        parts = np.split(x, np.cumsum([len(group) for group in self.groups])[:-1])
        return [int(np.argmax(part)) for part in parts]


def _require_reachable(problem: _Problem, fixed_bytes: int, parameters: int) -> None:
    least = problem.least_cost()
    if problem.max_cost is not None and problem.max_cost < least:
        raise AllocationError(
            f"The cost cannot be as low as {problem.max_cost:g}",
            where="max_cost",
            remedy=f"Allow a cost of {least:g} or more, or give options that cost less.",
        )
    if problem.max_bytes is None:
        return
    fewest = problem.least_bytes()
    if problem.max_cost is not None and problem.max_bytes >= fewest:
        fewest = problem.fewest_bytes()
    if problem.max_bytes < fewest:
        bits = math.ceil(8000 * (fixed_bytes + fewest) / max(1, parameters)) / 1000
        within = "" if problem.max_cost is None else f" at a cost of {problem.max_cost:g}"
        raise AllocationError(
            f"The model cannot be as small as {fixed_bytes + problem.max_bytes} bytes{within}",
            where="bytes",
            remedy=f"Allow {fixed_bytes + fewest} bytes ({bits:.3f} bits a parameter) or more.",
        )
