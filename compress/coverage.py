"""What decisions make of a denoiser's size: all of its parameters are counted, and what stays float is listed."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dcomp.calibrate.cost import layer_bytes
from dcomp.compress.policy import Decision


@dataclass(frozen=True)
class FloatPart:
    """A module whose own parameters stay float.

    Attributes:
        name: path in the denoiser; empty for the denoiser itself.
        kind: its class.
        parameters: how many of its own it has.
        nbytes: their size.
        reason: why they stay float.
    """

    name: str
    kind: str
    parameters: int
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Size of a denoiser before and after, over all of its parameters.

    Attributes:
        parameters: number of parameters, those that several modules share counted once.
        bytes_before: 4 bytes for each, in whatever dtype they are now.
        bytes_after: size of codes, scales, tables and what stays float.
        ratio: `bytes_after / bytes_before`.
        bits_per_param: average over all parameters, with scales and tables counted in.
        left_in_float: every module with parameters that stay float, largest first.
    """

    parameters: int
    bytes_before: int
    bytes_after: int
    ratio: float
    bits_per_param: float
    left_in_float: tuple[FloatPart, ...]


def coverage(denoiser: nn.Module, decisions: Mapping[str, Decision], step_bins: int = 1) -> Coverage:
    """Add up what the decisions make of a denoiser.

    Args:
        denoiser: the float model, on any device, also meta.
        decisions: from `choose_schemes`.
        step_bins: entries of each table of input scales.
    """
    seen: set[int] = set()
    parameters = after = 0
    left = []
    for name, module in denoiser.named_modules():
        # Stored buffers, such as tables of positions, are parameters for whoever keeps the file.
        stored = [b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set]
        own = [t for t in (*module.parameters(recurse=False), *stored) if t is not None and id(t) not in seen]
        seen |= {id(t) for t in own}
        count, size = sum(t.numel() for t in own), sum(t.nbytes for t in own)
        parameters += count
        decision = decisions.get(name, Decision(None, "not a linear layer or convolution"))
        if decision.scheme is not None:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            after += layer_bytes(module, decision.scheme, step_bins)
        elif own:
            after += size
            left.append(FloatPart(name, type(module).__name__, count, size, decision.reason))
    left.sort(key=lambda part: -part.nbytes)
    before = 4 * parameters
    ratio = after / max(1, before)
    return Coverage(parameters, before, after, ratio, 32 * ratio, tuple(left))
