"""The error of predictions as `compress/objective.py` means it, in other words."""

from torch import Tensor


def accumulating_error(error: Tensor, exact: Tensor, steps: int) -> Tensor:
    """Return the mean square of errors `[n, ...]`, the part along the exact predictions `steps` times."""
    error, exact = error.double().flatten(1), exact.double().flatten(1)
    direction = exact / exact.norm(dim=1, keepdim=True)
    along = (error * direction).sum(1, keepdim=True) * direction
    return steps * along.square().mean(1) + (error - along).square().mean(1)
