"""The operations `torch.ops.dcomp.*`: what quantized layers run, each by the row that `dispatch` chooses.

They take plain tensors in the layout of `packing` (4 bits when `qweight` is uint8), have shapes for tracing, and no
gradients. They are registered here and nowhere else, once per process. `reference` and `qparams` say what they return.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import dispatch, qparams, reference
from dcomp.kernels.cuda import nibbles
from dcomp.kernels.cuda import rows as cuda
from dcomp.kernels.dispatch import Choice
from dcomp.kernels.packing import Stored
from dcomp.kernels.reference import GroupNorm, LayerNorm

_MOST_PADDING = 256  # channels that a kernel adds to those of a weight


def _quantizer(operation: str, x: Tensor) -> Choice:
    return dispatch.choose(operation, device=x.device, excess=cuda.excess(x.numel()) if x.is_cuda else None)


@torch.library.custom_op("dcomp::quantize_static", mutates_args=())
def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return uint8 codes for a static range: scale fp32 `[1]`, zero uint8 `[1]`.

    Here as in all quantizers, what is rounded is `qparams.smoothed(x, smooth)`; factors are fp32, one for each channel.
    """
    codes: Tensor = _quantizer("quantize_static", x).run(x, scale, zero, smooth)
    return codes.contiguous(memory_format=qparams.memory_format(x))


@quantize_static.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))


@torch.library.custom_op("dcomp::quantize_sample", mutates_args=())
def quantize_sample(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of the samples of `x` `[N, ...]`, their scales fp32 `[N]` and zeros uint8 `[N]`."""
    codes, scale, zero = _quantizer("quantize_sample", x).run(x, smooth)
    return codes.contiguous(memory_format=qparams.memory_format(x)), scale, zero


@quantize_sample.register_fake
def _(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))
    return codes, x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty(x.shape[:1], dtype=torch.uint8)


@torch.library.custom_op("dcomp::quantize_token", mutates_args=())
def quantize_token(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the rows of `x` `[M, I]` and their scales fp32 `[M]`."""
    codes, scale = _quantizer("quantize_token", x).run(x, smooth)
    return codes.contiguous(), scale


@quantize_token.register_fake
def _(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dcomp::quantize_group", mutates_args=())
def quantize_group(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the int8 image of `x` `[N, M, I]` in groups of `group` channels, and the scales fp32 `[N]`."""
    image, scale = _quantizer("quantize_group", x).run(x, group, smooth)
    return image.contiguous(), scale


@quantize_group.register_fake
def _(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("dcomp::quantize_low_rank", mutates_args=())
def quantize_low_rank(
    x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes of the rows of `x` `[M, I]`, their scales fp32 `[M]`, and `x @ down.t()` fp32 `[M, r]`.

    Codes are those of `quantize_token`, or with a group those of `quantize_group`; `down` is fp16 `[r, I]`.
    """
    codes, scale, hidden = _quantizer("quantize_low_rank", x).run(x, down, group, smooth)
    return codes.contiguous(), scale, hidden.contiguous()


@quantize_low_rank.register_fake
def _(x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    hidden = x.new_empty((x.shape[0], down.shape[0]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32), hidden


@torch.library.custom_op("dcomp::group_norm_quantize", mutates_args=())
def group_norm_quantize(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of the group norm of `x` `[N, C, H, W]`, through SiLU if asked for, their scale and zero.

    Scale fp32 and zero uint8 are `[1]` of a static range, or None for that of each sample, `[N]`.
    """
    choice = _quantizer("group_norm_quantize", x)
    codes, found, center = choice.run(x, GroupNorm(groups, weight, bias, eps, silu), scale, zero)
    return codes.contiguous(memory_format=qparams.memory_format(x)), found, center


@group_norm_quantize.register_fake
def _(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))
    ranges = x.shape[:1] if scale is None or zero is None else scale.shape
    return codes, x.new_empty(ranges, dtype=torch.float32), x.new_empty(ranges, dtype=torch.uint8)


@torch.library.custom_op("dcomp::layer_norm_quantize", mutates_args=())
def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the layer norm of `x` `[N, L, C]`, times `1 + gain`, plus `shift` `[N, C]`, and scales."""
    codes, scale = _quantizer("layer_norm_quantize", x).run(x, LayerNorm(weight, bias, gain, shift, eps))
    return codes.contiguous(), scale


@layer_norm_quantize.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dcomp::linear_a4", mutates_args=())
def linear_a4(
    x: Tensor,
    group: int,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    hidden: Tensor | None = None,
    up: Tensor | None = None,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """Return `[M, O]` of floats `[M, I]`, rounded as by `quantize_group` of each row, and a packed weight.

    A low-rank branch, `hidden` fp32 `[M, r]` and `up` `[O, r]`, is added before the result is rounded to its dtype.
    With `down` fp16 `[r, I]` in place of `hidden`, that is `x @ down.t()`.
    """
    excess = _product_excess(x.numel(), qweight, in_features, len(x)) if x.is_cuda else None
    is_taken = x.dtype in cuda.FLOAT_TYPE and x.numel() > 0
    block = nibbles.block_of(group, Stored(qweight, multiplier), in_features) if is_taken else 0
    bits = _bits(qweight)
    choice = dispatch.choose("linear_a4", device=x.device, bits=bits, reduction=in_features, excess=excess, block=block)
    if choice.run is cuda.linear_a4:
        hidden = hidden if down is None else functional.linear(x.float(), down.float())
        weight = choice.image(qweight, multiplier, in_features)
        return _with_branch(choice, dtype, hidden, up, x, group, weight, scale, bias, smooth)
    if down is None:
        image, x_scale = quantize_group(x.unsqueeze(1), group, smooth)
        codes = image.squeeze(1)
    else:
        codes, x_scale, hidden = quantize_low_rank(x, down, group, smooth)
    y: Tensor = linear_a8(codes, x_scale, qweight, scale, multiplier, bias, in_features, dtype, hidden, up)
    return y


@linear_a4.register_fake
def _(
    x: Tensor,
    group: int,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    hidden: Tensor | None = None,
    up: Tensor | None = None,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[0]), dtype=dtype)


@torch.library.custom_op("dcomp::linear_a8", mutates_args=())
def linear_a8(
    q: Tensor,
    x_scale: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    hidden: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return `[M, O]` of int8 codes `[M, I]` with a scale for each row `[M]` and a packed weight, rounded from fp32.

    A low-rank branch, `hidden` fp32 `[M, r]` and `up` `[O, r]`, is added before that.
    """
    excess = _product_excess(q.numel(), qweight, in_features, len(q)) if q.is_cuda else None
    choice = dispatch.choose("linear_a8", device=q.device, bits=_bits(qweight), reduction=in_features, excess=excess)
    weight = choice.image(qweight, multiplier, in_features)
    return _with_branch(choice, dtype, hidden, up, q, x_scale, weight, scale, bias)


@linear_a8.register_fake
def _(
    q: Tensor,
    x_scale: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    hidden: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], qweight.shape[0]), dtype=dtype)


def _with_branch(choice: Choice, dtype: torch.dtype, hidden: Tensor | None, up: Tensor | None, *given: Any) -> Tensor:
    """Run an integer product of a linear layer, and add a branch to it if there is one."""
    if hidden is None or up is None:
        return _rounded(choice, dtype, *given)
    if choice.row == "cuda" and dtype in cuda.FLOAT_TYPE and cuda.can_add(up):
        return cast(Tensor, choice.run(*given, dtype=dtype, branch=(hidden, up)))
    return reference.add_branch_(choice.run(*given), hidden, up).to(dtype)


def _rounded(choice: Choice, dtype: torch.dtype, *arguments: Any) -> Tensor:
    """Run an integer product whose fp32 values are wanted in some dtype."""
    if choice.row == "cuda" and dtype in cuda.FLOAT_TYPE:
        return cast(Tensor, choice.run(*arguments, dtype=dtype))
    return cast(Tensor, choice.run(*arguments)).to(dtype)


@torch.library.custom_op("dcomp::linear_a16", mutates_args=())
def linear_a16(
    x: Tensor, qweight: Tensor, scale: Tensor, multiplier: Tensor | None, bias: Tensor | None, in_features: int
) -> Tensor:
    """Return `[..., O]` in the dtype of `x` `[..., I]`, computed with the dequantized weight."""
    choice = dispatch.choose("linear_a16", device=x.device, bits=_bits(qweight), excess=_weight_excess(qweight))
    y: Tensor = choice.run(x, choice.image(qweight, multiplier, in_features), scale, bias)
    return y.contiguous()


@linear_a16.register_fake
def _(
    x: Tensor, qweight: Tensor, scale: Tensor, multiplier: Tensor | None, bias: Tensor | None, in_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


@torch.library.custom_op("dcomp::conv2d_a8", mutates_args=())
def conv2d_a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return channels-last `[N, O, H', W']` of uint8 codes `[N, C, H, W]`, rounded from fp32.

    Scale and zero are `[1]`, or `[N]` with one for each sample.
    """
    taps = qweight.shape[1:3]
    excess = None
    if q.is_cuda:
        height, width = reference.output_size(q.shape[2:], taps, stride, padding, dilation)
        rows = len(q) * height * width
        excess = _product_excess(q.numel(), qweight, q.shape[1], rows, taps, dilation)
    choice = dispatch.choose(
        "conv2d_a8",
        device=q.device,
        bits=_bits(qweight),
        reduction=q.shape[1] // groups * taps[0] * taps[1],
        groups=groups,
        excess=excess,
    )
    codes = choice.image(qweight, multiplier, q.shape[1] // groups)
    shape = (list(stride), list(padding), list(dilation))
    return _channels_last(_rounded(choice, dtype, q, x_scale, x_zero, codes, scale, bias, *shape, groups))


@conv2d_a8.register_fake
def _(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return _empty_output(q, qweight, stride, padding, dilation, dtype)


@torch.library.custom_op("dcomp::conv2d_a16", mutates_args=())
def conv2d_a16(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return channels-last `[N, O, H', W']` in the dtype of `x`, computed with the dequantized weight."""
    choice = dispatch.choose("conv2d_a16", device=x.device, bits=_bits(qweight), excess=_weight_excess(qweight))
    codes = choice.image(qweight, multiplier, x.shape[1] // groups)
    y: Tensor = choice.run(x, codes, scale, bias, list(stride), list(padding), list(dilation), groups)
    return _channels_last(y)


@conv2d_a16.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _empty_output(x, qweight, stride, padding, dilation, x.dtype)


@torch.library.custom_op("dcomp::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `[B, H, N, d]` of queries `[B, H, N, d]`, keys and values `[B, H, M, d]`, in the dtype of `q`.

    The heads of a token lie together in memory.
    """
    excess = cuda.attention_excess(q, k, v, scale) if q.is_cuda else None
    y: Tensor = dispatch.choose("attention", device=q.device, excess=excess).run(q, k, v, scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _product_excess(
    inputs: int,
    qweight: Tensor,
    channels: int,
    rows: int,
    taps: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
) -> str | None:
    """Say what of the sizes of an integer product on a GPU is too much, or None; channels may be padded there."""
    weights = qweight.shape[:-1].numel() * (channels + _MOST_PADDING)
    return cuda.excess(max(inputs, rows * len(qweight), weights), rows, taps, dilation)


def _weight_excess(qweight: Tensor) -> str | None:
    return cuda.excess(2 * qweight.numel()) if qweight.is_cuda else None


def _bits(qweight: Tensor) -> int:
    return 4 if qweight.dtype == torch.uint8 else 8


def _empty_output(
    x: Tensor,
    qweight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    height, width = reference.output_size(x.shape[2:], qweight.shape[1:3], stride, padding, dilation)
    return x.new_empty((x.shape[0], height, width, qweight.shape[0]), dtype=dtype).permute(0, 3, 1, 2)


def _channels_last(y: Tensor) -> Tensor:
    # Axes of length 1 may have any stride; this gives them those that tracing was told.
    return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
