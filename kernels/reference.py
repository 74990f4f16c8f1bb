"""Each integer operation in a few lines of plain torch: the definition that every other implementation is tested by.

Codes are multiplied and summed in float64, where sums of integers are exact (each product is below 2^15), so the result
does not depend on an order and equals int64 arithmetic. Runs on every device. Weights come as the int8 image
`[O, *taps, I]`, outputs are fp32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams
from dcomp.kernels.qparams import along_first, dequantize_weight, rescale_


def linear_a8(q: Tensor, x_scale: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `[M, O]` of int8 activations `[M, I]` with a scale for each row."""
    sums = q.double() @ codes.double().t()
    return rescale_(sums.float(), x_scale, weight_scale, bias)


def add_branch_(y: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """Add a low-rank branch to outputs fp32 `[M, O]` of a linear layer and return them.

    Args:
        y: is overwritten.
        hidden: fp32 `[M, r]`.
        up: `[O, r]`, any float dtype.
    """
    return y.addmm_(hidden, up.float().t())


def linear_a4(
    x: Tensor,
    group: int,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    smooth: Tensor | None = None,
) -> Tensor:
    """Return `[M, O]` of floats `[M, I]`, smoothed and rounded to 4 bits in groups of channels, by rows."""
    image, x_scale = qparams.quantize_group(x.unsqueeze(1), group, smooth)
    return linear_a8(image.squeeze(1), x_scale, codes, weight_scale, bias)


def quantize_low_rank(
    x: Tensor,
    down: Tensor,
    group: int | None = None,
    smooth: Tensor | None = None,
    by_token: Callable[..., tuple[Tensor, Tensor]] = qparams.quantize_token,
    by_group: Callable[..., tuple[Tensor, Tensor]] = qparams.quantize_group,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes of rows, their scales fp32 `[M]`, and the first half of a low-rank branch, fp32 `[M, r]`.

    Args:
        x: `[M, I]`, any float dtype; the branch reads it as it is.
        down: fp16 `[r, I]`.
        group: of `qparams.quantize_group`, or None for `qparams.quantize_token`.
        smooth: fp32 `[I]`, for codes alone.
        by_token: the quantizer of a row of the table, as `qparams.quantize_token`.
        by_group: likewise, as `qparams.quantize_group`.

    Source:
        Li et al. 2024, SVDQuant (section 4.2).
    """
    if group is None:
        codes, scale = by_token(x, smooth)
    else:
        image, scale = by_group(x.unsqueeze(1), group, smooth)
        codes = image.squeeze(1)
    return codes, scale, functional.linear(x.float(), down.float())


def conv2d_a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return channels-last `[N, O, H', W']` of uint8 activations `[N, C, H, W]`; padding is the real zero.

    Scale and zero are `[1]`, or `[N]` with one for each sample.
    """
    # cuDNN may choose a transform (FFT, Winograd) that is not exact in integers; torch's own kernels do not.
    with torch.backends.cudnn.flags(enabled=False):
        values, weight = q.double() - along_first(x_zero.double(), 4), codes.permute(0, 3, 1, 2).double()
        sums = functional.conv2d(values, weight, None, stride, padding, dilation, groups)
    rows = sums.permute(0, 2, 3, 1).float().contiguous()
    rescale_(rows.view(-1, rows.shape[-1]), x_scale, weight_scale, bias)
    return rows.permute(0, 3, 1, 2)


def output_size(
    size: Sequence[int | torch.SymInt],
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Any]:
    """Return height and width of what a convolution makes of an image of height and width `size`."""
    sides = zip(size, taps, stride, padding, dilation, strict=True)
    return [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in sides]


def linear_a16(x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the float operation with the dequantized weight, in the dtype of `x`."""
    weight = dequantize_weight(codes, weight_scale).to(x.dtype)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def conv2d_a16(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the float operation with the dequantized weight, channels-last, in the dtype of `x`."""
    weight = dequantize_weight(codes, weight_scale).to(x.dtype).permute(0, 3, 1, 2)
    y = float_conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last)


def float_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *shape: Any) -> Tensor:
    """Return `torch.nn.functional.conv2d`, also for one input channel in any layout.

    oneDNN takes such inputs and weights for channels-last by their strides and, with some shapes, reads the wrong
    memory. `contiguous` does not help, because it looks at no stride of an axis of size 1.
    """
    x, weight = (t.clone(memory_format=torch.contiguous_format) if t.shape[1] == 1 else t for t in (x, weight))
    return functional.conv2d(x, weight, bias, *shape)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `[B, H, N, d]` of queries `[B, H, N, d]`, keys and values `[B, H, M, d]`, in the dtype of `q`."""
    scores = q.double() @ k.double().mT * scale
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


class GroupNorm(NamedTuple):
    """A group norm before codes.

    Attributes:
        groups: of channels.
        weight: `[C]`, or None for 1.
        bias: `[C]`, or None for 0.
        eps: is added to the variance.
        silu: whether SiLU follows the norm.
    """

    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    silu: bool


class LayerNorm(NamedTuple):
    """A layer norm before codes, with what adaptive norms make of it (Peebles & Xie 2023, DiT).

    Attributes:
        weight: `[C]`, or None for 1.
        bias: `[C]`, or None for 0.
        gain: `[N, C]`; the norm is multiplied by `1 + gain`. None for 0.
        shift: `[N, C]`, added after that; None for 0.
        eps: is added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    eps: float


def group_norm_quantize(
    x: Tensor, norm: GroupNorm, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of the group norm of `x` `[N, C, H, W]`, in its memory format, their scale and zero.

    Args:
        x: any float dtype.
        norm: which.
        scale: fp32 `[1]` of a static range, or None for the range of each sample.
        zero: uint8 `[1]`, likewise.
    """
    weight, bias = (None if part is None else part.double() for part in (norm.weight, norm.bias))
    y = functional.group_norm(x.double(), norm.groups, weight, bias, norm.eps)
    y = (functional.silu(y) if norm.silu else y).float().contiguous(memory_format=qparams.memory_format(x))
    if scale is None or zero is None:
        return qparams.quantize_sample(y)
    return qparams.quantize_static(y, scale, zero), scale.clone(), zero.clone()


def layer_norm_quantize(x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the layer norm of `x` `[N, L, C]`, any float dtype, and their scales fp32 `[N, L]`."""
    weight, bias = (None if part is None else part.double() for part in (norm.weight, norm.bias))
    y = functional.layer_norm(x.double(), x.shape[-1:], weight, bias, norm.eps)
    y = y if norm.gain is None else y * (1 + norm.gain.double().unsqueeze(1))
    return qparams.quantize_token((y if norm.shift is None else y + norm.shift.double().unsqueeze(1)).float())
