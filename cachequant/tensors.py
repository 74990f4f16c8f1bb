"""Tensors in what modules return: tensors, tuples, and diffusers' outputs alike."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested value, in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return a nested value with every tensor changed."""
    return _pytree.tree_map_only(Tensor, change, tree)


def with_leaves(tree: Any, tensors: list[Tensor]) -> Any:
    """Return a nested value with other tensors, in the order of `leaves`."""
    given = iter(tensors)
    return map_tensors(lambda _: next(given), tree)


def parts_of(output: Any) -> list[Any]:
    """Return what a module returned as a list: the members of a tuple or list, or the one thing."""
    return list(output) if isinstance(output, tuple | list) else [output]


def like(output: Any, parts: list[Any]) -> Any:
    """Put parts into the form of an output; the inverse of `parts_of`."""
    return type(output)(parts) if isinstance(output, tuple | list) else parts[0]


def placeholder(like: Tensor, value: float = 0.0) -> Tensor:
    """Return a tensor of that shape, dtype and device that takes no memory: all of its elements are one."""
    return torch.full((), value, dtype=like.dtype, device=like.device).expand(like.shape)


def own_memory(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where it is a part of a larger piece of memory, which it would keep alive."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def weighted(tensors: Sequence[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Return the weighted sum, in float32 where the tensors are shorter; one tensor of weight 1 is itself."""
    if weights == (1.0,):
        return tensors[0]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = tensors[0].to(wide) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)
