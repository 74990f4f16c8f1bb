"""A quantized denoiser without the noise of rounded inputs: smooth like a float model, with the weights of its codes.

A trajectory that was moved by a hair rounds other values up, so that small causes and large ones leave the same
difference in the picture. Without rounding it tells what a cause does by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn
from torch.nn import functional

from dcomp.calibrate.stored_weights import is_large
from dcomp.compress.altered_calls import answering
from dcomp.compress.quantized import Quantized
from dcomp.compress.split import quantized_layers

_FP32_BYTES = 4


@contextmanager
def unrounded(denoiser: nn.Module) -> Iterator[None]:
    """Within a `with` block, let quantized layers multiply their inputs as they are.

    Corrections by step, which belong to rounded inputs, are left out. Float weights are held meanwhile, or made at
    every call where memory is short.
    """
    layers = quantized_layers(denoiser).values()
    held = not is_large(_FP32_BYTES * sum(layer.weight.shape.numel() for layer in layers))
    with answering({layer: _product(layer, held) for layer in layers}):
        yield


def unrounded_calls(denoiser: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return what does the same again and again, for single calls; float weights are made in each and not held."""
    layers = quantized_layers(denoiser).values()
    answers: dict[nn.Module, Callable[[Tensor], Tensor]] = {layer: _product(layer, held=False) for layer in layers}
    return lambda: answering(answers)


def _product(layer: Quantized, held: bool) -> Callable[[Tensor], Tensor]:
    kept = layer.dequantize() if held else None

    def multiply(x: Tensor) -> Tensor:
        weight = (layer.dequantize() if kept is None else kept).to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return functional.linear(x, weight, bias)

    return multiply
