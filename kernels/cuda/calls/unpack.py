"""The float weight of layers whose inputs are not quantized (`unpack.cuh`)."""

import torch
from torch import Tensor

from dcomp.kernels.cuda import arguments
from dcomp.kernels.cuda.arguments import FLOAT_TYPE
from dcomp.kernels.cuda.calls.launch import blocks_for, launch
from dcomp.kernels.cuda.driver import Kernel
from dcomp.kernels.packing import Stored


def unpack(kernel: Kernel, weight: Stored, scale: Tensor, in_channels: int, dtype: torch.dtype) -> Tensor:
    """Return the float weight `[O, *taps, I]`, rounded once from fp32."""
    qweight, multiplier = weight.by_taps()
    outputs, taps, _ = qweight.shape
    out = torch.empty(*weight.qweight.shape[:-1], in_channels, dtype=dtype, device=scale.device)
    groups = 1 if multiplier is None else multiplier.shape[-1]
    tensors = {
        "qweight": qweight.contiguous(),
        "multiplier": None if multiplier is None else multiplier.contiguous(),
        "scale": scale.contiguous(),
        "out": out,
    }
    sizes = {
        "rows": outputs * taps,
        "taps": taps,
        "channels": in_channels,
        "groups": groups,
        "group": in_channels if multiplier is None else 2 * qweight.shape[-1] // groups,
        "out_type": FLOAT_TYPE[dtype],
    }
    if out.numel():
        launch(kernel, (blocks_for(kernel, out.numel()),), arguments.UnpackArguments, tensors, **sizes)
    return out
