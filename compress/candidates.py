"""What a layer may become: its quantized forms, each made alone with its inputs in the float model, and tried in it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.replay import RowBatch
from dcomp.compress.quantize_layer import Layer, quantize_layer
from dcomp.compress.scheme import QScheme

FLOAT = "float"  # label of a layer that is left as it is
CHUNK_ROWS = 16  # rows that run at once

Candidates = Mapping[str, Mapping[str, QScheme]]  # layer -> label -> scheme


class CandidateError(DcompError):
    """A layer whose forms cannot be tried."""


def quantized_forms(
    denoiser: nn.Module, rows: RowBatch, name: str, schemes: Mapping[str, QScheme], bins: StepBins | None
) -> Iterator[tuple[str, Any]]:
    """Yield a float layer's quantized forms by label, made with its inputs in the float model.

    Raises:
        CandidateError: the layer is never called.
        QuantizationError: see `quantize_layer`.
    """
    layer = denoiser.get_submodule(name)
    assert isinstance(layer, Layer)
    x = layer_input(denoiser, rows, name)
    row_bins = None
    if bins is not None and len(x) == len(rows):
        row_bins = torch.tensor([bins.lookup(t) for t in rows.timesteps.tolist()])
    for label, scheme in schemes.items():
        with torch.no_grad():
            yield label, quantize_layer(layer, x, scheme, row_bins=row_bins, bins=bins.count if bins else 1, name=name)


@contextmanager
def in_place(denoiser: nn.Module, forms: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let forms stand in for the layers of these names until the context ends."""
    with ExitStack() as stack:
        for name, form in forms.items():
            stack.callback(denoiser.set_submodule, name, denoiser.get_submodule(name))
            denoiser.set_submodule(name, form)
        yield


def layer_input(denoiser: nn.Module, rows: RowBatch, name: str) -> Tensor:
    """Return what a layer reads at its first call; nothing behind it is run."""
    parts: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts.append((args[0] if args else kwargs["input"]).detach())
        raise _InputReady

    hook = denoiser.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            for chunk in rows.chunks(CHUNK_ROWS):
                try:
                    denoiser(*chunk.args, **chunk.kwargs)
                except _InputReady:
                    continue
                raise CandidateError(
                    "The layer was not called", where=name, remedy="Leave it in float, or record calls that use it."
                )
    finally:
        hook.remove()
    return torch.cat(parts)


class _InputReady(Exception):  # noqa: N818 - no error: it ends a forward pass at the layer that was waited for
    pass
