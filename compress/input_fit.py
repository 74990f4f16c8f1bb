"""The float weight that quantized inputs want: least squares against the exact output of the layer.

Rounding adds noise of about the same strength to all directions of the input space, while the inputs themselves live
in few of them. A weight that was trained on exact inputs passes on the noise of all directions; one that is fitted to
the quantized inputs lets go of those that carry little else. With 4-bit inputs that is a good part of the error.
"""

import torch
from torch import Tensor

from dcomp.compress.moments import Moments


def fit_to_inputs(weight: Tensor, cross: Moments, quantized: Moments, damp: float = 0.01) -> Tensor:
    """Return the weight W' with the least `mean |X W^T - Z W'^T|^2`, fp32 `[O, *taps, I]`.

    The closed form is `W' = W C H^-1` with `C = X^T Z` and `H = Z^T Z`. A part of H's mean diagonal is added to both,
    so that directions without inputs keep their weight, and W' is W where the inputs are exact.

    Args:
        weight: float `[O, *taps, I]`.
        cross: of exact inputs X and quantized inputs Z, in this order.
        quantized: of the quantized inputs alone.
        damp: part of the mean of H's diagonal that is added.

    Source:
        The objective is that of Li et al. 2025, GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
        Calibration; here with a closed form before rounding, and for the noise of a layer's own input quantizer.
    """
    parts = []
    for columns, c, h in zip(quantized.cut(weight), cross.blocks, quantized.blocks, strict=True):
        mean = float(h.diagonal().double().mean())
        added = torch.eye(len(h), dtype=torch.float64, device=h.device) * (damp * mean if mean else 1.0)
        change = torch.linalg.solve(h.double() + added, (c.double() + added).t())
        parts.append((columns.double() @ change.t()).float().view(*weight.shape[:-1], -1))
    return torch.cat(parts, -1)
