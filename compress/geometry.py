"""Geometry of linear and convolution layers: what of it integer layers can have, and how they take it over."""

from typing import Any, TypeVar, cast

from torch import nn

from dcomp.compress.scheme import SchemeError

_M = TypeVar("_M", bound=nn.Module)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is in effect a linear layer over pixels."""
    unpadded = conv.padding in ("valid", "same", (0, 0))
    geometry = (conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    return unpadded and geometry == ((1, 1), (1, 1), (1, 1), 1)


def take_linear_geometry(quantized: Any, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
    """Copy the attributes of a linear layer to its quantized form; return O, no taps, and I.

    Raises:
        SchemeError: it is no linear layer.
    """
    linear = _of_kind(layer, nn.Linear)
    quantized.in_features, quantized.out_features = linear.in_features, linear.out_features
    return linear.out_features, (), linear.in_features


def take_conv_geometry(quantized: Any, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
    """Copy the attributes of a convolution to its quantized form; return O, the taps, and the I of one group.

    Raises:
        SchemeError: it is no convolution, or pads as no integer convolution does.
    """
    conv = _of_kind(layer, nn.Conv2d)
    if conv.padding_mode != "zeros":
        raise SchemeError(
            f"A convolution pads by {conv.padding_mode!r}, integer convolutions by zeros only",
            where=str(layer),
            remedy="Leave the layer in float.",
        )
    quantized.in_channels, quantized.out_channels, quantized.groups = conv.in_channels, conv.out_channels, conv.groups
    quantized.kernel_size, quantized.stride, quantized.dilation = conv.kernel_size, conv.stride, conv.dilation
    quantized.padding = _even_padding(conv)
    quantized.padding_mode, quantized.transposed, quantized.output_padding = "zeros", False, (0, 0)
    return conv.out_channels, conv.kernel_size, conv.in_channels // conv.groups


def _of_kind(layer: nn.Module, kind: type[_M]) -> _M:
    if not isinstance(layer, kind):
        raise SchemeError(
            f"A {type(layer).__name__} is no {kind.__name__}", where=str(layer), remedy="Leave the layer in float."
        )
    return layer


def _even_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(conv.padding, str):
        return cast(tuple[int, int], conv.padding)
    total = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise SchemeError(
            "A convolution pads one side more than the other", where=str(conv), remedy="Leave the layer in float."
        )
    return total[0] // 2, total[1] // 2
