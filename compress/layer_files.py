"""Layers whose tensors stay in the checkpoint's files, and are in memory only while the layer runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.safetensors_file import Header
from dcomp.compress.manifest import CheckpointError


@dataclass(frozen=True)
class _Place:
    """Where one tensor of a layer is when the layer runs, and where it comes from."""

    module: nn.Module
    leaf: str
    file: Path
    name: str
    shape: torch.Size
    stored: torch.dtype
    dtype: torch.dtype


class LayerFiles:
    """Takes the tensors of layers out of memory and brings them back for each run.

    Args:
        denoiser: opened from the files; it cannot be saved any more.
        names: of the layers.
        headers: of the weight files.

    Attributes:
        nbytes: of the tensors that were taken out of memory.

    Raises:
        CheckpointError: a tensor is not in the files, or was changed since it was read.
    """

    def __init__(self, denoiser: nn.Module, names: Iterable[str], headers: Iterable[Header]) -> None:
        files = {name: header.path for header in headers for name in header.tensors}
        found = {name: list(_places(denoiser.get_submodule(name), name, files)) for name in names}
        self._places: dict[str, list[_Place]] = found
        self.nbytes = 0
        for place in (place for places in found.values() for place in places):
            tensor = getattr(place.module, place.leaf)
            self.nbytes += tensor.nbytes
            _put(place, tensor.new_empty(0))
        self._refusal = denoiser.register_state_dict_pre_hook(_refuse)

    def restore(self) -> None:
        """Bring all tensors back into memory for good; harmless when called again."""
        for place in (place for places in self._places.values() for place in places):
            _put(place, _read(place).to(getattr(place.module, place.leaf).device, place.dtype))
        self._places = {}
        self._refusal.remove()

    @contextmanager
    def present(self, name: str) -> Iterator[None]:
        """Within a `with` block, have a layer's tensors in memory."""
        places = self._places.get(name, [])
        empty = [getattr(place.module, place.leaf) for place in places]
        try:
            for place, nothing in zip(places, empty, strict=True):
                _put(place, _read(place).to(nothing.device, place.dtype))
            yield
        finally:
            for place, nothing in zip(places, empty, strict=True):
                _put(place, nothing)


def _places(layer: nn.Module, name: str, files: Mapping[str, Path]) -> Iterator[_Place]:
    for path, module in layer.named_modules(prefix=name):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{leaf}"
            if full not in files:
                raise CheckpointError("A layer's tensor is in no weight file", where=full, remedy="Open it as it is")
            with _opened(files[full], full) as file:
                stored = file.get_tensor(full)
            yield _Place(module, leaf, files[full], full, tensor.shape, stored.dtype, tensor.dtype)


def _read(place: _Place) -> Tensor:
    """Read a tensor into memory of its own."""
    with _opened(place.file, place.name) as file:
        tensor: Tensor = file.get_tensor(place.name)
        if tensor.shape != place.shape or tensor.dtype != place.stored:
            raise _gone(place.file, place.name, "it has another shape or dtype")
        return tensor.clone()


@contextmanager
def _opened(file: Path, name: str) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise _gone(file, name, str(error)[:200]) from error


def _gone(file: Path, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"The tensor {name} can be read no longer: {why}",
        where=str(file),
        remedy="Leave the checkpoint as it is while it is used, and open it again",
    )


def _put(place: _Place, tensor: Tensor) -> None:
    if place.leaf in place.module._parameters:
        place.module._parameters[place.leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        place.module._buffers[place.leaf] = tensor


def _refuse(*_: Any) -> None:
    raise UsageError(
        "Some of this denoiser's tensors stay in the files that it was opened from, so that it has no state dict",
        where="offload",
        remedy="Copy the folder, or open it without offload.",
    )
