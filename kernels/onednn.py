"""Rows of the dispatch table for x86 processors that multiply int8 by the oneDNN that torch carries.

Signatures and results are those of `reference`; sums are equal, and the float32 steps after them agree to a few ulp.
Everything works in blocks whose temporaries stay in the second-level cache, because fresh memory of a large output
costs more than the arithmetic on it. Refused, with a reason for `dcomp doctor`: processors on which oneDNN's int8
saturates or is not there, sums that could leave int32, and grouped convolutions.

Signed activations never go to `qlinear` or `qconv`: they fall to a scalar loop, thousands of times slower.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams, reference
from dcomp.kernels.packs import Packs

# |uint8| * |int8| summed this often stays within int32; with int8 activations there is room for twice as many.
MAX_REDUCTION = (2**31 - 1) // (255 * 128)

_BLOCK_BYTES = 1 << 21  # of an output or patch matrix
_SMALL_SAMPLE = 1 << 23  # products; patches of all samples cost less than a call of qconv for each


@functools.cache
def defect() -> str | None:
    """Say why oneDNN's int8 cannot be used here, or None.

    Without VNNI it adds pairs of products in int16, which saturates silently. torch's own capability flags do not tell
    (they miss `ONEDNN_MAX_CPU_ISA`), so extreme codes are multiplied once and compared with exact integers.
    """
    try:
        exact = all(_int_mm_is_exact(*shape) for shape in ((1, 64, 16), (64, 320, 48))) and _qconv_is_exact()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"torch has no oneDNN int8 here ({str(error).splitlines()[0]})"
    return None if exact else "oneDNN's int8 is not exact here: the processor, or ONEDNN_MAX_CPU_ISA, lacks VNNI"


def _int_mm_is_exact(rows: int, inner: int, columns: int) -> bool:
    q = torch.tensor([127, 127, -128, -128], dtype=torch.int8).repeat(inner // 4).expand(rows, -1).contiguous()
    weight = torch.tensor([127, -127, 127, -128], dtype=torch.int8).repeat(inner // 4).expand(columns, -1).clone()
    weight[::2] = 127
    return torch.equal(torch._int_mm(q, weight.t()).double(), q.double() @ weight.double().t())


def _qconv_is_exact() -> bool:
    q = torch.full((1, 32, 6, 6), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    codes = torch.full((16, 3, 3, 32), 127, dtype=torch.int8)
    codes[::2] = -127
    one, zero, scale = torch.ones(1), torch.tensor([3], dtype=torch.uint8), torch.ones(16)
    shape = ([1, 1], [1, 1], [1, 1])
    expected = reference.conv2d_a8(q, one, zero, codes, scale, None, *shape, 1)
    return torch.equal(_qconv(q, one, zero, _prepack(codes, *shape), scale, None, *shape), expected)


Rescale = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
"""Turns int32 sums in the memory of fp32 `[M, O]` into values, with scales of inputs and weights and a bias."""


def _rescale_in_place(out: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Turn int32 sums that lie in the memory of `out` into its float32 values."""
    out.copy_(out.view(torch.int32))
    qparams.rescale_(out, x_scale, weight_scale, bias)


def linear_a8(
    q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    rescale: Rescale = _rescale_in_place,
) -> Tensor:
    """Return `reference.linear_a8`: `_int_mm` on plain int8 weights, which is as fast as on prepacked ones."""
    q, codes = _two_columns(q.contiguous(), codes)
    out = torch.empty(len(q), len(codes))
    # A block reads all weights, hence not too few rows, and no small rest.
    most = max(256, _BLOCK_BYTES // max(1, 4 * len(codes)))
    rows = max(1, -(-len(q) // max(1, round(len(q) / most))))
    for start in range(0, len(q), rows):
        block = out[start : start + rows]
        torch._int_mm(q[start : start + rows], codes.t(), out=block.view(torch.int32))
        rescale(block, x_scale[start : start + rows], weight_scale, bias)
    return out


def _two_columns(q: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    # With a single column the strides of a transposed matrix are ambiguous and _int_mm reads the wrong elements.
    if codes.shape[-1] == 1:
        return functional.pad(q, (0, 1)), functional.pad(codes, (0, 1))
    return q, codes


_packs: Packs[Tensor] = Packs()


def conv2d_prepacked(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
) -> Tensor:
    """Return `reference.conv2d_a8` by `qconv`, with a reordered copy of the weight that lives as long as `codes`."""
    assert groups == 1
    by_sample = len(x_scale) != 1 or len(x_zero) != 1
    unfit = (
        _may_see_only_padding(q, codes, padding, dilation)
        or _is_strided_column(q, codes, stride, padding, dilation)
        or not _packs.can_keep(codes)
    )
    if unfit or (by_sample and _is_small(q, codes)):
        return conv2d_patches(q, x_scale, x_zero, codes, weight_scale, bias, stride, padding, dilation)
    shape = (tuple(codes.shape), tuple(stride), tuple(padding), tuple(dilation))
    packed = _packs.get(codes, shape, lambda: _prepack(codes, stride, padding, dilation))
    q = q.contiguous(memory_format=torch.channels_last)
    convolve = functools.partial(
        _qconv,
        packed=packed,
        weight_scale=weight_scale,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )
    if not by_sample:
        return convolve(q, x_scale, x_zero).contiguous(memory_format=torch.channels_last)
    # qconv knows one scale and zero.
    parts = zip(q.split(1), x_scale.expand(len(q)), x_zero.expand(len(q)), strict=True)
    first = convolve(*next(parts))
    y = torch.empty((len(q), *first.shape[1:]), memory_format=torch.channels_last)
    y[:1] = first
    for n, part in enumerate(parts, 1):
        y[n : n + 1] = convolve(*part)
    return y


def _is_small(q: Tensor, codes: Tensor) -> bool:
    return len(q) == 0 or codes.numel() * q[0, 0].numel() < _SMALL_SAMPLE


def _may_see_only_padding(q: Tensor, codes: Tensor, padding: list[int], dilation: list[int]) -> bool:
    """Say whether a patch may lie outside the image, beyond its edge or with the image between two taps.

    There oneDNN returns memory that it never wrote, or crashes.
    """
    sides = zip(q.shape[2:], codes.shape[1:3], padding, dilation, strict=True)
    return any(p > d * (k - 1) or (p > 0 and d > length) for length, k, p, d in sides)


def _is_strided_column(q: Tensor, codes: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> bool:
    """Say whether the output is one column of several rows, made with a horizontal stride.

    There oneDNN takes the rows below the first from the wrong place.
    """
    height, width = reference.output_size(q.shape[2:], codes.shape[1:3], stride, padding, dilation)
    return bool(width == 1 and height > 1 and stride[1] > 1)


def _prepack(codes: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    # Scales and zero are given again at each call, and may differ from these.
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        codes.permute(0, 3, 1, 2), torch.ones(len(codes)), 1.0, 128, stride, padding, dilation, 1, None
    )
    return packed


def _qconv(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    assert q.dtype == torch.uint8
    no_zeros = torch.zeros(len(weight_scale), dtype=torch.int32)
    shape = (stride, padding, dilation, 1)
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
    y: Tensor = torch.ops.onednn.qconv_pointwise(
        q, x_scale.item(), x_zero.item(), packed, weight_scale, no_zeros, bias, *shape, *output
    )
    return y


def conv2d_patches(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    rescale: Rescale = _rescale_in_place,
) -> Tensor:
    """Return `reference.conv2d_a8` as a matrix product over patches; needs no preparation of the weight.

    Activations are shifted to int8, `u = q - 128`, and `sum (q - z) w = sum u w + (128 - z) sum w`. Padding is written
    out, so that every patch is full and the second sum is the same for all of a sample.
    """
    assert groups == 1
    out_channels, kernel_h, kernel_w, _ = codes.shape
    image = (_padded(q.permute(0, 2, 3, 1), x_zero, padding) ^ 0x80).view(torch.int8)
    batch, height, width, channels = image.shape
    out_h = (height - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (width - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    n, h, w, c = image.stride()
    patches = image.as_strided(
        (batch, out_h, out_w, kernel_h, kernel_w, channels),
        (n, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c),
    )
    matrix = codes.reshape(out_channels, -1)
    ones = torch.ones(1, matrix.shape[1], dtype=torch.int8)
    weight_sums = torch._int_mm(*_transposed(*_two_columns(ones, matrix)))
    shift = weight_sums * (128 - x_zero.int()).unsqueeze(1) if (x_zero != 128).any() else None  # [1 or N, O]

    out = torch.empty(batch * out_h, out_w, out_channels)
    for start, stop, block in _blocks(patches, max(_BLOCK_BYTES, matrix.nbytes)):
        rows = out[start:stop].view(-1, out_channels)
        sums = rows.view(torch.int32)
        # A reshape may be a view whose rows overlap, which _int_mm does not read as such.
        matrix_of_patches = block.reshape(-1, matrix.shape[1]).contiguous()
        torch._int_mm(*_transposed(*_two_columns(matrix_of_patches, matrix)), out=sums)
        samples = slice(start // out_h, -(-stop // out_h))
        if shift is not None:
            sums.view(samples.stop - samples.start, -1, out_channels).add_(_of(shift, samples).unsqueeze(1))
        rescale(rows, _of(x_scale, samples), weight_scale, bias)
    return out.view(batch, out_h, out_w, out_channels).permute(0, 3, 1, 2)


def _padded(q: Tensor, x_zero: Tensor, padding: list[int]) -> Tensor:
    """Return `[N, H, W, C]` with the zeros of `[1]` or `[N]` around each sample."""
    if not any(padding):
        return q.contiguous()
    pad_h, pad_w = padding
    batch, height, width, channels = q.shape
    padded = q.new_empty(batch, height + 2 * pad_h, width + 2 * pad_w, channels)
    padded.copy_(qparams.along_first(x_zero, 4))
    padded[:, pad_h : pad_h + height, pad_w : pad_w + width] = q
    return padded


def _of(values: Tensor, samples: slice) -> Tensor:
    """Take the rows of some samples, or the one row of all."""
    return values if len(values) == 1 else values[samples]


def _transposed(q: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return q, codes.t()


def _blocks(patches: Tensor, budget: int) -> Iterator[tuple[int, int, Tensor]]:
    """Cut `[N, H', ...]` into samples, or rows of one sample, of about `budget` bytes once they are copied.

    Yields:
        The first and the last + 1 of the N * H' rows, and the patches in them.
    """
    batch, out_h = patches.shape[:2]
    row_bytes = max(1, patches[:1, :1].numel())
    samples, rows = max(1, budget // (row_bytes * out_h)), max(1, budget // row_bytes)
    for first in range(0, batch, samples):
        group = patches[first : first + samples]
        if samples > 1 or rows >= out_h:
            yield first * out_h, first * out_h + len(group) * out_h, group
            continue
        for row in range(0, out_h, rows):
            block = group[:, row : row + rows]
            yield first * out_h + row, first * out_h + row + block.shape[1], block
