"""Rows of a denoiser call: which of its arguments have one for each sample, and a call with some of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcomp.cachequant.tensors import leaves
from dcomp.calibrate.replay import map_leaves
from dcomp.calibrate.structure import POSITIONS

_PAIR = 2  # contexts of classifier-free guidance in one batch: the first half of the rows, and the second


def count_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the samples of a call: the length of the argument with the most dimensions."""
    return len(max(leaves((args, kwargs)), key=lambda leaf: leaf.ndim))


def take_rows(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor | slice
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with some of their samples.

    Args:
        names: of the denoiser's parameters, in order.
        args: positional arguments.
        kwargs: keyword arguments.
        rows: which samples.
    """
    count = count_rows(args, kwargs)

    def taken(path: tuple[str | int, ...], leaf: Any) -> Any:
        name = names[path[0]] if isinstance(path[0], int) else path[0]
        has_rows = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count and name not in POSITIONS
        return leaf[rows] if has_rows else leaf

    return map_leaves(args, kwargs, taken)


def second_half(
    names: Sequence[str], forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a denoiser on the second half of a call's samples.

    Args:
        names: of the denoiser's parameters, in order.
        forward: of the denoiser.
        args: positional arguments of the whole call.
        kwargs: its keyword arguments.
    """
    rows = slice(count_rows(args, kwargs) // _PAIR, None)
    own_args, own_kwargs = take_rows(names, args, kwargs, rows)
    return forward(*own_args, **own_kwargs)


def halves_apart(output: Any) -> list[Tensor]:
    """Return how far the second half of the samples is from the first, for each tensor of a prediction."""
    return [second - first for first, second in (leaf.chunk(_PAIR) for leaf in leaves(output))]


def joined_halves(second: Sequence[Tensor], apart: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a prediction from their second half and how far it is from the first."""
    return [torch.cat([half - distance, half]) for half, distance in zip(second, apart, strict=True)]
