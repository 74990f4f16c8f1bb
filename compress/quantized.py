"""What stands in the place of a float layer, whatever it is made of: the interface of every quantized layer."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.kernels import dispatch

if TYPE_CHECKING:
    from dcomp.calibrate.clock import StepClock

Execution = Literal["int", "fake"]

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
