"""Folding: smoothing factors become part of what makes a layer's input, so that nothing multiplies it at run time.

What makes it is a norm with weight and bias, rows of a linear layer that modulate a norm without them, or rows that an
attention or a gate passes on. A fold is legal if nothing reads the tensor but layers with the same factors. That is
found by following tensors through one run, and then tried: with factors of 2 in the float model, and their inverse in
what the layers do, inputs must change by just these factors and the prediction not at all. Class names play no
part.

An adapter for the float model no longer fits layers that a fold has touched; they are marked, and refuse it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import prediction_of
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.structure import is_layer
from dcomp.compress.quantized import Quantized
from dcomp.compress.row_watch import Reading, Rows, RowWatch
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import is_quantized, parts_of

TRIAL_TOLERANCE = 1e-4  # of the norm: `(1 + scale) * 2 - 1` rounds, everything else is exact


@dataclass(frozen=True)
class Fold:
    """A tensor whose factors can be folded.

    Attributes:
        rows: what makes it.
        layers: all that reads it, in order of execution.
    """

    rows: tuple[Rows, ...]
    layers: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Number of factors."""
        return self.rows[0].stop - self.rows[0].start

    @property
    def module(self) -> str:
        """Name of the module that takes the factors."""
        return self.rows[0].module


@torch.no_grad()
def find_folds(denoiser: nn.Module, schemes: Mapping[str, QScheme], rows: RowBatch) -> tuple[Fold, ...]:
    """Find where smoothing factors can be folded, before layers are quantized.

    Args:
        denoiser: in float; it is changed and put back meanwhile.
        schemes: layer name -> how it is going to be quantized. All layers that read a tensor must be smoothed.
        rows: a few rows of the calibration set, with which the model is run some times.
    """
    watch = RowWatch()
    with watch.watching(denoiser):
        denoiser(*rows.args, **rows.kwargs)
    candidates = [
        fold
        for fold in _candidates(watch)
        if all(_smoothed(schemes.get(name)) for name in fold.layers)
        and all(_fits(denoiser.get_submodule(name), fold) for name in fold.layers)
        and all(_can_take(denoiser.get_submodule(own.module), own, schemes.get(own.module)) for own in fold.rows)
    ]
    return tuple(_Trial(denoiser, rows, (name for fold in candidates for name in fold.layers)).legal(candidates))


@torch.no_grad()
def fold_smoothing(denoiser: nn.Module, folds: Sequence[Fold]) -> dict[str, str]:
    """Fold the factors of quantized layers, in place; what the denoiser computes stays the same up to rounding.

    A fold is left out where layers have no factors, or not the same.

    Whatever stores outputs of layers, or corrections of them, comes later.

    Args:
        denoiser: quantized.
        folds: what `find_folds` returned for it.

    Returns:
        Name of each layer that lost its factors -> name of the module that took them.
    """
    folded: dict[str, str] = {}
    for fold in folds:
        layers = [denoiser.get_submodule(name) for name in fold.layers]
        parts = [part for layer in layers if is_quantized(layer) for part in parts_of(layer)]
        factors = [part.smooth_inv for part in parts if part.smooth_inv is not None]
        if len(factors) < len(layers) or not all(torch.equal(factors[0], other) for other in factors):
            continue
        for rows in fold.rows:
            module = denoiser.get_submodule(rows.module)
            _multiply(module, rows, factors[0])
            if is_quantized(module):
                _mark(module)
        for part in parts:
            if part.lr_down is not None:  # it read the input as it was
                part.lr_down = (part.lr_down.float() / factors[0]).to(part.lr_down.dtype)
            part.scheme, part.smooth_inv = replace(part.scheme, smooth=False, folded=True), None
        folded |= dict.fromkeys(fold.layers, fold.module)
    return folded


def _candidates(watch: RowWatch) -> list[Fold]:
    """Put layers that read the same tensor together; leave out what anything else reads."""
    readers: dict[Reading, list[str]] = {}
    for name, readings in watch.readings.items():
        for reading in {reading for reading in readings if reading is not None}:
            readers.setdefault(reading, []).append(name)
    others = {
        one: [rows for two in readers if two is not one for rows in two.rows] + [*watch.spoiled] for one in readers
    }
    return [
        Fold(reading.rows, tuple(names))
        for reading, names in readers.items()
        if all(len(set(watch.readings[name])) == 1 for name in names)
        and not any(own.overlaps(other) for own in reading.rows for other in others[reading])
    ]


def _smoothed(scheme: QScheme | None) -> bool:
    return scheme is not None and scheme.smooth and not scheme.boundaries


def _fits(layer: nn.Module, fold: Fold) -> bool:
    """Whether a layer has an input channel for each row."""
    weight: Any = layer.weight
    return all(rows.stop - rows.start == weight.shape[1] for rows in fold.rows)


def _can_take(module: nn.Module, rows: Rows, scheme: QScheme | None) -> bool:
    """Whether a module's rows can be multiplied.

    Weights in half precision would be rounded once more, and a layer that stays float could not refuse an adapter.
    """
    fits = scheme is not None and not (scheme.rank or scheme.directions) if is_layer(module) else True
    return fits and (not rows.plus or _bias(module) is not None)


def _multiply(module: nn.Module, rows: Rows, factors: Tensor) -> None:
    """Multiply what rows of a module make, and what is added to it afterwards; quantized ones by their scales."""
    own = slice(rows.start, rows.stop)
    weights: list[Any] = [part.scale for part in parts_of(module)] if is_quantized(module) else [module.weight]
    for weight in weights:
        weight[own] *= factors.view(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)
    bias = _bias(module)
    if bias is not None:
        bias[own] = (bias[own] + rows.plus) * factors - rows.plus


def _bias(module: nn.Module) -> Tensor | None:
    bias: Tensor | None = getattr(module, "bias", None)  # a norm may have none
    return bias


def _mark(layer: Quantized) -> None:
    for one in (layer, *parts_of(layer)):
        one.scheme = replace(one.scheme, folded=True)


class _Trial:
    """The float model with factors of 2 in the place of smoothing factors, and their inverse in the layers."""

    def __init__(self, denoiser: nn.Module, rows: RowBatch, layers: Iterable[str]) -> None:
        self._denoiser, self._rows, self._layers = denoiser, rows, list(layers)
        self._expected = self._run()

    def legal(self, folds: Sequence[Fold]) -> list[Fold]:
        """Return those that keep the function; all are tried at once, then halves of what does not."""
        if not folds or self._keeps_function(folds):
            return list(folds)
        if len(folds) == 1:
            return []
        half = len(folds) // 2
        return self.legal(folds[:half]) + self.legal(folds[half:])

    def _keeps_function(self, folds: Sequence[Fold]) -> bool:
        generator = torch.Generator().manual_seed(0)
        expected, device = dict(self._expected), self._expected[""].device
        with ExitStack() as stack:
            for fold in folds:
                factors = 2.0 ** torch.randint(-1, 2, (fold.channels,), generator=generator).to(device)
                for rows in fold.rows:
                    stack.enter_context(_multiplied(self._denoiser.get_submodule(rows.module), rows, factors))
                for name in fold.layers:
                    layer = self._denoiser.get_submodule(name)
                    stack.enter_context(_divided(layer, factors))
                    expected[name] = expected[name] * _along_channels(factors, layer, expected[name])
            found = self._run()
        return all(bool((found[name] - x).norm() <= TRIAL_TOLERANCE * x.norm()) for name, x in expected.items())

    def _run(self) -> dict[str, Tensor]:
        """Return what the layers read, and the prediction under an empty name."""
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def starts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.setdefault(name, args[0] if args else kwargs["input"])

            return starts

        with ExitStack() as stack:
            for name in self._layers:
                layer = self._denoiser.get_submodule(name)
                # First of all, so that it sees what arrives and not what another hook makes of it.
                handle = layer.register_forward_pre_hook(hook(name), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            seen[""] = prediction_of(self._denoiser(*self._rows.args, **self._rows.kwargs))
        return seen


@contextmanager
def _multiplied(module: nn.Module, rows: Rows, factors: Tensor) -> Iterator[None]:
    """Within a `with` block, let a float module compute with rows multiplied; a layer's matrix is not touched."""
    if is_layer(module):
        own = slice(rows.start, rows.stop)

        def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            y = y.clone()
            part = y[:, own] if isinstance(module, nn.Conv2d) else y[..., own]
            part.add_(rows.plus).mul_(_along_channels(factors, module, part)).sub_(rows.plus)
            return y

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        return
    before = {parameter: parameter.detach().clone() for parameter in module.parameters()}
    _multiply(module, rows, factors)
    try:
        yield
    finally:
        for parameter, value in before.items():
            parameter.copy_(value)


@contextmanager
def _divided(layer: nn.Module, factors: Tensor) -> Iterator[None]:
    """Within a `with` block, let a layer compute with columns divided by factors."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["input"]
        return (x / _along_channels(factors, layer, x), *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _along_channels(factors: Tensor, layer: nn.Module, values: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (values.ndim - 2 if isinstance(layer, nn.Conv2d) else 0))
