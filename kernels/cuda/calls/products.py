"""Linear layers and convolutions, and weights as their kernels take them (`products.cuh`, `nibble_products.cuh`)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import reference
from dcomp.kernels.cuda import arguments, nibbles, packing
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.calls.launch import launch
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.tiles import ENTRIES
from dcomp.kernels.packing import Stored, int8_image, unpack_int4

_RANKS = 8  # of a branch, that a product of a tensor core has


@dataclass(frozen=True)
class ProductWeight:
    """A weight as a product takes it.

    Attributes:
        kind: of the kernels: "w8a8", "w4a8" with multipliers of groups, "w4a8_channel" with one of each row.
        data: int8 `[O, *taps, C]` with C padded, or fragments; None stands for the int8 weight as it is stored.
        channels: C, of a tap.
        sums: int32 `[O]`, of the integers that are multiplied; None if the zero of inputs is 0.
        factor: fp32 `[O]`, by which the scale of the weight is multiplied; None for 1.
        multipliers: of "w4a4" kinds, see `nibbles.NibbleRows`.
        corrections: likewise.
    """

    kind: str
    data: Tensor | None
    channels: int
    sums: Tensor | None
    factor: Tensor | None
    multipliers: Tensor | None = None
    corrections: int = 0


def kinds_of(weight: Stored) -> tuple[str, ...]:
    """Return the kinds of kernels that multiply with a weight, best first."""
    if weight.multiplier is None:
        return ("w8a8",)
    if weight.multiplier.numel() == len(weight.qweight):
        return "w4a8_channel", "w4a8"
    group = 2 * weight.qweight.shape[-1] // weight.multiplier.shape[-1]
    # Groups that fragments cannot hold are made int8.
    return ("w4a8",) if packing.is_packable(group, weight.multiplier.shape[-1]) else ("w8a8",)


def product_weight(weight: Stored, in_channels: int, kind: str, *, with_sums: bool) -> ProductWeight:
    """Make of a stored weight what kernels of a kind take; they need `sums` where inputs have a zero."""
    if kind.startswith("w4a4"):
        rows, factor = nibbles.weight_rows(weight, in_channels, block_of_kind(kind))
        return ProductWeight(kind, rows.data, rows.data.shape[1], None, factor, rows.multipliers, rows.corrections)
    if kind == "w8a8":
        image = int8_image(*weight, in_channels)
        assert image.shape[-1] == in_channels
        channels = packing.padded_channels(in_channels, grouped=False)
        sums = image.flatten(1).sum(1, dtype=torch.int32) if with_sums else None
        return ProductWeight(kind, _padded(image, channels), channels, sums, None)
    channels = packing.padded_channels(in_channels, grouped=kind == "w4a8")
    if kind == "w4a8":
        data = packing.pack_fragments(*weight, in_channels)
        sums = int8_image(*weight, in_channels).flatten(1).sum(1, dtype=torch.int32) if with_sums else None
        return ProductWeight(kind, data, channels, sums, None)
    assert weight.multiplier is not None
    data = packing.pack_fragments(weight.qweight, None, in_channels)
    codes = unpack_int4(weight.qweight)[..., :in_channels] if with_sums else None
    sums = None if codes is None else codes.flatten(1).sum(1, dtype=torch.int32) * 16
    return ProductWeight(kind, data, channels, sums, weight.multiplier.flatten(1)[:, 0].float() / 16)


def block_of_kind(kind: str) -> int:
    """Return the channels of a block of a "w4a4" kind."""
    return int(kind.removeprefix("w4a4_group"))


def linear(
    kernel: Kernel,
    q: Tensor,
    x_scale: Tensor,
    weight: ProductWeight,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
    x_multipliers: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `reference.linear_a8` in some float dtype; of "w4a4" kinds, `q` and `x_multipliers` are `NibbleRows`.

    Kernels with a branch take it as `reference.add_branch_` does, float16 `up`.
    """
    rows, outputs = len(q), len(weight_scale)
    out = torch.empty(rows, outputs, dtype=dtype, device=q.device)
    scale = weight_scale if weight.factor is None else weight_scale * weight.factor
    tensors = {
        "x": _padded(q, weight.channels),
        "weight": weight.data,
        "x_scale": x_scale.expand(rows).contiguous(),
        "weight_scale": scale.contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
        "out": out,
        "x_multipliers": x_multipliers,
        "weight_multipliers": weight.multipliers,
    }
    if branch is not None:
        rank = -(-branch[0].shape[1] // _RANKS) * _RANKS
        tensors |= {"hidden": _padded(branch[0].float(), rank), "up": _padded(branch[1], rank)}
    sizes = {"rows": rows, "outputs": outputs, "depth": weight.channels, "out_type": FLOAT_TYPE[dtype]}
    sizes |= {"corrections": weight.corrections, "rank": 0 if branch is None else rank}
    if out.numel():
        launch(kernel, _tiles(kernel, rows, outputs), arguments.LinearArguments, tensors, **sizes)
    return out


def conv2d(
    kernel: Kernel,
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: ProductWeight,
    weight_scale: Tensor,
    bias: Tensor | None,
    taps: tuple[int, int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `reference.conv2d_a8` of one group in some float dtype; `taps` are height and width of the kernel."""
    samples, _, height, width = q.shape
    outputs, channels = len(weight_scale), weight.channels
    out_height, out_width = reference.output_size((height, width), taps, stride, padding, dilation)
    out = torch.empty(samples, out_height, out_width, outputs, dtype=dtype, device=q.device)
    ranges = max(len(x_scale), len(x_zero))
    zeros = x_zero.expand(ranges).contiguous()
    scale = weight_scale if weight.factor is None else weight_scale * weight.factor
    tensors = {
        "x": _padded(q.permute(0, 2, 3, 1), channels),
        "padding": zeros.unsqueeze(1).expand(-1, 16).contiguous(),
        "weight": weight.data,
        "weight_sum": weight.sums,
        "x_scale": x_scale.expand(ranges).contiguous(),
        "x_zero": zeros,
        "weight_scale": scale.contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
        "out": out,
    }
    rows, pixels = samples * out_height * out_width, out_height * out_width
    sizes = {
        "rows": rows,
        "outputs": outputs,
        "depth": taps[0] * taps[1] * channels,
        "out_type": FLOAT_TYPE[dtype],
        "height": height,
        "width": width,
        "channels": channels,
        "out_pixels": pixels,
        "out_width": out_width,
        "scale_rows": pixels if ranges > 1 else rows,
        "kernel_width": taps[1],
        "channels_inverse": -(-(2**32) // channels),
        "kernel_width_inverse": -(-(2**16) // taps[1]),
    }
    for name, (y, x) in {"stride": stride, "padding": padding, "dilation": dilation}.items():
        sizes |= {f"{name}_y": y, f"{name}_x": x}
    if out.numel():
        launch(kernel, _tiles(kernel, rows, outputs), arguments.ConvArguments, tensors, **sizes)
    return out.permute(0, 3, 1, 2)


def _padded(x: Tensor, channels: int) -> Tensor:
    """Return `[..., C]`, contiguous, with zeros up to `channels`, which weights there do not see."""
    missing = channels - x.shape[-1]
    return functional.pad(x, (0, missing)).contiguous() if missing else x.contiguous()


def _tiles(kernel: Kernel, rows: int, outputs: int) -> tuple[int, int]:
    entry = ENTRIES[kernel.name]
    return -(-outputs // entry.columns), -(-rows // entry.rows)
