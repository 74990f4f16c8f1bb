"""Which precision every layer gets, and why: presets that map roles to schemes, and the patterns that overrule them.

A decision is made from the structure alone, before a weight is read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from dcomp.calibrate.structure import LayerFacts, Role, Structure
from dcomp.compress.geometry import is_pointwise
from dcomp.compress.scheme import (
    DIRECTIONS,
    GROUP_SIZE,
    INPUT_GROUP,
    Granularity,
    QScheme,
    RangeName,
    Rounding,
    SchemeError,
)
from dcomp.compress.scheme_check import check_schemes
from dcomp.kernels import qparams

Preset = Mapping[Role, "QScheme | None"]


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
    "w4a4": _preset("W4A4", {"W8A16": (Role.INPUT, Role.OUTPUT, *_ONCE), "W8A8": (Role.SHORTCUT,)}),
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
        cause: what decided, in a few words.
        findings: what turned out while it was carried out, likewise.
    """

    scheme: QScheme | None
    cause: str
    findings: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """What is done and why, as one sentence for people, without a full stop."""
        done = self.cause if self.scheme is None else f"{self.cause}: {self.scheme}"
        return ", ".join((done, *self.findings))


@dataclass(frozen=True)
class Treatment:
    """How layers are quantized, whatever their precision; what a layer cannot have is left out for it.

    Attributes:
        group_size: of 4-bit weights.
        input_group: channels of a 4-bit input that share a multiplier; 0: all of a row or pixel.
        weight_range, input_range: how scales of weights, and static scales of inputs, are chosen.
        rounding: how codes of weights are chosen.
        inputs: 8-bit ranges of convolutions: found while running, or static tables. Others are always dynamic.
        split: which layers that read a concatenation get quantizers for each part: those that read it with no norm or
            activation between, all, or none.
        smooth: whether smoothing factors are looked for; None: for layers with 4-bit inputs.
        rotate: likewise whether a rotation is tried; None: for layers with 4-bit inputs.
        directions: of inputs that are taken out before rounding, for layers with 4-bit weights or inputs; None: some
            for layers with 4-bit inputs.
        rank: for layers with 4-bit inputs.
    """

    group_size: int = GROUP_SIZE
    input_group: int = INPUT_GROUP
    weight_range: RangeName = "mse"
    input_range: RangeName = "mse"
    rounding: Rounding = "nearest"
    inputs: Literal["dynamic", "static"] = "dynamic"
    split: Literal["direct", "all", "none"] = "direct"
    smooth: bool | None = None
    rotate: bool | None = None
    directions: int | None = None
    rank: int = 0


def choose_schemes(
    denoiser: nn.Module,
    structure: Structure,
    preset: str | Preset,
    keep: Sequence[str] = (),
    overrides: Mapping[str, str | QScheme] | None = None,
    treatment: Treatment | None = None,
) -> dict[str, Decision]:
    """Decide about every layer of a denoiser.

    A pattern is a glob over the layer's name or over that of a module around it (`down_blocks.0`, `*.attn2.to_k`), or
    a regular expression to search for, after `re:`.

    Args:
        denoiser: the model; nothing but its attributes and shapes is read.
        structure: what probing it found.
        preset: a name in `PRESETS` or a scheme for every role.
        keep: patterns of layers that stay float, in addition to those that must.
        overrides: pattern -> scheme, or a label as `QScheme.from_label` reads it, or "float"; the last match counts. A
            `QScheme` is taken as it is.
        treatment: how all layers are quantized, those given as a `QScheme` excepted.

    Returns:
        A decision for each layer, in the order of `structure.layers`.

    Raises:
        SchemeError: a pattern matches no layer or is no regular expression, a preset or label is unknown, or layers
            cannot have what an override asks for: a `QScheme`, or a label for that very name. All of them are listed.
    """
    treatment = treatment or Treatment()
    schemes = _preset_named(preset) if isinstance(preset, str) else preset
    overrides = overrides or {}
    changes = {pattern: _scheme_of(value) for pattern, value in overrides.items()}
    kept, changed = _select(structure, keep), _select(structure, changes)
    refused: dict[str, SchemeError] = {}
    fragments = getattr(denoiser, "_keep_in_fp32_modules", None) or ()
    decisions = {}
    for name, facts in structure.layers.items():
        float_reason = next((f"kept float by {pattern!r}" for pattern in kept.get(name, ())), None)
        float_reason = float_reason or _unsupported(denoiser.get_submodule(name))
        if float_reason is None and any(fragment in name.split(".") for fragment in fragments):
            float_reason = "the model asks to keep it in float32"
        if float_reason is not None:
            decisions[name] = Decision(None, float_reason)
            if name not in kept and changed.get(name, [""])[-1] == name and changes[name] is not None:
                refused[name] = SchemeError(
                    f"{overrides[name]} is asked for by name, but it stays float: {float_reason}",
                    remedy="Take layers that must stay float out of the overrides.",
                )
        elif name in changed:
            pattern = changed[name][-1]
            scheme, words = changes[pattern], f"set by {pattern!r}"
            if isinstance(overrides[pattern], QScheme):
                decisions[name] = Decision(scheme, words)
            else:
                decisions[name] = _decide(denoiser.get_submodule(name), facts, scheme, words, treatment)
                found = decisions[name].scheme
                if pattern == name and scheme and found and found.weight_bits != scheme.weight_bits:
                    refused[name] = SchemeError(
                        f"{overrides[name]} is asked for by name, but 4-bit weights need groups of "
                        f"{treatment.group_size} input channels, and the layer or a part of it has fewer",
                        remedy="Ask for 8-bit weights where there are fewer input channels than in a group.",
                    )
        else:
            decisions[name] = _by_role(denoiser.get_submodule(name), facts, schemes, treatment)
    check_schemes(denoiser, {name: d.scheme for name, d in decisions.items() if d.scheme is not None}, refused)
    return decisions


def _preset_named(name: str) -> Preset:
    if name not in PRESETS:
        raise SchemeError(f"Unknown preset {name!r}", remedy=f"Use one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def _scheme_of(value: str | QScheme) -> QScheme | None:
    if isinstance(value, QScheme):
        return value
    return None if value.lower() == "float" else QScheme.from_label(value)


def _by_role(layer: nn.Module, facts: LayerFacts, schemes: Preset, treatment: Treatment) -> Decision:
    role, words = facts.role, _WORDS[facts.role]
    if role is Role.SHORTCUT and facts.kind == "linear":
        # Scales per token and per group fit each part by themselves, if no group reaches over a boundary.
        usual = schemes[Role.LINEAR]
        if usual and usual.group_size and all(boundary % treatment.group_size == 0 for boundary in facts.boundaries):
            role, words = Role.LINEAR, f"{words} whose parts begin with a group"
    scheme = schemes[role]
    if scheme is None and role is not Role.UNUSED:
        words = f"{words}: float by preset"
    if scheme and scheme.input_bits == 4 and isinstance(layer, nn.Conv2d) and is_pointwise(layer):
        # It leads into or out of a whole block: few products, while its error reaches all that follows.
        scheme, words = replace(scheme, input_bits=8, input_group=None), f"{words} of single pixels"
    return _decide(layer, facts, scheme, words, treatment)


def _decide(layer: nn.Module, facts: LayerFacts, scheme: QScheme | None, words: str, treatment: Treatment) -> Decision:
    if scheme is None:
        return Decision(None, words)
    four = scheme.input_bits == 4
    scheme = replace(
        scheme,
        group_size=treatment.group_size if scheme.weight_bits == 4 else None,
        weight_range=treatment.weight_range,
        input_range=treatment.input_range,
        input_granularity=None if scheme.input_bits == 16 else _granularity(layer, scheme, treatment),
        input_group=(treatment.input_group or _inputs(layer) + _inputs(layer) % 2) if four else None,
        boundaries=_boundaries(facts, treatment),
        smooth=scheme.input_bits < 16 and (four if treatment.smooth is None else treatment.smooth),
        rotate=four and treatment.rotate is not False,
        rounding=treatment.rounding,
    )
    parts = [b - a for a, b in pairwise((0, *scheme.boundaries, _inputs(layer)))]
    smallest = min(parts)
    if four:
        turns = any(qparams.rotation_block(part) > 1 for part in parts)
        scheme = replace(
            scheme,
            rotate=scheme.rotate and turns,
            rank=min(treatment.rank, smallest, _outputs(layer)),
        )
    if scheme.group_size is not None and smallest < scheme.group_size:
        words = f"{words} with {smallest} input channels, less than a group of {scheme.group_size}"
        scheme = replace(scheme, weight_bits=8, group_size=None)
    return Decision(replace(scheme, directions=_directions(scheme, smallest, treatment)), words)


def _directions(scheme: QScheme, channels: int, treatment: Treatment) -> int:
    if treatment.directions is None:
        # What they cost grows as channels get fewer.
        return min(DIRECTIONS, channels // 8) if scheme.input_bits == 4 else 0
    return min(treatment.directions, channels) if 4 in (scheme.weight_bits, scheme.input_bits) else 0


def _granularity(layer: nn.Module, scheme: QScheme, treatment: Treatment) -> Granularity:
    if not isinstance(layer, nn.Conv2d):
        return "token"
    if scheme.input_bits == 8 and treatment.inputs == "static":
        return "tensor"
    return "token" if is_pointwise(layer) else "sample"


def _inputs(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else getattr(layer, "in_channels", 0)


def _boundaries(facts: LayerFacts, treatment: Treatment) -> tuple[int, ...]:
    wanted = treatment.split == "all" or (treatment.split == "direct" and facts.role is Role.SHORTCUT)
    return facts.boundaries if wanted else ()


def _outputs(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return len(weight)


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
