"""The float twin of a quantized denoiser: the weights that its codes stand for, and inputs that are not rounded.

Rounding of inputs is noise: a trajectory that was moved by a hair rounds other values up, so that small causes and
large ones leave the same difference in the picture. The twin tells what a cause does by itself.
"""

import copy

from torch import nn

from dcomp.compress.quantized import Quantized
from dcomp.compress.split import quantized_layers


def float_twin(denoiser: nn.Module) -> nn.Module:
    """Return a copy of a denoiser with float layers in the place of quantized ones; without these, a plain copy.

    Corrections by step, which belong to rounded inputs, are left out; tables stay.

    Args:
        denoiser: stays as it is.
    """
    twin = copy.deepcopy(denoiser)
    for name, layer in quantized_layers(twin).items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, _float_layer(layer))
    return twin.eval().requires_grad_(False)


def _float_layer(layer: Quantized) -> nn.Module:
    weight, has_bias = layer.dequantize(), layer.bias is not None
    if isinstance(layer, nn.Linear):
        plain: nn.Linear | nn.Conv2d = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
    else:
        assert isinstance(layer, nn.Conv2d)
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            has_bias,
            layer.padding_mode,
            device="meta",
        )
    plain.weight = nn.Parameter(weight)
    if has_bias:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain
