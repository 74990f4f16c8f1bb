import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from dcomp.calibrate.structure import LayerFacts, Role, Structure, probe_structure
from dcomp.compress.coverage import Coverage, FloatPart, coverage
from dcomp.compress.policy import PRESETS, Decision, choose_schemes
from dcomp.compress.scheme import QScheme, SchemeError
from tests.support.schemes import schemes
from tests.support.tiny import NAMES, denoiser_inputs, tiny_denoiser


@settings(deadline=None)
@given(schemes())
def test_schemes_survive_json(scheme: QScheme) -> None:
    data = json.loads(json.dumps(scheme.to_dict()))
    assert data == scheme.to_dict()
    assert QScheme.from_dict(data) == scheme
    assert hash(QScheme.from_dict(data)) == hash(scheme)
    assert QScheme.from_label(scheme.label).label == scheme.label
    changes = {name: data[name] for name, default in DEFAULTS.items() if data[name] != default}
    assert QScheme.from_dict({key: data[key] for key in OLD_KEYS} | changes) == scheme


OLD_KEYS = ("weight_bits", "group_size", "weight_range", "input_bits", "input_granularity", "input_range")
DEFAULTS = {
    "input_group": None, "boundaries": [], "smooth": False, "rotate": False, "rank": 0, "rounding": "nearest",
}  # fmt: skip


def test_schemes_of_the_first_version_are_read() -> None:
    old = {
        "weight_bits": 4, "group_size": 64, "weight_range": "mse", "input_bits": 8, "input_granularity": "tensor",
        "input_range": "minmax",
    }  # fmt: skip
    assert QScheme.from_dict(old).to_dict() == old | DEFAULTS
    assert set(QScheme.__dataclass_fields__) == {*OLD_KEYS, *DEFAULTS}


def test_people_read_what_is_special() -> None:
    assert str(QScheme(8)) == "8-bit weights, float input"
    assert str(QScheme(4, 64, input_bits=8, input_granularity="sample")) == (
        "4-bit weights in groups of 64, 8-bit input per sample"
    )
    full = QScheme(
        4, 64, input_bits=4, input_granularity="token", input_group=32, boundaries=(128, 192), smooth=True, rotate=True,
        rank=16,
    )  # fmt: skip
    assert str(full) == (
        "4-bit weights in groups of 64, 4-bit input per token in groups of 32, split at 128, 192, smoothed, rotated, "
        "with a branch of rank 16"
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"weight_bits": 3},
        {"weight_bits": "8"},
        {"weight_bits": 8.0},
        {"weight_bits": True},
        {"weight_bits": 4},
        {"weight_bits": 4, "group_size": 0},
        {"weight_bits": 4, "group_size": 7},
        {"weight_bits": 4, "group_size": -64},
        {"weight_bits": 4, "group_size": "64"},
        {"weight_bits": 8, "group_size": 64},
        {"weight_bits": 8, "input_bits": 4},
        {"weight_bits": 8, "input_bits": 4, "input_granularity": "token"},
        {"weight_bits": 8, "input_bits": 4, "input_granularity": "token", "input_group": 7},
        {"weight_bits": 8, "input_bits": 4, "input_granularity": "token", "input_group": True},
        {"weight_bits": 8, "input_bits": 4, "input_granularity": "tensor", "input_group": 64},
        {"weight_bits": 8, "input_bits": 8, "input_granularity": "token", "input_group": 64},
        {"weight_bits": 8, "input_group": 64},
        {"weight_bits": 8, "input_bits": 8},
        {"weight_bits": 8, "input_bits": [8]},
        {"weight_bits": 8, "boundaries": [0]},
        {"weight_bits": 8, "boundaries": [8, 8]},
        {"weight_bits": 8, "boundaries": [16, 8]},
        {"weight_bits": 8, "boundaries": [8.0]},
        {"weight_bits": 8, "boundaries": [True]},
        {"weight_bits": 8, "boundaries": [[8]]},
        {"weight_bits": 8, "boundaries": 8},
        {"weight_bits": 8, "boundaries": None},
        {"weight_bits": 8, "boundaries": "8"},
        {"weight_bits": 8, "boundaries": list(range(1, 65))},
        {"weight_bits": 8, "smooth": 1},
        {"weight_bits": 8, "rotate": "yes"},
        {"weight_bits": 8, "rank": -1},
        {"weight_bits": 8, "rank": True},
        {"weight_bits": 8, "rank": 1.0},
        {"weight_bits": 8, "rounding": "up"},
        {"weight_bits": 8, "rounding": ["gptq"]},
        {"weight_bits": 8, "input_bits": 16, "input_granularity": "token"},
        {"weight_bits": 8, "input_bits": 8, "input_granularity": "channel"},
        {"weight_bits": 8, "weight_range": "max"},
        {"weight_bits": 8, "input_range": None},
        {"weight_bits": 8, "bits": 8},
        {"weight_bits": []},
    ],
)
def test_impossible_schemes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        QScheme.from_dict(values)


def test_all_problems_of_a_scheme_are_named_at_once() -> None:
    with pytest.raises(SchemeError, match=r"weight_bits is 4 or 8, input_bits is 4, 8 or 16"):
        QScheme(5, input_bits=7)


@pytest.mark.parametrize("label", ["W4A8", "w8a16", "W8A8", "w4a16", "W4A4", "w8a4"])
def test_labels_are_read(label: str) -> None:
    assert QScheme.from_label(label).label == label.upper()


@pytest.mark.parametrize("label", ["", "W4", "W2A8", "W4A6", "W4A8x", "8"])
def test_unknown_labels_are_refused(label: str) -> None:
    with pytest.raises(SchemeError, match="Unknown precision"):
        QScheme.from_label(label)


def test_a_label_of_four_bits_groups_both_sides() -> None:
    assert QScheme.from_label("W4A4", group_size=32) == QScheme(
        4, 32, input_bits=4, input_granularity="token", input_group=32
    )


def labels(preset: str) -> dict[str, str]:
    return {role.name: scheme.label if scheme else "float" for role, scheme in PRESETS[preset].items()}


def test_presets_are_the_published_tables() -> None:
    once = {"TIME": "W8A16", "TEXT": "W8A16", "MODULATION": "W8A16"}
    ends = {"INPUT": "W8A16", "OUTPUT": "W8A16", "UNUSED": "float"}
    assert labels("w8a8") == {**ends, **once, "SHORTCUT": "W8A8", "CONV": "W8A8", "LINEAR": "W8A8"}
    assert labels("w4a8") == {**ends, **once, "SHORTCUT": "W8A8", "CONV": "W4A8", "LINEAR": "W4A8"}
    assert labels("w4a16") == {
        **ends, "TIME": "W8A16", "TEXT": "W4A16", "MODULATION": "W4A16", "SHORTCUT": "W8A16", "CONV": "W4A16",
        "LINEAR": "W4A16",
    }  # fmt: skip
    assert set(labels("w8a16").values()) == {"W8A16", "float"}
    assert set(labels("float").values()) == {"float"}
    assert all(set(preset) == set(Role) for preset in PRESETS.values())


def test_options_of_a_preset_reach_all_its_schemes() -> None:
    preset = preset_named("w4a8", group_size=32, weight_range="minmax", input_range="minmax")
    schemes = [scheme for scheme in preset.values() if scheme]
    assert {s.group_size for s in schemes} == {None, 32}
    assert {(s.weight_range, s.input_range) for s in schemes} == {("minmax", "minmax")}
    assert preset_named("w4a8") == PRESETS["w4a8"]
    with pytest.raises(SchemeError, match="w4a8"):
        preset_named("w2a2")


class Parts(nn.Module):
    """One layer of every sort."""

    _keep_in_fp32_modules = ("fragile",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3))
        self.conv, self.linear = nn.Conv2d(64, 64, 3), nn.Linear(64, 64)
        self.narrow = nn.Linear(48, 1000)
        self.narrow_conv = nn.Conv2d(63, 8, 1)
        self.wide = nn.Linear(65, 8)
        self.grouped = nn.Conv2d(128, 128, 3, groups=128)
        self.circular = nn.Conv2d(64, 64, 3, padding_mode="circular")
        self.uneven = nn.Conv2d(64, 64, 2, padding="same")
        self.even = nn.Conv2d(64, 64, 3, padding="same")
        self.fragile = nn.ModuleDict({"linear": nn.Linear(64, 64)})
        self.joined = nn.ModuleDict({k: nn.Linear(192, 8) for k in ("aligned", "astray", "minor")})
        self.shortcut = nn.Conv2d(128, 8, 1)
        self.idle = nn.Linear(64, 64)
        self.norm = nn.GroupNorm(2, 64)
        self.embedding = nn.Embedding(1000, 64)


def structure_of(model: nn.Module, **roles: tuple[Role, tuple[int, ...]]) -> Structure:
    facts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
            usual = Role.CONV if kind == "conv2d" else Role.LINEAR
            role, boundaries = roles.get(name.replace(".", "_"), (usual, ()))
            facts[name] = LayerFacts(name, kind, role, frozenset(), boundaries)
    return Structure(facts, (), ())


PARTS = Parts()
STRUCTURE = structure_of(
    PARTS,
    joined_aligned=(Role.SHORTCUT, (64, 128)),
    joined_astray=(Role.SHORTCUT, (72,)),
    joined_minor=(Role.SHORTCUT, (32,)),
    shortcut=(Role.SHORTCUT, (64,)),
    idle=(Role.UNUSED, ()),
)


def chosen(preset: str, **options: Any) -> dict[str, tuple[str | None, str]]:
    decisions = choose_schemes(PARTS, STRUCTURE, preset, **options)
    assert list(decisions) == list(STRUCTURE.layers)
    return {name: (d.scheme.label if d.scheme else None, d.reason) for name, d in decisions.items()}


def test_every_decision_comes_with_its_reason() -> None:
    assert chosen("w4a8") == {
        "conv": ("W4A8", "convolution: 4-bit weights in groups of 64, 8-bit input"),
        "linear": ("W4A8", "linear layer: 4-bit weights in groups of 64, 8-bit input per token"),
        "narrow": (
            "W8A8",
            "linear layer with 48 input channels, less than a group of 64: 8-bit weights, 8-bit input per token",
        ),
        "narrow_conv": (
            "W8A8",
            "convolution with 63 input channels, less than a group of 64: 8-bit weights, 8-bit input",
        ),
        "wide": ("W4A8", "linear layer: 4-bit weights in groups of 64, 8-bit input per token"),
        "grouped": (None, "convolution in 128 groups: no fast integer kernel"),
        "circular": (None, "convolution with padding mode 'circular': integer kernels pad with zeros"),
        "uneven": (None, "convolution that pads one side more than the other: no integer kernel"),
        "even": ("W4A8", "convolution: 4-bit weights in groups of 64, 8-bit input"),
        "fragile.linear": (None, "the model asks to keep it in float32"),
        "joined.aligned": (
            "W4A8",
            "reads a concatenation whose parts begin with a group: "
            "4-bit weights in groups of 64, 8-bit input per token",
        ),
        "joined.astray": ("W8A8", "reads a concatenation: 8-bit weights, 8-bit input per token"),
        "joined.minor": ("W8A8", "reads a concatenation: 8-bit weights, 8-bit input per token"),
        "shortcut": ("W8A8", "reads a concatenation: 8-bit weights, 8-bit input"),
        "idle": (None, "was not executed in the recorded call"),
    }


def test_float_preset_leaves_every_layer_as_it_is() -> None:
    decisions = chosen("float")
    assert {label for label, _ in decisions.values()} == {None}
    assert decisions["conv"][1] == "convolution: float by preset"


def test_granularity_follows_the_kind_of_layer() -> None:
    for preset in ("w8a8", "w4a8"):
        for name, decision in choose_schemes(PARTS, STRUCTURE, preset).items():
            if decision.scheme and decision.scheme.input_bits == 8:
                is_conv = STRUCTURE.layers[name].kind == "conv2d"
                assert decision.scheme.input_granularity == ("tensor" if is_conv else "token")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("conv", {"conv"}),
        ("joined", {"joined.aligned", "joined.astray", "joined.minor"}),
        ("joined.a*", {"joined.aligned", "joined.astray"}),
        ("*a*ed", {"joined.aligned"}),
        ("re:^(linear|wide)$", {"linear", "wide"}),
        ("re:or", {"joined.minor", "shortcut"}),
    ],
)
def test_keep_adds_to_what_stays_float(pattern: str, names: set[str]) -> None:
    plain, kept = chosen("w4a8"), chosen("w4a8", keep=(pattern,))
    assert {name for name in plain if plain[name] != kept[name]} == names
    for name in names:
        assert kept[name] == (None, f"kept float by {pattern!r}")


def test_last_override_counts_and_keep_is_stronger() -> None:
    scheme = QScheme(4, 32, weight_range="minmax")
    decisions = choose_schemes(
        PARTS,
        STRUCTURE,
        "w8a8",
        keep=["joined.minor"],
        overrides={"joined": "w4a16", "joined.astray": scheme, "linear": "float", "conv": "W4A8", "idle": "W8A8"},
    )
    assert decisions["joined.aligned"] == Decision(
        QScheme(4, 64), "set by 'joined': 4-bit weights in groups of 64, float input"
    )
    assert decisions["joined.astray"].scheme == scheme
    assert decisions["joined.minor"].scheme is None
    assert decisions["linear"] == Decision(None, "set by 'linear'")
    assert decisions["conv"].scheme == QScheme(4, 64, input_bits=8, input_granularity="tensor")
    assert decisions["idle"].scheme == QScheme(8, input_bits=8, input_granularity="token")


def test_overrides_reach_four_bits_and_keep_a_dynamic_range() -> None:
    sample = QScheme(8, input_bits=8, input_granularity="sample", smooth=True, rank=8)
    decisions = choose_schemes(PARTS, STRUCTURE, "w8a8", overrides={"*": "W4A4", "shortcut": sample, "wide": sample})
    four = QScheme(4, 64, input_bits=4, input_granularity="token", input_group=64)
    assert decisions["linear"].scheme == four
    assert decisions["conv"].scheme == replace(four, input_granularity="sample")
    assert decisions["narrow"].scheme == replace(four, weight_bits=8, group_size=None)
    assert decisions["shortcut"].scheme == sample
    assert decisions["wide"].scheme == replace(sample, input_granularity="token")


def test_an_override_cannot_ask_for_what_no_kernel_runs() -> None:
    assert chosen("w8a8", overrides={"*": "W8A8"})["grouped"][0] is None


@pytest.mark.parametrize("option", ["keep", "overrides"])
def test_patterns_that_match_nothing_are_refused_with_the_nearest_names(option: str) -> None:
    patterns = ["conv", "joined.alined", "shortcuts"]
    value = patterns if option == "keep" else dict.fromkeys(patterns, "W8A8")
    with pytest.raises(SchemeError, match=r"'joined.alined' or 'shortcuts'.*joined\.aligned.*shortcut"):
        choose_schemes(PARTS, STRUCTURE, "w4a8", **{option: value})


@pytest.mark.parametrize("pattern", ["re:(", "re:*x"])
def test_broken_regular_expressions_are_refused(pattern: str) -> None:
    with pytest.raises(SchemeError, match="not a regular expression"):
        choose_schemes(PARTS, STRUCTURE, "w4a8", keep=[pattern])


def test_coverage_counts_every_parameter_once_and_lists_what_is_float() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(5))
    model.big, model.small = nn.Linear(64, 32), nn.Linear(64, 4, bias=False)
    model.norm = nn.LayerNorm(64).half()
    model.copy = nn.Linear(64, 32)
    model.copy.weight = model.big.weight
    decisions = {
        "big": Decision(None, "kept"),
        "small": Decision(QScheme(4, 64), ""),
        "copy": Decision(None, "also kept"),
    }
    parameters = 5 + (64 * 32 + 32) + 64 * 4 + 128 + 32
    after = 4 * 5 + 4 * (64 * 32 + 32) + (128 + 4 * 4 + 4) + 2 * 128 + 4 * 32
    assert coverage(model, decisions) == Coverage(
        parameters,
        4 * parameters,
        after,
        after / (4 * parameters),
        8 * after / parameters,
        (
            FloatPart("big", "Linear", 64 * 32 + 32, 4 * (64 * 32 + 32), "kept"),
            FloatPart("norm", "LayerNorm", 128, 256, "not a linear layer or convolution"),
            FloatPart("copy", "Linear", 32, 128, "also kept"),
            FloatPart("", "Module", 5, 20, "not a linear layer or convolution"),
        ),
    )


def test_static_tables_are_counted() -> None:
    decisions = choose_schemes(PARTS, STRUCTURE, "w8a8")
    static = sum(d.scheme is not None and d.scheme.input_granularity == "tensor" for d in decisions.values())
    grown = coverage(PARTS, decisions, 21).bytes_after - coverage(PARTS, decisions, 1).bytes_after
    assert grown == 20 * 5 * static > 0


@pytest.mark.parametrize("name", NAMES)
def test_presets_shrink_every_architecture_in_their_order(name: str) -> None:
    denoiser = tiny_denoiser(name)
    args, kwargs = denoiser_inputs(name)
    structure = probe_structure(denoiser, args, kwargs)
    sizes = {preset: coverage(denoiser, choose_schemes(denoiser, structure, preset)) for preset in PRESETS}
    total = sum(t.numel() for t in denoiser.state_dict().values())
    assert all(size.parameters == total for size in sizes.values())
    assert sizes["float"].ratio == 1
    assert sizes["w4a16"].ratio < sizes["w8a16"].ratio <= sizes["w8a8"].ratio < 0.6  # DiT: embeddings of 1000 classes
    assert sizes["w4a8"].ratio < sizes["w8a8"].ratio
    undecided = {part.name for part in sizes["w4a8"].left_in_float} & set(structure.layers)
    assert undecided == set()


def test_a_preset_may_be_given_as_a_table() -> None:
    table = dict(PRESETS["w8a16"])
    table[Role.CONV] = replace(QScheme.from_label("W4A16"), group_size=32)
    decisions = choose_schemes(PARTS, STRUCTURE, table)
    assert decisions["conv"].scheme == QScheme(4, 32)
    assert decisions["linear"].scheme == QScheme(8)
