"""Which rows a training pass must not see, so that they can judge it."""

import torch
from torch import Tensor

from dcomp import DcompError

PART = 0.1


class HeldOutError(DcompError):
    """Rows of which none can be held out."""


def hold_out(groups: Tensor, seed: int, part: float = PART) -> tuple[Tensor, Tensor]:
    """Divide rows by whole groups, for rows of one trajectory know each other.

    Args:
        groups: integers `[N]`, the group of each row.
        seed: decides which groups are held out.
        part: of the groups; at least one is held out, and one is not.

    Returns:
        Positions of the rows to learn from and of those held out, int64, ascending.

    Raises:
        HeldOutError: there is one group only.
    """
    distinct = groups.unique()
    if len(distinct) < 2:
        raise HeldOutError(
            "All rows belong to one trajectory, so none can be held out to judge the result",
            remedy="Calibrate with more prompts.",
        )
    count = min(max(1, round(len(distinct) * part)), len(distinct) - 1)
    chosen = distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:count]]
    held_out = torch.isin(groups, chosen)
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
