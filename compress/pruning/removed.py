"""What stands in the place of a part that was cut out: the residual stream, and a constant of the branch beside it.

Without heads, hidden channels or convolutions a branch returns the bias of its last layer. That constant stays a
parameter, so that the mean of what was lost can go into it, and recovery can learn it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.compress.pruning.units import PartKind, is_joint, last_layers


class Constant(nn.Module):
    """In the place of an attention or a feed-forward.

    Attributes:
        bias: `[C]`, its output at every position.
        added_bias: `[C]`, likewise of the second stream of a joint attention; None where nothing reads it.
        joint: whether the branch returns both streams.
        scale: what the sum with a residual stream of its own is multiplied by; None: it has no such stream.
    """

    def __init__(
        self, bias: Tensor, added_bias: Tensor | None = None, joint: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        self.bias = _parameter(bias)
        self.added_bias = None if added_bias is None else _parameter(added_bias)
        self.joint, self.scale = joint, scale

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Return what the branch returns for inputs of these shapes, `[N, ..., C]`, or `[N, C, H, W]` with a stream."""
        if self.scale is not None:
            bias = self.bias[:, None, None] if hidden_states.dim() == 4 else self.bias
            return (hidden_states + bias) * self.scale
        constant = _spread(self.bias, hidden_states)
        if not self.joint or encoder_hidden_states is None:
            return constant
        if self.added_bias is None:
            return constant, encoder_hidden_states
        return constant, _spread(self.added_bias, encoder_hidden_states)


class Shortcut(nn.Module):
    """In the place of a residual block of convolutions.

    Attributes:
        conv_shortcut: changes the number of channels; None where it stays.
        bias: `[C]`, added to the stream.
        resize: what the block does to the size of its pictures; None if nothing.
        scale: what the sum is multiplied by.
    """

    def __init__(
        self, shortcut: nn.Module | None, bias: Tensor, resize: Callable[[Tensor], Tensor] | None, scale: float
    ) -> None:
        super().__init__()
        self.conv_shortcut = shortcut
        self.bias = _parameter(bias)
        self.resize, self.scale = resize, scale

    def forward(self, input_tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the stream behind the block, `[N, C, H, W]`."""
        x = input_tensor if self.resize is None else self.resize(input_tensor)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return (x + self.bias[:, None, None]) * self.scale


class Passed(nn.Module):
    """In the place of a transformer over the pixels of a U-Net.

    Attributes:
        bias: `[C]`, added to the stream.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = _parameter(bias)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        """Return the stream, `[N, C, H, W]`, as the one member of a tuple."""
        return (hidden_states + self.bias[:, None, None],)


def stand_in(module: Any, kind: PartKind) -> nn.Module:
    """Return what takes the place of a part that is no block; it shares what it keeps with the module."""
    first, *more = (_bias_of(module.get_submodule(name)) for name in last_layers(module, kind))
    if kind == "attention":
        scale = 1 / module.rescale_output_factor if getattr(module, "residual_connection", False) else None
        return Constant(first, more[0] if more else None, is_joint(module), scale)
    if kind == "feed_forward":
        return Constant(first)
    if kind == "resnet":
        resize = getattr(module, "upsample", None) or getattr(module, "downsample", None)
        return Shortcut(module.conv_shortcut, first, resize, 1 / module.output_scale_factor)
    return Passed(first)


def _bias_of(layer: Any) -> Tensor:
    found: Tensor | None = layer.bias
    return (
        found
        if found is not None
        else torch.zeros(len(layer.weight), dtype=layer.weight.dtype, device=layer.weight.device)
    )


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=values.requires_grad)


def _spread(bias: Tensor, like: Tensor) -> Tensor:
    return bias.to(like.dtype).expand(*like.shape[:-1], len(bias))
