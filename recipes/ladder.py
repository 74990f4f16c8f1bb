"""What bits and a cache cost in the picture: each alone, put together as they are, and planned together.

All four are compared with the original's own pictures, in which everything is computed in float.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcomp.cachequant.plan_set import MeasuredPlan
from dcomp.recipes.plan_choice import PlanJudge


@dataclass(frozen=True)
class Rung:
    """One speed. All numbers are PSNR in dB against the original's pictures, means over pictures.

    Attributes:
        name: of the plan.
        cache_alone: the original with a plan of its own; None if it has none that is better than fewer steps.
        bits_alone: the compressed model, everything computed.
        naive: the compressed model with the original's plan; None as above.
        joint: the compressed model with its own plan.
    """

    name: str
    cache_alone: float | None
    bits_alone: float
    naive: float | None
    joint: float


def climb(
    plans: Sequence[MeasuredPlan],
    compressed: PlanJudge,
    plans_of_original: Mapping[str, MeasuredPlan],
    original: PlanJudge,
) -> tuple[Rung, ...]:
    """Follow all plans and return a rung for each plan of the compressed model.

    Args:
        plans: of the compressed model.
        compressed: makes its pictures.
        plans_of_original: name -> plan.
        original: makes the same pictures with the original.
    """
    bits_alone = original.whole.compare(compressed.computed()).psnr
    rungs = []
    for own in plans:
        joint = original.whole.compare(compressed.follow(own.plan)).psnr
        theirs = plans_of_original.get(own.name)
        naive = None if theirs is None else original.whole.compare(compressed.follow(theirs.plan)).psnr
        rungs.append(Rung(own.name, None if theirs is None else theirs.psnr, bits_alone, naive, joint))
    return tuple(rungs)
