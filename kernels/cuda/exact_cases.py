"""Small inputs of each kernel, and what it makes of them beside what the definitions make.

Integers are those of `reference` and `qparams`; floats are powers of two, so they are exact too, and codes of norms may
differ by one at ties alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams, reference
from dcomp.kernels.cuda import nibbles, packing
from dcomp.kernels.cuda.calls import attention as attention_calls
from dcomp.kernels.cuda.calls import norms, products, quantizers
from dcomp.kernels.cuda.calls.unpack import unpack
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.tiles import ENTRIES, LOW_RANK
from dcomp.kernels.packing import Stored, int8_image
from dcomp.kernels.reference import GroupNorm, LayerNorm

COUNT = 3  # of cases
Pairs = Iterator[tuple[Tensor, Tensor]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(name: str, found: tuple[Kernel, ...], case: int, device: torch.device) -> Pairs:
    """Yield what a kernel makes of a case, on the device, and what is right, on the processor.

    Args:
        name: of the kernel.
        found: it, after those that must run before it.
        case: below `COUNT`.
        device: of the kernel.
    """
    of_kernel = next(of_kernel for start, of_kernel in _CASES.items() if name.startswith(start))
    return of_kernel(found, case, _Draw(case, device))


class _Draw:
    """Inputs of one case, the same at each time; made on the processor and given to the device."""

    def __init__(self, case: int, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(case)
        self.device = device

    def integers(self, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self._generator).to(dtype)

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (3 * torch.randn(shape, generator=self._generator) - 0.5).to(dtype)

    def powers(self, *shape: int) -> Tensor:
        """Powers of two, which change no digit of a sum; the product of two keeps sums in the range of float16."""
        return 2.0 ** self.integers(shape, -8, -5, torch.float32)

    def scales(self, rows: int, outputs: int, *, has_bias: bool, uniform: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales of rows and columns, and a bias; with one scale for all, sums and a branch add up exactly."""
        x_scale, scale = self.powers(rows), self.powers(outputs)
        if uniform:
            x_scale, scale = torch.full_like(x_scale, 2.0**-8), torch.full_like(scale, 0.25)
        return x_scale, scale, self.integers((outputs,), -99, 99, torch.float32) if has_bias else None

    def weight(self, kind: str, shape: tuple[int, ...], group: int = 32) -> Stored:
        """A weight of some kind of products, `[O, *taps, I]`; int4 ones have groups, or rows."""
        if kind == "w8a8":
            return Stored(self.integers(shape, -127, 127, torch.int8), None)
        *rows, channels = shape
        groups = -(-channels // group)
        packed = (*rows, group // 2 * groups) if kind == "w4a8" else (*rows, -(-channels // 2))
        whole_row = (shape[0], *(1 for _ in rows))
        factors = self.integers((*rows, groups) if kind == "w4a8" else whole_row, 1, 15, torch.int8)
        factors = torch.where(self.integers(tuple(factors.shape), 0, 1, torch.int8) > 0, factors, -factors)
        return Stored(self.integers(packed, 0, 255, torch.uint8), factors.expand(*rows, -1))

    def here(self, *tensors: Tensor | None) -> Iterator[Any]:
        """Copies on the device."""
        return (None if tensor is None else tensor.to(self.device) for tensor in tensors)


def _linear(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    entry, (_, kind) = ENTRIES[found[-1].name], _operation_and_kind(found[-1].name)
    rows, outputs, channels = ((5, 7, 40), (entry.rows + 37, entry.columns + 19, 208), (33, entry.columns, 512))[case]
    q = draw.integers((rows, channels), -127, 127, torch.int8)
    branch = _drawn_branch(found[-1], draw, rows, outputs)
    x_scale, scale, bias = draw.scales(rows, outputs, has_bias=case > 0, uniform=branch is not None)
    stored = draw.weight(kind, (outputs, channels))
    expected = _expected(q, x_scale, int8_image(*stored, channels), scale, bias, branch).to(_DTYPES[case])
    weight = products.product_weight(Stored(*draw.here(*stored)), channels, kind, with_sums=False)
    q, x_scale, scale, bias = draw.here(q, x_scale, scale, bias)
    given = (q, x_scale, weight, scale, bias, _DTYPES[case])
    yield products.linear(found[-1], *given, branch=_here(draw, branch)), expected


def _drawn_branch(kernel: Kernel, draw: _Draw, rows: int, outputs: int) -> tuple[Tensor, Tensor] | None:
    """Return a branch for a kernel that has one: numbers of 14 bits, half of which a product of tf32 would lose."""
    if LOW_RANK not in kernel.name:
        return None
    hidden = draw.integers((rows, 21), -4999, 4999, torch.float32) * 2.0**-10
    return hidden, draw.integers((outputs, 21), -7, 7, torch.float16)


def _here(draw: _Draw, branch: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    if branch is None:
        return None
    hidden, up = draw.here(*branch)
    return hidden, up


def _expected(
    q: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, branch: tuple[Tensor, Tensor] | None
) -> Tensor:
    y = reference.linear_a8(q, x_scale, codes, scale, bias)
    return y if branch is None else reference.add_branch_(y, *branch)


def _conv(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    entry, (_, kind) = ENTRIES[found[-1].name], _operation_and_kind(found[-1].name)
    outputs = (9, entry.columns + 19, 32)[case]
    image = ((1, 20, 5, 6), (2, 32, 13, 13), (3, 48, 9, 8))[case]
    taps = ((3, 3), (3, 3), (3, 2))[case]
    shape = (([1, 1], [1, 1], [1, 1]), ([1, 1], [1, 1], [1, 1]), ([2, 1], [2, 1], [1, 2]))[case]
    q = draw.integers(image, 0, 255, torch.uint8).contiguous(memory_format=torch.channels_last)
    ranges = 1 if case == 0 else image[0]
    x_scale, x_zero = draw.powers(ranges), draw.integers((ranges,), 0, 255, torch.uint8)
    scale, bias = draw.powers(outputs), None if case == 0 else draw.integers((outputs,), -99, 99, torch.float32)
    stored = draw.weight(kind, (outputs, *taps, image[1]))
    codes = int8_image(*stored, image[1])
    expected = reference.conv2d_a8(q, x_scale, x_zero, codes, scale, bias, *shape, 1).to(_DTYPES[case])
    weight = products.product_weight(Stored(*draw.here(*stored)), image[1], kind, with_sums=True)
    q, x_scale, x_zero, scale, bias = draw.here(q, x_scale, x_zero, scale, bias)
    made = products.conv2d(found[-1], q, x_scale, x_zero, weight, scale, bias, taps, *shape, dtype=_DTYPES[case])
    yield made, expected


def _operation_and_kind(name: str) -> tuple[str, str]:
    """Take the name of a product's kernel apart; a branch is not told."""
    operation, *kind, _ = name.replace(LOW_RANK, "").split("_")
    return operation, "_".join(kind)


def _static(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    x = draw.floats(((3, 5, 7), (2, 19, 33, 31), (4, 4099))[case], _DTYPES[case])
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    scale, zero, smooth = draw.powers(1), draw.integers((1,), 0, 255, torch.uint8), _smooth(x, case, draw)
    expected = qparams.quantize_static(x, scale, zero, smooth)
    yield quantizers.quantize_static(found[-1], *draw.here(x, scale, zero, smooth)), expected


def _sample(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    x = draw.floats(((1, 3, 5, 7), (2, 19, 33, 31), (5, 4099))[case], _DTYPES[case])
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    smooth = _smooth(x, case, draw)
    made = quantizers.quantize_sample(found, *draw.here(x, smooth))
    yield from zip(made, qparams.quantize_sample(x, smooth), strict=True)


def _token(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    x = draw.floats(((5, 7), (37, 320), (18, 1283))[case], _DTYPES[case])
    smooth = _smooth(x, case, draw)
    made = quantizers.quantize_token(found[-1], *draw.here(x, smooth))
    yield from zip(made, qparams.quantize_token(x, smooth), strict=True)


def _group(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    x = draw.floats(((1, 5, 7), (37, 1, 320), (2, 143, 84))[case], _DTYPES[case])
    if found[-1].name == "quantize_group_token":
        x = x.flatten(0, 1).unsqueeze(1)
    smooth = _smooth(x, case, draw)
    here, smooth_here = draw.here(x, smooth)
    made = quantizers.quantize_group(found, here, 32, smooth_here)
    yield from zip(made, qparams.quantize_group(x, 32, smooth), strict=True)


def _low_rank(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    (rows, channels), rank = ((5, 7), (37, 320), (70, 203))[case], (3, 40, 32)[case]
    # fp32 inputs need two values of tf32; sums are below 2^24.
    x = draw.integers((rows, channels), -(2**15) if case == 0 else -127, 127, _DTYPES[case])
    down = draw.integers((rank, channels), -9, 9, torch.float16)
    smooth, group = _smooth(x, case, draw), 32 if found[-1].name == "low_rank_group" else None
    x_here, down_here, smooth_here = draw.here(x, down, smooth)
    made = quantizers.quantize_low_rank(found[-1], x_here, down_here, group, smooth_here)
    yield from zip(made, reference.quantize_low_rank(x, down, group, smooth), strict=True)


def _smooth(x: Tensor, case: int, draw: _Draw) -> Tensor | None:
    """Return factors of the channels of a quantizer's input, in all cases but the first."""
    return None if case == 0 else draw.floats((x.shape[1 if x.ndim == 4 else -1],), torch.float32)


def _nibbles(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    group, block, shape = ((32, 32, (5, 7)), (128, 64, (37, 2304)), (96, 32, (18, 1283)))[case]
    x = draw.floats(shape, _DTYPES[case])
    codes, zeros, multipliers, expected_scale = qparams.quantize_nibbles(x, group)
    expected = nibbles.input_rows(codes, zeros, multipliers, group, block)
    made, scale = quantizers.quantize_nibbles(found[-1], next(draw.here(x)), group, block)
    yield made.data, expected.data
    yield made.multipliers[:, : len(x)], expected.multipliers[:, : len(x)]
    yield scale, expected_scale


def _linear_nibbles(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    entry, (_, kind) = ENTRIES[found[-1].name], _operation_and_kind(found[-1].name)
    block = products.block_of_kind(kind)
    rows, outputs = ((5, 7), (entry.rows + 37, entry.columns + 19), (33, entry.columns))[case]
    channels = (40, 17 * block + 96, 512)[case]
    x, stored = draw.floats((rows, channels), torch.float32), draw.weight("w4a8", (outputs, channels), group=64)
    codes, zeros, multipliers, _ = draw.here(*qparams.quantize_nibbles(x, block))
    image, _ = qparams.quantize_group(x.unsqueeze(1), block)
    branch = _drawn_branch(found[-1], draw, rows, outputs)
    x_scale, scale, bias = draw.scales(rows, outputs, has_bias=case > 0, uniform=branch is not None)
    weight_image = int8_image(*stored, channels)
    expected = _expected(image.squeeze(1), x_scale, weight_image, scale, bias, branch).to(_DTYPES[case])
    weight = products.product_weight(Stored(*draw.here(*stored)), channels, kind, with_sums=False)
    inputs = nibbles.input_rows(codes, zeros, multipliers, block, block)
    x_scale, scale, bias = draw.here(x_scale, scale, bias)
    given = (inputs.data, x_scale, weight, scale, bias, _DTYPES[case], inputs.multipliers)
    yield products.linear(found[-1], *given, _here(draw, branch)), expected


def _unpack(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    shape = ((9, 20), (67, 3, 3, 64), (33, 2, 1, 83))[case]
    stored = draw.weight("w4a8" if found[-1].name == "unpack_int4" else "w8a8", shape)
    scale = draw.powers(shape[0])
    expected = qparams.dequantize_weight(int8_image(*stored, shape[-1]), scale).to(_DTYPES[case])
    weight = Stored(*draw.here(*stored))
    yield unpack(found[-1], weight, next(draw.here(scale)), shape[-1], _DTYPES[case]), expected


def _group_norm(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    x = draw.floats(((1, 8, 5, 7), (2, 64, 9, 11), (3, 42, 16, 5))[case], _DTYPES[case])
    x, groups = x.contiguous(memory_format=torch.channels_last), (2, 8, 3)[case]
    weight, bias = (None, None) if case == 0 else (draw.powers(x.shape[1]), draw.powers(x.shape[1]))
    is_static = found[-1].name == "group_norm_static"
    scale, zero = (draw.powers(1), draw.integers((1,), 0, 255, torch.uint8)) if is_static else (None, None)
    norm = GroupNorm(groups, weight, bias, 1e-5, case > 0)
    expected, *_ = reference.group_norm_quantize(x, norm, scale, zero)
    x, weight, bias, scale, zero = draw.here(x, weight, bias, scale, zero)
    norm = norm._replace(weight=weight, bias=bias)
    codes, *_ = norms.group_norm_quantize(found, x, norm, scale, zero)
    yield _near(codes, expected), torch.tensor(True)


def _layer_norm(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    x = draw.floats(((1, 5, 8), (2, 19, 320), (3, 7, 1283))[case], _DTYPES[case])
    samples, _, channels = x.shape
    weight, bias = (None, None) if case == 0 else (draw.powers(channels), draw.powers(channels))
    gain, shift = (None, None) if case == 1 else (draw.powers(samples, channels), draw.powers(samples, channels))
    expected, _ = reference.layer_norm_quantize(x, LayerNorm(weight, bias, gain, shift, 1e-5))
    x, weight, bias, gain, shift = draw.here(x, weight, bias, gain, shift)
    codes, _ = norms.layer_norm_quantize(found[-1], x, LayerNorm(weight, bias, gain, shift, 1e-5))
    yield _near(codes, expected), torch.tensor(True)


def _tiles(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    shape, width = (((1, 2, 64, 40), 48), ((2, 3, 256, 72), 80), ((1, 1, 128, 160), 160))[case]
    # Means of so many integers are exact.
    k, v = (draw.integers(shape, -99, 99, _DTYPES[case]) for _ in range(2))
    codes, scale = packing.quantize_keys(k, k.float().mean(2, keepdim=True))
    expected = packing.pack_tiles(codes, scale, v, packing.value_scale(v), width)
    k, v = draw.here(k, v)
    yield from zip(attention_calls.key_value_tiles(found, k, v, width), expected, strict=True)


def _attention(found: tuple[Kernel, ...], case: int, draw: _Draw) -> Pairs:
    """One key of each query takes all: a score that is larger by one makes it 2^64 times as probable."""
    scale = 64 * math.log(2)
    width, rows = int(found[-1].name.split("_")[1]), ENTRIES[found[-1].name].rows
    samples, heads, queries, keys = ((1, 1, 5, 70), (2, 3, rows + 21, 150), (1, 2, rows, 64))[case]
    channels = width - (8, 5, 0)[case]
    q = draw.integers((samples, queries, heads, channels), -127, 127, torch.int8)
    codes = draw.integers((samples, heads, keys, channels), -127, 127, torch.int8)
    ones, v = torch.ones(samples, heads, keys), draw.integers((samples, heads, keys, channels), -99, 99, torch.float32)
    expected = reference.attention(q.transpose(1, 2).double(), codes, v.double(), scale).to(_DTYPES[case])
    tiles, v_scale = packing.pack_tiles(codes, ones, v, packing.value_scale(v), width)
    q = functional.pad(q, (0, packing.head_depth(width) - channels))
    q, ones, tiles, v_scale = draw.here(q, torch.ones(samples, queries, heads), tiles, v_scale)
    made = attention_calls.attention(found[-1], q, ones, tiles, v_scale, channels, scale, _DTYPES[case])
    yield made.float().round(), expected.float()  # a device's powers of two need not be exact


def _near(codes: Tensor, expected: Tensor) -> Tensor:
    """Whether codes are right but for a few, of values at ties, that are off by one."""
    off = (codes.cpu().int() - expected.int()).abs()
    return (off.max() <= 1) & (off.sum() <= max(1, off.numel() // 500))


_CASES: dict[str, Callable[[tuple[Kernel, ...], int, _Draw], Pairs]] = {
    "linear_w4a4": _linear_nibbles,
    "linear": _linear,
    "conv": _conv,
    "quantize_static": _static,
    "quantize_sample": _sample,
    "quantize_token": _token,
    "quantize_group": _group,
    "quantize_nibbles": _nibbles,
    "low_rank": _low_rank,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "key_value": _tiles,
    "attention": _attention,
    "unpack": _unpack,
}
