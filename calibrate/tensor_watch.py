"""Tags that follow tensors from function to function during one run of a model.

Owns two questions about the input of a layer: which of its channels come from different tensors, and is it still the
latents that went into the model. Nothing but the tags is kept: a tag dies with its tensor.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_CAT = {torch.cat, torch.concat, torch.concatenate}
# Functions after which channel i is still made of channel i alone (or nearly so: a group norm mixes statistics), so
# that the boundaries of a concatenation stay where they are. The first set also leaves the values what they were.
_COPYING: set[Any] = {
    nn.functional.dropout,
    nn.functional.interpolate,
    nn.functional.avg_pool2d,
    nn.functional.max_pool2d,
    Tensor.to,
    Tensor.type,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.detach,
}
_BY_CHANNEL: set[Any] = {
    nn.functional.group_norm,
    nn.functional.layer_norm,
    nn.functional.rms_norm,
    nn.functional.silu,
    nn.functional.gelu,
    nn.functional.relu,
    nn.functional.mish,
}


class TensorWatch(TorchFunctionMode):
    """Follow tensors while active, as a context manager around one run; layers report what they read.

    Args:
        latents: the tensor that the run starts from.

    Attributes:
        boundaries: split points of the concatenation that a layer reads, along its channel axis, by layer.
        direct: layers that read a concatenation without a norm or activation between.
        first: layers that read the latents, or a function of the latents alone that has no weights.
        inputs: number of the tensor that a layer reads in its first call, by layer.
    """

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.boundaries: dict[str, tuple[int, ...]] = {}
        self.direct: set[str] = set()
        self.first: set[str] = set()
        self.inputs: dict[str, int] = {}
        # Weak, by identity: a tag lives as long as its tensor, so that no activation is kept and no id is reused.
        self._latents = WeakTensorKeyDictionary({latents: True})
        self._concatenated = WeakTensorKeyDictionary()
        self._numbers = WeakTensorKeyDictionary()
        self._next = count()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, then tag what it returns."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = list(tensors_in((args, kwargs)))
        if func in _CAT:
            self._tag_cat(output, read, kwargs.get("dim", args[1] if len(args) > 1 else 0))
        elif read and func in _COPYING | _BY_CHANNEL and read[0] in self._concatenated:
            dim, boundaries, direct = self._concatenated[read[0]]
            self._concatenated[output] = (dim, boundaries, direct and func in _COPYING)
        if len(read) == 1 and read[0] in self._latents:
            for tensor in tensors_in(output):
                self._latents[tensor] = True
        return output

    def reads(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Note what a layer reads."""
        self.inputs.setdefault(name, self._numbers.setdefault(x, next(self._next)))
        if x in self._latents:
            self.first.add(name)
        dim, boundaries, direct = self._concatenated.get(x, (None, (), False))
        if dim == (1 if isinstance(layer, nn.Conv2d) else x.ndim - 1):
            self.boundaries[name] = boundaries
            if direct:
                self.direct.add(name)

    def _tag_cat(self, output: Tensor, parts: list[Tensor], dim: int) -> None:
        # Pieces of one tensor put together again are no concatenation.
        if len({part.untyped_storage().data_ptr() for part in parts}) < 2:
            return
        dim %= output.ndim
        starts = accumulate((part.shape[dim] for part in parts), initial=0)
        boundaries: set[int] = set()
        for start, part in zip(starts, parts, strict=False):
            inner_dim, inner, _ = self._concatenated.get(part, (None, (), False))
            boundaries |= {start} | {start + i for i in inner if inner_dim == dim}
        self._concatenated[output] = (dim, tuple(sorted(boundaries - {0})), True)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dictionaries, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
