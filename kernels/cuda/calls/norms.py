"""Norms that write codes (`norm_quantize.cuh`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dcomp.kernels.cuda import arguments
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.calls.launch import blocks_for, launch
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.reference import GroupNorm, LayerNorm


def group_norm_quantize(
    passes: Sequence[Kernel],
    x: Tensor,
    norm: GroupNorm,
    scale: Tensor | None,
    zero: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.group_norm_quantize` of channels-last images with elements."""
    samples, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).contiguous()
    codes = torch.empty(pixels.shape, dtype=torch.uint8, device=x.device)
    if scale is None or zero is None:
        scale = torch.empty(samples, device=x.device)
        zero = torch.empty(samples, dtype=torch.uint8, device=x.device)
    else:
        scale, zero = scale.clone(), zero.clone()
    parts = min(height * width, -(-blocks_for(passes[-1], x.numel()) // samples))
    factors = _both(norm.weight, norm.bias, (channels,), 1.0, x.device)
    tensors = {
        "x": pixels,
        "weight": factors[0],
        "bias": factors[1],
        "moments": torch.empty(samples, parts, norm.groups, 2, device=x.device),
        "ranges": torch.empty(samples, parts, 2, device=x.device),
        "codes": codes,
        "scale": scale,
        "zero": zero,
    }
    sizes = {
        "pixels": height * width,
        "channels": channels,
        "groups": norm.groups,
        "silu": int(norm.silu),
        "parts": parts,
        "x_type": FLOAT_TYPE[x.dtype],
    }
    for kernel in passes:
        launch(kernel, (parts, samples), arguments.GroupNormArguments, tensors, **sizes, epsilon=norm.eps)
    return codes.permute(0, 3, 1, 2), scale, zero


def layer_norm_quantize(kernel: Kernel, x: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """Return `reference.layer_norm_quantize` of tensors with elements."""
    samples, length, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(samples, length, device=x.device)
    factors = _both(norm.weight, norm.bias, (channels,), 1.0, x.device)
    modulation = _both(norm.gain, norm.shift, (samples, channels), 0.0, x.device)
    tensors = {
        "x": x.contiguous(),
        "weight": factors[0],
        "bias": factors[1],
        "gain": modulation[0],
        "shift": modulation[1],
        "codes": codes,
        "scale": scale,
    }
    rows = samples * length
    sizes = {"rows": rows, "channels": channels, "depth": channels, "gain_rows": length, "x_type": FLOAT_TYPE[x.dtype]}
    warps = kernel.threads // 32
    launch(kernel, (-(-rows // warps),), arguments.LayerNormArguments, tensors, **sizes, epsilon=norm.eps)
    return codes, scale


def _both(
    factor: Tensor | None, addend: Tensor | None, shape: tuple[int, ...], neutral: float, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return both as dense fp32, where one may be missing, or neither."""
    if factor is None and addend is None:
        return None, None
    factor = torch.full(shape, neutral, device=device) if factor is None else factor.float().expand(shape).contiguous()
    addend = torch.zeros(shape, device=device) if addend is None else addend.float().expand(shape).contiguous()
    return factor, addend
