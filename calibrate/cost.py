"""What a denoiser costs: multiply-accumulates of one call, parameters, and bytes at a precision.

Bytes follow from shapes alone, so that a plan can be printed before a weight is touched or even loaded; they are those
of the buffers, not of file headers. Time is not measured here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dcomp.kernels import ops  # noqa: F401  (torch.ops.dcomp)
from dcomp.kernels.packing import storage


class Precision(Protocol):
    """The part of a quantization scheme that decides about bytes."""

    @property
    def weight_bits(self) -> int:
        """4 or 8."""

    @property
    def group_size(self) -> int | None:
        """Input channels that share a multiplier; None for 8 bits."""

    @property
    def input_granularity(self) -> str | None:
        """With `tensor` (static) input scales there is a table of them."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Input channels at which a part with tensors of its own begins."""

    @property
    def smooth(self) -> bool:
        """Whether there is a factor for each input channel."""

    @property
    def rank(self) -> int:
        """Of the float branch of each part."""

    @property
    def directions(self) -> int:
        """Of the input of each part, which are multiplied in float."""

    @property
    def corrected(self) -> bool:
        """Whether there are tables of the output's scale and bias."""


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one call of a denoiser.

    Attributes:
        layers: of each `nn.Linear` and `nn.Conv2d` that ran, by name, in order of execution.
        attention: of the products of activations with activations (queries with keys, weights with values).
    """

    layers: dict[str, int]
    attention: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.layers.values()) + self.attention


def count_macs(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Macs:
    """Run one call and count; also works on meta tensors, where nothing is computed."""
    with counting_macs(denoiser) as counted, torch.no_grad():
        denoiser(*args, **kwargs)
    return counted()


@contextmanager
def counting_macs(denoiser: nn.Module) -> Iterator[Callable[[], Macs]]:
    """Count what all calls of a denoiser within a `with` block multiply, whatever a cache makes of them.

    Subclasses of linear and convolution layers count, so a quantized denoiser has the MACs of its original; the parts
    of a split layer do not count beside it, and neither does what is multiplied in float beside its weight, the product
    that takes directions out of an input excepted.

    Yields:
        What returns the sum so far.
    """
    layers: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Linear | nn.Conv2d, _: Any, output: Tensor) -> None:
            layers[name] = layers.get(name, 0) + output.numel() * macs_per_output(module)

        return add

    products = _Products()

    def begin(*_: Any) -> None:
        products.__enter__()  # type: ignore[no-untyped-call]

    def end(*_: Any) -> None:
        products.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        within: set[nn.Module] = set()
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module not in within:
                within |= set(module.modules())
                stack.callback(module.register_forward_hook(hook(name)).remove)
        stack.callback(denoiser.register_forward_pre_hook(begin).remove)
        stack.callback(denoiser.register_forward_hook(end, always_call=True).remove)
        yield lambda: Macs(dict(layers), products.macs)


def macs_per_output(layer: nn.Linear | nn.Conv2d) -> int:
    """Multiply-accumulates behind one element of a layer's output."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels // layer.groups * prod(layer.kernel_size)
    return layer.in_features


def layer_bytes(layer: nn.Linear | nn.Conv2d, scheme: Precision | None, step_bins: int = 1) -> int:
    """Bytes of a layer's parameters and tables, exactly as stored.

    Args:
        layer: a float layer; only its shapes and dtypes are read, so it may be on the meta device.
        scheme: its precision; None leaves it as it is.
        step_bins: rows of tables, of static input scales and of corrections.
    """
    if scheme is None:
        return sum(parameter.nbytes for parameter in layer.parameters())
    if isinstance(layer, nn.Conv2d):
        out_channels, taps, in_channels = (
            layer.out_channels,
            tuple(layer.kernel_size),
            layer.in_channels // layer.groups,
        )
    else:
        out_channels, taps, in_channels = layer.out_features, (), layer.in_features
    edges = pairwise((0, *scheme.boundaries, in_channels))
    parts = sum(_part_bytes(out_channels, taps, stop - start, scheme, step_bins) for start, stop in edges)
    biases = (layer.bias is not None) + (step_bins if scheme.corrected else 0)
    return parts + 4 * out_channels * biases


def _part_bytes(out_channels: int, taps: tuple[int, ...], in_channels: int, scheme: Precision, step_bins: int) -> int:
    buffers = storage(out_channels, taps, in_channels, scheme.weight_bits, scheme.group_size)
    weight = sum(prod(size) * dtype.itemsize for size, dtype in buffers.values())
    table = step_bins * (4 + 1) if scheme.input_granularity == "tensor" else 0  # fp32 scales and uint8 zeros
    factors = 4 * in_channels if scheme.smooth else 0
    branch = 2 * scheme.rank * (prod(taps) * in_channels + out_channels)  # fp16
    directions = scheme.directions * (2 * in_channels + prod(taps) * out_channels + 4)  # fp16, int8 and fp32
    factors_of_output = 4 * step_bins * out_channels if scheme.corrected else 0
    return weight + table + factors + branch + directions + factors_of_output


class _Products(TorchFunctionMode):
    """Counts matrix products in which no layer's weight takes part."""

    macs = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function and count what it multiplies."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in (nn.functional.scaled_dot_product_attention, torch.ops.dcomp.attention.default):
            query, key = _arguments(("query", "key"), args, kwargs)
            # Scores and their product with the values; heads and batch are those of the output.
            self.macs += key.shape[-2] * (prod(output.shape[:-1]) * query.shape[-1] + output.numel())
        elif func in (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm):
            self.macs += output.numel() * args[0].shape[-1]
        elif func in (torch.baddbmm, Tensor.baddbmm):
            self.macs += output.numel() * _arguments(("input", "batch1"), args, kwargs)[1].shape[-1]
        return output


def _arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]
