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
from dcomp.kernels.cuda import driver, loaded, nibbles, packing, self_test
from dcomp.kernels.cuda.arguments import FLOAT_TYPE as FLOAT_TYPE
from dcomp.kernels.cuda.calls import attention as attention_calls
from dcomp.kernels.cuda.calls import norms, products, quantizers
from dcomp.kernels.cuda.calls.launch import MOST_ROWS_OF_BLOCKS
from dcomp.kernels.cuda.calls.products import ProductWeight
from dcomp.kernels.cuda.calls.unpack import unpack
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.cuda.driver import index_of as index_of
from dcomp.kernels.cuda.self_test import UnusableError
from dcomp.kernels.cuda.tiles import ENTRIES, LOW_RANK
from dcomp.kernels.packing import Stored, int8_image
from dcomp.kernels.packs import Packs
from dcomp.kernels.reference import GroupNorm, LayerNorm

# |uint8| * |int8| summed this often stays within int32; int4 codes are multiplied as 16 times what they are, at most
# 128 too.
MAX_REDUCTION = (2**31 - 1) // (255 * 128)
_MOST_ELEMENTS = 2**31 - 1  # of inputs and of outputs
_MOST_ROWS = MOST_ROWS_OF_BLOCKS * 64
_MOST_RANK = 1024  # of a branch: with as many rows as there may be, its elements are numbers of 32 bits
_MOST_TAPS = 2**16  # taps times the width of the kernel: up to there its inverse in 16 bits divides exactly
_MOST_REACH = 2**20  # of a kernel with its dilation
_SMALL = "64x64"
# Tensor cores with products of nibbles, and the least block that is worth it there: see docs/decisions.md.
_LEAST_BLOCK = {(8, 0): 64, (8, 6): 32, (8, 9): 32}
_LARGE = "256x128"  # fewest reads of shared memory, which these devices have least of for their products
_TAKES_LARGE = ((8, 0), (9, 0))

_SEVERAL = {
    "quantize_group": ("quantize_group", "quantize_group_token"),
    "quantize_low_rank": ("low_rank_token", "low_rank_group"),
    "group_norm_quantize": ("group_norm_static", "group_norm_sample"),
    "layer_norm_quantize": ("layer_norm_token",),
}
_MOST_GROUPS = 256  # of a group norm
_HEADS = (48, 64, 80, 128, 160)  # channels of a head that attention has kernels for; others are padded
_MOST_SAMPLES = MOST_ROWS_OF_BLOCKS

_weights: Packs[ProductWeight] = Packs()


def small_kernels(operation: str, bits: int) -> tuple[str, ...]:
    """Return the kernels without which an operation does not run in CUDA; none for one that has no kernel."""
    if operation in ("linear_a8", "conv2d_a8"):
        product = "linear" if operation == "linear_a8" else "conv"
        return tuple(f"{product}_{kind}_{_SMALL}" for kind in (("w8a8",) if bits == 8 else ("w4a8", "w8a8")))
    if operation == "linear_a4":
        return ("quantize_nibbles", *(f"linear_w4a4_group{block}_{_SMALL}" for block in nibbles.BLOCKS))
    if operation in ("linear_a16", "conv2d_a16"):
        return (f"unpack_int{bits}",)
    if operation in _SEVERAL:
        return _SEVERAL[operation]
    if operation == "attention":
        return "quantize_token", "key_value_tiles", f"attention_{_HEADS[-1]}"
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


def misfit(index: int, bits: int, block: int) -> str | None:
    """Say why weights of so many bits do not meet 4-bit inputs as such on a device, or None.

    Args:
        index: of the device.
        bits: of the weight.
        block: what `nibbles.block_of` says, or 0.
    """
    unfit = loaded.defect(index)
    if unfit is not None:
        return unfit
    least = _LEAST_BLOCK.get(driver.device(index).capability)
    if least is None:
        return "its tensor cores have no fast products of 4 bits"
    if bits != 4:
        return "the weight has 8 bits"
    return None if block >= least else f"products of 4 bits pay in groups of multiples of {least} channels alone"


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


def attention_excess(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Say what of queries, keys and values `[B, H, N or M, C]` attention does not take, or None."""
    samples, heads, keys, channels = k.shape
    if any(x.dtype not in FLOAT_TYPE for x in (q, k, v)):
        return "there are kernels for float32, bfloat16 and float16"
    if not scale > 0 or keys == 0 or channels == 0:
        return "there are kernels for positive scales and for keys with elements"
    if channels > _HEADS[-1] or v.shape != k.shape or q.shape != (samples, heads, q.shape[2], channels):
        return f"there are kernels for queries, keys and values of up to {_HEADS[-1]} channels, as many in each"
    if samples * heads > MOST_ROWS_OF_BLOCKS:
        return f"{samples * heads} heads are too many"
    return excess(max(q.numel(), k.numel()))


def _kernel(name: str, device: torch.device) -> Kernel:
    return self_test.kernels(name, index_of(device))[-1]


def _product_kernel(operation: str, kind: str, rows: int, outputs: int, device: torch.device) -> Kernel:
    """Return the kernel of the largest tile with which all of the device has work, or of the small one."""
    index = index_of(device)
    for tile in _large_tiles(rows, outputs, index):
        if f"{operation}_{kind}_{tile}" not in ENTRIES:
            continue
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
    operation: str, weight: Stored, in_channels: int, rows: int, device: torch.device, branch: str = ""
) -> tuple[Kernel, ProductWeight]:
    """Return the kernel for a product, and the weight as it takes it."""
    for kind in products.kinds_of(weight):
        try:
            kernel = _product_kernel(operation, kind + branch, rows, len(weight.qweight), device)
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
        return products.product_weight(weight, in_channels, kind, with_sums=with_sums)

    def make() -> ProductWeight:
        made = products.product_weight(weight, in_channels, kind, with_sums=with_sums)
        driver.wait(index_of(qweight.device))  # other streams may use it next
        return dataclasses.replace(made, data=None) if made.data is qweight else made

    kept = _weights.get(qweight, (kind, in_channels, with_sums), make, *rest)
    return dataclasses.replace(kept, data=qweight) if kept.data is None else kept


def _float_weight(weight: Stored, scale: Tensor, in_channels: int, dtype: torch.dtype) -> Tensor:
    name = "unpack_int8" if weight.multiplier is None else "unpack_int4"
    return unpack(_kernel(name, scale.device), weight, scale, in_channels, dtype)


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return the bytes of `qparams.quantize_static`, in the memory format of `x`."""
    if x.dtype not in FLOAT_TYPE or scale.numel() != 1 or zero.numel() != 1:
        return qparams.quantize_static(x, scale, zero, smooth)
    return quantizers.quantize_static(_kernel("quantize_static", x.device), x, scale, zero, smooth)


def quantize_sample(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_sample`, in the memory format of `x`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return qparams.quantize_sample(x, smooth)
    kernels = self_test.kernels("quantize_sample", index_of(x.device))
    return quantizers.quantize_sample(kernels, x, smooth)


def quantize_token(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_token` for `x` `[M, I]`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return qparams.quantize_token(x, smooth)
    return quantizers.quantize_token(_kernel("quantize_token", x.device), x, smooth)


def quantize_group(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_group`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return qparams.quantize_group(x, group, smooth)
    name = "quantize_group_token" if x.shape[1] == 1 else "quantize_group"
    kernels = self_test.kernels(name, index_of(x.device))
    return quantizers.quantize_group(kernels, x, group, smooth)


def quantize_low_rank(
    x: Tensor, down: Tensor, group: int | None = None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.quantize_low_rank`; a row with an infinity may have NaN in all of `hidden`."""
    if x.dtype not in FLOAT_TYPE or down.dtype != torch.float16 or 0 in (*x.shape, len(down)):
        return reference.quantize_low_rank(x, down, group, smooth)
    kernel = _kernel("low_rank_token" if group is None else "low_rank_group", x.device)
    return quantizers.quantize_low_rank(kernel, x, down, group, smooth)


def group_norm_quantize(
    x: Tensor, norm: GroupNorm, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.group_norm_quantize`; images that are not channels-last become it first."""
    is_taken = x.dtype in FLOAT_TYPE and x.numel() > 0 and norm.groups <= _MOST_GROUPS and len(x) <= _MOST_SAMPLES
    if not is_taken:
        return reference.group_norm_quantize(x, norm, scale, zero)
    name = "group_norm_sample" if scale is None or zero is None else "group_norm_static"
    return norms.group_norm_quantize(self_test.kernels(name, index_of(x.device)), x, norm, scale, zero)


def layer_norm_quantize(x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `reference.layer_norm_quantize`."""
    if x.dtype not in FLOAT_TYPE or x.numel() == 0:
        return reference.layer_norm_quantize(x, norm)
    return norms.layer_norm_quantize(_kernel("layer_norm_token", x.device), x, norm)


def linear_a8(
    q: Tensor,
    x_scale: Tensor,
    weight: Stored,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `reference.linear_a8` in a float dtype, after `reference.add_branch_` of a branch that `can_add`."""
    try:
        kernel, packed = _product("linear", weight, q.shape[1], len(q), q.device, LOW_RANK if branch else "")
    except UnusableError:
        if branch is None:
            raise
        y = linear_a8(q, x_scale, weight, weight_scale, bias)
        return reference.add_branch_(y, *branch).to(dtype)
    return products.linear(kernel, q, x_scale, packed, weight_scale, bias, dtype, branch=branch)


def can_add(up: Tensor) -> bool:
    """Whether kernels of products add a branch with such an `up`."""
    return up.dtype == torch.float16 and 0 < up.shape[1] <= _MOST_RANK


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
    return products.conv2d(kernel, q, x_scale, x_zero, packed, weight_scale, bias, taps, *shape, dtype)


def linear_a4(
    x: Tensor,
    group: int,
    weight: Stored,
    weight_scale: Tensor,
    bias: Tensor | None,
    smooth: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    branch: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `reference.linear_a4` in a float dtype, for inputs of a float dtype and groups without `misfit`.

    A branch is one that `can_add`.
    """
    block = nibbles.block_of(group, weight, x.shape[1])
    kind = f"w4a4_group{block}"
    try:
        name = kind + LOW_RANK if branch else kind
        kernel = _product_kernel("linear", name, len(x), len(weight_scale), x.device)
    except UnusableError:
        if branch is None:
            raise
        y = linear_a4(x, group, weight, weight_scale, bias, smooth)
        return reference.add_branch_(y, *branch).to(dtype)
    packed = _product_weight(weight, x.shape[1], kind, with_sums=False)
    inputs, x_scale = quantizers.quantize_nibbles(_kernel("quantize_nibbles", x.device), x, group, block, smooth)
    return products.linear(kernel, inputs.data, x_scale, packed, weight_scale, bias, dtype, inputs.multipliers, branch)


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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `reference.attention` of what `attention_excess` allows: scores of int8 codes, values in float16.

    What is no number spoils what it meets: a query its row, a key its head, a value its channel of its head.
    """
    samples, heads, queries, channels = q.shape
    if q.numel() == 0:
        return torch.empty_like(q)
    kernel = _attention_kernel(channels, q.device)
    width = int(kernel.name.split("_")[1])
    rows = q.transpose(1, 2).reshape(-1, channels)
    quantize = _kernel("quantize_token", q.device)
    codes, q_scale = quantizers.quantize_token(quantize, rows, depth=packing.head_depth(width))
    codes, q_scale = codes.view(samples, queries, heads, -1), q_scale.view(samples, queries, heads)
    passes = self_test.kernels("key_value_tiles", index_of(q.device))
    tiles, v_scale = attention_calls.key_value_tiles(passes, k, v.to(k.dtype), width)
    return attention_calls.attention(kernel, codes, q_scale, tiles, v_scale, channels, scale, q.dtype)


def _attention_kernel(channels: int, device: torch.device) -> Kernel:
    """Return the narrowest kernel for heads of some channels; the widest takes them all."""
    for width in _HEADS[:-1]:
        if channels <= width:
            try:
                return _kernel(f"attention_{width}", device)
            except UnusableError:
                continue
    return _kernel(f"attention_{_HEADS[-1]}", device)
