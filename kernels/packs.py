"""What a kernel makes of a stored weight once, kept as long as the weight lives."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


@dataclass(frozen=True)
class _State:
    """Where the values of a tensor are, and how often they were changed."""

    version: int
    # Holding the storage keeps its address from being given to another tensor while the pack is kept.
    storage: torch.UntypedStorage
    offset: int | torch.SymInt

    @classmethod
    def of(cls, tensor: Tensor) -> "_State":
        return cls(tensor._version, tensor.untyped_storage(), tensor.storage_offset())

    def fits(self, tensor: Tensor) -> bool:
        return (self.version, self.storage.data_ptr(), self.offset) == (
            tensor._version,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
        )


@dataclass(frozen=True)
class Pack(Generic[T]):
    """Something made of tensors."""

    made: T
    states: tuple[_State, ...]

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors are what it was made of."""
        return len(tensors) == len(self.states) and all(map(_State.fits, self.states, tensors))


class Packs(Generic[T]):
    """What was made of weights.

    A change of a weight is seen by its version, storage and offset. A write through `.data` or a numpy view, which
    torch does not count either, is not.
    """

    def __init__(self) -> None:
        self._packs: weakref.WeakKeyDictionary[Tensor, dict[Hashable, Pack[T]]] = WeakTensorKeyDictionary()  # type: ignore[assignment]

    @staticmethod
    def can_keep(weight: Tensor) -> bool:
        """Whether changes of a weight can be seen; tensors made in inference mode have no version."""
        return not weight.is_inference()

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], T], *others: Tensor) -> T:
        """Return what `make` gives, made now unless it was before.

        Args:
            weight: `can_keep` must be true of it; a view counts as what it is a view of.
            key: the rest that the result depends on.
            make: is called if needed; what it gives must not hold the weight itself, which would then live forever.
            others: further tensors that the result is made of.
        """
        base = _base(weight)
        if base is not weight:
            key = (weight.storage_offset(), weight.shape, weight.stride(), key)
        packs = self._packs.setdefault(base, {})
        tensors = (weight, *others)
        pack = packs.get(key)
        if pack is None or not pack.fits(tensors):
            pack = packs[key] = Pack(make(), tuple(map(_State.of, tensors)))
        return pack.made

    def of(self, weight: Tensor) -> dict[Hashable, Pack[T]]:
        """Return all that is kept of a weight and its views, by key."""
        return dict(self._packs.get(_base(weight), {}))

    def __len__(self) -> int:
        return len(self._packs)


def _base(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base
