"""Layers that read a concatenation, in parts: each has its own range of input channels, with quantizers of its own.

`y = W [x1; x2] = W1 x1 + W2 x2` is exact algebra, so a split costs nothing but the padding of another group. The parts
are ordinary quantized layers, and the split layer is `nn.Linear` or `nn.Conv2d` for the model around it.

This is also where code that does not care about parts finds its way: what a layer's quantized form is, whether a module
is one, and which ones a model has.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeGuard, cast

import torch
from torch import Tensor, nn

from dcomp.compress.geometry import take_conv_geometry, take_linear_geometry
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.quantized import Execution, Quantized, WeightForm
from dcomp.compress.scheme import QScheme, SchemeError

if TYPE_CHECKING:
    from dcomp.calibrate.clock import StepClock


class SplitLayer(Quantized):
    """What `SplitLinear` and `SplitConv2d` share.

    Attributes:
        parts: quantized layers over consecutive input channels, all of one scheme; the first has the bias.
        scheme: that of the parts, with boundaries.
    """

    part_kind: ClassVar[type[QuantLayer]]
    channel_axis: ClassVar[int]
    parts: nn.ModuleList

    @classmethod
    def from_parts(cls, layer: nn.Module, parts: Sequence[QuantLayer], scheme: QScheme) -> Self:
        """Put quantized parts in the place of a float layer.

        A part without smoothing factors beside one that has them gets factors of 1, because one scheme describes all
        parts. Where none has them, `smooth` is taken out of the scheme.

        Args:
            layer: the float layer; only its geometry is used.
            parts: in the order of their channels; kept, not copied.
            scheme: with the boundaries.

        Raises:
            SchemeError: the parts have another scheme, or do not make up the layer.
        """
        scheme = replace(scheme, smooth=scheme.smooth and any(part.scheme.smooth for part in parts))
        of_parts = replace(scheme, boundaries=())
        for part in parts:
            if scheme.smooth and not part.scheme.smooth:
                part.scheme = replace(part.scheme, smooth=True)
                part.smooth_inv = torch.ones(part.weight.shape[1], device=part.qweight.device)
        tables = [table for part in parts for table in (part.input_scale, part.step_scale)]
        bins = {len(table) for table in tables if table is not None}
        with torch.device("meta"):
            split = cls.from_shape(layer, scheme, max(bins, default=1))
        if [_form(part) for part in parts] != [_form(part) for part in parts_of(split)] or any(
            part.scheme != of_parts for part in parts
        ):
            raise SchemeError(
                "The parts are not those of the layer",
                where=f"{scheme.label}, boundaries {list(scheme.boundaries)}, {layer}",
                remedy="Quantize the channels of each part by this scheme without its boundaries.",
            )
        split.parts = nn.ModuleList(parts)
        return split.train(layer.training)

    @classmethod
    def from_shape(cls, layer: nn.Module, scheme: QScheme, bins: int) -> Self:
        """Make a layer with uninitialised buffers for a checkpoint to fill, on the current default device.

        Args:
            layer: float layer with the geometry; may be on the meta device.
            scheme: decides where parts begin and which buffers there are.
            bins: B, rows of tables.

        Raises:
            SchemeError: this layer cannot have such a scheme.
        """
        split: Self = cls.__new__(cls)
        nn.Module.__init__(split)
        split._take_geometry(layer)
        split.scheme = scheme
        of_parts = replace(scheme, boundaries=())
        split.parts = nn.ModuleList(
            cls.part_kind.from_shape(part, of_parts, bins) for part in float_parts(layer, scheme.boundaries)
        )
        for part in parts_of(split)[1:]:
            part.step_bias = None
        return split

    def correct(self, step_scale: Tensor, step_bias: Tensor) -> None:
        """Give the layer tables of its output's scale and bias, which the first part adds.

        Args:
            step_scale: fp32 `[B, O]`, factors of the output without bias.
            step_bias: fp32 `[B, O]`, what is added to that; the layer's own bias, times the factor, is part of it.

        Raises:
            SchemeError: the tables have another form, or not as many rows as those of the inputs.
        """
        for part in parts_of(self):
            part.correct(step_scale.clone(), step_bias if part is self._first else None)
        self.scheme = replace(self.scheme, corrected=True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer as `execution` says; the result has the dtype of `x`."""
        return self._sum(x, lambda part, own: cast(Tensor, part(own)))

    def int_forward(self, x: Tensor) -> Tensor:
        """Apply all parts in integers."""
        return self._sum(x, lambda part, own: part.int_forward(own))

    def fake_forward(self, x: Tensor) -> Tensor:
        """Apply all parts in fp32 with the values that the codes stand for; gradients pass straight through."""
        return self._sum(x, lambda part, own: part.fake_forward(own))

    def dequantize(self) -> Tensor:
        """Return the float weight that the layer amounts to, fp32, in torch's layout."""
        return torch.cat([part.dequantize() for part in parts_of(self)], 1)

    @property
    def weight(self) -> WeightForm:
        """Shape, dtype and device of the float weight, which is not there."""
        out_channels, _, *taps = self._first.weight.shape
        shape = torch.Size((out_channels, self._channels, *taps))
        return WeightForm(shape, self._first.qweight.device, self.scheme.folded)

    @property
    def bias(self) -> Any:
        """The bias, which the first part adds."""
        return self._first.bias

    @property
    def clock(self) -> "StepClock | None":
        """The clock of the parts."""
        return self._first.clock

    @clock.setter
    def clock(self, clock: "StepClock | None") -> None:
        for part in parts_of(self):
            part.clock = clock

    @property
    def execution(self) -> Execution:
        """How the parts are executed."""
        return self._first.execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        for part in parts_of(self):
            part.execution = execution

    @abstractmethod
    def _take_geometry(self, layer: nn.Module) -> None:
        """Copy the attributes of a float layer."""

    @property
    @abstractmethod
    def _channels(self) -> int:
        """Input channels of all parts together."""

    @property
    def _first(self) -> QuantLayer:
        return parts_of(self)[0]

    def _sum(self, x: Tensor, apply: Callable[[QuantLayer, Tensor], Tensor]) -> Tensor:
        """Add up the parts in fp32."""
        self._check_channels(x.shape[self.channel_axis], self._channels)
        slices = part_slices(self._channels, self.scheme.boundaries)
        first, *others = [
            apply(part, x.narrow(self.channel_axis, own.start, own.stop - own.start).float())
            for part, own in zip(parts_of(self), slices, strict=True)
        ]
        return sum(others, first).to(x.dtype)


class SplitLinear(SplitLayer, nn.Linear):  # type: ignore[misc, override]
    """A linear layer in parts."""

    float_kind = nn.Linear
    part_kind = QuantLinear
    channel_axis = -1

    def _take_geometry(self, layer: nn.Module) -> None:
        take_linear_geometry(self, layer)

    @property
    def _channels(self) -> int:
        return self.in_features


class SplitConv2d(SplitLayer, nn.Conv2d):  # type: ignore[misc, override]
    """A convolution in parts."""

    float_kind = nn.Conv2d
    part_kind = QuantConv2d
    channel_axis = -3

    def _take_geometry(self, layer: nn.Module) -> None:
        take_conv_geometry(self, layer)

    @property
    def _channels(self) -> int:
        return self.in_channels


def is_quantized(module: nn.Module) -> TypeGuard[Quantized]:
    """Whether a module is the quantized form of a layer, in one part or several, or a part of one."""
    return isinstance(module, Quantized)


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers of a model by name; parts are not listed beside the layer that they make up."""
    found: dict[str, Quantized] = {}
    within: set[nn.Module] = set()
    for name, module in model.named_modules():
        if is_quantized(module) and module not in within:
            found[name] = module
            within |= set(module.modules())
    return found


def parts_of(layer: Quantized) -> list[QuantLayer]:
    """Return the parts of a layer; of one that is not split, the layer itself."""
    parts = [layer] if isinstance(layer, QuantLayer) else list(cast(SplitLayer, layer).parts)
    return cast(list[QuantLayer], parts)


def part_slices(channels: int, boundaries: Sequence[int]) -> list[slice]:
    """Return the input channels of each part."""
    return [slice(start, stop) for start, stop in pairwise((0, *boundaries, channels))]


def float_parts(layer: nn.Module, boundaries: Sequence[int]) -> list[nn.Module]:
    """Cut a float layer at input channels: layers of its geometry whose outputs add up to its output.

    They share its memory. The first has the bias.

    Raises:
        SchemeError: it is no linear layer or convolution, its channels are in groups, or a boundary lies outside them.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise _not_split(layer, f"a {type(layer).__name__} is no linear layer or convolution")
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise _not_split(layer, f"its channels are in {layer.groups} groups")
    if not boundaries or not all(before < after for before, after in pairwise((0, *boundaries, channels))):
        raise _not_split(layer, f"there are no parts between {channels} channels at {list(boundaries)}")
    return [_float_part(layer, own) for own in part_slices(channels, boundaries)]


def empty_layer(layer: nn.Module, scheme: QScheme, bins: int) -> Quantized:
    """Make the quantized form of a float layer, in parts or not, with uninitialised buffers.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`; only its geometry is used.
        scheme: decides about parts and buffers.
        bins: B, rows of a static range's table.

    Raises:
        SchemeError: this layer cannot have such a scheme.
    """
    if isinstance(layer, nn.Conv2d):
        return (SplitConv2d if scheme.boundaries else QuantConv2d).from_shape(layer, scheme, bins)
    return (SplitLinear if scheme.boundaries else QuantLinear).from_shape(layer, scheme, bins)


def join_parts(layer: nn.Module, parts: Sequence[QuantLayer], scheme: QScheme) -> Quantized:
    """Make the quantized form of a float layer from its quantized parts: the only one itself, or a split layer.

    Raises:
        SchemeError: the parts do not make up the layer.
    """
    if not scheme.boundaries:
        (part,) = parts
        return part
    return (SplitConv2d if isinstance(layer, nn.Conv2d) else SplitLinear).from_parts(layer, parts, scheme)


def _float_part(layer: nn.Linear | nn.Conv2d, own: slice) -> nn.Module:
    part: nn.Linear | nn.Conv2d
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            part = nn.Linear(own.stop - own.start, layer.out_features)
        else:
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            geometry: dict[str, Any] = {name: getattr(layer, name) for name in names}
            part = nn.Conv2d(own.stop - own.start, layer.out_channels, **geometry)
    part.weight = nn.Parameter(layer.weight.detach()[:, own], requires_grad=False)
    part.register_parameter("bias", layer._parameters["bias"] if own.start == 0 else None)
    return part.train(layer.training)


def _not_split(layer: nn.Module, problem: str) -> SchemeError:
    return SchemeError(
        f"A layer cannot be split: {problem}",
        where=str(layer),
        remedy="Change the boundaries, or leave the layer in float.",
    )


def _form(part: QuantLayer) -> tuple[Any, ...]:
    """Kind and geometry of a layer, and shapes and dtypes of its tensors."""
    geometry = cast(Any, part.float_kind).extra_repr(part)
    return type(part), geometry, {name: (tensor.shape, tensor.dtype) for name, tensor in part.state_dict().items()}
