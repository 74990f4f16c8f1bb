"""What stands in for a tensor that a call does not compute: a weighted sum of those that earlier calls computed.

Every predictor of the literature is such a sum, and its weights follow from the places of the calls alone. Letters: s
the last call that computed, r the one before it, q the one before that, t the call that is skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Weights = Callable[[Sequence[float], float], tuple[float, ...]]
_HERMITE_SCALE = 0.5  # sigma of HiCache, section 4


@dataclass(frozen=True)
class Predictor:
    """A rule for weights.

    Attributes:
        nodes: number of earlier computing calls that it reads.
        weights: places of these calls, oldest first, and of the skipped call -> a weight for each.
        by_call: places are call indices, whatever the plan's coordinates are: the rule of a paper counts calls.
    """

    nodes: int
    weights: Weights
    by_call: bool = False


def lagrange(places: Sequence[float], place: float) -> tuple[float, ...]:
    """Return the weights of the polynomial through all nodes, at their real distances; they add up to 1.

    Exact for polynomials of a degree below the number of nodes, however unevenly these lie.
    """
    weights = []
    for i, own in enumerate(places):
        weight = 1.0
        for j, other in enumerate(places):
            if j != i:
                weight *= (place - other) / (own - other)
        weights.append(weight)
    return tuple(weights)


def _differences(places: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the weights of TaylorSeer's first and second difference: each divides by the spacing of its own time."""
    zeros = [0.0] * len(places)
    first, second = zeros.copy(), zeros.copy()
    spacing = places[-1] - places[-2]
    first[-1], first[-2] = 1 / spacing, -1 / spacing
    if len(places) > 2:
        older = places[-2] - places[-3]
        second[-1], second[-2] = first[-1] / spacing, first[-2] / spacing - 1 / older / spacing
        second[-3] = 1 / older / spacing
    return first, second


def _series(terms: Callable[[float], tuple[float, float]]) -> Weights:
    def weights(places: Sequence[float], place: float) -> tuple[float, ...]:
        slope, bend = terms(place - places[-1])
        first, second = _differences(places)
        found = [slope * a + bend * b for a, b in zip(first, second, strict=True)]
        found[-1] += 1
        return tuple(found)

    return weights


def _taylor(k: float) -> tuple[float, float]:
    return k, k * k / 2


def _hermite(k: float) -> tuple[float, float]:
    x, scale = _HERMITE_SCALE * k, _HERMITE_SCALE
    return scale * 2 * x, scale**2 * (4 * x * x - 2) / 2


PREDICTORS: dict[str, Predictor] = {
    "reuse": Predictor(1, lagrange),
    "linear": Predictor(2, lagrange),
    "quadratic": Predictor(3, lagrange),
    "taylor1": Predictor(2, _series(_taylor), by_call=True),
    "taylor2": Predictor(3, _series(_taylor), by_call=True),
    "hermite1": Predictor(2, _series(_hermite), by_call=True),
    "hermite2": Predictor(3, _series(_hermite), by_call=True),
}
"""Name in a plan -> rule. `linear` and `quadratic` are exact extrapolation; `taylor` is that of Liu et al. 2025,
TaylorSeer, equation 6, and `hermite` that of Feng et al. 2025, HiCache: both are here to be compared with."""
