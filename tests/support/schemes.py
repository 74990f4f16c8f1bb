"""Schemes of every sort as a hypothesis strategy, and layers quantized by them without a calibration set."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.calibrate.range_search import search_weight
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.quantized import Quantized
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import float_parts, join_parts
from dcomp.compress.transforms import carried_weight, principal_directions
from dcomp.kernels import qparams

RANGES = st.sampled_from(["mse", "minmax"])
GRANULARITIES = ("tensor", "sample", "token")
GROUPS = st.integers(1, 8).map(lambda i: 2 * i)


@st.composite
def schemes(draw: st.DrawFn, inputs: int = 64, outputs: int = 64, known: tuple[str, ...] = GRANULARITIES) -> QScheme:
    """A scheme that a layer of so many channels can have, which knows these granularities of inputs."""
    kinds: list[tuple[int, Any]] = [(16, None), *((8, name) for name in known)]
    kinds += [(4, name) for name in known if name != "tensor"]
    weight_bits = draw(st.sampled_from([8, 4]))
    input_bits, granularity = draw(st.sampled_from(kinds))
    boundaries = sorted(draw(st.sets(st.integers(1, inputs - 1), max_size=3))) if inputs > 1 else []
    narrowest = min(stop - start for start, stop in pairwise((0, *boundaries, inputs)))
    return QScheme(
        weight_bits,
        draw(GROUPS) if weight_bits == 4 else None,
        draw(RANGES),
        input_bits,
        granularity,
        draw(RANGES),
        draw(GROUPS) if input_bits == 4 else None,
        tuple(boundaries),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, min(3, narrowest, outputs))),
        draw(st.sampled_from(["nearest", "gptq", "adaround"])),
        corrected=draw(st.booleans()),
        directions=draw(st.integers(0, min(3, narrowest))),
    )


def quantized_form(layer: nn.Module, scheme: QScheme, bins: int = 1, seed: int = 0) -> Quantized:
    """Quantize a layer by any scheme: random transforms, branches, static ranges and corrections, weights by search.

    The float function is kept, corrections aside: whatever the transforms and branches take from the weight, they give
    back.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = float_parts(layer, scheme.boundaries) if scheme.boundaries else [layer]
    whole = replace(scheme, corrected=False)
    own = replace(whole, boundaries=())
    quantized = join_parts(layer, [_part(part, own, bins, generator) for part in parts], whole)
    if scheme.corrected:
        shape = (bins, len(layer.weight))  # type: ignore[arg-type]
        quantized.correct(torch.rand(shape, generator=generator) + 0.5, torch.randn(shape, generator=generator))
    return quantized


def _part(layer: Any, scheme: QScheme, bins: int, generator: torch.Generator) -> QuantLayer:
    weight = layer.weight.detach().float().movedim(1, -1)
    out_channels, *taps, in_channels = weight.shape
    given: dict[str, Any] = {}
    if scheme.rank:
        scale = 0.5 * float(weight.abs().mean()) ** 0.5
        down, up = (
            scale * torch.randn(shape, generator=generator).half()
            for shape in ((scheme.rank, *taps, in_channels), (out_channels, scheme.rank))
        )
        given["low_rank"] = (down, up)
        weight = weight - (up.float() @ down.float().flatten(1)).view(weight.shape)
    if scheme.smooth:
        given["smooth_inv"] = torch.rand(in_channels, generator=generator) + 0.5
        weight = weight / given["smooth_inv"]
    if scheme.directions:
        directions = principal_directions(torch.randn(64, in_channels, generator=generator), scheme.directions)
        codes, scale, weight = carried_weight(weight, directions)
        given["directions"] = (directions, codes, scale)
    if scheme.rotate:
        weight = qparams.hadamard(weight, qparams.rotation_block(in_channels))
    if scheme.input_granularity == "tensor":
        given["input_scale"] = torch.rand(bins, generator=generator) * 0.03 + 0.02
        given["input_zero"] = torch.randint(90, 160, (bins,), generator=generator, dtype=torch.uint8)
    packed = search_weight(weight.contiguous(), scheme.weight_bits, scheme.group_size, scheme.weight_range)
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    return kind.from_float(layer, packed, scheme, **given)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
