"""Tiny pipelines with a few layers quantized by hand: no calibration, fixed input ranges, two step bins."""

from pathlib import Path

import torch
from torch import nn

from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.attention import attend_by_kernels
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.loader import attach_clock
from dcomp.compress.scheme import QScheme

BINS = StepBins.uniform([900.0, 500.0, 100.0], 2)


def quantize_by_hand(pipeline: OpenPipeline, *, of_each_kind: int = 2) -> list[str]:
    """Replace the first layers of each kind, in 8 and 4 bits by turns, and attach a clock; return their names."""
    denoiser = pipeline.denoiser
    names: list[str] = []
    for kind in (nn.Linear, nn.Conv2d):
        found = [name for name, layer in denoiser.named_modules() if type(layer) is kind][1 : 1 + of_each_kind]
        for position, name in enumerate(found):
            replace_layer(denoiser, name, 4 if position % 2 else 8)
        names += found
    attach_clock(denoiser, BINS)
    attend_by_kernels(denoiser)
    return names


def replace_layer(denoiser: nn.Module, name: str, bits: int) -> QuantLayer:
    """Quantize one layer in place: linear inputs by token, convolution inputs by a table of two rows."""
    layer = denoiser.get_submodule(name)
    weight = layer.weight.detach().float()
    group = 64 if bits == 4 else None
    if isinstance(layer, nn.Conv2d):
        scheme = QScheme(bits, group, input_bits=8, input_granularity="tensor")
        packed = search_weight(weight.permute(0, 2, 3, 1).contiguous(), bits, group)
        scale, zero = torch.tensor([0.03, 0.04]), torch.tensor([100, 130], dtype=torch.uint8)
        quantized: QuantLayer = QuantConv2d.from_float(layer, packed, scheme, scale, zero)
    else:
        scheme = QScheme(bits, group, input_bits=8, input_granularity="token")
        quantized = QuantLinear.from_float(layer, search_weight(weight, bits, group), scheme)
    parent, _, leaf = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), leaf, quantized)
    return quantized


def quantized_pipeline(source: Path) -> OpenPipeline:
    """Open a folder and quantize its denoiser by hand."""
    pipeline = open_pipeline(source)
    quantize_by_hand(pipeline)
    return pipeline
