"""Which output channels of which module make a layer's input, found by following tensors through one run of a model.

If channels of a module are multiplied by factors, so is everything made of them by copies and products, up to what
reads it. Only those steps are followed; whatever else touches a tensor on the way *spoils* its channels: something
would notice. Which axis is that of channels is not looked at: whoever uses the result tries it with numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dcomp.calibrate.structure import is_layer
from dcomp.calibrate.tensor_watch import tensors_in

_COPYING: set[Any] = {
    functional.dropout,
    Tensor.to,
    Tensor.type,
    Tensor.float,
    Tensor.contiguous,
    Tensor.clone,
    Tensor.view,
    Tensor.reshape,
    Tensor.transpose,
    Tensor.permute,
    Tensor.flatten,
    Tensor.unflatten,
    Tensor.squeeze,
    Tensor.unsqueeze,
    Tensor.expand,
    Tensor.__getitem__,
}
_CUTTING: set[Any] = {Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.split_with_sizes}
_ADDING: set[Any] = {Tensor.add, torch.add}
_MULTIPLYING: set[Any] = {Tensor.mul, torch.mul}


@dataclass(frozen=True)
class Rows:
    """Output channels of a module: rows of its weight, with their biases.

    Attributes:
        module: name of a layer, or of another module with a weight of one axis, such as a norm.
        start, stop: the channels.
        plus: what is added to them before they become a factor: 1 in `1 + scale`.
    """

    module: str
    start: int
    stop: int
    plus: float = 0.0

    def overlaps(self, other: "Rows") -> bool:
        """Whether both have a channel in common."""
        return self.module == other.module and self.start < other.stop and other.start < self.stop


@dataclass(frozen=True)
class Reading:
    """A tensor that layers read, made of rows and nothing else that factors would change.

    Attributes:
        rows: all that must be multiplied for the tensor to be.
        tensor: number of the tensor in the run.
    """

    rows: tuple[Rows, ...]
    tensor: int


class RowWatch(TorchFunctionMode):
    """Follow rows while active; use `watching`, which also has the modules report.

    Attributes:
        readings: layer -> what it read in each of its calls; None for something else.
        spoiled: rows that something reads which is no layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readings: dict[str, list[Reading | None]] = {}
        self.spoiled: set[Rows] = set()
        self._tags = WeakTensorKeyDictionary()
        self._numbers = WeakTensorKeyDictionary()
        self._next = count()
        self._made: set[str] = set()
        self._inside = 0

    @contextmanager
    def watching(self, denoiser: nn.Module) -> Iterator["RowWatch"]:
        """Within a `with` block, follow what the modules of a denoiser make."""
        with ExitStack() as stack:
            for name, module in denoiser.named_modules():
                if is_layer(module):
                    stack.callback(module.register_forward_pre_hook(self._reader(name), with_kwargs=True).remove)
                if is_layer(module) or _is_affine(module):
                    stack.callback(module.register_forward_hook(self._producer(name)).remove)
            stack.enter_context(self)
            yield self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, then tag what it returns."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._inside:
            return output
        made = list(tensors_in(output))
        read = [tensor for tensor in tensors_in((args, kwargs)) if tensor in self._tags]
        if read and made:
            self._follow(func, args, kwargs, read, made)
        return output

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: list[Tensor], made: list[Tensor]
    ) -> None:
        tags: list[_Tag] = [self._tags[tensor] for tensor in read]
        followed: list[_Tag] = []
        if func is functional.scaled_dot_product_attention:
            value = kwargs["value"] if "value" in kwargs else args[2]
            others = [tag for tensor, tag in zip(read, tags, strict=True) if tensor is not value]
            followed = [replace(self._tags[value], affine=False)] if value in self._tags else []
            self._spoil(others)
        elif func in _COPYING and len(tags) == 1:
            followed = tags
        elif func in _CUTTING:
            followed = [*tags[0].cut(read[0], made)]
        elif func in _MULTIPLYING and len(tags) == 1:
            followed = [replace(tags[0], affine=False)]
        elif func in _ADDING:
            followed = _sum(args, tags)
        if not followed:
            self._spoil(tags)
        for position, tensor in enumerate(made):
            self._tags.pop(tensor, None)  # a function in place returns what it read
            if followed:
                self._tags[tensor] = followed[position % len(followed)]

    def _spoil(self, tags: list["_Tag"]) -> None:
        self.spoiled |= {rows for tag in tags for rows in tag.rows}

    def _reader(self, name: str) -> Callable[..., None]:
        def starts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            tag = self._tags.get(x)
            reading = Reading(tag.rows, self._numbers.setdefault(x, next(self._next))) if tag else None
            self.readings.setdefault(name, []).append(reading)
            self._inside += 1

        return starts

    def _producer(self, name: str) -> Callable[..., None]:
        def ended(module: nn.Module, _: Any, y: Any) -> None:
            self._inside -= is_layer(module)
            weight = module.weight
            assert isinstance(weight, Tensor)
            rows = Rows(name, 0, len(weight))
            if name in self._made:
                self.spoiled.add(rows)
            self._made.add(name)
            if isinstance(y, Tensor):
                self._tags[y] = _Tag((rows,), affine=True)

        return ended


@dataclass(frozen=True)
class _Tag:
    """What a tensor is made of; `affine` as long as it is the rows themselves and no product of them."""

    rows: tuple[Rows, ...]
    affine: bool

    def cut(self, whole: Tensor, pieces: list[Tensor]) -> Iterator["_Tag"]:
        """Yield the tag of each piece: its own channels if channels are what is cut."""
        first, *others = self.rows
        axis = next((i for i, size in enumerate(whole.shape) if pieces[0].shape[i] != size), 0)
        by_channel = not others and whole.shape[axis] == first.stop - first.start
        start = first.start
        for piece in pieces:
            stop = start + piece.shape[axis]
            yield replace(self, rows=(replace(first, start=start, stop=stop),)) if by_channel else self
            start = stop


def _sum(args: tuple[Any, ...], tags: list[_Tag]) -> list[_Tag]:
    """Return the tag of a sum that factors go through: `1 + rows`, or `rows * x + rows` of the same module."""
    numbers = [value for value in args if isinstance(value, int | float)]
    if len(tags) == 1 and len(numbers) == 1 and tags[0].affine and len(tags[0].rows) == 1:
        (rows,) = tags[0].rows
        return [replace(tags[0], rows=(replace(rows, plus=rows.plus + numbers[0]),))]
    if len(tags) == 2 and {tag.affine for tag in tags} == {True, False} and all(len(tag.rows) == 1 for tag in tags):
        rows_of = sorted((rows for tag in tags for rows in tag.rows), key=lambda rows: rows.start)
        if rows_of[0].module == rows_of[1].module and not rows_of[0].overlaps(rows_of[1]):
            return [_Tag(tuple(rows_of), affine=False)]
    return []


def _is_affine(module: nn.Module) -> bool:
    """Whether a module has one weight for each channel, as norms do; what it does with it is not known here."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and weight.is_floating_point()
