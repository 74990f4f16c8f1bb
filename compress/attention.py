"""Attention between integer projections: products of 16 bits, where this machine has a kernel that gains by it.

What comes out of 8-bit products, and what goes into them, has about two digits; bfloat16 keeps two and a half, integers
of 12 bits more. So nothing is chosen or stored: a module that projects its queries in integers (found by its parts)
attends by `torch.ops.dcomp.attention`; on a GPU, where that multiplies in int8, only if `dispatch.use_backend("cuda")`
demands it. Its processor stays what it is: torch's function is replaced while the module runs. With a mask, with
gradients, while `torch.compile` traces, or when something stands in for the queries' layer, it is torch's.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dcomp.compress.pruning.units import projects_heads
from dcomp.compress.quantized import Quantized
from dcomp.kernels import dispatch, ops
from dcomp.kernels.cuda import rows as cuda

_LEAST_SCORES = 256  # of a head; fewer are too little work to be worth a detour


def attend_by_kernels(denoiser: nn.Module) -> None:
    """Let all attentions of a denoiser whose projections multiply in integers use the project's kernels."""
    modules: list[Any] = list(denoiser.modules())
    for module in modules:
        attends = projects_heads(module) and _is_integer(module.to_q)
        if attends and not isinstance(module, _ByKernels):
            module.__class__ = _by_kernels(cast(Hashable, type(module)))


def _is_integer(layer: nn.Module) -> bool:
    """Whether what a layer returns comes straight out of a product of integers, an adapter's addition aside."""
    layer = getattr(layer, "base_layer", layer)
    stood_in_for = "forward" in vars(layer)
    return (
        isinstance(layer, Quantized) and layer.scheme.input_bits <= 8 and layer.execution == "int" and not stood_in_for
    )


class _ByKernels:
    """What is added to the class of an attention: an instance's copies and hooks stay its own."""

    to_q: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, its attention by `torch.ops.dcomp.attention` where that is better."""
        forward: Callable[..., Any] = super().forward  # type: ignore[misc]
        if torch.compiler.is_compiling() or not _is_integer(self.to_q) or not _has_kernel(_device(self.to_q)):
            return forward(*args, **kwargs)
        with _Detour():
            return forward(*args, **kwargs)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.buffers()).device


def _has_kernel(device: torch.device) -> bool:
    """Whether a kernel of ours attends on a device: where it is known to gain, or demanded."""
    return dispatch.choose("attention", device=device).row in ("native", "cuda")


@functools.cache
def _by_kernels(kind: Hashable) -> type[nn.Module]:
    assert isinstance(kind, type)
    return type(kind.__name__, (_ByKernels, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _Detour(TorchFunctionMode):
    """Sends torch's attention to ours."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, or ours in its place."""
        kwargs = kwargs or {}
        ours = _scaled(*args, **kwargs) if func is scaled_dot_product_attention else None
        return func(*args, **kwargs) if ours is None else ours


def _scaled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what torch's function of these arguments does, or None if the kernel cannot take them."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return None
    if query.ndim != 4 or query.shape[-2] * key.shape[-2] < _LEAST_SCORES:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.is_cuda and cuda.attention_excess(query, key, value, scale) is not None:
        return None
    out: Tensor = ops.attention(query, key, value, scale)
    return out
