"""Rows of the dispatch table that use the project's own C++ kernels.

Matrix products stay with oneDNN where these are exact and the processor has no tiles (AMX).

Results are those of `qparams` and `reference`: codes to the bit, floats to a few ulp. Inputs are float32 or bfloat16
in any memory format that is dense, else the row of oneDNN does it.
"""

import functools

import torch
from torch import Tensor

from dcomp.kernels import blocked, onednn, packing, qparams, reference
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.native.build import library_file
from dcomp.kernels.packing import Stored
from dcomp.kernels.reference import GroupNorm, LayerNorm

_DTYPES = (torch.float32, torch.bfloat16)
_WIDEST_HEAD = 256
_INSTRUCTION_SETS = ("generic", "avx2", "avx512", "avx512bf16", "amx")


@functools.cache
def defect() -> str | None:
    """Say why the library cannot be used here, or None; builds and loads it if that has not been done."""
    try:
        try:
            torch.ops.load_library(library_file())
        except OSError:  # a file that is not what was built
            library_file().unlink(missing_ok=True)
            torch.ops.load_library(library_file())
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the built library does not load ({str(error).splitlines()[0]})"
    return None if _is_right() else "the built library is not exact here"


def instruction_set() -> str:
    """Return the name of the instruction set that the library runs; there must be no defect."""
    return _INSTRUCTION_SETS[torch.ops.dcomp_native.instruction_set()]


def has_tiles() -> bool:
    """Whether the processor multiplies in tiles (AMX); there must be no defect."""
    return instruction_set() == "amx"


def multiplies_itself() -> bool:
    """Whether matrix products are our own: in tiles, or where oneDNN's are not exact; there must be no defect."""
    return has_tiles() or (instruction_set() != "generic" and onednn.defect() is not None)


@functools.cache
def attention_defect() -> str | None:
    """Say why `attention` is not used here, or None."""
    if defect() is not None:
        return defect()
    if instruction_set() == "generic":
        return "our own attention needs AVX2; this is generic code"
    q, k, v = torch.linspace(-2, 3, 3 * 45 * 40).sin().view(3, 1, 1, 45, 40)
    off = (attention(q, k, v, 1.0) - reference.attention(q, k, v, 1.0)).abs().max()
    return None if off < 2**-6 else "attention is not right here"


def _is_right() -> bool:
    x = torch.linspace(-3, 5, 2 * 37).view(2, 37)
    codes, scale, zero = quantize_sample(x)
    expected = qparams.quantize_sample(x)
    right = all(map(torch.equal, (codes, scale, zero, *quantize_token(x)), (*expected, *qparams.quantize_token(x))))
    tokens = x.unsqueeze(1)
    right = right and all(map(torch.equal, quantize_group(tokens, 12), qparams.quantize_group(tokens, 12)))
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    multiplier = torch.tensor([[1, -15], [15, 2], [7, 7], [-1, 3]], dtype=torch.int8)
    image = packing.int8_image(packed, multiplier, 128)
    right = right and torch.equal(int8_image(packed, multiplier, 128), image)
    x, scale = torch.arange(-200, 56).to(torch.int8).view(2, 128), torch.ones(4)
    found = linear_a8_by_strips(x, scale[:2], Stored(packed, multiplier), scale, None)
    return right and torch.equal(found, reference.linear_a8(x, scale[:2], image, scale, None))


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor, smooth: Tensor | None = None) -> Tensor:
    """Return the bytes of `qparams.quantize_static` for one range, in the memory format of `x`."""
    x, smooth = blocked.smoothed_where_channels_are_apart(x, smooth)
    values = _dense(x)
    if values is None or scale.numel() != 1 or zero.numel() != 1:
        return blocked.quantize_static(x, scale, zero, smooth)
    codes = torch.empty_like(x, dtype=torch.uint8)
    out = _dense(codes)
    assert out is not None
    torch.ops.dcomp_native.quantize_static(values.view(1, -1), smooth, scale.view(1), zero.view(1), out)
    return codes


def quantize_sample(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_sample`, in the memory format of `x`."""
    x, smooth = blocked.smoothed_where_channels_are_apart(x, smooth)
    values = _dense(x)
    if values is None or x.numel() == 0:
        return blocked.quantize_sample(x, smooth)
    codes, found = torch.empty_like(x, dtype=torch.uint8), torch.empty(2, len(x))
    samples, out = values.view(len(x), -1), _dense(codes)
    assert out is not None
    torch.ops.dcomp_native.range(samples, smooth, found)
    scale, zero = qparams.sample_range(found[0], found[1])
    torch.ops.dcomp_native.quantize_static(samples, smooth, scale, zero, out)
    return codes, scale, zero


def quantize_token(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_token` for `x` `[M, I]`."""
    if x.dtype not in _DTYPES or x.shape[-1] == 0:
        return blocked.quantize_token(x, smooth)
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    torch.ops.dcomp_native.quantize_token(x.contiguous(), _vector(smooth), codes, scale)
    return codes, scale


def quantize_group(x: Tensor, group: int, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bytes of `qparams.quantize_group`."""
    if x.dtype not in _DTYPES or x.numel() == 0:
        return blocked.quantize_group(x, group, smooth)
    image, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    group = max(1, min(group, x.shape[-1]))
    torch.ops.dcomp_native.quantize_group(x.contiguous(), _vector(smooth), group, image, scale)
    return image, scale


quantize_low_rank = functools.partial(reference.quantize_low_rank, by_token=quantize_token, by_group=quantize_group)


def group_norm_quantize(
    x: Tensor, norm: GroupNorm, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.group_norm_quantize` of channels-last images; others take the row of torch."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not last or x.dtype not in _DTYPES or x.numel() == 0:
        return blocked.group_norm_quantize(x, norm, scale, zero)
    factor, added = torch.empty(2, *x.shape[:2])
    pixels, codes = x.permute(0, 2, 3, 1).flatten(1, 2), torch.empty_like(x, dtype=torch.uint8)
    weight, bias = _vector(norm.weight), _vector(norm.bias)
    torch.ops.dcomp_native.group_norm_factors(pixels, norm.groups, weight, bias, norm.eps, factor, added)
    if scale is None or zero is None:
        found = torch.empty(2, len(x))
        torch.ops.dcomp_native.normal_range(pixels, factor, added, norm.silu, found)
        scale, zero = qparams.sample_range(found[0], found[1])
    else:
        scale, zero = scale.clone(), zero.clone()
    ranges = (scale.expand(len(x)).contiguous(), zero.expand(len(x)).contiguous())
    out = codes.permute(0, 2, 3, 1).flatten(1, 2)
    torch.ops.dcomp_native.normal_codes(pixels, factor, added, norm.silu, *ranges, out)
    return codes, scale, zero


def layer_norm_quantize(x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `reference.layer_norm_quantize`."""
    if x.dtype not in _DTYPES or x.numel() == 0:
        return blocked.layer_norm_quantize(x, norm)
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1])
    modulation = (norm.gain, norm.shift)
    of_samples = [None if part is None else part.float().expand(len(x), -1).contiguous() for part in modulation]
    vectors = (_vector(norm.weight), _vector(norm.bias), *of_samples)
    torch.ops.dcomp_native.layer_norm_quantize(x.contiguous(), *vectors, norm.eps, codes, scale)
    return codes, scale


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _rescale(out: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    if out.numel():
        scales = x_scale.contiguous(), weight_scale.contiguous()
        torch.ops.dcomp_native.rescale(out, *scales, None if bias is None else bias.contiguous())


linear_a8 = functools.partial(onednn.linear_a8, rescale=_rescale)
conv2d_patches = functools.partial(onednn.conv2d_patches, rescale=_rescale)


def int8_image(qweight: Tensor, multiplier: Tensor | None, in_channels: int) -> Tensor:
    """Return `packing.int8_image`."""
    if multiplier is None or qweight.dtype != torch.uint8 or qweight.numel() == 0:
        return packing.int8_image(qweight, multiplier, in_channels)
    codes = torch.empty((*qweight.shape[:-1], in_channels), dtype=torch.int8)
    rows = (qweight.reshape(-1, qweight.shape[-1]), multiplier.reshape(-1, multiplier.shape[-1]))
    torch.ops.dcomp_native.unpack_int4(*rows, codes.view(-1, in_channels))
    return codes


def linear_a8_by_strips(
    q: Tensor, x_scale: Tensor, weight: Stored, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Return `reference.linear_a8`."""
    qweight, multiplier = weight.by_taps()
    out = torch.empty(len(q), len(qweight))
    scales = (weight_scale.contiguous(), None if bias is None else bias.contiguous())
    torch.ops.dcomp_native.linear_a8(q.contiguous(), x_scale.contiguous(), qweight, multiplier, *scales, out)
    return out


def conv2d_a8_by_strips(
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
) -> Tensor:
    """Return `reference.conv2d_a8`; patches are read where they lie in a padded copy of the image."""
    assert groups == 1
    qweight, multiplier = weight.by_taps()
    taps = tuple(weight.qweight.shape[1:3])
    made = reference.output_size(q.shape[2:], taps, stride, padding, dilation)
    out = torch.empty(len(q), *made, len(qweight))
    pixels = q.permute(0, 2, 3, 1).contiguous()
    scales = (weight_scale.contiguous(), None if bias is None else bias.contiguous())
    inputs = (pixels, x_scale.contiguous(), x_zero.contiguous())
    torch.ops.dcomp_native.conv2d_a8(*inputs, qweight, multiplier, *scales, *taps, *stride, *padding, *dilation, out)
    return out.permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `reference.attention`: products of rounded inputs and probabilities, sums of blocks in fp32.

    They are rounded to bfloat16, or (AVX2) to codes of 12 bits and more, whose infinity makes NaN of all it meets.
    """
    heads = (*q.shape[:2], q.shape[-1])
    for x in (q, k, v):
        fits = x.dtype == q.dtype and x.stride(-1) == 1 and (*x.shape[:2], x.shape[-1]) == heads
        if not fits or x.dtype not in _DTYPES or k.shape[-2] == 0 or x.shape[-1] > _WIDEST_HEAD or scale <= 0:
            return blocked.attention(q, k, v, scale)
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    torch.ops.dcomp_native.attention(q, k, v, out, scale)
    return out.to(q.dtype).transpose(1, 2)


def _dense(x: Tensor) -> Tensor | None:
    """View memory without gaps as one axis, samples one after the other; None where that cannot be."""
    return blocked.in_memory_order(x) if x.dtype in (*_DTYPES, torch.uint8) else None
