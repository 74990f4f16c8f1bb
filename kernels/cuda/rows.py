"""Rows of the dispatch table that run our CUDA kernels.

Results are those of `qparams` and `reference`: codes to the bit, floats to a few ulp. Inputs are float32, bfloat16 or
float16 in any memory format. Which tile of the output a block makes is chosen by the size of the output and the device;
one of the small tile is always there when the table has chosen this row, and stands in for a larger one that fails.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dcomp.kernels import qparams, reference
from dcomp.kernels.cuda import calls, driver, loaded, self_test
from dcomp.kernels.cuda.arguments import FLOAT_TYPE as FLOAT_TYPE
from dcomp.kernels.cuda.calls import MOST_ROWS_OF_BLOCKS, ProductWeight
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.driver import index_of as index_of
from dcomp.kernels.cuda.self_test import UnusableError
from dcomp.kernels.cuda.tiles import ENTRIES
from dcomp.kernels.packing import Stored, int8_image
from dcomp.kernels.packs import Packs

# |uint8| * |int8| summed this often stays within int32; int4 codes are multiplied as 16 times what they are, at most
# 128 too.
MAX_REDUCTION = (2**31 - 1) // (255 * 128)
_MOST_ELEMENTS = 2**31 - 1  # of inputs and of outputs
_MOST_ROWS = MOST_ROWS_OF_BLOCKS * 64
_MOST_TAPS = 2**16  # taps times the width of the kernel: up to there its inverse in 16 bits divides exactly
_MOST_REACH = 2**20  # of a kernel with its dilation
_SMALL = "64x64"
_LARGE = "256x128"  # fewest reads of shared memory, which these devices have least of for their products
_TAKES_LARGE = ((8, 0), (9, 0))

_SEVERAL = {
    "quantize_group": ("quantize_group", "quantize_group_token"),
    "quantize_low_rank": ("low_rank_token", "low_rank_group"),
    "group_norm_quantize": ("group_norm_static", "group_norm_sample"),
    "layer_norm_quantize": ("layer_norm_token",),
}
_MOST_GROUPS = 256  # of a group norm
_MOST_SAMPLES = MOST_ROWS_OF_BLOCKS

_weights: Packs[ProductWeight] = Packs()


def small_kernels(operation: str, bits: int) -> tuple[str, ...]:
    """Return the kernels without which an operation does not run in CUDA; none for one that has no kernel."""
    if operation in ("linear_a8", "conv2d_a8"):
        product = "linear" if operation == "linear_a8" else "conv"
        return tuple(f"{product}_{kind}_{_SMALL}" for kind in (("w8a8",) if bits == 8 else ("w4a8", "w8a8")))
    if operation in ("linear_a16", "conv2d_a16"):
        return (f"unpack_int{bits}",)
    if operation in _SEVERAL:
        return _SEVERAL[operation]
    return (operation,) if operation in ENTRIES else ()


def defect(operation: str, bits: int, index: int) -> str | None:
    """Say why no kernel of an operation runs on a device, or None; compiles and tests them at the first time."""
    names = small_kernels(operation, bits)
    if not names:
        return "there is no CUDA kernel for it"
    unfit = loaded.defect(index)
    if unfit is not None:
        return unfit
    problems = (self_test.defect(name, index) for name in names)
    return next((f"CUDA kernel {name}: {p}" for name, p in zip(names, problems, strict=True) if p is not None), None)


def may_try(operation: str, bits: int, index: int) -> bool:
    """Whether `defect` can answer now: kernels are compiled and tested before a CUDA graph is recorded, not in one."""
    if loaded.defect(index) is not None or not driver.is_capturing():
        return True
    return all(self_test.is_known(name, index) for name in small_kernels(operation, bits))


def remark(operation: str, bits: int, index: int) -> str:
    """Say for what and how the kernels of an operation were compiled; they must have no defect."""
    images = [loaded.module(name, index)[1] for name in small_kernels(operation, bits)]
    whys = [f"; compiled for this process alone, because {image.remark}" for image in images if image.remark]
    return f"{images[0].architecture}{''.join(whys[:1])}"


def excess(elements: int, rows: int = 0, taps: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1)) -> str | None:
    """Say what of the sizes of an operation is more than kernels take, or None.

    Args:
        elements: of the largest tensor.
        rows: of a product: tokens, or pixels of the output.
        taps: height and width of a convolution's kernel.
        dilation: along both.
    """
    if elements > _MOST_ELEMENTS:
        return f"a tensor of {elements} elements is too large"
    if rows > _MOST_ROWS:
        return f"{rows} rows are too many"
    height, width = taps
    if height * width * width > _MOST_TAPS or max(dilation[0] * height, dilation[1] * width) > _MOST_REACH:
        return f"a kernel of {height} x {width} taps is too large"
    return None


def _kernel(name: str, device: torch.device) -> Kernel:
    return self_test.kernels(name, index_of(device))[-1]


def _product_kernel(operation: str, kind: str, rows: int, outputs: int, device: torch.device) -> Kernel:
    """Return the kernel of the largest tile with which all of the device has work, or of the small one."""
    index = index_of(device)
    for tile in _large_tiles(rows, outputs, index):
        try:
            return self_test.kernels(f"{operation}_{kind}_{tile}", index)[-1]
        except UnusableError:
            continue
    return _kernel(f"{operation}_{kind}_{_SMALL}", device)


def _large_tiles(rows: int, outputs: int, index: int) -> list[str]:
    """Return the tiles beside the small one that suit an output, best first."""
    device = driver.device(index)
    tiles = [_LARGE, "128x128"] if device.capability in _TAKES_LARGE else ["128x128"]
    blocks = {tile: -(-rows // int(tile.split("x")[0])) * -(-outputs // int(tile.split("x")[1])) for tile in tiles}
    return [tile for tile in tiles if blocks[tile] >= device.multiprocessors]


def _product(
    operation: str, weight: Stored, in_channels: int, rows: int, device: torch.device
) -> tuple[Kernel, ProductWeight]:
    """Return the kernel for a product, and the weight as it takes it."""
    for kind in calls.kinds_of(weight):
        try:
            kernel = _product_kernel(operation, kind, rows, len(weight.qweight), device)
        except UnusableError as error:
            problem = error
        else:
            return kernel, _product_weight(weight, in_channels, kind, with_sums=operation == "conv")
    raise problem


def _product_weight(weight: Stored, in_channels: int, kind: str, *, with_sums: bool) -> ProductWeight:
    """Make what a kernel takes of a stored weight, or return what was made before."""
    qweight, *rest = (tensor for tensor in weight if tensor is not None)
    made_for_call = kind == "w8a8" and weight.multiplier is not None  # an image of all of an int4 weight is large
    # What is made while a graph is recorded belongs to the graph.
    if made_for_call or not all(map(Packs.can_keep, (qweight, *rest))) or driver.is_capturing():
        return calls.product_weight(weight, in_channels, kind, with_sums=with_sums)

    def make() -> ProductWeight:
        made = calls.product_weight(weight, in_channels, kind, with_sums=with_sums)
        driver.wait(index_of(qweight.device))  # other streams may use it next
        return dataclasses.replace(made, data=None) if made.data is qweight else made

    kept = _weights.get(qweight, (kind, in_channels, with_sums), make, *rest)
    return dataclasses.replace(kept, data=qweight) if kept.data is None else kept


def _float_weight(weight: Stored, scale: Tensor, in_channels: int, dtype: torch.dtype) -> Tensor:
    name = "unpack_int8" if weight.multiplier is None else "unpack_int4"
    return calls.unpack(_kernel(name, scale.device), weight, scale, in_channels, dtype)


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return the bytes of `qparams.quantize_static`, in the memory format of `x`."""
    if x.dtype not in FLOAT_TYPE or scale.numel() != 1 or zero.numel() != 1:
        return qparams.quantize_static(x, scale, zero, smooth)
    return calls.quantize_static(_kernel("quantize_static", x.device), x, scale, zero, smooth)


def quantize_sample(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_sample`, in the memory format of `x`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return qparams.quantize_sample(x, smooth)
    kernels = self_test.kernels("quantize_sample", index_of(x.device))
    return calls.quantize_sample(kernels, x, smooth)


def quantize_token(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_token` for `x` `[M, I]`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return qparams.quantize_token(x, smooth)
    return calls.quantize_token(_kernel("quantize_token", x.device), x, smooth)


def quantize_group(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_group`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return qparams.quantize_group(x, group, smooth)
    name = "quantize_group_token" if x.shape[1] == 1 else "quantize_group"
    kernels = self_test.kernels(name, index_of(x.device))
    return calls.quantize_group(kernels, x, group, smooth)


def quantize_low_rank(
    x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.quantize_low_rank`; a row with an infinity may have NaN in all of `hidden`."""
    if x.dtype not in FLOAT_TYPE or down.dtype != torch.float16 or 0 in (*x.shape, len(down)):
        return reference.quantize_low_rank(x, down, group, smooth)
    kernel = _kernel("low_rank_token" if group is None else "low_rank_group", x.device)
    return calls.quantize_low_rank(kernel, x, down, group, smooth)


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
    """Return `reference.group_norm_quantize`; images that are not channels-last become it first."""
    norm = (groups, weight, bias, eps, silu, scale, zero)
    is_taken = x.dtype in FLOAT_TYPE and x.numel() > 0 and groups <= _MOST_GROUPS and len(x) <= _MOST_SAMPLES
    if not is_taken:
        return reference.group_norm_quantize(x, *norm)
    name = "group_norm_sample" if scale is None or zero is None else "group_norm_static"
    return calls.group_norm_quantize(self_test.kernels(name, index_of(x.device)), x, *norm)


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `reference.layer_norm_quantize`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return reference.layer_norm_quantize(x, weight, bias, gain, shift, eps)
    return calls.layer_norm_quantize(_kernel("layer_norm_token", x.device), x, weight, bias, gain, shift, eps)


def linear_a8(
    q: Tensor,
    x_scale: Tensor,
    weight: Stored,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `reference.linear_a8` in a float dtype."""
    kernel, packed = _product("linear", weight, q.shape[1], len(q), q.device)
    return calls.linear(kernel, q, x_scale, packed, weight_scale, bias, dtype)


def conv2d_a8(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Stored,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `reference.conv2d_a8` in a float dtype."""
    assert groups == 1
    height, width = weight.qweight.shape[1:3]
    taps, shape = (height, width), (stride, padding, dilation)
    out_height, out_width = reference.output_size(q.shape[2:], taps, *shape)
    kernel, packed = _product("conv", weight, q.shape[1], len(q) * out_height * out_width, q.device)
    return calls.conv2d(kernel, q, x_scale, x_zero, packed, weight_scale, bias, taps, *shape, dtype)


def linear_a16(x: Tensor, weight: Stored, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return `reference.linear_a16`."""
    if x.dtype not in FLOAT_TYPE:
        return reference.linear_a16(x, int8_image(*weight, x.shape[-1]), weight_scale, bias)
    values = _float_weight(weight, weight_scale, x.shape[-1], x.dtype)
    return functional.linear(x, values, None if bias is None else bias.to(x.dtype))


def conv2d_a16(
    x: Tensor,
    weight: Stored,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return `reference.conv2d_a16`."""
    channels, shape = x.shape[1] // groups, (stride, padding, dilation, groups)
    if x.dtype not in FLOAT_TYPE:
        return reference.conv2d_a16(x, int8_image(*weight, channels), weight_scale, bias, *shape)
    values = _float_weight(weight, weight_scale, channels, x.dtype).permute(0, 3, 1, 2)
    y = reference.float_conv2d(x, values, None if bias is None else bias.to(x.dtype), *shape)
    return y.contiguous(memory_format=torch.channels_last)
