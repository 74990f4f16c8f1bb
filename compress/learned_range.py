"""Static input ranges that can be learned: gradients of a quantizer with respect to its scale.

Zeros stay, so a range keeps the place of its 0 and grows or shrinks around it. B is the number of step bins.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dcomp.compress.layers import QuantConv2d
from dcomp.kernels import qparams


def learned_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Quantize and dequantize as `qparams.fake_quant_static` does, bit for bit, with gradients for `x` and `scale`.

    With the code q, the gradient inside the range is 1 for x and `q - zero - x / scale` for the scale. Outside it is 0
    for x and `q - zero` for the scale.

    Args:
        x: any shape and float dtype.
        scale: fp32, broadcasts against `x`.
        zero: uint8, likewise.

    Source:
        Esser et al. 2020, Learned Step Size Quantization, equations 3 and 5; with a zero point.
    """
    x, fixed = x.float(), scale.detach()
    exact = qparams.fake_quant_static(x.detach(), fixed, zero)
    position = x.detach() / fixed
    inside = (position + zero >= 0) & (position + zero <= 255)
    by_scale = (exact / fixed - torch.where(inside, position, 0)) * scale
    by_x = torch.where(inside, x, 0)
    return exact + (by_scale - by_scale.detach()) + (by_x - by_x.detach())


@contextmanager
def ranges_replaced(scales: Mapping[QuantConv2d, Callable[[], Tensor]]) -> Iterator[None]:
    """Within a `with` block, let layers in fake execution quantize their inputs with other static scales.

    Args:
        scales: layer -> function that returns its scales, fp32 `[B]`.
    """
    try:
        for layer, function in scales.items():
            vars(layer)["_fake_inputs"] = _fake_inputs(layer, function)
        yield
    finally:
        for layer in scales:
            vars(layer).pop("_fake_inputs", None)


def _fake_inputs(layer: QuantConv2d, function: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    assert layer.input_zero is not None
    table = layer.input_zero

    def fake_inputs(x: Tensor) -> Tensor:
        rows = layer._bins(x)
        scale, zero = function()[rows], table[rows]
        if isinstance(rows, Tensor):
            scale, zero = scale.view(-1, 1, 1, 1), zero.view(-1, 1, 1, 1)
        return learned_static(x, scale, zero)

    return fake_inputs
