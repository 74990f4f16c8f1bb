"""Affine arithmetic between floats and integer codes: quantize, dequantize, fake-quantize, rescale.

One rule for all backends: `q = clamp(rint(x * (1 / scale)) + zero)` in float32, ties to even, where `1 / scale` is
rounded before it is used. Weights are `codes * scale`. Finding a scale for a layer is not done here; only the scale of
a token, which is known when its values are, is. NaN turns into an arbitrary code of a static range, and into a scale of
NaN, hence an output row of NaN, of a token.
"""

import torch
from torch import Tensor

TOKEN_LIMIT = 127  # symmetric: -128 is never a token's code
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the inverse of anything smaller may be infinite


def quantize_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return uint8 codes of a float tensor.

    Args:
        x: any shape and float dtype.
        scale: fp32, broadcasts against `x`.
        zero: uint8, the code of real 0; broadcasts against `x`.
    """
    return x.float().mul(1 / scale).round_().add_(zero).clamp_(0, 255).to(torch.uint8)


def dequantize_static(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the fp32 values that uint8 codes stand for."""
    return codes.float().sub_(zero).mul_(scale)


def token_scale(x: Tensor) -> Tensor:
    """Return the fp32 scale of each row of the last axis: its largest magnitude over 127.

    A row of zeros, or so small that the inverse scale would not be finite, has scale 1 and codes 0.
    """
    if x.shape[-1] == 0:
        return torch.ones(x.shape[:-1], device=x.device)
    x = x.float()
    scale = torch.maximum(x.amax(-1), -x.amin(-1)) / TOKEN_LIMIT
    return scale.masked_fill_(scale < _SMALLEST_SCALE, 1.0)


def quantize_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes of a float tensor and the scale of each of its rows, fp32 `x.shape[:-1]`."""
    scale = token_scale(x)
    codes = x.float().mul((1 / scale).unsqueeze(-1)).round_().clamp_(-TOKEN_LIMIT, TOKEN_LIMIT)
    return codes.to(torch.int8), scale


def dequantize_token(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values that int8 codes stand for."""
    return codes.float().mul_(scale.unsqueeze(-1))


def fake_quant_static(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Quantize and dequantize, fp32; the gradient passes straight through."""
    return _straight_through(x, dequantize_static(quantize_static(x.detach(), scale, zero), scale, zero))


def fake_quant_token(x: Tensor) -> Tensor:
    """Quantize and dequantize, fp32; the gradient passes straight through."""
    return _straight_through(x, dequantize_token(*quantize_token(x.detach())))


def _straight_through(x: Tensor, values: Tensor) -> Tensor:
    """Return `values` with the gradient of `x`."""
    if not x.requires_grad:
        return values
    # `x - x` is exactly 0 for finite values, so adding it changes no bit; -0.0 becomes 0.0.
    x = x.float()
    return values + (x - x.detach())


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight of integer codes `[O, ...]` with a scale for each output channel `[O]`."""
    return codes.float().mul_(scale.view(-1, *[1] * (codes.ndim - 1)))


def rescale_(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Turn exact integer sums into a layer's output: `bias + (sums * weight_scale) * x_scale`.

    Args:
        sums: fp32 `[M, O]`, overwritten.
        x_scale: fp32 `[M]`, or `[1]` for a static range.
        weight_scale: fp32 `[O]`.
        bias: fp32 `[O]`.

    Returns:
        `sums`.
    """
    sums.mul_(weight_scale)
    if bias is None:
        return sums.mul_(x_scale.unsqueeze(-1))
    return torch.addcmul(bias, sums, x_scale.unsqueeze(-1), out=sums)
