"""Norms with quantized results in the emulator, from tensors as a layer has them."""

import torch
from torch import Tensor

from dcomp.kernels.cuda.arguments import GroupNormArguments, LayerNormArguments
from tests.support.emulated import Emulator, type_of, untouched
from tests.support.quantizers import WARPS

Range = tuple[Tensor, Tensor]  # scale and zero


def group_norm(
    emulator: Emulator,
    x: Tensor,
    groups: int,
    affine: tuple[Tensor, Tensor] | None,
    *,
    silu: bool,
    static: Range | None = None,
    parts: int = 2,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 codes `[N, P, C]`, and scale and zero, in a static range or in that of each sample."""
    samples, pixels, channels = x.shape
    codes = untouched(*x.shape, dtype=torch.uint8)
    scale, zero = static or (untouched(samples), untouched(samples, dtype=torch.uint8))
    tensors = {
        "x": x,
        "weight": affine and affine[0],
        "bias": affine and affine[1],
        "moments": untouched(samples, parts, groups, 2),
        "ranges": None if static else untouched(samples, parts, 2),
        "codes": codes,
        "scale": scale,
        "zero": zero,
    }
    shape = {"pixels": pixels, "channels": channels, "groups": groups, "silu": int(silu), "parts": parts}
    after = ["group_norm_static"] if static else ["group_norm_range", "group_norm_sample"]
    for name in ("group_norm_moments", *after):
        fields = {**tensors, **shape, "epsilon": epsilon, "x_type": type_of(x)}
        emulator.launch(name, (parts, samples), GroupNormArguments, **fields)
    return codes, scale, zero


def layer_norm(
    emulator: Emulator,
    x: Tensor,
    affine: tuple[Tensor, Tensor] | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    depth: int | None = None,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[M, K]` and scales `[M]`; modulation is gain and shift `[B, C]`, for M / B rows each."""
    rows, channels = x.shape
    codes, scale = untouched(rows, depth or channels, dtype=torch.int8), untouched(rows)
    tensors = {
        "x": x,
        "weight": affine and affine[0],
        "bias": affine and affine[1],
        "gain": modulation and modulation[0],
        "shift": modulation and modulation[1],
        "codes": codes,
        "scale": scale,
    }
    shape = {"rows": rows, "channels": channels, "depth": codes.shape[1]}
    shape["gain_rows"] = rows // len(modulation[0]) if modulation else 0
    fields = {**tensors, **shape, "epsilon": epsilon, "x_type": type_of(x)}
    emulator.launch("layer_norm_token", (-(-rows // WARPS), 1), LayerNormArguments, **fields)
    return codes, scale
