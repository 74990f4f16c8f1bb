"""Quantized layers: `QuantLinear` and `QuantConv2d`, each with an integer and a fake execution of the same buffers.

They are `nn.Linear` and `nn.Conv2d` for everything that asks by type (adapters, structure probes), but have no tensor
`weight`, so that nothing merges into or retypes one by mistake. Codes and scales keep their dtype through `.to(dtype)`.
Arithmetic is not here: integers run through `torch.ops.dcomp`, floats through `kernels/qparams.py`.

A layer computes `y = Q(x') W'^T + bias + h P^T + up (down x)` with `s = x * smooth_inv`, `h = s D^T` and
`x' = (s - h D) H`: its weight W' is that of smoothed and rotated inputs, H is symmetric and orthonormal, the few
directions D of the input are taken out before it is rounded and multiplied in float, and the low-rank branch reads the
raw input. Each part is optional.
A corrected layer has tables of the output's scale and bias in the step bins,
`y = step_scale[b] (Q(x') W'^T + h P^T + up (down x)) + step_bias[b]`. They become part of the weight's scale, of P, of
`up` and of the bias: no operation is added.

Letters: O output and I input channels (of one convolution group), B step bins, N samples, r rank of the branch, d
directions.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.compress.geometry import is_pointwise, take_conv_geometry, take_linear_geometry
from dcomp.compress.quantized import WeightForm
from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.compress.step_tables import SteppedLayer, form_of
from dcomp.kernels import ops, packing, qparams, reference
from dcomp.kernels.cuda import nibbles
from dcomp.kernels.packing import PackedWeight, Stored

if TYPE_CHECKING:
    from dcomp.calibrate.clock import StepClock

_BUFFERS = (
    "qweight",
    "scale",
    "multiplier",
    "input_scale",
    "input_zero",
    "smooth_inv",
    "directions",
    "direction_weight",
    "direction_scale",
    "lr_down",
    "lr_up",
    "step_scale",
    "step_bias",
)


class QuantLayer(SteppedLayer):
    """What `QuantLinear` and `QuantConv2d` share: one integer weight and one quantizer of inputs.

    Attributes:
        qweight, scale, multiplier: see `kernels/packing.py`; `multiplier` is None for 8 bits.
        input_zero: uint8 `[B]` of a static input range, else None.
        smooth_inv: fp32 `[I]`, what inputs are multiplied by, or None.
        directions: fp16 `[d, I]`, D above, or None.
        direction_weight, direction_scale: int8 `[O, *taps, d]` and fp32 `[d]`, whose product is P above, or None.
        lr_down, lr_up: fp16 `[r, *taps, I]` and `[O, r]` of the low-rank branch, or None.
    """

    qweight: Tensor
    multiplier: Tensor | None
    input_zero: Tensor | None
    smooth_inv: Tensor | None
    directions: Tensor | None
    direction_weight: Tensor | None
    direction_scale: Tensor | None
    lr_down: Tensor | None
    lr_up: Tensor | None

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        packed: PackedWeight,
        scheme: QScheme,
        input_scale: Tensor | None = None,
        input_zero: Tensor | None = None,
        clock: "StepClock | None" = None,
        *,
        smooth_inv: Tensor | None = None,
        directions: tuple[Tensor, Tensor, Tensor] | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Make the quantized form of a float layer; nothing but the bias is copied.

        Args:
            layer: `nn.Linear` or `nn.Conv2d`; only its geometry and its bias are used.
            packed: its weight, as it is for smoothed and rotated inputs, without directions and branch.
            scheme: must agree with all others.
            input_scale: fp32 `[B]`, of a static range only.
            input_zero: uint8 `[B]`, of a static range only.
            clock: tells the step bin.
            smooth_inv: fp32 `[I]`, of a smoothed layer only.
            directions: `directions`, `direction_weight` and `direction_scale`, of a layer with directions only.
            low_rank: `lr_down` and `lr_up`, of a layer with a branch only.

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
            "smooth_inv": smooth_inv,
            "directions": directions and directions[0].contiguous(),
            "direction_weight": directions and directions[1].contiguous(),
            "direction_scale": directions and directions[2].contiguous(),
            # As a file holds them: products over other strides round otherwise.
            "lr_down": low_rank and low_rank[0].contiguous(),
            "lr_up": low_rank and low_rank[1].contiguous(),
        }
        for name, value in given.items():
            expected = quantized._buffers[name]
            if form_of(value) != form_of(expected):
                raise SchemeError(
                    f"{name} is {form_of(value)}, but a layer of this scheme needs {form_of(expected)}",
                    where=f"{scheme.label}, {layer}",
                    remedy="Quantize the weight and the input by the scheme that is passed here.",
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
            bins: B, rows of tables.

        Raises:
            SchemeError: this layer cannot have such a scheme.
        """
        quantized: Self = cls.__new__(cls)
        nn.Module.__init__(quantized)
        out_channels, taps, in_channels = quantized._take_geometry(layer)
        quantized._check_scheme(scheme, out_channels, in_channels)
        buffers = packing.storage(out_channels, taps, in_channels, scheme.weight_bits, scheme.group_size)
        if scheme.input_granularity == "tensor":
            buffers |= {
                "input_scale": (torch.Size((bins,)), torch.float32),
                "input_zero": (torch.Size((bins,)), torch.uint8),
            }
        if scheme.smooth:
            buffers["smooth_inv"] = (torch.Size((in_channels,)), torch.float32)
        if scheme.directions:
            buffers["directions"] = (torch.Size((scheme.directions, in_channels)), torch.float16)
            buffers["direction_weight"] = (torch.Size((out_channels, *taps, scheme.directions)), torch.int8)
            buffers["direction_scale"] = (torch.Size((scheme.directions,)), torch.float32)
        if scheme.rank:
            buffers["lr_down"] = (torch.Size((scheme.rank, *taps, in_channels)), torch.float16)
            buffers["lr_up"] = (torch.Size((out_channels, scheme.rank)), torch.float16)
        if scheme.corrected:
            buffers |= {name: (torch.Size((bins, out_channels)), torch.float32) for name in ("step_scale", "step_bias")}
        for name in _BUFFERS:
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

    def values(self) -> Tensor:
        """Return the weight that the codes stand for, fp32, in torch's layout: for smoothed and rotated inputs.

        Fake execution uses it. Whoever tunes a layer replaces this method on the instance; gradients reach what the
        replacement returns.
        """
        return self.packed().dequantize().movedim(-1, 1)

    def dequantize(self) -> Tensor:
        """Return the float weight that the layer amounts to, fp32, in torch's layout.

        That is the weight for raw inputs: transforms are undone, and the branch is added. Corrections by step are not
        in it.
        """
        weight = self.values().movedim(1, -1)
        if self.scheme.rotate:
            weight = qparams.hadamard(weight, qparams.rotation_block(self._in_channels))
        if self.directions is not None:
            directions = self.directions.float()
            weight = weight + (self._carried() - weight @ directions.t()) @ directions
        if self.smooth_inv is not None:
            weight = weight * self.smooth_inv
        if self.lr_down is not None and self.lr_up is not None:
            weight = weight + (self.lr_up.float() @ self.lr_down.float().flatten(1)).view(weight.shape)
        return weight.movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer as `execution` says; the result has the dtype of `x`."""
        return self.fake_forward(x) if self.execution == "fake" else self.int_forward(x)

    def operations(self) -> dict[str, dict[str, Any]]:
        """Return what `int_forward` runs of the dispatch table, in order, with what `dispatch.choose` asks of each."""
        scheme, groups = self.scheme, getattr(self, "groups", 1)
        weight = {"bits": scheme.weight_bits}
        product = "linear" if scheme.input_granularity == "token" or self.float_kind is nn.Linear else "conv2d"
        if scheme.input_bits == 16:
            return {f"{product}_a16": weight}
        reduction = self._in_channels * math.prod(self.qweight.shape[1:-1])
        quantizers = {"tensor": "quantize_static", "sample": "quantize_sample", "token": "quantize_token"}
        assert scheme.input_granularity is not None
        if scheme.input_bits == 4 and product == "linear":
            block = nibbles.block_of(self._input_group, Stored(*self._rows_of_weight()), self._in_channels)
            return {"linear_a4": {**weight, "reduction": reduction, "block": block}}
        quantizer = "quantize_group" if scheme.input_bits == 4 else quantizers[scheme.input_granularity]
        quantizer = "quantize_low_rank" if self._is_read_once else quantizer
        return {quantizer: {}, f"{product}_a8": {**weight, "reduction": reduction, "groups": groups}}

    @property
    def weight(self) -> WeightForm:
        """Shape, dtype and device of the float weight, which is not there."""
        out_channels, *taps, _ = self.qweight.shape
        shape = torch.Size((out_channels, self._in_channels, *taps))
        return WeightForm(shape, self.qweight.device, self.scheme.folded)

    @property
    def _is_quantized_raw(self) -> bool:
        """Whether nothing but factors of channels comes between inputs and their codes."""
        return self.scheme.input_bits < 16 and self.directions is None and not self.scheme.rotate

    @property
    def _is_read_once(self) -> bool:
        """Whether codes of rows and the first half of the branch are found together."""
        return self.lr_down is not None and self._is_quantized_raw and self.scheme.input_granularity == "token"

    @abstractmethod
    def _take_geometry(self, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
        """Copy the attributes of a float layer; return O, the taps and the I of one group."""

    @property
    @abstractmethod
    def _in_channels(self) -> int:
        """I, the input channels of one group."""

    @property
    @abstractmethod
    def _granularities(self) -> tuple[str, ...]:
        """How integer inputs of this layer may be scaled."""

    def _check_scheme(self, scheme: QScheme, out_channels: int, in_channels: int) -> None:
        known = self._granularities
        transformed = scheme.smooth or scheme.rotate or scheme.rank or scheme.directions
        most = min(out_channels, in_channels)
        for good, problem, remedy in (
            (not scheme.boundaries, "A layer of one part has no boundaries", "Leave the boundaries out."),
            (
                scheme.input_granularity in (None, *known),
                f"The layer takes inputs by {' or '.join(known)}, or float ones, not by {scheme.input_granularity}",
                "Give linear layers inputs by token, and convolutions by sample or tensor.",
            ),
            (
                getattr(self, "groups", 1) == 1 or not transformed,
                "Channels in groups have no transform and no branch",
                "Leave smooth, rotate, directions and rank out for convolutions in groups.",
            ),
            (
                scheme.directions <= in_channels,
                f"{scheme.directions} directions are more than {in_channels} channels can have",
                "Lower the number of directions to the least number of channels of a layer, or of a part of it.",
            ),
            (
                scheme.rank <= most,
                f"A branch of rank {scheme.rank} is more than {most} channels can have",
                "Lower the rank to the least number of channels of a layer, or of a part of it.",
            ),
        ):
            if not good:
                raise SchemeError(problem, where=f"{scheme.label}, {scheme}", remedy=remedy)

    def _transformed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Smooth inputs `[..., I]`, take directions out and rotate: fp32, or `x` itself when there is nothing to do.

        Returns:
            What is rounded, and how far the inputs reach along the directions, `[..., d]`, or None.
        """
        along = None
        if self.smooth_inv is not None:
            x = x.float() * self.smooth_inv
        if self.directions is not None:
            x, along = qparams.take_out(x, self.directions)
        if self.scheme.rotate:
            x = qparams.hadamard(x.float(), qparams.rotation_block(self._in_channels))
        return x, along

    def _transformed_for_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Transform inputs `[..., I]` of a quantizer, which smooths them itself where nothing else comes between.

        Returns:
            What `_transformed` does, and the factors that the quantizer has to multiply channels by, or None.
        """
        if self._is_quantized_raw:
            return x, None, self.smooth_inv
        return *self._transformed(x), None

    def _carried(self) -> Tensor:
        """Return what meets the directions of the input, fp32 `[O, *taps, d]`."""
        assert self.direction_weight is not None
        assert self.direction_scale is not None
        return self.direction_weight.float() * self.direction_scale

    def _int_rows(self, rows: Tensor, raw: Tensor, smooth: Tensor | None, step_bin: int) -> Tensor:
        """Apply a layer without taps to rows `[M, I]`, each with a scale of its own: `[M, O]`.

        The branch is in the result unless directions have to be added as well.

        Args:
            rows: as `_transformed_for_codes` leaves them.
            raw: as they came: what the branch reads.
            smooth: factors that rows have to be multiplied by.
            step_bin: of tables.
        """
        qweight, multiplier = self._rows_of_weight()
        scale, bias = self._scale_and_bias(step_bin)
        dtype = raw.dtype if self.directions is None else torch.float32
        weight = (qweight, scale, multiplier, bias, self._in_channels, dtype)
        down = hidden = up = None
        if self.lr_down is not None and self.lr_up is not None and self.directions is None:
            # As stored it is float16, which kernels take.
            up = self.lr_up if self.step_scale is None else self._of_output(self.lr_up.float(), step_bin)
            down = self.lr_down.flatten(1)
            hidden = None if self._is_read_once else functional.linear(raw.float(), down.float())
        if self.scheme.input_bits == 4:
            found = (hidden, up, smooth, down if self._is_read_once else None)
            return cast(Tensor, ops.linear_a4(rows, self._input_group, *weight, *found))
        if self._is_read_once:
            codes, x_scale, hidden = ops.quantize_low_rank(rows, down, None, smooth)
        else:
            codes, x_scale = ops.quantize_token(rows, smooth)
        return cast(Tensor, ops.linear_a8(codes, x_scale, *weight, hidden, up))

    def _rows_of_weight(self) -> tuple[Tensor, Tensor | None]:
        """View codes and multipliers of a layer without taps as rows."""
        return self.qweight.flatten(1), None if self.multiplier is None else self.multiplier.flatten(1)

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which an integer product is wanted: that of inputs, unless floats are added to it."""
        return torch.float32 if self.directions is not None or self.lr_down is not None else x.dtype

    @property
    def _input_group(self) -> int:
        return _input_group(self.scheme, self._in_channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers to a device but never change their dtype, whatever `fn` does."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = moved.dtype == tensor.dtype or isinstance(tensor, nn.Parameter)
            return moved if kept else tensor.to(moved.device)

        return cast(Self, super()._apply(keep_dtype, recurse))  # type: ignore[no-untyped-call]


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer with an integer weight, and integer inputs with a scale for each row, or float inputs."""

    float_kind = nn.Linear
    _granularities = ("token",)

    def _take_geometry(self, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
        return take_linear_geometry(self, layer)

    @property
    def _in_channels(self) -> int:
        return self.in_features

    def int_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in integers to `[..., I]`."""
        self._check_channels(x.shape[-1], self.in_features)
        return self._by_bin(x, self._int_bin)

    def _int_bin(self, x: Tensor, step_bin: int) -> Tensor:
        inputs, along, smooth = self._transformed_for_codes(x)
        if self.scheme.input_bits == 16:
            scale, bias = self._scale_and_bias(step_bin)
            y = ops.linear_a16(inputs.to(x.dtype), self.qweight, scale, self.multiplier, bias, self.in_features)
        else:
            rows, raw = (part.reshape(-1, self.in_features) for part in (inputs, x))
            y = self._int_rows(rows, raw, smooth, step_bin).view(*x.shape[:-1], self.out_features)
            if along is None:
                return y
        return self._with_floats(y, x, along, step_bin).to(x.dtype)

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""
        inputs, along = self._transformed(x)
        y = functional.linear(fake_quant_dynamic(inputs, self.scheme), self.values(), self._bias)
        return self._corrected(self._with_floats(y, x, along), x, -1).to(x.dtype)

    def _with_floats(self, y: Tensor, x: Tensor, along: Tensor | None, step_bin: int | None = None) -> Tensor:
        """Add what is multiplied in float: directions, and the branch of the raw input; with a bin's correction."""
        if along is not None:
            y = y.float() + functional.linear(along, self._of_output(self._carried(), step_bin))
        if self.lr_down is not None and self.lr_up is not None:
            hidden = functional.linear(x.float(), self.lr_down.float())
            y = y.float() + functional.linear(hidden, self._of_output(self.lr_up.float(), step_bin))
        return y


class QuantConv2d(QuantLayer, nn.Conv2d):  # type: ignore[misc]
    """A convolution with an integer weight, and float inputs or integer ones.

    Integer inputs have a static range for each step bin, or a range found while running: for each sample, or for each
    pixel of a convolution that is a linear layer over pixels.
    """

    float_kind = nn.Conv2d
    padding: tuple[int, int]

    def _take_geometry(self, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
        return take_conv_geometry(self, layer)

    @property
    def _in_channels(self) -> int:
        return self.in_channels // self.groups

    @property
    def _granularities(self) -> tuple[str, ...]:
        return ("tensor", "sample", "token") if is_pointwise(self) else ("tensor", "sample")

    def int_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in integers to `[N, C, H, W]`; the result is channels-last."""
        self._check_channels(x.shape[-3], self.in_channels)
        if x.ndim == 3:
            return self.int_forward(x.unsqueeze(0)).squeeze(0)
        return self._by_bin(x, self._int_bin).contiguous(memory_format=torch.channels_last)

    def _int_bin(self, x: Tensor, step_bin: int) -> Tensor:
        inputs, along, smooth = self._transformed_for_codes(x.movedim(1, -1))
        inputs = inputs.movedim(-1, 1)
        if self.scheme.input_granularity == "tensor":
            assert self.input_scale is not None
            assert self.input_zero is not None
            scale, zero = self.input_scale[step_bin : step_bin + 1], self.input_zero[step_bin : step_bin + 1]
            q = ops.quantize_static(inputs, scale, zero, smooth)
            y = ops.conv2d_a8(q, scale, zero, *self._weight_and_shape(step_bin), self._product_dtype(x))
        elif self.scheme.input_granularity == "sample":
            weight_and_shape = self._weight_and_shape(step_bin)
            y = ops.conv2d_a8(*self._sample_codes(inputs, smooth), *weight_and_shape, self._product_dtype(x))
        elif self.scheme.input_granularity == "token":
            pixels = inputs.movedim(1, -1)
            rows, raw = (part.reshape(-1, self.in_channels) for part in (pixels, x.movedim(1, -1)))
            y = self._int_rows(rows, raw, smooth, step_bin)
            y = y.view(*pixels.shape[:-1], self.out_channels).movedim(-1, 1)
            if along is None:
                return y
        else:
            y = ops.conv2d_a16(inputs.to(x.dtype), *self._weight_and_shape(step_bin))
        return self._with_floats(y, x, along, step_bin).to(x.dtype)

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""
        if x.ndim == 3:
            return self.fake_forward(x.unsqueeze(0)).squeeze(0)
        inputs, along = self._transformed(x.movedim(1, -1))
        y = reference.float_conv2d(self._fake_inputs(inputs.movedim(-1, 1)), self.values(), self._bias, *self._shape)
        return self._corrected(self._with_floats(y, x, along), x, 1).to(x.dtype)

    def _fake_inputs(self, x: Tensor) -> Tensor:
        """Quantize and dequantize transformed inputs."""
        if self.scheme.input_granularity == "tensor":
            assert self.input_scale is not None
            assert self.input_zero is not None
            rows = self._bins(x)
            scale, zero = self.input_scale[rows], self.input_zero[rows]
            if isinstance(rows, Tensor):
                scale, zero = scale.view(-1, 1, 1, 1), zero.view(-1, 1, 1, 1)
            return qparams.fake_quant_static(x, scale, zero)
        return fake_quant_dynamic(x.movedim(1, -1), self.scheme).movedim(-1, 1)

    def _sample_codes(self, x: Tensor, smooth: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return uint8 codes, scale and zero of each sample; codes of groups are shifted to have their zero at 128."""
        if self.scheme.input_bits == 8:
            return cast(tuple[Tensor, Tensor, Tensor], ops.quantize_sample(x, smooth))
        pixels = x.movedim(1, -1)
        image, scale = ops.quantize_group(pixels.flatten(1, 2), self._input_group, smooth)
        codes = (image.view(torch.uint8) ^ 0x80).view(pixels.shape).movedim(-1, 1)
        return codes, scale, torch.full_like(scale, 128, dtype=torch.uint8)

    def _with_floats(self, y: Tensor, x: Tensor, along: Tensor | None, step_bin: int | None = None) -> Tensor:
        """Add what is multiplied in float: directions, and the branch of the raw input; with a bin's correction."""
        if along is not None:
            weight = self._of_output(self._carried(), step_bin).movedim(-1, 1)
            y = y.float() + reference.float_conv2d(along.movedim(-1, 1), weight, None, *self._shape)
        if self.lr_down is not None and self.lr_up is not None:
            hidden = reference.float_conv2d(x.float(), self.lr_down.float().movedim(-1, 1), None, *self._shape)
            y = y.float() + reference.float_conv2d(
                hidden, self._of_output(self.lr_up.float(), step_bin)[:, :, None, None]
            )
        return y

    @property
    def _shape(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def _weight_and_shape(self, step_bin: int) -> tuple[Any, ...]:
        scale, bias = self._scale_and_bias(step_bin)
        return self.qweight, scale, self.multiplier, bias, *self._shape


def fake_quant_dynamic(x: Tensor, scheme: QScheme) -> Tensor:
    """Quantize and dequantize inputs `[..., I]` with the ranges of the moment, as a layer of the scheme does; fp32.

    Args:
        x: transformed inputs, samples along the first axis.
        scheme: one without static ranges; float inputs stay what they are.
    """
    if scheme.input_bits == 16:
        return x.float()
    if scheme.input_bits == 4:
        rows = x.flatten(1, -2) if scheme.input_granularity == "sample" else x.reshape(-1, 1, x.shape[-1])
        return qparams.fake_quant_group(rows, _input_group(scheme, x.shape[-1])).view(x.shape)
    return qparams.fake_quant_token(x) if scheme.input_granularity == "token" else qparams.fake_quant_sample(x)


def _input_group(scheme: QScheme, channels: int) -> int:
    """Channels of a group of inputs; whatever a checkpoint says, no more than there are."""
    assert scheme.input_group is not None
    return min(scheme.input_group, channels + channels % 2)
