"""Which precision every layer gets, and why: schemes, presets that map roles to schemes, and the sum of it all.

A decision is made from the structure alone, before a weight is read. What is not decided here stays float and is
listed with its size: nothing is left out of the count.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, Self

from torch import nn

from dcomp import UsageError
from dcomp.calibrate.cost import layer_bytes
from dcomp.calibrate.structure import LayerFacts, Role, Structure

GROUP_SIZE = 64

RangeName = Literal["mse", "minmax"]
Preset = Mapping[Role, "QScheme | None"]


class SchemeError(UsageError):
    """A scheme that has no kernel, or a pattern or preset that names nothing."""


@dataclass(frozen=True)
class QScheme:
    """How one layer is quantized.

    Attributes:
        weight_bits: 4 or 8.
        group_size: input channels that share a multiplier, for 4 bits; None for 8 bits (a scale per output channel).
        weight_range: how scales of weights are chosen.
        input_bits: 8, or 16 for an input that stays float.
        input_granularity: "tensor" has static scales, one for each step bin; "token" finds a scale for each row while
            running; None with 16 bits.
        input_range: how static scales of inputs are chosen.

    Raises:
        SchemeError: there is no layer with such a combination.
    """

    weight_bits: int
    group_size: int | None = None
    weight_range: RangeName = "mse"
    input_bits: int = 16
    input_granularity: Literal["tensor", "token"] | None = None
    input_range: RangeName = "mse"

    def __post_init__(self) -> None:
        even = type(self.group_size) is int and self.group_size > 0 and self.group_size % 2 == 0
        granularities: tuple[str | None, ...] = ("tensor", "token") if self.input_bits == 8 else (None,)
        problems = [
            text
            for text, good in (
                ("weight_bits is 4 or 8", type(self.weight_bits) is int and self.weight_bits in (4, 8)),
                ("group_size is a positive even number with 4 bits", self.weight_bits != 4 or even),
                ("group_size is None with 8 bits", self.weight_bits != 8 or self.group_size is None),
                ("input_bits is 8 or 16", type(self.input_bits) is int and self.input_bits in (8, 16)),
                (f"input_granularity is one of {granularities}", self.input_granularity in granularities),
                ("weight_range is mse or minmax", self.weight_range in ("mse", "minmax")),
                ("input_range is mse or minmax", self.input_range in ("mse", "minmax")),
            )
            if not good
        ]
        if problems:
            raise SchemeError(f"Impossible scheme {asdict(self)}", remedy=f"Change it so that {', '.join(problems)}.")

    @property
    def label(self) -> str:
        """Short name, such as "W4A8"."""
        return f"W{self.weight_bits}A{self.input_bits}"

    def __str__(self) -> str:
        weights = "8-bit weights" if self.group_size is None else f"4-bit weights in groups of {self.group_size}"
        inputs = {"tensor": "8-bit input", "token": "8-bit input per token", None: "float input"}
        return f"{weights}, {inputs[self.input_granularity]}"

    def to_dict(self) -> dict[str, Any]:
        """Return a form for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned.

        Raises:
            SchemeError: a key is unknown or missing, or the scheme is impossible.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise SchemeError(
                f"Not a scheme: {error}", remedy=f"Use the keys {', '.join(cls.__dataclass_fields__)}."
            ) from error

    @classmethod
    def from_label(cls, label: str, *, group_size: int = GROUP_SIZE) -> Self:
        """Read a label such as "W4A8"; 8-bit inputs are per token, which `choose_schemes` changes for convolutions.

        Raises:
            SchemeError: the label is not one of W4A8, W4A16, W8A8 and W8A16, in upper or lower case.
        """
        match = re.fullmatch(r"[wW]([48])[aA](8|16)", label)
        if not match:
            raise SchemeError(f"Unknown precision {label!r}", remedy="Use W4A8, W4A16, W8A8 or W8A16.")
        weight_bits, input_bits = int(match[1]), int(match[2])
        return cls(
            weight_bits,
            group_size if weight_bits == 4 else None,
            input_bits=input_bits,
            input_granularity="token" if input_bits == 8 else None,
        )


def _preset(label: str, exceptions: Mapping[str, Sequence[Role]]) -> Preset:
    schemes: dict[Role, QScheme | None] = dict.fromkeys(Role, QScheme.from_label(label))
    for other, roles in exceptions.items():
        schemes |= dict.fromkeys(roles, QScheme.from_label(other))
    return {**schemes, Role.UNUSED: None}


# Layers of time, text and conditions read one row per picture, or the same rows at every step: integers would save no
# time there, while an error of theirs reaches all pixels and adds up over a trajectory. The first and the last layer
# are small, and every error in them is seen. A shortcut adds to the stream without a norm behind it, and its input is
# two tensors with ranges of their own.
_ONCE = (Role.TIME, Role.TEXT, Role.MODULATION)
PRESETS: dict[str, Preset] = {
    "w8a8": _preset("W8A8", {"W8A16": (Role.INPUT, Role.OUTPUT, *_ONCE)}),
    "w4a8": _preset("W4A8", {"W8A16": (Role.INPUT, Role.OUTPUT, *_ONCE), "W8A8": (Role.SHORTCUT,)}),
    "w4a16": _preset("W4A16", {"W8A16": (Role.INPUT, Role.OUTPUT, Role.TIME, Role.SHORTCUT)}),
    "w8a16": _preset("W8A16", {}),
    "float": dict.fromkeys(Role),
}

_WORDS = {
    Role.UNUSED: "was not executed in the recorded call",
    Role.INPUT: "reads the latents",
    Role.OUTPUT: "makes the prediction",
    Role.TIME: "depends on the timestep alone",
    Role.TEXT: "depends on the text alone",
    Role.MODULATION: "passes timestep and conditions on",
    Role.SHORTCUT: "reads a concatenation",
    Role.CONV: "convolution",
    Role.LINEAR: "linear layer",
}


@dataclass(frozen=True)
class Decision:
    """What happens to a layer.

    Attributes:
        scheme: how it is quantized; None leaves it float.
        reason: why, in words for people.
    """

    scheme: QScheme | None
    reason: str


def preset_named(
    name: str, *, group_size: int = GROUP_SIZE, weight_range: RangeName = "mse", input_range: RangeName = "mse"
) -> Preset:
    """Return a preset, with other options in all its schemes.

    Raises:
        SchemeError: there is no such preset, or a scheme is impossible with these options.
    """
    if name not in PRESETS:
        raise SchemeError(f"Unknown preset {name!r}", remedy=f"Use one of {', '.join(PRESETS)}.")
    options: dict[str, Any] = {"weight_range": weight_range, "input_range": input_range}
    return {
        role: scheme and replace(scheme, group_size=group_size if scheme.weight_bits == 4 else None, **options)
        for role, scheme in PRESETS[name].items()
    }


def choose_schemes(
    denoiser: nn.Module,
    structure: Structure,
    preset: str | Preset,
    keep: Sequence[str] = (),
    overrides: Mapping[str, str | QScheme] | None = None,
) -> dict[str, Decision]:
    """Decide about every layer of a denoiser.

    A pattern is a glob over the layer's name or over that of a module around it (`down_blocks.0`, `*.attn2.to_k`), or
    a regular expression to search for, after `re:`.

    Args:
        denoiser: the model; nothing but its attributes and shapes is read.
        structure: what probing it found.
        preset: a name in `PRESETS` or a scheme for every role.
        keep: patterns of layers that stay float, in addition to those that must.
        overrides: pattern -> scheme, or a label as `QScheme.from_label` reads it, or "float"; the last match counts.

    Returns:
        A decision for each layer, in the order of `structure.layers`.

    Raises:
        SchemeError: a pattern matches no layer or is no regular expression, or a preset or label is unknown.
    """
    schemes = preset_named(preset) if isinstance(preset, str) else preset
    changes = {pattern: _scheme_of(value) for pattern, value in (overrides or {}).items()}
    kept, changed = _select(structure, keep), _select(structure, changes)
    fragments = getattr(denoiser, "_keep_in_fp32_modules", None) or ()
    decisions = {}
    for name, facts in structure.layers.items():
        float_reason = next((f"kept float by {pattern!r}" for pattern in kept.get(name, ())), None)
        float_reason = float_reason or _unsupported(denoiser.get_submodule(name))
        if float_reason is None and any(fragment in name.split(".") for fragment in fragments):
            float_reason = "the model asks to keep it in float32"
        if float_reason is not None:
            decisions[name] = Decision(None, float_reason)
        elif name in changed:
            pattern = changed[name][-1]
            decisions[name] = _decide(denoiser.get_submodule(name), facts, changes[pattern], f"set by {pattern!r}")
        else:
            decisions[name] = _by_role(denoiser.get_submodule(name), facts, schemes)
    return decisions


def _scheme_of(value: str | QScheme) -> QScheme | None:
    if isinstance(value, QScheme):
        return value
    return None if value.lower() == "float" else QScheme.from_label(value)


def _by_role(layer: nn.Module, facts: LayerFacts, schemes: Preset) -> Decision:
    role, words = facts.role, _WORDS[facts.role]
    if role is Role.SHORTCUT and facts.kind == "linear":
        # Scales per token and per group fit each part by themselves, if no group reaches over a boundary.
        usual = schemes[Role.LINEAR]
        if usual and usual.group_size and all(boundary % usual.group_size == 0 for boundary in facts.boundaries):
            role, words = Role.LINEAR, f"{words} whose parts begin with a group"
    if schemes[role] is None and role is not Role.UNUSED:
        words = f"{words}: float by preset"
    return _decide(layer, facts, schemes[role], words)


def _decide(layer: nn.Module, facts: LayerFacts, scheme: QScheme | None, words: str) -> Decision:
    if scheme is None:
        return Decision(None, words)
    if scheme.input_bits == 8:
        scheme = replace(scheme, input_granularity="tensor" if facts.kind == "conv2d" else "token")
    channels = layer.in_features if isinstance(layer, nn.Linear) else getattr(layer, "in_channels", 0)
    if scheme.group_size is not None and channels < scheme.group_size:
        words = f"{words} with {channels} input channels, less than a group of {scheme.group_size}"
        scheme = replace(scheme, weight_bits=8, group_size=None)
    return Decision(scheme, f"{words}: {scheme}")


def _unsupported(layer: nn.Module) -> str | None:
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.groups != 1:
        return f"convolution in {layer.groups} groups: no fast integer kernel"
    if layer.padding_mode != "zeros":
        return f"convolution with padding mode {layer.padding_mode!r}: integer kernels pad with zeros"
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same" and any(span % 2 for span in spans):
        return "convolution that pads one side more than the other: no integer kernel"
    return None


def _select(structure: Structure, patterns: Sequence[str] | Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the patterns that match each layer; every pattern must match one."""
    selected: dict[str, list[str]] = {}
    unknown = []
    for pattern in patterns:
        names = [name for name in structure.layers if _matches(pattern, name)]
        for name in names:
            selected.setdefault(name, []).append(pattern)
        if not names:
            unknown.append(pattern)
    if unknown:
        parts = [name.split(".") for name in structure.layers]
        known = list(dict.fromkeys(".".join(p[:i]) for p in parts for i in range(len(p), 0, -1)))
        near = dict.fromkeys(name for pattern in unknown for name in get_close_matches(pattern, known, 3, 0.4))
        raise SchemeError(
            f"No layer is called {' or '.join(map(repr, unknown))}",
            remedy=f"Did you mean {', '.join(near)}?"
            if near
            else "List the layers with `dcomp quantize MODEL --dry-run`.",
        )
    return selected


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    try:
        return re.search(pattern[3:], name) is not None
    except re.error as error:
        raise SchemeError(
            f"{pattern!r} is not a regular expression: {error}", remedy="Correct it, or use a glob without `re:`."
        ) from error


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
