"""Codes that can be learned: what a training pass puts in place of a quantized layer's fixed weight.

A weight is `codes * multiplier * scale`, with codes in `low..high` and the step `multiplier * scale` (a multiplier may
be negative). Two ways let a gradient reach integer codes: rounding that the gradient passes straight through, and a
rectified sigmoid between the two codes around a float weight. Letters as in `kernels/packing.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from dcomp.compress.layers import QuantLayer
from dcomp.compress.quantized import Execution
from dcomp.kernels.packing import PackedWeight

# The sigmoid is stretched beyond 0 and 1 and cut off there, so that it reaches both and stays.
_STRETCH, _OFFSET = 1.2, -0.1


def round_through(codes: Tensor, low: int, high: int) -> Tensor:
    """Return the nearest whole codes within the range; the gradient passes straight through."""
    # `codes - codes` is exactly 0, so the result is whole; the other order, `codes + (whole - codes)`, need not be.
    return codes.detach().round().clamp(low, high) + (codes - codes.detach())


def soft_step(v: Tensor) -> Tensor:
    """Return `h(v)` in 0..1: the rectified sigmoid.

    Source:
        Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization, equation 23.
    """
    return (torch.sigmoid(v) * _STRETCH + _OFFSET).clamp(0, 1)


def inverse_soft_step(h: Tensor) -> Tensor:
    """Return the `v` for which `soft_step(v)` is `h`, which is in 0..1."""
    return torch.logit((h - _OFFSET) / _STRETCH)


def undecided(h: Tensor, beta: float) -> Tensor:
    """Return 0 where `h` is 0 or 1 and 1 where it is one half; the larger `beta`, the flatter in between.

    Source:
        Nagel et al. 2020, equation 24.
    """
    return 1 - (2 * h - 1).abs().pow(beta)


def fake_execution(layers: Iterable[QuantLayer]) -> AbstractContextManager[None]:
    """Within a `with` block, let layers run in fake execution."""
    return executed(dict.fromkeys(layers, "fake"))


@contextmanager
def executed(executions: Mapping[QuantLayer, Execution]) -> Iterator[None]:
    """Within a `with` block, let each layer run in an execution of its own."""
    before = {layer: layer.execution for layer in executions}
    try:
        for layer, execution in executions.items():
            layer.execution = execution
        yield
    finally:
        for layer, execution in before.items():
            layer.execution = execution


@contextmanager
def weights_replaced(weights: Mapping[QuantLayer, Callable[[], Tensor]]) -> Iterator[None]:
    """Within a `with` block, let the fake execution of layers use other weights.

    Args:
        weights: layer -> function that returns its weight, fp32 `[O, *taps, I]`.
    """
    try:
        for layer, weight in weights.items():
            vars(layer)["values"] = _in_torch_layout(weight)
        yield
    finally:
        for layer in weights:
            vars(layer).pop("values", None)


def store(layer: QuantLayer, packed: PackedWeight) -> None:
    """Give a layer another weight of the same form; it is not copied."""
    layer.qweight, layer.scale, layer.multiplier = packed.qweight, packed.scale, packed.multiplier


def _in_torch_layout(weight: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: weight().movedim(-1, 1)
