"""The one table (operation, format, device) -> implementation.

Rows in order of preference: `cuda` and `native` are the project's own kernels for GPUs and processors, `cpu` is what
torch carries, and `emulated` (`torch` for float operations) is always there and always last. A row that is passed over
says why, and `explain` shows it: nothing falls back unseen. `ops` are the operations that go by it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dcomp import DcompError
from dcomp.kernels import blocked, onednn, qparams, reference
from dcomp.kernels.cuda import rows as cuda
from dcomp.kernels.native import rows as native
from dcomp.kernels.packing import int8_image, stored

Backend = Literal["auto", "cuda", "native", "cpu", "emulated"]
OPERATIONS = (
    "quantize_static",
    "quantize_sample",
    "quantize_token",
    "quantize_group",
    "quantize_low_rank",
    "group_norm_quantize",
    "layer_norm_quantize",
    "linear_a4",
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
    block: int = 64  # channels that share multipliers of 4-bit inputs and weights

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
    block: int = 64,
) -> Choice:
    """Return the implementation that an operation uses.

    Args:
        operation: one of `OPERATIONS`.
        device: as "cpu" or "cuda:1"; "cuda" is the current one.
        bits: of the weight; no matter where there is none.
        reduction: number of products in a sum.
        groups: of a convolution.
        excess: what `cuda.rows.excess` says of the sizes.
        block: of 4-bit inputs, what `cuda.nibbles.block_of` says of the groups; 0 for none.

    Raises:
        KernelError: `use_backend` demands a row that cannot run this, or kernels of a GPU would have to be tested while
            a CUDA graph is recorded.
    """
    place = torch.device(device)
    index = cuda.index_of(place) if place.type == "cuda" else 0
    return _choose(_Request(operation, place.type, index, bits, reduction, groups, excess, block), _forced.get())


@functools.lru_cache(maxsize=4096)
def _choose(request: _Request, forced: Backend) -> Choice:
    last, text, run = _LAST_ROW[request.operation]
    if forced == "emulated":
        return Choice(last, f"demanded by use_backend; {text}", run)
    if request.operation == "linear_a4":
        return _choose_a4(request, forced)
    refusals = []
    for row, (device, refuse, make) in _FAST_ROWS.items():
        if forced not in ("auto", row) or (forced == "auto" and request.device != device):
            continue
        unmeasured = _UNMEASURED.get((row, request.operation)) if forced == "auto" else None
        refusal = unmeasured or refuse(request) if request.device == device else f"it does not run on {request.device}"
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


def _choose_a4(request: _Request, forced: Backend) -> Choice:
    """Return the kernel of 4-bit inputs where there is one, else say what runs the operations that stand in for it."""
    refusal = ""
    if request.device == "cuda" and forced in ("auto", "cuda"):
        found = _refuse_cuda(request)
        if found is None:
            return _cuda_row(request)
        refusal = f"{found}; "
    quantizer, product = (_choose(replace(request, operation=part), forced) for part in ("quantize_group", "linear_a8"))
    reason = f"{refusal}quantize_group by {quantizer.row}, linear_a8 by {product.row}"
    return Choice(product.row, reason, reference.linear_a4)


def _cuda_row(request: _Request) -> Choice:
    text, run = _CUDA_ROW[request.operation, 4 if request.bits == 4 and _has_weight(request.operation) else 8]
    remark = cuda.remark(request.operation, request.bits, request.index)
    return Choice("cuda", f"{text} ({remark})", run, stored)


def _refuse_cuda(request: _Request) -> str | None:
    names = (request.operation, request.bits, request.index)
    if request.groups > 1 and request.operation == "conv2d_a8":
        return "grouped convolutions have no integer kernel"
    if request.reduction > cuda.MAX_REDUCTION and request.operation.endswith(("a4", "a8")):
        return f"a sum of {request.reduction} products could overflow int32"
    if request.operation == "linear_a4":
        misfit = cuda.misfit(request.index, request.bits, request.block)
        if misfit is not None:
            return misfit
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
        text = f"{text}; {onednn.defect()}" if onednn.defect() else text
        return Choice("native", text, _STRIPS[request.operation], stored)
    text, run = _NATIVE_ROW[request.key]
    if request.operation == "attention":
        text = f"{_PRODUCTS_OF_ATTENTION[native.instruction_set()]}, {text}"
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
    if request.operation in _STRIPS and onednn.defect() is not None:
        return native.defect() or f"{onednn.defect()}, and {native.instruction_set()} has no fast products of our own"
    if request.key in _NATIVE_ROW:
        return native.defect()
    if request.operation not in _STRIPS:
        return "there is no kernel of our own for it"
    return native.defect() or "this processor has no tiles of integers (AMX)"


def _refuse_cpu(request: _Request) -> str | None:
    return _refuse_any(request) or (onednn.defect() if request.operation in _STRIPS else None)


def _refuse_any(request: _Request) -> str | None:
    """Say why no row of this processor can run it."""
    if request.operation not in _STRIPS:
        return None
    if request.groups > 1:
        return "grouped convolutions have no integer kernel"
    if request.reduction > onednn.MAX_REDUCTION:
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
    return operation.endswith(("a4", "a8", "a16"))


_UNPACKED = "weight unpacked by one kernel, torch's float operation"
_CUDA_ROW: dict[tuple[str, int], tuple[str, Callable[..., Any]]] = {
    ("quantize_static", 8): ("one pass", cuda.quantize_static),
    ("quantize_sample", 8): ("two passes", cuda.quantize_sample),
    ("quantize_token", 8): ("a warp for each token", cuda.quantize_token),
    ("quantize_group", 8): ("a warp for each row, or two passes where rows share a scale", cuda.quantize_group),
    ("quantize_low_rank", 8): ("rows are read once for codes and for tf32 products", cuda.quantize_low_rank),
    ("group_norm_quantize", 8): ("norm, activation and codes in two or three passes", cuda.group_norm_quantize),
    ("layer_norm_quantize", 8): ("a warp for each token", cuda.layer_norm_quantize),
    ("attention", 8): ("scores of int8 codes, values in float16", cuda.attention),
    ("linear_a4", 4): ("4-bit codes in one pass, their products in tiles", cuda.linear_a4),
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
    ("quantize_group", 8): ("one pass, or two where rows share a scale", native.quantize_group),
    ("quantize_low_rank", 8): ("codes in one pass, torch's product", native.quantize_low_rank),
    ("linear_a8", 8): ("oneDNN int8 matrix product; own unpacking and rescaling", native.linear_a8),
    ("conv2d_a8", 4): (
        "own unpacking and rescaling, oneDNN int8 matrix product over patches",
        native.conv2d_patches,
    ),
    ("group_norm_quantize", 8): ("norm, activation and codes in two or three passes", native.group_norm_quantize),
    ("layer_norm_quantize", 8): ("norm and codes of a token at once", native.layer_norm_quantize),
    ("attention", 8): ("softmax between them in fp32", native.attention),
}
_STRIPS: dict[str, Callable[..., Any]] = {
    "linear_a8": native.linear_a8_by_strips,
    "conv2d_a8": native.conv2d_a8_by_strips,
}
_TILES = "unpacked to tiles a block at a time, products and rescaling in them"
_NO_VNNI = {
    8: "own products of bytes; what would saturate is kept apart, or widened to 16 bits",
    4: "own products of bytes; multipliers in sums where groups have 32 channels and more",
}
_PRODUCTS_OF_ATTENTION = {
    "amx": "bfloat16 products in tiles",
    "avx512bf16": "bfloat16 products",
    "avx512": "products of 16-bit integers",
    "avx2": "products of 16-bit integers",
}
_CPU_ROW: dict[tuple[str, int], tuple[str, Callable[..., Any]]] = {
    ("quantize_static", 8): ("one pass in cache-sized blocks", blocked.quantize_static),
    ("quantize_sample", 8): ("two passes in cache-sized blocks", blocked.quantize_sample),
    ("quantize_token", 8): ("one pass in cache-sized blocks", blocked.quantize_token),
    ("quantize_group", 8): ("two passes in cache-sized blocks", blocked.quantize_group),
    ("quantize_low_rank", 8): ("codes in cache-sized blocks, torch's product", blocked.quantize_low_rank),
    ("group_norm_quantize", 8): ("torch's norm and activation, codes of their result", blocked.group_norm_quantize),
    ("layer_norm_quantize", 8): ("torch's norm, codes of its result", blocked.layer_norm_quantize),
    ("linear_a8", 8): ("oneDNN int8 matrix product; 4-bit weights are unpacked for each call", onednn.linear_a8),
    ("conv2d_a8", 8): ("oneDNN int8 convolution, weight reordered once and kept", onednn.conv2d_prepacked),
    ("conv2d_a8", 4): ("weight unpacked for each call, oneDNN int8 matrix product over patches", onednn.conv2d_patches),
    ("linear_a16", 8): (_BLOCKS, blocked.linear_a16),
    ("conv2d_a16", 8): (_BLOCKS, blocked.conv2d_a16),
    ("attention", 8): ("torch's own function", blocked.attention),
}
# Rows that are used where they are demanded, and nowhere else.
_UNMEASURED = {
    ("cuda", "attention"): "int8 products are not measured against torch's on a GPU yet; use_backend('cuda') runs them"
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
    "quantize_low_rank": ("emulated", "plain torch", reference.quantize_low_rank),
    "group_norm_quantize": ("emulated", "plain torch", reference.group_norm_quantize),
    "layer_norm_quantize": ("emulated", "plain torch", reference.layer_norm_quantize),
    "linear_a4": ("emulated", _EXACT, reference.linear_a4),
    "linear_a8": ("emulated", _EXACT, reference.linear_a8),
    "conv2d_a8": ("emulated", _EXACT, reference.conv2d_a8),
    "linear_a16": ("torch", _FLOAT, reference.linear_a16),
    "conv2d_a16": ("torch", _FLOAT, reference.conv2d_a16),
    "attention": ("torch", "torch's own function", blocked.attention),
}
