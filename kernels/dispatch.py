"""The one table (operation, format, device) -> implementation, and the operations `torch.ops.dcomp.*` that go by it.

Rows in order of preference: `cuda` and `native` are the project's own kernels for GPUs and processors, `cpu` is what
torch carries, and `emulated` (`torch` for float operations) is always there and always last. A row that is passed over
says why, and `explain` shows it: nothing falls back unseen. The operations take plain tensors in the layout of
`packing` (4 bits when `qweight` is uint8), have shapes for tracing, and no gradients.

Operations are registered here and nowhere else, once per process.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from dcomp import DcompError
from dcomp.kernels import cpu, qparams, reference
from dcomp.kernels.cuda import rows as cuda
from dcomp.kernels.native import rows as native
from dcomp.kernels.packing import int8_image, stored

Backend = Literal["auto", "cuda", "native", "cpu", "emulated"]
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

_forced: ContextVar[Backend] = ContextVar("dcomp_backend", default="auto")


class KernelError(DcompError):
    """An implementation that was demanded cannot run here."""


@dataclass(frozen=True)
class _Request:
    operation: str
    device: str  # its type
    index: int
    bits: int
    reduction: int  # products that are summed into one output
    groups: int
    excess: str | None  # what of the sizes is too much for CUDA kernels

    @property
    def key(self) -> tuple[str, int]:
        """Of a line in the tables below: bits matter to convolutions alone."""
        return self.operation, self.bits if self.operation == "conv2d_a8" else 8


@dataclass(frozen=True)
class Choice:
    """The implementation of an operation.

    Attributes:
        row: "cuda", "native", "cpu", or the row that is always there: "emulated", or "torch" for a float operation.
        reason: why this one, and why not a faster one.
        run: the implementation.
        image: makes of a stored weight what it takes, as `packing.int8_image` does.
    """

    row: str
    reason: str
    run: Callable[..., Any]
    image: Callable[[Tensor, Tensor | None, int], Any] = int8_image


def choose(
    operation: str,
    *,
    device: torch.device | str = "cpu",
    bits: int = 8,
    reduction: int = 1,
    groups: int = 1,
    excess: str | None = None,
) -> Choice:
    """Return the implementation that an operation uses.

    Args:
        operation: one of `OPERATIONS`.
        device: as "cpu" or "cuda:1"; "cuda" is the current one.
        bits: of the weight; no matter where there is none.
        reduction: number of products in a sum.
        groups: of a convolution.
        excess: what `cuda.rows.excess` says of the sizes.

    Raises:
        KernelError: `use_backend` demands a row that cannot run this, or kernels of a GPU would have to be tested while
            a CUDA graph is recorded.
    """
    place = torch.device(device)
    index = cuda.index_of(place) if place.type == "cuda" else 0
    return _choose(_Request(operation, place.type, index, bits, reduction, groups, excess), _forced.get())


@functools.lru_cache(maxsize=4096)
def _choose(request: _Request, forced: Backend) -> Choice:
    last, text, run = _LAST_ROW[request.operation]
    if forced == "emulated":
        return Choice(last, f"demanded by use_backend; {text}", run)
    refusals = []
    for row, (device, refuse, make) in _FAST_ROWS.items():
        if forced not in ("auto", row) or (forced == "auto" and request.device != device):
            continue
        refusal = refuse(request) if request.device == device else f"it does not run on {request.device}"
        if refusal is None:
            return make(request)
        if forced == row:
            raise KernelError(
                f"The {row} row cannot run {request.operation}: {refusal}",
                where=f"{request.bits}-bit weight on {request.device}",
                remedy="Leave use_backend out to let dcomp choose.",
            )
        refusals.append(refusal)
    refusal = refusals[-1] if refusals else f"there is no row for {request.device}"
    return Choice(last, f"{refusal}; {text}", run)


def _cuda_row(request: _Request) -> Choice:
    text, run = _CUDA_ROW[request.operation, 4 if request.bits == 4 and _has_weight(request.operation) else 8]
    remark = cuda.remark(request.operation, request.bits, request.index)
    return Choice("cuda", f"{text} ({remark})", run, stored)


def _refuse_cuda(request: _Request) -> str | None:
    names = (request.operation, request.bits, request.index)
    if request.groups > 1 and request.operation == "conv2d_a8":
        return "grouped convolutions have no integer kernel"
    if request.reduction > cuda.MAX_REDUCTION and request.operation.endswith("a8"):
        return f"a sum of {request.reduction} products could overflow int32"
    if not cuda.may_try(*names):
        raise KernelError(
            "A CUDA kernel is to be tested, and a CUDA graph is being recorded",
            where=request.operation,
            remedy="Run the model once before its graph is recorded.",
        )
    return request.excess or cuda.defect(*names)


def _native_row(request: _Request) -> Choice:
    if request.operation in _STRIPS and native.multiplies_itself():
        text = f"{_TILES if native.has_tiles() else _NO_VNNI[request.bits]} ({native.instruction_set()})"
        text = f"{text}; {cpu.defect()}" if cpu.defect() else text
        return Choice("native", text, _STRIPS[request.operation], stored)
    text, run = _NATIVE_ROW[request.key]
    if request.operation == "attention" and not native.has_tiles():
        text = _WITHOUT_TILES
    return Choice("native", f"{text} ({native.instruction_set()})", run, native.int8_image)


def _cpu_row(request: _Request) -> Choice:
    text, run = _CPU_ROW[request.key]
    unbuilt = _refuse_native(request) if request.key in _NATIVE_ROW or request.operation in _STRIPS else None
    return Choice("cpu", f"{text}; no kernels of our own: {unbuilt}" if unbuilt else text, run)


def _refuse_native(request: _Request) -> str | None:
    if request.operation == "attention":
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
                if bits == 4 and not _has_weight(operation):
                    continue
                fmt = f"W{bits}A{operation.rpartition('_a')[2]}" if _has_weight(operation) else "any"
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


def _has_weight(operation: str) -> bool:
    return operation.endswith(("a8", "a16"))


_UNPACKED = "weight unpacked by one kernel, torch's float operation"
_CUDA_ROW: dict[tuple[str, int], tuple[str, Callable[..., Any]]] = {
    ("quantize_static", 8): ("one pass", cuda.quantize_static),
    ("quantize_sample", 8): ("two passes", cuda.quantize_sample),
    ("quantize_token", 8): ("a warp for each token", cuda.quantize_token),
    ("quantize_group", 8): ("two passes", cuda.quantize_group),
    ("group_norm_quantize", 8): ("norm, activation and codes in two or three passes", cuda.group_norm_quantize),
    ("layer_norm_quantize", 8): ("a warp for each token", cuda.layer_norm_quantize),
    ("linear_a8", 8): ("int8 products in tiles", cuda.linear_a8),
    ("linear_a8", 4): ("int4 made int8 in registers, int8 products in tiles", cuda.linear_a8),
    ("conv2d_a8", 8): ("int8 products in tiles, patches read where they lie", cuda.conv2d_a8),
    ("conv2d_a8", 4): ("int4 made int8 in registers, int8 products in tiles", cuda.conv2d_a8),
    ("linear_a16", 8): (_UNPACKED, cuda.linear_a16),
    ("linear_a16", 4): (_UNPACKED, cuda.linear_a16),
    ("conv2d_a16", 8): (_UNPACKED, cuda.conv2d_a16),
    ("conv2d_a16", 4): (_UNPACKED, cuda.conv2d_a16),
}
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
_FAST_ROWS: dict[str, tuple[str, Callable[[_Request], str | None], Callable[[_Request], Choice]]] = {
    "cuda": ("cuda", _refuse_cuda, _cuda_row),
    "native": ("cpu", _refuse_native, _native_row),
    "cpu": ("cpu", _refuse_cpu, _cpu_row),
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


def _quantizer(operation: str, x: Tensor) -> Choice:
    return choose(operation, device=x.device, excess=cuda.excess(x.numel()) if x.is_cuda else None)


@torch.library.custom_op("dcomp::quantize_static", mutates_args=())
def quantize_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return uint8 codes for a static range: scale fp32 `[1]`, zero uint8 `[1]`."""
    codes: Tensor = _quantizer("quantize_static", x).run(x, scale, zero)
    return codes.contiguous(memory_format=qparams.memory_format(x))


@quantize_static.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))


@torch.library.custom_op("dcomp::quantize_sample", mutates_args=())
def quantize_sample(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes of the samples of `x` `[N, ...]`, their scales fp32 `[N]` and zeros uint8 `[N]`."""
    codes, scale, zero = _quantizer("quantize_sample", x).run(x)
    return codes.contiguous(memory_format=qparams.memory_format(x)), scale, zero


@quantize_sample.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=qparams.memory_format(x))
    return codes, x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty(x.shape[:1], dtype=torch.uint8)


@torch.library.custom_op("dcomp::quantize_token", mutates_args=())
def quantize_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the rows of `x` `[M, I]` and their scales fp32 `[M]`."""
    codes, scale = _quantizer("quantize_token", x).run(x)
    return codes.contiguous(), scale


@quantize_token.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("dcomp::quantize_group", mutates_args=())
def quantize_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the int8 image of `x` `[N, M, I]` in groups of `group` channels, and the scales fp32 `[N]`."""
    image, scale = _quantizer("quantize_group", x).run(x, group)
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
    choice = _quantizer("group_norm_quantize", x)
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
    codes, scale = _quantizer("layer_norm_quantize", x).run(x, weight, bias, gain, shift, eps)
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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `[M, O]` of int8 codes `[M, I]` with a scale for each row `[M]` and a packed weight, rounded from fp32."""
    excess = cuda.excess(max(q.numel(), len(q) * len(scale)), len(q)) if q.is_cuda else None
    choice = choose("linear_a8", device=q.device, bits=_bits(qweight), reduction=in_features, excess=excess)
    return _rounded(choice, dtype, q, x_scale, choice.image(qweight, multiplier, in_features), scale, bias)


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
) -> Tensor:
    return q.new_empty((q.shape[0], qweight.shape[0]), dtype=dtype)


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
    choice = choose("linear_a16", device=x.device, bits=_bits(qweight), excess=_weight_excess(qweight))
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
        excess = cuda.excess(max(q.numel(), rows * len(scale)), rows, taps, dilation)
    choice = choose(
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
    choice = choose("conv2d_a16", device=x.device, bits=_bits(qweight), excess=_weight_excess(qweight))
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
    y: Tensor = choose("attention", device=q.device).run(q, k, v, scale)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


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
