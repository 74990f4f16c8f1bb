"""The one table (operation, format, device) -> implementation, and the operations `torch.ops.dcomp.*` that go by it.

Rows in order of preference: `native` are the project's own kernels, `cpu` is what torch carries, and `emulated`
(`torch` for float operations) is always there and always last. A row that is passed over says why, and `explain` shows
it: nothing falls back unseen. The operations take plain tensors in the layout of `packing` (4 bits when `qweight` is
uint8), have shapes for tracing, and no gradients.

Operations are registered here and nowhere else, once per process.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dcomp import DcompError
from dcomp.kernels import cpu, qparams, reference
from dcomp.kernels.native import rows as native
from dcomp.kernels.packing import int8_image

Backend = Literal["auto", "native", "cpu", "emulated"]
OPERATIONS = (
    "quantize_static",
    "quantize_sample",
    "quantize_token",
    "quantize_group",
    "group_norm_quantize",
    "layer_norm_quantize",
    "linear_a8",
    "conv2d_a8",
    "linear_a16",
    "conv2d_a16",
    "attention",
)

_NO_CUDA = "this version has no CUDA kernels of its own"
_forced: ContextVar[Backend] = ContextVar("dcomp_backend", default="auto")


class KernelError(DcompError):
    """An implementation that was demanded cannot run here."""


@dataclass(frozen=True)
class _Request:
    operation: str
    device: str
    bits: int
    reduction: int  # products that are summed into one output
    groups: int

    @property
    def key(self) -> tuple[str, int]:
        """Of a line in the tables below: bits matter to convolutions alone."""
        return self.operation, self.bits if self.operation == "conv2d_a8" else 8


@dataclass(frozen=True)
class Choice:
    """The implementation of an operation.

    Attributes:
        row: "native", "cpu", or the row that is always there: "emulated", or "torch" for a float operation.
        reason: why this one, and why not a faster one.
        run: the implementation.
        image: makes of a stored weight what it takes, as `packing.int8_image` does.
    """

    row: str
    reason: str
    run: Callable[..., Any]
    image: Callable[[Tensor, Tensor | None, int], Any] = int8_image


def choose(operation: str, *, device: str = "cpu", bits: int = 8, reduction: int = 1, groups: int = 1) -> Choice:
    """Return the implementation that an operation uses.

    Args:
        operation: one of `OPERATIONS`.
        device: type of the device, as "cpu" or "cuda".
        bits: of the weight; no matter where there is none.
        reduction: number of products in a sum.
        groups: of a convolution.

    Raises:
        KernelError: `use_backend` demands a row that cannot run this.
    """
    return _choose(_Request(operation, device, bits, reduction, groups), _forced.get())


@functools.lru_cache(maxsize=4096)
def _choose(request: _Request, forced: Backend) -> Choice:
    last, text, run = _LAST_ROW[request.operation]
    if forced == "emulated":
        return Choice(last, f"demanded by use_backend; {text}", run)
    refusals = []
    for row, (refuse, make) in _FAST_ROWS.items():
        if forced not in ("auto", row):
            continue
        refusal = refuse(request)
        if refusal is None:
            return make(request)
        if forced == row:
            raise KernelError(
                f"The {row} row cannot run {request.operation}: {refusal}",
                where=f"{request.bits}-bit weight on {request.device}",
                remedy="Leave use_backend out to let dcomp choose.",
            )
        refusals.append(refusal)
    return Choice(last, f"{refusals[-1]}; {text}", run)


def _native_row(request: _Request) -> Choice:
    if request.operation in _STRIPS and native.multiplies_itself():
        text = f"{_TILES if native.has_tiles() else _NO_VNNI[request.bits]} ({native.instruction_set()})"
        text = f"{text}; {cpu.defect()}" if cpu.defect() else text
        return Choice("native", text, _STRIPS[request.operation], native.stored)
    text, run = _NATIVE_ROW[request.key]
    if request.operation == "attention" and not native.has_tiles():
        text = _WITHOUT_TILES
    return Choice("native", f"{text} ({native.instruction_set()})", run, native.int8_image)


def _cpu_row(request: _Request) -> Choice:
    text, run = _CPU_ROW[request.key]
    unbuilt = _refuse_native(request) if request.key in _NATIVE_ROW or request.operation in _STRIPS else None
    return Choice("cpu", f"{text}; no kernels of our own: {unbuilt}" if unbuilt else text, run)


def _refuse_native(request: _Request) -> str | None:
    if request.operation == "attention" and request.device == "cpu":
        return native.attention_defect()
    refusal = _refuse_any(request)
    if refusal is not None:
        return refusal
    if request.operation in _STRIPS and native.defect() is None and native.multiplies_itself():
        return None
    if request.operation in _STRIPS and cpu.defect() is not None:
        return native.defect() or f"{cpu.defect()}, and {native.instruction_set()} has no fast products of our own"
    if request.key in _NATIVE_ROW:
        return native.defect()
    if request.operation not in _STRIPS:
        return "there is no kernel of our own for it"
    return native.defect() or "this processor has no tiles of integers (AMX)"


def _refuse_cpu(request: _Request) -> str | None:
    return _refuse_any(request) or (cpu.defect() if request.operation in _STRIPS else None)


def _refuse_any(request: _Request) -> str | None:
    """Say why no row of this processor can run it."""
    if request.device == "cuda":
        return _NO_CUDA
    if request.device != "cpu":
        return f"there is no row for {request.device}"
    if request.operation not in _STRIPS:
        return None
    if request.groups > 1:
        return "grouped convolutions have no integer kernel"
    if request.reduction > cpu.MAX_REDUCTION:
        return f"a sum of {request.reduction} products could overflow int32"
    return None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Demand a row within a `with` block, in this thread; "auto" is the table's own order."""
    if backend not in get_args(Backend):
        raise KernelError(f"There is no row {backend!r}", remedy=f"Use one of {', '.join(get_args(Backend))}.")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(devices: Sequence[str] = ("cpu", "cuda")) -> list[dict[str, str]]:
    """Return operation, format, device, row and reason of each line of the table, as `dcomp doctor` prints it."""
    lines = []
    for device in devices:
        for operation in OPERATIONS:
            for bits in (8, 4):
                weightless = not operation.endswith(("a8", "a16"))
                if weightless and bits == 4:
                    continue
                fmt = "any" if weightless else f"W{bits}A{operation.removeprefix('linear_a').removeprefix('conv2d_a')}"
                choice = choose(operation, device=device, bits=bits)
                lines.append(
                    {
                        "operation": operation,
                        "format": fmt,
                        "device": device,
                        "row": choice.row,
                        "reason": choice.reason,
                    }
                )
    return lines


_BLOCKS = "weight dequantized a block of output channels at a time, torch's float operation"
_NATIVE_ROW: dict[tuple[str, int], tuple[str, Callable[..., Any]]] = {
    ("quantize_static", 8): ("one pass", native.quantize_static),
    ("quantize_sample", 8): ("two passes", native.quantize_sample),
    ("quantize_token", 8): ("one pass", native.quantize_token),
    ("linear_a8", 8): ("oneDNN int8 matrix product; own unpacking and rescaling", native.linear_a8),
    ("conv2d_a8", 4): (
        "own unpacking and rescaling, oneDNN int8 matrix product over patches",
        native.conv2d_patches,
    ),
    ("group_norm_quantize", 8): ("norm, activation and codes in two or three passes", native.group_norm_quantize),
    ("layer_norm_quantize", 8): ("norm and codes of a token at once", native.layer_norm_quantize),
    ("attention", 8): ("bfloat16 products in tiles, softmax between them", native.attention),
}
_STRIPS: dict[str, Callable[..., Any]] = {
    "linear_a8": native.linear_a8_by_strips,
    "conv2d_a8": native.conv2d_a8_by_strips,
}
_TILES = "unpacked to tiles a block at a time, products and rescaling in them"
_NO_VNNI = {
    8: "own products, widened to 16 bits",
    4: "own products of 8 bits where groups have 32 channels and more, else widened to 16 bits",
}
_WITHOUT_TILES = "products of 16-bit integers, softmax between them in fp32"
_CPU_ROW: dict[tuple[str, int], tuple[str, Callable[..., Any]]] = {
    ("quantize_static", 8): ("one pass in cache-sized blocks", cpu.quantize_static),
    ("quantize_sample", 8): ("two passes in cache-sized blocks", cpu.quantize_sample),
    ("quantize_token", 8): ("one pass in cache-sized blocks", cpu.quantize_token),
    ("quantize_group", 8): ("two passes in cache-sized blocks", cpu.quantize_group),
    ("group_norm_quantize", 8): ("torch's norm and activation, codes of their result", cpu.group_norm_quantize),
    ("layer_norm_quantize", 8): ("torch's norm, codes of its result", cpu.layer_norm_quantize),
    ("linear_a8", 8): ("oneDNN int8 matrix product; 4-bit weights are unpacked for each call", cpu.linear_a8),
    ("conv2d_a8", 8): ("oneDNN int8 convolution, weight reordered once and kept", cpu.conv2d_prepacked),
    ("conv2d_a8", 4): ("weight unpacked for each call, oneDNN int8 matrix product over patches", cpu.conv2d_patches),
    ("linear_a16", 8): (_BLOCKS, cpu.linear_a16),
    ("conv2d_a16", 8): (_BLOCKS, cpu.conv2d_a16),
    ("attention", 8): ("torch's own function", cpu.attention),
}
_FAST_ROWS: dict[str, tuple[Callable[[_Request], str | None], Callable[[_Request], Choice]]] = {
    "native": (_refuse_native, _native_row),
    "cpu": (_refuse_cpu, _cpu_row),
}
_EXACT = "exact integers in float64"
_FLOAT = "weight dequantized for each call, torch's float operation"
_LAST_ROW: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "quantize_static": ("emulated", "plain torch", qparams.quantize_static),
    "quantize_sample": ("emulated", "plain torch", qparams.quantize_sample),
    "quantize_token": ("emulated", "plain torch", qparams.quantize_token),
    "quantize_group": ("emulated", "plain torch", qparams.quantize_group),
    "group_norm_quantize": ("emulated", "plain torch", reference.group_norm_quantize),
    "layer_norm_quantize": ("emulated", "plain torch", reference.layer_norm_quantize),
    "linear_a8": ("emulated", _EXACT, reference.linear_a8),
    "conv2d_a8": ("emulated", _EXACT, reference.conv2d_a8),
    "linear_a16": ("torch", _FLOAT, reference.linear_a16),
    "conv2d_a16": ("torch", _FLOAT, reference.conv2d_a16),
    "attention": ("torch", "torch's own function", cpu.attention),
}


@torch.library.custom_op("dcomp::quantize_static", mutates_args=())
def quantize_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return uint8 codes for a static range: scale fp32 `[1]`, zero uint8 `[1]`."""
    codes: Tensor = choose("quantize_static", device=x.device.type).run(x, scale, zero)
    return codes.contiguous(memory_format=qparams.memory_format(x))


@quantize_static.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))


@torch.library.custom_op("dcomp::quantize_sample", mutates_args=())
def quantize_sample(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of the samples of `x` `[N, ...]`, their scales fp32 `[N]` and zeros uint8 `[N]`."""
    codes, scale, zero = choose("quantize_sample", device=x.device.type).run(x)
    return codes.contiguous(memory_format=qparams.memory_format(x)), scale, zero


@quantize_sample.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))
    return codes, x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty(x.shape[:1], dtype=torch.uint8)


@torch.library.custom_op("dcomp::quantize_token", mutates_args=())
def quantize_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the rows of `x` `[M, I]` and their scales fp32 `[M]`."""
    codes, scale = choose("quantize_token", device=x.device.type).run(x)
    return codes.contiguous(), scale


@quantize_token.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dcomp::quantize_group", mutates_args=())
def quantize_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the int8 image of `x` `[N, M, I]` in groups of `group` channels, and the scales fp32 `[N]`."""
    image, scale = choose("quantize_group", device=x.device.type).run(x, group)
    return image.contiguous(), scale


@quantize_group.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


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
    choice = choose("group_norm_quantize", device=x.device.type)
    codes, found, center = choice.run(x, groups, weight, bias, eps, silu, scale, zero)
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
    codes, scale = choose("layer_norm_quantize", device=x.device.type).run(x, weight, bias, gain, shift, eps)
    return codes.contiguous(), scale


@layer_norm_quantize.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dcomp::linear_a8", mutates_args=())
def linear_a8(
    q: Tensor,
    x_scale: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    """Return fp32 `[M, O]` of int8 codes `[M, I]` with a scale for each row `[M]` and a packed weight."""
    choice = choose("linear_a8", device=q.device.type, bits=_bits(qweight), reduction=in_features)
    y: Tensor = choice.run(q, x_scale, choice.image(qweight, multiplier, in_features), scale, bias)
    return y


@linear_a8.register_fake
def _(
    q: Tensor,
    x_scale: Tensor,
    qweight: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    return q.new_empty((q.shape[0], qweight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dcomp::linear_a16", mutates_args=())
def linear_a16(
    x: Tensor, qweight: Tensor, scale: Tensor, multiplier: Tensor | None, bias: Tensor | None, in_features: int
) -> Tensor:
    """Return `[..., O]` in the dtype of `x` `[..., I]`, computed with the dequantized weight."""
    choice = choose("linear_a16", device=x.device.type, bits=_bits(qweight), reduction=in_features)
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
) -> Tensor:
    """Return fp32 channels-last `[N, O, H', W']` of uint8 codes `[N, C, H, W]`.

    Scale and zero are `[1]`, or `[N]` with one for each sample.
    """
    choice = choose(
        "conv2d_a8",
        device=q.device.type,
        bits=_bits(qweight),
        reduction=q.shape[1] // groups * qweight.shape[1] * qweight.shape[2],
        groups=groups,
    )
    codes = choice.image(qweight, multiplier, q.shape[1] // groups)
    shape = (list(stride), list(padding), list(dilation))
    y: Tensor = choice.run(q, x_scale, x_zero, codes, scale, bias, *shape, groups)
    return _channels_last(y)


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
) -> Tensor:
    return _empty_output(q, qweight, stride, padding, dilation, torch.float32)


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
    choice = choose("conv2d_a16", device=x.device.type, bits=_bits(qweight))
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
    y: Tensor = choose("attention", device=q.device.type).run(q, k, v, scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


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
