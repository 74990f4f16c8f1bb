"""Each kernel called with tensors: memory made to fit, the struct filled in, the grid chosen.

Tensors are on the kernel's device. Nothing is waited for, and all memory is torch's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import reference
from dcomp.kernels.blocked import in_memory_order, smoothed_where_channels_are_apart
from dcomp.kernels.cuda import arguments, driver, nibbles, packing
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.nibbles import NibbleRows
from dcomp.kernels.cuda.tiles import ENTRIES
from dcomp.kernels.packing import Stored, int8_image, unpack_int4
from dcomp.kernels.reference import GroupNorm, LayerNorm

MOST_ROWS_OF_BLOCKS = 65535  # of a grid, along its second axis
_SAMPLES_OF_LAUNCH = MOST_ROWS_OF_BLOCKS // 16 * 16  # so that each part of samples is aligned
_MOST_PARTS_OF_KEYS = 16  # each block reads what all of them found
_RANKS = 8  # of a branch, that a product of a tensor core has
LOW_RANK_ROWS = 32  # of a block, as in quantize_low_rank.cuh
_ELEMENTS = 16  # that a thread of a quantizer has at least, if there are so many


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
        _launch(kernel, _tiles(kernel, rows, outputs), arguments.LinearArguments, tensors, **sizes)
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
        _launch(kernel, _tiles(kernel, rows, outputs), arguments.ConvArguments, tensors, **sizes)
    return out.permute(0, 3, 1, 2)


def _padded(x: Tensor, channels: int) -> Tensor:
    """Return `[..., C]`, contiguous, with zeros up to `channels`, which weights there do not see."""
    missing = channels - x.shape[-1]
    return functional.pad(x, (0, missing)).contiguous() if missing else x.contiguous()


def _tiles(kernel: Kernel, rows: int, outputs: int) -> tuple[int, int]:
    entry = ENTRIES[kernel.name]
    return -(-outputs // entry.columns), -(-rows // entry.rows)


def quantize_static(kernel: Kernel, x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return `qparams.quantize_static` for one range, in the memory format of `x`."""
    x, smooth = smoothed_where_channels_are_apart(x, smooth)
    values, codes = _with_codes(x)
    tensors = {"x": values, "codes": codes, "scale": scale.contiguous(), "zero": zero.contiguous(), "smooth": smooth}
    if x.numel():
        blocks = _blocks(kernel, x.numel())
        sizes = {"count": x.numel(), "channels": _channels(smooth), "x_type": FLOAT_TYPE[x.dtype]}
        _launch(kernel, (blocks,), arguments.QuantizeStaticArguments, tensors, **sizes)
    return codes


def quantize_sample(passes: Sequence[Kernel], x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return `qparams.quantize_sample` of tensors with elements, in the memory format of `x`."""
    x, smooth = smoothed_where_channels_are_apart(x, smooth)
    values, codes = _with_codes(x)
    samples, count = len(x), x[0].numel()
    scale = torch.empty(samples, device=x.device)
    zero = torch.empty(samples, dtype=torch.uint8, device=x.device)
    parts = -(-_blocks(passes[-1], x.numel()) // samples)
    tensors = {
        "x": values,
        "codes": codes,
        "scale": scale,
        "zero": zero,
        "smooth": smooth,
        "ranges": torch.empty(samples, parts, 2, device=x.device),
    }
    sizes = {"count": count, "channels": _channels(smooth), "parts": parts, "x_type": FLOAT_TYPE[x.dtype]}
    for kernel in passes:
        _launch(kernel, (parts, samples), arguments.QuantizeSampleArguments, tensors, **sizes)
    return codes, scale, zero


def quantize_token(
    kernel: Kernel, x: Tensor, smooth: Tensor | None = None, depth: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `qparams.quantize_token` of `[M, C]` with elements; codes are padded with 0 to `depth` channels."""
    rows, channels = x.shape
    codes = torch.empty(rows, depth or channels, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    tensors = {"x": x.contiguous(), "smooth": _factors(smooth), "codes": codes, "scale": scale}
    sizes = {"rows": rows, "channels": channels, "depth": codes.shape[1], "x_type": FLOAT_TYPE[x.dtype]}
    warps = kernel.threads // 32
    _launch(kernel, (-(-rows // warps),), arguments.QuantizeTokenArguments, tensors, **sizes)
    return codes, scale


def quantize_group(
    passes: Sequence[Kernel], x: Tensor, group: int, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `qparams.quantize_group` of `[N, M, C]` with elements; one pass is enough if M is 1."""
    samples, rows, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(samples, device=x.device)
    warps = passes[-1].threads // 32
    parts = min(-(-rows // warps), -(-_blocks(passes[-1], x.numel()) // samples))
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": channels,
        "group": max(1, min(group, channels)),
        "parts": parts,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    smooth = _factors(smooth)
    if len(passes) == 1:
        assert rows == 1
        tensors = {"x": x.contiguous(), "smooth": smooth, "codes": codes, "scale": scale, "peaks": None}
        grid = (-(-samples // warps),)
        _launch(passes[0], grid, arguments.QuantizeGroupArguments, tensors, **sizes | {"rows": samples})
        return codes, scale
    blocks = (values.split(_SAMPLES_OF_LAUNCH) for values in (x.contiguous(), codes, scale))
    for some_x, some_codes, some_scale in zip(*blocks, strict=True):
        peaks = torch.empty(len(some_x), parts, device=x.device)
        tensors = {"x": some_x, "smooth": smooth, "codes": some_codes, "scale": some_scale, "peaks": peaks}
        for kernel in passes:
            _launch(kernel, (parts, len(some_x)), arguments.QuantizeGroupArguments, tensors, **sizes)
    return codes, scale


def quantize_nibbles(
    kernel: Kernel, x: Tensor, group: int, block: int, smooth: Tensor | None = None
) -> tuple[NibbleRows, Tensor]:
    """Return `nibbles.input_rows` of `qparams.quantize_nibbles` of `[M, C]` with elements, and the scale."""
    rows, channels = x.shape
    codes = torch.empty(rows, nibbles.row_bytes(channels, block), dtype=torch.uint8, device=x.device)
    of_stages = (nibbles.stages(channels), -(-rows // 4) * 4, 4)
    multipliers = torch.empty(of_stages, dtype=torch.uint8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    tensors = {
        "x": x.contiguous(),
        "smooth": _factors(smooth),
        "codes": codes,
        "multipliers": multipliers,
        "scale": scale,
    }
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": codes.shape[1],
        "group": -(-min(group, channels) // block) * block,
        "block": block,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    warps = kernel.threads // 32
    _launch(kernel, (-(-rows // warps),), arguments.QuantizeNibblesArguments, tensors, **sizes)
    return NibbleRows(codes, multipliers, nibbles.corrections(channels, block)), scale


def block_of_kind(kind: str) -> int:
    """Return the channels of a block of a "w4a4" kind."""
    return int(kind.removeprefix("w4a4_group"))


def quantize_low_rank(
    kernel: Kernel, x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.quantize_low_rank` of `[M, C]` and fp16 `[r, C]`, both with elements."""
    (rows, channels), rank = x.shape, len(down)
    codes = torch.empty(rows, channels, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, device=x.device)
    hidden = torch.empty(rows, rank, device=x.device)
    tensors = {
        "x": x.contiguous(),
        "smooth": _factors(smooth),
        "down": down.contiguous(),
        "codes": codes,
        "scale": scale,
        "hidden": hidden,
    }
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": channels,
        "group": max(1, min(group or 1, channels)),
        "rank": rank,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    _launch(kernel, (-(-rows // LOW_RANK_ROWS),), arguments.LowRankArguments, tensors, **sizes)
    return codes, scale, hidden


def group_norm_quantize(
    passes: Sequence[Kernel],
    x: Tensor,
    norm: GroupNorm,
    scale: Tensor | None,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.group_norm_quantize` of channels-last images with elements."""
    samples, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).contiguous()
    codes = torch.empty(pixels.shape, dtype=torch.uint8, device=x.device)
    if scale is None or zero is None:
        scale = torch.empty(samples, device=x.device)
        zero = torch.empty(samples, dtype=torch.uint8, device=x.device)
    else:
        scale, zero = scale.clone(), zero.clone()
    parts = min(height * width, -(-_blocks(passes[-1], x.numel()) // samples))
    factors = _both(norm.weight, norm.bias, (channels,), 1.0, x.device)
    tensors = {
        "x": pixels,
        "weight": factors[0],
        "bias": factors[1],
        "moments": torch.empty(samples, parts, norm.groups, 2, device=x.device),
        "ranges": torch.empty(samples, parts, 2, device=x.device),
        "codes": codes,
        "scale": scale,
        "zero": zero,
    }
    sizes = {
        "pixels": height * width,
        "channels": channels,
        "groups": norm.groups,
        "silu": int(norm.silu),
        "parts": parts,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    for kernel in passes:
        _launch(kernel, (parts, samples), arguments.GroupNormArguments, tensors, **sizes, epsilon=norm.eps)
    return codes.permute(0, 3, 1, 2), scale, zero


def layer_norm_quantize(kernel: Kernel, x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `reference.layer_norm_quantize` of tensors with elements."""
    samples, length, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(samples, length, device=x.device)
    factors = _both(norm.weight, norm.bias, (channels,), 1.0, x.device)
    modulation = _both(norm.gain, norm.shift, (samples, channels), 0.0, x.device)
    tensors = {
        "x": x.contiguous(),
        "weight": factors[0],
        "bias": factors[1],
        "gain": modulation[0],
        "shift": modulation[1],
        "codes": codes,
        "scale": scale,
    }
    rows = samples * length
    sizes = {"rows": rows, "channels": channels, "depth": channels, "gain_rows": length, "x_type": FLOAT_TYPE[x.dtype]}
    warps = kernel.threads // 32
    _launch(kernel, (-(-rows // warps),), arguments.LayerNormArguments, tensors, **sizes, epsilon=norm.eps)
    return codes, scale


def key_value_tiles(passes: Sequence[Kernel], k: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return `packing.pack_tiles` of keys less their mean and of values, `[B, H, M, C]` with elements."""
    samples, heads, keys, channels = k.shape
    rows, count = samples * heads, -(-keys // packing.TILE_KEYS)
    tiles = torch.empty(rows, count, packing.tile_bytes(width), dtype=torch.uint8, device=k.device)
    v_scale = torch.empty(rows, width, device=k.device)
    parts = min(count, _MOST_PARTS_OF_KEYS)
    tensors = {
        "k": k.transpose(1, 2).contiguous(),
        "v": v.transpose(1, 2).contiguous(),
        "moments": torch.empty(rows, parts, 2, channels, device=k.device),
        "tiles": tiles,
        "v_scale": v_scale,
    }
    sizes = {"keys": keys, "heads": heads, "channels": channels, "width": width, "parts": parts}
    for kernel, blocks in zip(passes, (parts, count), strict=True):
        grid = (blocks, rows)
        _launch(kernel, grid, arguments.KeyValueArguments, tensors, **sizes, x_type=FLOAT_TYPE[k.dtype])
    return tiles, v_scale


def attention(
    kernel: Kernel,
    q: Tensor,
    q_scale: Tensor,
    tiles: Tensor,
    v_scale: Tensor,
    channels: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return attention `[B, H, N, C]` in some float dtype, heads of a token together.

    Args:
        kernel: for the width of `v_scale`.
        q: int8 codes `[B, N, H, packing.head_depth(width)]` with elements.
        q_scale: fp32 `[B, N, H]`.
        tiles: as `packing.pack_tiles` returns them with `v_scale`.
        v_scale: likewise.
        channels: C.
        scale: of scores.
        dtype: of the result.
    """
    samples, queries, heads, _ = q.shape
    out = torch.empty(samples, queries, heads, channels, dtype=dtype, device=q.device)
    tensors = {"q": q, "q_scale": q_scale, "tiles": tiles, "v_scale": v_scale, "out": out}
    sizes = {"queries": queries, "heads": heads, "channels": channels, "tile_count": tiles.shape[1]}
    grid = (-(-queries // ENTRIES[kernel.name].rows), samples * heads)
    type_and_scale = {"out_type": FLOAT_TYPE[dtype], "scale": scale * math.log2(math.e)}
    _launch(kernel, grid, arguments.AttentionArguments, tensors, **sizes, **type_and_scale)
    return out.transpose(1, 2)


def _both(
    factor: Tensor | None, addend: Tensor | None, shape: tuple[int, ...], neutral: float, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return both as dense fp32, where one may be missing, or neither."""
    if factor is None and addend is None:
        return None, None
    factor = torch.full(shape, neutral, device=device) if factor is None else factor.float().expand(shape).contiguous()
    addend = torch.zeros(shape, device=device) if addend is None else addend.float().expand(shape).contiguous()
    return factor, addend


def unpack(kernel: Kernel, weight: Stored, scale: Tensor, in_channels: int, dtype: torch.dtype) -> Tensor:
    """Return the float weight `[O, *taps, I]`, rounded once from fp32."""
    qweight, multiplier = weight.by_taps()
    outputs, taps, _ = qweight.shape
    out = torch.empty(*weight.qweight.shape[:-1], in_channels, dtype=dtype, device=scale.device)
    groups = 1 if multiplier is None else multiplier.shape[-1]
    tensors = {
        "qweight": qweight.contiguous(),
        "multiplier": None if multiplier is None else multiplier.contiguous(),
        "scale": scale.contiguous(),
        "out": out,
    }
    sizes = {
        "rows": outputs * taps,
        "taps": taps,
        "channels": in_channels,
        "groups": groups,
        "group": in_channels if multiplier is None else 2 * qweight.shape[-1] // groups,
        "out_type": FLOAT_TYPE[dtype],
    }
    if out.numel():
        _launch(kernel, (_blocks(kernel, out.numel()),), arguments.UnpackArguments, tensors, **sizes)
    return out


def _factors(smooth: Tensor | None) -> Tensor | None:
    return None if smooth is None else smooth.float().contiguous()


def _channels(smooth: Tensor | None) -> int:
    return 1 if smooth is None else len(smooth)


def _with_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a dense tensor and the memory of uint8 codes for it, in the same order."""
    if in_memory_order(x) is None:
        x = x.contiguous()
    return x, torch.empty_like(x, dtype=torch.uint8)


def _blocks(kernel: Kernel, elements: int) -> int:
    """Return how many blocks share elements: enough for the device, none of them idle."""
    enough = 8 * driver.device(kernel.device).multiprocessors
    return max(1, min(enough, -(-elements // (kernel.threads * _ELEMENTS))))


def _launch(
    kernel: Kernel, grid: tuple[int, ...], struct: type[Any], tensors: Mapping[str, Tensor | None], **sizes: float
) -> None:
    devices = {tensor.device for tensor in tensors.values() if tensor is not None}
    if len(devices) > 1:  # a kernel that reads memory of another device takes the whole process down
        raise RuntimeError(f"Tensors of one operation lie on {' and '.join(sorted(map(str, devices)))}")
    # Kernels load 16 bytes at once; a view may begin anywhere. What they write was made for them, and is aligned.
    aligned = {name: t.clone() if t is not None and t.data_ptr() % 16 else t for name, t in tensors.items()}
    pointers = {name: None if tensor is None else _address(tensor) for name, tensor in aligned.items()}
    driver.launch(kernel, grid, struct(**pointers, **sizes))


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()
