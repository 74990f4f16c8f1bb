"""Quantized layers: `QuantLinear` and `QuantConv2d`, each with an integer and a fake execution of the same buffers.

They are `nn.Linear` and `nn.Conv2d` for everything that asks by type (adapters, structure probes), but have no tensor
`weight`, so that nothing merges into or retypes one by mistake. Codes and scales keep their dtype through `.to(dtype)`.
Arithmetic is not here: integers run through `torch.ops.dcomp`, floats through `kernels/qparams.py`.

Letters: O output and I input channels, B step bins, N samples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.kernels import dispatch, packing, qparams
from dcomp.kernels.packing import PackedWeight

if TYPE_CHECKING:
    from dcomp.calibrate.clock import StepClock

_M = TypeVar("_M", bound=nn.Module)

_NO_WEIGHT = (
    "A quantized layer has integer codes and no float weight, so an adapter can be attached but not merged; "
    "dequantize() gives the float values"
)


class WeightForm:
    """What may be asked of a weight that is not there: its shape, dtype and device.

    PEFT looks at the type and at the number of axes before it attaches an adapter. Every other use, merging above all,
    raises AttributeError.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.shape, self.device, self.dtype = shape, device, torch.float32

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NO_WEIGHT)


class QuantLayer(nn.Module, ABC):
    """What both quantized layers share; only its subclasses are used.

    Attributes:
        qweight, scale, multiplier: see `kernels/packing.py`; `multiplier` is None for 8 bits.
        input_scale, input_zero: fp32 and uint8 `[B]` of a static input range, else None. A table of one row serves
            every bin.
        bias: parameter `[O]` without gradient, or None. Unlike the buffers it takes the model's float dtype.
        scheme: the rule that it was quantized by.
        clock: tells the step bin; without one, bin 0 is used.
        execution: "int", or "fake" for the float arithmetic that the integers stand for.
    """

    float_kind: ClassVar[type[nn.Module]]
    input_granularity: ClassVar[Literal["token", "tensor"]]
    qweight: Tensor
    scale: Tensor
    multiplier: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    bias: Any  # Parameter or None; nn.Linear and nn.Conv2d disagree on the type
    scheme: QScheme
    clock: "StepClock | None"
    execution: Literal["int", "fake"]

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """Make the float layer when called like one: there are no codes yet.

        PEFT makes an adapter's layers by calling the type of the layer that it adapts.
        """
        return cls.float_kind(*sizes, **options) if sizes or options else super().__new__(cls)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        packed: PackedWeight,
        scheme: QScheme,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
        clock: "StepClock | None" = None,
    ) -> Self:
        """Make the quantized form of a float layer.

        Args:
            layer: `nn.Linear` or `nn.Conv2d`; only its geometry and a copy of its bias are used.
            packed: its weight, not copied.
            scheme: must agree with `packed`.
            input_scale: fp32 `[B]`, of a static range only.
            input_zero: uint8 `[B]`, of a static range only.
            clock: tells the step bin.

        Raises:
            SchemeError: scheme, weight, ranges and layer do not fit together.
        """
        bins = 1 if input_scale is None else input_scale.numel()
        with torch.device("meta"):
            quantized = cls.from_shape(layer, scheme, bins)
        given = {
            "qweight": packed.qweight,
            "scale": packed.scale,
            "multiplier": packed.multiplier,
            "input_scale": input_scale,
            "input_zero": input_zero,
        }
        for name, value in given.items():
            expected = quantized._buffers[name]
            if _form(value) != _form(expected):
                raise SchemeError(
                    f"{name} is {_form(value)}, but a layer of this scheme needs {_form(expected)}",
                    where=f"{scheme.label}, {layer}",
                    remedy="Quantize the weight and the input range by the scheme that is passed here.",
                )
            quantized._buffers[name] = value
        if quantized.bias is not None:
            bias = layer.bias.detach().to(packed.scale.device, torch.float32, copy=True)  # type: ignore[operator]
            quantized.bias = nn.Parameter(bias, requires_grad=False)
        quantized.clock = clock
        return quantized.train(layer.training)

    @classmethod
    def from_shape(cls, layer: nn.Module, scheme: QScheme, bins: int) -> Self:
        """Make a layer with uninitialised buffers for a checkpoint to fill, on the current default device.

        Args:
            layer: float layer with the geometry; may be on the meta device.
            scheme: decides which buffers there are.
            bins: B, rows of a static range's table.

        Raises:
            SchemeError: this kind of layer has no such scheme.
        """
        quantized: Self = cls.__new__(cls)
        nn.Module.__init__(quantized)
        out_channels, taps, in_channels = quantized._take_geometry(layer)
        if (scheme.input_bits, scheme.input_granularity) not in ((8, cls.input_granularity), (16, None)):
            raise SchemeError(
                f"{cls.__name__} takes 8-bit inputs by {cls.input_granularity}, or float inputs",
                where=f"{scheme.label}, input granularity {scheme.input_granularity}",
                remedy="Change the scheme, or leave the layer in float.",
            )
        buffers = packing.storage(out_channels, taps, in_channels, scheme.weight_bits, scheme.group_size)
        if scheme.input_granularity == "tensor":
            buffers |= {
                "input_scale": (torch.Size((bins,)), torch.float32),
                "input_zero": (torch.Size((bins,)), torch.uint8),
            }
        for name in ("qweight", "scale", "multiplier", "input_scale", "input_zero"):
            empty = torch.empty(buffers[name][0], dtype=buffers[name][1]) if name in buffers else None
            quantized.register_buffer(name, empty)
        has_bias = getattr(layer, "bias", None) is not None
        bias = nn.Parameter(torch.empty(out_channels, dtype=torch.float32), requires_grad=False) if has_bias else None
        quantized.register_parameter("bias", bias)
        quantized.scheme, quantized.clock, quantized.execution = scheme, None, "int"
        return quantized

    def packed(self) -> PackedWeight:
        """Return the stored weight; shares memory with the buffers."""
        scheme, in_channels = self.scheme, self._in_channels
        return PackedWeight(
            self.qweight, self.scale, self.multiplier, scheme.weight_bits, scheme.group_size, in_channels
        )

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, fp32, in torch's layout."""
        weight = self.packed().dequantize()
        return weight.permute(0, 3, 1, 2) if weight.ndim == 4 else weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; the result has the dtype of `x`."""
        return self.fake_forward(x) if self.execution == "fake" else self.int_forward(x)

    @property
    def weight(self) -> WeightForm:
        """Shape, dtype and device of the float weight, which is not there."""
        out_channels, *taps, _ = self.qweight.shape
        return WeightForm(torch.Size((out_channels, self._in_channels, *taps)), self.qweight.device)

    @abstractmethod
    def int_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in integers."""

    @abstractmethod
    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""

    @abstractmethod
    def _take_geometry(self, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
        """Copy the attributes of a float layer; return O, the taps and the I of one group."""

    @property
    @abstractmethod
    def _in_channels(self) -> int:
        """I, the input channels of one group."""

    def _check_channels(self, found: int, expected: int) -> None:
        # A packed weight is padded, so that a kernel cannot tell a missing channel from a padded one.
        if found != expected:
            raise dispatch.KernelError(
                f"The input has {found} channels instead of {expected}", where=str(self), remedy="Check the model."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers to a device but never change their dtype, whatever `fn` does."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = moved.dtype == tensor.dtype or isinstance(tensor, nn.Parameter)
            return moved if kept else tensor.to(moved.device)

        return cast(Self, super()._apply(keep_dtype, recurse))  # type: ignore[no-untyped-call]

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def extra_repr(self) -> str:
        """Return the geometry and the scheme."""
        return f"{super().extra_repr()}, scheme={self.scheme.label}, execution={self.execution}"


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer with an integer weight and int8 inputs by token, or float inputs."""

    float_kind = nn.Linear
    input_granularity = "token"

    def _take_geometry(self, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
        linear = _of_kind(layer, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        return self.out_features, (), self.in_features

    @property
    def _in_channels(self) -> int:
        return self.in_features

    def int_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in integers to `[..., I]`."""
        self._check_channels(x.shape[-1], self.in_features)
        weight = (self.qweight, self.scale, self.multiplier, self._bias, self.in_features)
        if self.scheme.input_bits == 16:
            return cast(Tensor, dispatch.linear_a16(x, *weight))
        q, x_scale = dispatch.quantize_token(x.reshape(-1, self.in_features))
        y: Tensor = dispatch.linear_a8(q, x_scale, *weight)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""
        values = qparams.fake_quant_token(x) if self.scheme.input_bits == 8 else x.float()
        return functional.linear(values, self.dequantize(), self._bias).to(x.dtype)


class QuantConv2d(QuantLayer, nn.Conv2d):  # type: ignore[misc]
    """A convolution with an integer weight and uint8 inputs by a static range for each step bin, or float inputs."""

    float_kind = nn.Conv2d
    input_granularity = "tensor"
    padding: tuple[int, int]

    def _take_geometry(self, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
        conv = _of_kind(layer, nn.Conv2d)
        if conv.padding_mode != "zeros":
            raise SchemeError(
                f"A convolution pads by {conv.padding_mode!r}, integer convolutions by zeros only",
                where=str(layer),
                remedy="Leave the layer in float.",
            )
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = _even_padding(conv)
        self.padding_mode, self.transposed, self.output_padding = "zeros", False, (0, 0)
        return self.out_channels, self.kernel_size, self.in_channels // self.groups

    @property
    def _in_channels(self) -> int:
        return self.in_channels // self.groups

    def int_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in integers to `[N, C, H, W]`; the result is channels-last."""
        self._check_channels(x.shape[-3], self.in_channels)
        if x.ndim == 3:
            return self.int_forward(x.unsqueeze(0)).squeeze(0)
        if self.scheme.input_bits == 16:
            return cast(Tensor, dispatch.conv2d_a16(x, *self._weight_and_shape()))
        rows = self._bins(x)
        if isinstance(rows, int):
            return self._int_rows(x, rows)
        parts = {step_bin: rows == step_bin for step_bin in rows.unique().tolist()}
        outputs = {step_bin: self._int_rows(x[mask], step_bin) for step_bin, mask in parts.items()}
        y = torch.empty_like(outputs[int(rows[0])][:1].expand(len(x), -1, -1, -1), memory_format=torch.channels_last)
        for step_bin, mask in parts.items():
            y[mask] = outputs[step_bin]
        return y

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""
        values = x.float()
        if self.input_scale is not None and self.input_zero is not None:
            rows = self._bins(x)
            scale, zero = self.input_scale[rows], self.input_zero[rows]
            if isinstance(rows, Tensor):
                scale, zero = scale.view(-1, 1, 1, 1), zero.view(-1, 1, 1, 1)
            values = qparams.fake_quant_static(x, scale, zero)
        shape = (self.stride, self.padding, self.dilation, self.groups)
        return functional.conv2d(values, self.dequantize(), self._bias, *shape).to(x.dtype)

    def _int_rows(self, x: Tensor, step_bin: int) -> Tensor:
        assert self.input_scale is not None
        assert self.input_zero is not None
        if step_bin >= len(self.input_scale):
            raise SchemeError(
                f"The clock is in step bin {step_bin}, the layer has ranges for {len(self.input_scale)}",
                where=str(self),
                remedy="Give the layer the clock that it was calibrated with.",
            )
        scale, zero = self.input_scale[step_bin : step_bin + 1], self.input_zero[step_bin : step_bin + 1]
        q = dispatch.quantize_static(x, scale, zero)
        y: Tensor = dispatch.conv2d_a8(q, scale, zero, *self._weight_and_shape())
        return y.to(x.dtype)

    def _weight_and_shape(self) -> tuple[Any, ...]:
        weight = (self.qweight, self.scale, self.multiplier, self._bias)
        return (*weight, self.stride, self.padding, self.dilation, self.groups)

    def _bins(self, x: Tensor) -> int | Tensor:
        """Return the step bin of the whole input, or of each sample where the clock knows them."""
        assert self.input_scale is not None
        if self.clock is None or len(self.input_scale) == 1:
            return 0
        rows = self.clock.row_bins
        if rows is None or len(rows) != len(x) or not len(x):
            return self.clock.bin
        return rows.to(x.device)


def _of_kind(layer: nn.Module, kind: type[_M]) -> _M:
    if not isinstance(layer, kind):
        raise SchemeError(
            f"A {type(layer).__name__} is no {kind.__name__}", where=str(layer), remedy="Leave the layer in float."
        )
    return layer


def _even_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(conv.padding, str):
        return cast(tuple[int, int], conv.padding)
    total = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise SchemeError(
            "A convolution pads one side more than the other", where=str(conv), remedy="Leave the layer in float."
        )
    return total[0] // 2, total[1] // 2


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
