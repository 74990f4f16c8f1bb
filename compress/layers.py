"""Quantized layers: `QuantLinear` and `QuantConv2d`, each with an integer and a fake execution of the same buffers.

They are `nn.Linear` and `nn.Conv2d` for everything that asks by type (adapters, structure probes), but have no tensor
`weight`, so that nothing merges into or retypes one by mistake. Codes and scales keep their dtype through `.to(dtype)`.
Arithmetic is not here: integers run through `torch.ops.dcomp`, floats through `kernels/qparams.py`.

A layer computes `y = Q(x') W'^T + bias + up (down x)` with `x' = (x * smooth_inv) H`: its weight W' is that of smoothed
and rotated inputs, H is symmetric and orthonormal, and the low-rank branch reads the raw input. Each part is optional.
A corrected layer has tables of the output's scale and bias in the step bins, `y = step_scale[b] (Q(x') W'^T + up (down
x)) + step_bias[b]`. They become part of the weight's scale, of `up` and of the bias: no operation is added.

Letters: O output and I input channels (of one convolution group), B step bins, N samples, r rank of the branch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.kernels import dispatch, packing, qparams, reference
from dcomp.kernels.packing import PackedWeight

if TYPE_CHECKING:
    from dcomp.calibrate.clock import StepClock

_M = TypeVar("_M", bound=nn.Module)
Execution = Literal["int", "fake"]

_BUFFERS = (
    "qweight",
    "scale",
    "multiplier",
    "input_scale",
    "input_zero",
    "smooth_inv",
    "lr_down",
    "lr_up",
    "step_scale",
    "step_bias",
)

_NO_WEIGHT = (
    "A quantized layer has integer codes and no float weight, so an adapter can be attached but not merged; "
    "dequantize() gives the float values"
)


class WeightForm:
    """What may be asked of a weight that is not there: its shape, dtype and device.

    PEFT looks at the type and at the number of axes before it attaches an adapter. Every other use, merging above all,
    raises AttributeError.
    """

    def __init__(self, shape: torch.Size, device: torch.device, folded: bool = False) -> None:
        self.shape, self.dtype, self._device, self._folded = shape, torch.float32, device, folded

    @property
    def device(self) -> torch.device:
        """The device; PEFT asks for it when it attaches an adapter.

        Raises:
            SchemeError: the layer is folded.
        """
        if self._folded:
            raise SchemeError(
                "An adapter for the float model does not fit: factors were moved between this layer and its neighbours",
                where=f"a quantized layer with a weight of {list(self.shape)}",
                remedy="Fuse the adapter before quantization with --lora, or quantize with --set stages.0.fold=false.",
            )
        return self._device

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_NO_WEIGHT)


class Quantized(nn.Module, ABC):
    """What stands in the place of a float layer; only its subclasses are used.

    Attributes:
        scheme: the rule that it was quantized by.
        bias: parameter `[O]` without gradient, or None. It takes the model's float dtype. A corrected layer has it in
            `step_bias` and does not read it.
        clock: tells the step bin; without one, bin 0 is used.
        execution: "int", or "fake" for the float arithmetic that the integers stand for.
    """

    float_kind: ClassVar[type[nn.Module]]
    scheme: QScheme
    bias: Any  # Parameter or None; nn.Linear and nn.Conv2d disagree on the type
    clock: "StepClock | None"
    execution: Execution

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """Make the float layer when called like one: there are no codes yet.

        PEFT makes an adapter's layers by calling the type of the layer that it adapts.
        """
        return cls.float_kind(*sizes, **options) if sizes or options else super().__new__(cls)

    @classmethod
    @abstractmethod
    def from_shape(cls, layer: nn.Module, scheme: QScheme, bins: int) -> Self:
        """Make a layer with uninitialised buffers for a checkpoint to fill, on the current default device.

        Args:
            layer: float layer with the geometry; may be on the meta device.
            scheme: decides which buffers there are.
            bins: B, rows of tables.

        Raises:
            SchemeError: this layer cannot have such a scheme.
        """

    @abstractmethod
    def correct(self, step_scale: Tensor, step_bias: Tensor) -> None:
        """Give the layer tables of its output's scale and bias; those that it had are replaced.

        Args:
            step_scale: fp32 `[B, O]`, factors of the output without bias.
            step_bias: fp32 `[B, O]`, what is added to that; the layer's own bias, times the factor, is part of it.

        Raises:
            SchemeError: the tables have another form, or not as many rows as those of the inputs.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer as `execution` says; the result has the dtype of `x`."""

    @abstractmethod
    def int_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in integers."""

    @abstractmethod
    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the float weight that the layer amounts to, fp32, in torch's layout.

        That is the weight for raw inputs: transforms are undone, and the branch is added. Corrections by step are not
        in it.
        """

    @property
    @abstractmethod
    def weight(self) -> WeightForm:
        """Shape, dtype and device of the float weight, which is not there."""

    def _check_channels(self, found: int, expected: int) -> None:
        # A packed weight is padded, so that a kernel cannot tell a missing channel from a padded one.
        if found != expected:
            raise dispatch.KernelError(
                f"The input has {found} channels instead of {expected}", where=str(self), remedy="Check the model."
            )

    def extra_repr(self) -> str:
        """Return the geometry and the scheme."""
        return f"{super().extra_repr()}, scheme={self.scheme.label}, execution={self.execution}"


class QuantLayer(Quantized):
    """What `QuantLinear` and `QuantConv2d` share: one integer weight and one quantizer of inputs.

    Attributes:
        qweight, scale, multiplier: see `kernels/packing.py`; `multiplier` is None for 8 bits.
        input_scale, input_zero: fp32 and uint8 `[B]` of a static input range, else None. Tables of one row serve
            every bin.
        smooth_inv: fp32 `[I]`, what inputs are multiplied by, or None.
        lr_down, lr_up: fp16 `[r, *taps, I]` and `[O, r]` of the low-rank branch, or None.
        step_scale, step_bias: fp32 `[B, O]` of a corrected layer, else None; of the parts of a split layer only the
            first has a bias.
    """

    qweight: Tensor
    scale: Tensor
    multiplier: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    smooth_inv: Tensor | None
    lr_down: Tensor | None
    lr_up: Tensor | None
    step_scale: Tensor | None
    step_bias: Tensor | None

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
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Make the quantized form of a float layer; nothing but the bias is copied.

        Args:
            layer: `nn.Linear` or `nn.Conv2d`; only its geometry and its bias are used.
            packed: its weight, as it is for smoothed and rotated inputs and without the branch.
            scheme: must agree with all others.
            input_scale: fp32 `[B]`, of a static range only.
            input_zero: uint8 `[B]`, of a static range only.
            clock: tells the step bin.
            smooth_inv: fp32 `[I]`, of a smoothed layer only.
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
            # As a file holds them: products over other strides round otherwise.
            "lr_down": low_rank and low_rank[0].contiguous(),
            "lr_up": low_rank and low_rank[1].contiguous(),
        }
        for name, value in given.items():
            expected = quantized._buffers[name]
            if _form(value) != _form(expected):
                raise SchemeError(
                    f"{name} is {_form(value)}, but a layer of this scheme needs {_form(expected)}",
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

    def correct(self, step_scale: Tensor, step_bias: Tensor | None) -> None:
        """Give the layer tables of its output's scale and bias; those that it had are replaced.

        Args:
            step_scale: fp32 `[B, O]`, factors of the output without bias.
            step_bias: fp32 `[B, O]`, what is added to that; the layer's own bias, times the factor, is part of it. None
                for a part of a layer that is not the first.

        Raises:
            SchemeError: the tables have another form, or not as many rows as those of the inputs.
        """
        bins = len(step_scale if self.input_scale is None else self.input_scale)
        expected = _form(torch.empty(bins, len(self.scale), device="meta"))
        forms = {_form(table) for table in (step_scale, step_bias) if table is not None}
        if forms != {expected}:
            raise SchemeError(
                f"Tables of a correction are {' and '.join(sorted(forms))}, but this layer needs {expected}",
                where=str(self),
                remedy="Use fp32 tables with a row for each step bin.",
            )
        self.step_scale, self.step_bias = step_scale, step_bias
        self.scheme = replace(self.scheme, corrected=True)

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
        if self.smooth_inv is not None:
            weight = weight * self.smooth_inv
        if self.lr_down is not None and self.lr_up is not None:
            weight = weight + (self.lr_up.float() @ self.lr_down.float().flatten(1)).view(weight.shape)
        return weight.movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer as `execution` says; the result has the dtype of `x`."""
        return self.fake_forward(x) if self.execution == "fake" else self.int_forward(x)

    @property
    def weight(self) -> WeightForm:
        """Shape, dtype and device of the float weight, which is not there."""
        out_channels, *taps, _ = self.qweight.shape
        shape = torch.Size((out_channels, self._in_channels, *taps))
        return WeightForm(shape, self.qweight.device, self.scheme.folded)

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
        transformed = scheme.smooth or scheme.rotate or scheme.rank
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
                "Leave smooth, rotate and rank out for convolutions in groups.",
            ),
            (
                scheme.rank <= most,
                f"A branch of rank {scheme.rank} is more than {most} channels can have",
                "Lower the rank to the least number of channels of a layer, or of a part of it.",
            ),
        ):
            if not good:
                raise SchemeError(problem, where=f"{scheme.label}, {scheme}", remedy=remedy)

    def _transformed(self, x: Tensor) -> Tensor:
        """Smooth and rotate inputs `[..., I]`; fp32, or `x` itself when there is nothing to do."""
        if self.smooth_inv is not None:
            x = x.float() * self.smooth_inv
        if self.scheme.rotate:
            x = qparams.hadamard(x.float(), qparams.rotation_block(self._in_channels))
        return x

    def _by_bin(self, x: Tensor, apply: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Apply a function to all samples of a step bin at once.

        Args:
            x: samples along the first axis.
            apply: function of samples and their bin.
        """
        rows = self._bins(x)
        if isinstance(rows, int):
            return apply(x, rows)
        masks = {step_bin: rows == step_bin for step_bin in rows.unique().tolist()}
        outputs = {step_bin: apply(x[mask], step_bin) for step_bin, mask in masks.items()}
        first = outputs[int(rows[0])]
        y = first.new_empty(len(x), *first.shape[1:])
        for step_bin, mask in masks.items():
            y[mask] = outputs[step_bin]
        return y

    def _bins(self, x: Tensor) -> int | Tensor:
        """Return the step bin of the whole input, or of each sample where the clock knows them; 0 without tables.

        Raises:
            SchemeError: the tables have no row for the bin.
        """
        table = self.input_scale if self.step_scale is None else self.step_scale
        if self.clock is None or table is None or len(table) == 1:
            return 0
        rows = self.clock.row_bins
        mixed = rows is not None and x.ndim > 1 and len(rows) == len(x) > 0
        last = int(rows.max()) if rows is not None and mixed else self.clock.bin
        if last >= len(table):
            raise SchemeError(
                f"The clock is in step bin {last}, the layer has tables for {len(table)}",
                where=str(self),
                remedy="Give the layer the clock that it was calibrated with.",
            )
        return rows.to(x.device) if rows is not None and mixed else last

    def _scale_and_bias(self, step_bin: int) -> tuple[Tensor, Tensor | None]:
        """Return the scale of the weight and the bias, `[O]` each, with a bin's correction in them."""
        if self.step_scale is None:
            return self.scale, self._bias
        return self.scale * self.step_scale[step_bin], None if self.step_bias is None else self.step_bias[step_bin]

    def _up(self, step_bin: int | None) -> Tensor:
        """Return `lr_up` in fp32, with a bin's correction in it."""
        assert self.lr_up is not None
        up = self.lr_up.float()
        return up if self.step_scale is None or step_bin is None else up * self.step_scale[step_bin].unsqueeze(-1)

    def _corrected(self, y: Tensor, x: Tensor, axis: int) -> Tensor:
        """Apply the tables to an output that has no bias, as fake execution does; O is along an axis of `y`."""
        if self.step_scale is None:
            return y
        rows = self._bins(x)
        shape = [1] * y.ndim
        shape[axis] = y.shape[axis]
        if isinstance(rows, Tensor):
            shape[0] = len(x)
        y = y * self.step_scale[rows].view(shape)
        return y if self.step_bias is None else y + self.step_bias[rows].view(shape)

    def _int_rows(self, rows: Tensor, step_bin: int) -> Tensor:
        """Apply a layer without taps to transformed rows `[M, I]`, each with a scale of its own: fp32 `[M, O]`."""
        if self.scheme.input_bits == 8:
            codes, x_scale = dispatch.quantize_token(rows)
        else:
            image, x_scale = dispatch.quantize_group(rows.unsqueeze(1), self._input_group)
            codes = image.squeeze(1)
        multiplier = None if self.multiplier is None else self.multiplier.flatten(1)
        scale, bias = self._scale_and_bias(step_bin)
        weight = (self.qweight.flatten(1), scale, multiplier, bias, self._in_channels)
        return cast(Tensor, dispatch.linear_a8(codes, x_scale, *weight))

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

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None or self.step_scale is not None else self.bias.float()


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
        inputs = self._transformed(x)
        if self.scheme.input_bits == 16:
            scale, bias = self._scale_and_bias(step_bin)
            y = dispatch.linear_a16(inputs.to(x.dtype), self.qweight, scale, self.multiplier, bias, self.in_features)
        else:
            y = self._int_rows(inputs.reshape(-1, self.in_features), step_bin).view(*x.shape[:-1], self.out_features)
        return self._with_branch(y, x, step_bin).to(x.dtype)

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""
        inputs = fake_quant_dynamic(self._transformed(x), self.scheme)
        y = self._with_branch(functional.linear(inputs, self.values(), self._bias), x)
        return self._corrected(y, x, -1).to(x.dtype)

    def _with_branch(self, y: Tensor, x: Tensor, step_bin: int | None = None) -> Tensor:
        """Add what the low-rank branch makes of the raw input, in a bin with its correction."""
        if self.lr_down is None:
            return y
        hidden = functional.linear(x.float(), self.lr_down.float())
        return y.float() + functional.linear(hidden, self._up(step_bin))


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
        inputs = self._transformed(x.movedim(1, -1)).movedim(-1, 1)
        if self.scheme.input_granularity == "tensor":
            assert self.input_scale is not None
            assert self.input_zero is not None
            scale, zero = self.input_scale[step_bin : step_bin + 1], self.input_zero[step_bin : step_bin + 1]
            q = dispatch.quantize_static(inputs, scale, zero)
            y = dispatch.conv2d_a8(q, scale, zero, *self._weight_and_shape(step_bin))
        elif self.scheme.input_granularity == "sample":
            y = dispatch.conv2d_a8(*self._sample_codes(inputs), *self._weight_and_shape(step_bin))
        elif self.scheme.input_granularity == "token":
            pixels = inputs.movedim(1, -1)
            rows = self._int_rows(pixels.reshape(-1, self.in_channels), step_bin)
            y = rows.view(*pixels.shape[:-1], self.out_channels).movedim(-1, 1)
        else:
            y = dispatch.conv2d_a16(inputs.to(x.dtype), *self._weight_and_shape(step_bin))
        return self._with_branch(y, x, step_bin).to(x.dtype)

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply the layer in fp32 with the values that the codes stand for; gradients pass straight through."""
        if x.ndim == 3:
            return self.fake_forward(x.unsqueeze(0)).squeeze(0)
        inputs = self._fake_inputs(self._transformed(x.movedim(1, -1)).movedim(-1, 1))
        y = self._with_branch(reference.float_conv2d(inputs, self.values(), self._bias, *self._shape), x)
        return self._corrected(y, x, 1).to(x.dtype)

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

    def _sample_codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return uint8 codes, scale and zero of each sample; codes of groups are shifted to have their zero at 128."""
        if self.scheme.input_bits == 8:
            return cast(tuple[Tensor, Tensor, Tensor], dispatch.quantize_sample(x))
        pixels = x.movedim(1, -1)
        image, scale = dispatch.quantize_group(pixels.flatten(1, 2), self._input_group)
        codes = (image.view(torch.uint8) ^ 0x80).view(pixels.shape).movedim(-1, 1)
        return codes, scale, torch.full_like(scale, 128, dtype=torch.uint8)

    def _with_branch(self, y: Tensor, x: Tensor, step_bin: int | None = None) -> Tensor:
        """Add what the low-rank branch makes of the raw input, in a bin with its correction."""
        if self.lr_down is None:
            return y
        hidden = reference.float_conv2d(x.float(), self.lr_down.float().movedim(-1, 1), None, *self._shape)
        return y.float() + reference.float_conv2d(hidden, self._up(step_bin)[:, :, None, None])

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


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is in effect a linear layer over pixels."""
    unpadded = conv.padding in ("valid", "same", (0, 0))
    geometry = (conv.kernel_size, conv.stride, conv.dilation, conv.groups)
    return unpadded and geometry == ((1, 1), (1, 1), (1, 1), 1)


def take_linear_geometry(quantized: Any, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
    """Copy the attributes of a linear layer to its quantized form; return O, no taps, and I.

    Raises:
        SchemeError: it is no linear layer.
    """
    linear = _of_kind(layer, nn.Linear)
    quantized.in_features, quantized.out_features = linear.in_features, linear.out_features
    return linear.out_features, (), linear.in_features


def take_conv_geometry(quantized: Any, layer: nn.Module) -> tuple[int, tuple[int, ...], int]:
    """Copy the attributes of a convolution to its quantized form; return O, the taps, and the I of one group.

    Raises:
        SchemeError: it is no convolution, or pads as no integer convolution does.
    """
    conv = _of_kind(layer, nn.Conv2d)
    if conv.padding_mode != "zeros":
        raise SchemeError(
            f"A convolution pads by {conv.padding_mode!r}, integer convolutions by zeros only",
            where=str(layer),
            remedy="Leave the layer in float.",
        )
    quantized.in_channels, quantized.out_channels, quantized.groups = conv.in_channels, conv.out_channels, conv.groups
    quantized.kernel_size, quantized.stride, quantized.dilation = conv.kernel_size, conv.stride, conv.dilation
    quantized.padding = _even_padding(conv)
    quantized.padding_mode, quantized.transposed, quantized.output_padding = "zeros", False, (0, 0)
    return conv.out_channels, conv.kernel_size, conv.in_channels // conv.groups


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
