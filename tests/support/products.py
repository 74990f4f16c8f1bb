"""Products in the emulator, from operands as a layer has them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels.cuda.arguments import ConvArguments, LinearArguments
from dcomp.kernels.cuda.packing import pack_fragments, padded_channels
from dcomp.kernels.packing import pack_int4
from dcomp.kernels.reference import output_size
from tests.support.emulated import Emulator, grid_of, type_of, untouched


def integers(generator: torch.Generator, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    """Return numbers from `low` to `high`, with runs of both extremes."""
    numbers = torch.randint(low, high + 1, shape, generator=generator)
    extreme = torch.randint(0, 8, shape, generator=generator)
    return numbers.masked_fill(extreme == 0, low).masked_fill(extreme == 1, high).to(dtype)


class Int4Weight:
    """Random codes `[O, *taps, I]` with multipliers, their image and their fragments."""

    def __init__(self, generator: torch.Generator, shape: tuple[int, ...], group: int | None) -> None:
        """Make a weight; without a group, one whose multiplier is part of the scale."""
        channels = shape[-1]
        codes = integers(generator, -8, 7, *shape)
        grouped = group is not None
        groups = -(-channels // group) if group else 1
        stored = functional.pad(codes, (0, (groups * group if group else channels + channels % 2) - channels))
        multiplier = integers(generator, 1, 15, *shape[:-1], groups)
        multiplier *= torch.randint(0, 2, multiplier.shape, generator=generator, dtype=torch.int8) * 2 - 1
        self.fragments = pack_fragments(pack_int4(stored), multiplier if grouped else None, channels)
        self.image = codes
        if group:
            self.image = codes * multiplier.repeat_interleave(group, -1)[..., :channels]
        self.channels = padded_channels(channels, grouped=grouped)


def linear(
    emulator: Emulator,
    name: str,
    q: Tensor,
    weight: Tensor,
    outputs: int,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `[M, O]` of codes `[M, I]`; the weight is `[O, K]` or fragments, scales those of rows and columns."""
    x = functional.pad(q, (0, -q.shape[1] % 16)).contiguous()
    out = untouched(len(x), outputs, dtype=dtype)
    shape = {"rows": len(x), "outputs": outputs, "depth": x.shape[1], "out_type": type_of(out)}
    tensors = {"x": x, "weight": weight, "x_scale": scales[0], "weight_scale": scales[1], "bias": bias, "out": out}
    if branch is not None:
        tensors |= {"hidden": branch[0], "up": branch[1]}
        shape["rank"] = branch[0].shape[1]
    emulator.launch(name, grid_of(name, len(x), outputs), LinearArguments, **tensors, **shape)
    return out


def conv(
    emulator: Emulator,
    name: str,
    q: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_sum: Tensor,
    taps: tuple[int, int],
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Return `[N, H', W', O]` of codes `[N, H, W, C]`, where C is padded as the weight's channels are."""
    samples, height, width, channels = q.shape
    outputs = len(weight_sum)
    out_height, out_width = output_size((height, width), taps, stride, padding, dilation)
    out = untouched(samples, out_height, out_width, outputs, dtype=dtype)
    rows = samples * out_height * out_width
    shape: dict[str, Any] = {
        "rows": rows,
        "outputs": outputs,
        "depth": taps[0] * taps[1] * channels,
        "out_type": type_of(out),
        "height": height,
        "width": width,
        "channels": channels,
        "out_pixels": out_height * out_width,
        "out_width": out_width,
        "scale_rows": rows if len(zero) == 1 else out_height * out_width,
        "kernel_width": taps[1],
        "channels_inverse": -(-(2**32) // channels),
        "kernel_width_inverse": -(-(2**16) // taps[1]),
    }
    for what, pair in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        shape |= {f"{what}_y": pair[0], f"{what}_x": pair[1]}
    tensors = {
        "x": q,
        "weight": weight,
        "weight_sum": weight_sum,
        "x_scale": scales[0],
        "x_zero": zero,
        "weight_scale": scales[1],
        "bias": bias,
        "out": out,
    }
    page = zero.view(-1, 1).repeat(1, 16)
    emulator.launch(name, grid_of(name, rows, outputs), ConvArguments, padding=page, **tensors, **shape)
    return out
