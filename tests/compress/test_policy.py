from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dcomp.calibrate.structure import Role
from dcomp.compress.geometry import is_pointwise
from dcomp.compress.policy import PRESETS, Decision, Treatment, choose_schemes
from dcomp.compress.scheme import QScheme, SchemeError
from tests.support.parts import PARTS, STRUCTURE


def labels(preset: str) -> dict[str, str]:
    return {role.name: scheme.label if scheme else "float" for role, scheme in PRESETS[preset].items()}


def test_presets_are_the_published_tables() -> None:
    once = {"TIME": "W8A16", "TEXT": "W8A16", "MODULATION": "W8A16"}
    ends = {"INPUT": "W8A16", "OUTPUT": "W8A16", "UNUSED": "float"}
    assert labels("w8a8") == {**ends, **once, "SHORTCUT": "W8A8", "CONV": "W8A8", "LINEAR": "W8A8"}
    assert labels("w4a8") == {**ends, **once, "SHORTCUT": "W8A8", "CONV": "W4A8", "LINEAR": "W4A8"}
    assert labels("w4a4") == {**ends, **once, "SHORTCUT": "W8A8", "CONV": "W4A4", "LINEAR": "W4A4"}
    assert labels("w4a16") == {
        **ends, "TIME": "W8A16", "TEXT": "W4A16", "MODULATION": "W4A16", "SHORTCUT": "W8A16", "CONV": "W4A16",
        "LINEAR": "W4A16",
    }  # fmt: skip
    assert set(labels("w8a16").values()) == {"W8A16", "float"}
    assert set(labels("float").values()) == {"float"}
    assert all(set(preset) == set(Role) for preset in PRESETS.values())


def chosen(preset: str, **options: Any) -> dict[str, tuple[str | None, str]]:
    decisions = choose_schemes(PARTS, STRUCTURE, preset, **options)
    assert list(decisions) == list(STRUCTURE.layers)
    return {name: (d.scheme.label if d.scheme else None, d.reason) for name, d in decisions.items()}


def test_every_decision_comes_with_its_reason() -> None:
    four, eight = "4-bit weights in groups of 64, 8-bit input per", "8-bit weights, 8-bit input per"
    narrow = "input channels, less than a group of 64"
    assert chosen("w4a8") == {
        "conv": ("W4A8", f"convolution: {four} sample"),
        "linear": ("W4A8", f"linear layer: {four} token"),
        "narrow": ("W8A8", f"linear layer with 48 {narrow}: {eight} token"),
        "narrow_conv": ("W8A8", f"convolution with 63 {narrow}: {eight} token"),
        "wide": ("W4A8", f"linear layer: {four} token"),
        "strided": ("W4A8", f"convolution: {four} sample"),
        "inset": ("W4A8", f"convolution: {four} sample"),
        "pointwise": ("W4A8", f"convolution: {four} token"),
        "grouped": (None, "convolution in 128 groups: no fast integer kernel"),
        "circular": (None, "convolution with padding mode 'circular': integer kernels pad with zeros"),
        "uneven": (None, "convolution that pads one side more than the other: no integer kernel"),
        "even": ("W4A8", f"convolution: {four} sample"),
        "fragile.linear": (None, "the model asks to keep it in float32"),
        "joined.aligned": (
            "W4A8",
            f"reads a concatenation whose parts begin with a group: {four} token, split at 64, 128",
        ),
        "joined.astray": ("W8A8", f"reads a concatenation: {eight} token, split at 72"),
        "joined.minor": ("W8A8", f"reads a concatenation: {eight} token, split at 32"),
        "shortcut": ("W8A8", f"reads a concatenation: {eight} token, split at 64"),
        "behind": ("W4A8", f"convolution: {four} sample"),
        "idle": (None, "was not executed in the recorded call"),
    }


def test_float_preset_leaves_every_layer_as_it_is() -> None:
    decisions = chosen("float")
    assert {label for label, _ in decisions.values()} == {None}
    assert decisions["conv"][1] == "convolution: float by preset"


def treated(preset: str, **options: Any) -> dict[str, QScheme]:
    decisions = choose_schemes(PARTS, STRUCTURE, preset, treatment=Treatment(**options))
    return {name: d.scheme for name, d in decisions.items() if d.scheme}


INTEGERS = ["w8a8", "w4a8", "w4a16", "w8a16", "w4a4"]
OVER_ROWS = {
    *("linear", "narrow", "narrow_conv", "wide", "pointwise", "joined.aligned", "joined.astray", "joined.minor"),
    "shortcut",
}


@pytest.mark.parametrize("preset", INTEGERS)
@pytest.mark.parametrize("inputs", ["dynamic", "static"])
def test_granularity_follows_bits_and_kind_of_layer(preset: str, inputs: str) -> None:
    for name, scheme in treated(preset, inputs=inputs).items():
        static = inputs == "static" and scheme.input_bits == 8 and STRUCTURE.layers[name].kind == "conv2d"
        dynamic = "token" if name in OVER_ROWS else "sample"
        expected = None if scheme.input_bits == 16 else "tensor" if static else dynamic
        assert scheme.input_granularity == expected, name


@pytest.mark.parametrize("preset", INTEGERS)
def test_ranges_and_rounding_reach_every_scheme(preset: str) -> None:
    plain = treated(preset)
    for field, value in (("weight_range", "minmax"), ("input_range", "minmax"), ("rounding", "gptq")):
        changed = treated(preset, **{field: value})
        assert changed == {name: replace(scheme, **{field: value}) for name, scheme in plain.items()}
        assert changed != plain


def test_the_group_size_is_that_of_weights_and_inputs() -> None:
    for name, scheme in treated("w4a4", group_size=32).items():
        assert scheme.group_size == (32 if scheme.weight_bits == 4 else None)
        assert scheme.input_group == (32 if scheme.input_bits == 4 else None)
        # Boundaries at 32, 64 and 128 begin a group of 32: a linear shortcut then is like any other linear layer.
        assert (scheme.weight_bits == 8) == (name in ("joined.astray", "shortcut"))


@pytest.mark.parametrize("preset", INTEGERS)
def test_concatenations_are_split_where_they_are_read_as_asked(preset: str) -> None:
    read = {name: facts.boundaries for name, facts in STRUCTURE.layers.items() if facts.boundaries}
    direct = {name: boundaries for name, boundaries in read.items() if name != "behind"}
    assert direct.keys() == {"joined.aligned", "joined.astray", "joined.minor", "shortcut"}
    for split, expected in (("direct", direct), ("all", read), ("none", {})):
        schemes = treated(preset, split=split)
        assert {name: s.boundaries for name, s in schemes.items() if s.boundaries} == expected
        others = {name for name in schemes if name not in read}
        assert all(schemes[name] == treated(preset)[name] for name in others)


@pytest.mark.parametrize("preset", INTEGERS)
def test_factors_are_looked_for_by_default_where_inputs_have_four_bits_and_never_where_they_are_float(
    preset: str,
) -> None:
    for smooth in (None, True, False):
        for scheme in treated(preset, smooth=smooth).values():
            wanted = scheme.input_bits == 4 if smooth is None else smooth
            assert scheme.smooth == (wanted and scheme.input_bits < 16)
    assert any(scheme.smooth for scheme in treated("w4a4").values())


def test_inputs_of_four_bits_have_groups_of_their_own() -> None:
    for size, expected in ((32, {32}), (8, {8}), (0, None)):
        for name, scheme in treated("w4a4", input_group=size).items():
            assert (scheme.input_group is None) == (scheme.input_bits != 4)
            if scheme.input_group and expected is None:  # all channels share a range; an odd number is rounded up
                channels = PARTS.get_submodule(name).weight.shape[1]
                assert scheme.input_group == channels + channels % 2
            elif scheme.input_group:
                assert {scheme.input_group} == expected


def test_single_pixels_keep_eight_bits_where_a_preset_asks_for_four() -> None:
    found = treated("w4a4")
    convs = {name: PARTS.get_submodule(name) for name in found if STRUCTURE.layers[name].kind == "conv2d"}
    pixels = [name for name, conv in convs.items() if is_pointwise(conv)]  # type: ignore[arg-type]
    assert Role.CONV in {STRUCTURE.layers[name].role for name in pixels}
    for name in pixels:
        assert found[name].input_bits in (8, 16)
    assert any(scheme.input_bits == 4 and scheme.input_granularity == "sample" for scheme in found.values())
    # Who asks for such a layer by a pattern gets what was asked for.
    asked = choose_schemes(PARTS, STRUCTURE, "w8a8", overrides={"*": "W4A4"})
    assert all(asked[name].scheme.input_bits == 4 for name in pixels if asked[name].scheme)  # type: ignore[union-attr]


@pytest.mark.parametrize("preset", INTEGERS)
def test_rotation_and_branches_are_for_inputs_of_four_bits(preset: str) -> None:
    schemes = treated(preset, rotate=True, rank=16)
    for name, scheme in schemes.items():
        odd = name in ("narrow_conv", "wide")  # 63 and 65 channels: a rotation would change nothing
        assert scheme.rotate == (scheme.input_bits == 4 and not odd)
        # No branch has a larger rank than its weight.
        largest = min(len(PARTS.get_submodule(name).weight), 16)
        assert scheme.rank == (largest if scheme.input_bits == 4 else 0)
    assert any(scheme.rank for scheme in schemes.values()) == (preset == "w4a4")


@pytest.mark.parametrize("preset", INTEGERS)
def test_directions_are_for_four_bits_and_by_default_for_such_inputs(preset: str) -> None:
    for name, scheme in treated(preset).items():
        edges = (0, *scheme.boundaries, PARTS.get_submodule(name).weight.shape[1])
        smallest = min(b - a for a, b in pairwise(edges))
        assert scheme.directions == (min(8, smallest // 8) if scheme.input_bits == 4 else 0)
        four = 4 in (scheme.weight_bits, scheme.input_bits)
        assert treated(preset, directions=70)[name].directions == (min(70, smallest) if four else 0)
        assert treated(preset, directions=0)[name].directions == 0
    assert any(scheme.directions for scheme in treated(preset).values()) == (preset == "w4a4")


def test_parts_narrower_than_a_group_get_eight_bits() -> None:
    overrides = {"joined": "W4A8", "behind*": "W4A4"}
    whole = choose_schemes(PARTS, STRUCTURE, "w8a8", overrides=overrides, treatment=Treatment(split="none"))
    parts = choose_schemes(PARTS, STRUCTURE, "w8a8", overrides=overrides, treatment=Treatment(split="all"))
    assert whole["joined.minor"].scheme == QScheme(4, 64, input_bits=8, input_granularity="token")
    assert parts["joined.minor"] == Decision(
        QScheme(8, input_bits=8, input_granularity="token", boundaries=(32,)),
        "set by 'joined' with 32 input channels, less than a group of 64",
    )
    assert parts["joined.minor"].reason == (
        "set by 'joined' with 32 input channels, less than a group of 64: "
        "8-bit weights, 8-bit input per token, split at 32"
    )
    for name in ("joined.aligned", "joined.astray", "behind"):  # parts of 64 channels or more
        assert parts[name].scheme is not None
        assert parts[name].scheme.weight_bits == 4
    large = choose_schemes(
        PARTS, STRUCTURE, "w8a8", overrides=overrides, treatment=Treatment(split="all", group_size=72)
    )
    eight = {name for name in ("joined.aligned", "joined.astray", "behind") if large[name].scheme.weight_bits == 8}
    assert eight == {"joined.aligned", "behind"}


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
    assert decisions["joined.aligned"] == Decision(QScheme(4, 64, boundaries=(64, 128)), "set by 'joined'")
    assert decisions["joined.aligned"].reason == (
        "set by 'joined': 4-bit weights in groups of 64, float input, split at 64, 128"
    )
    assert decisions["joined.astray"].scheme == scheme
    assert decisions["joined.minor"].scheme is None
    assert decisions["linear"] == Decision(None, "set by 'linear'")
    assert decisions["conv"].scheme == QScheme(4, 64, input_bits=8, input_granularity="sample")
    assert decisions["idle"].scheme == QScheme(8, input_bits=8, input_granularity="token")


def test_overrides_reach_four_bits_and_a_scheme_is_taken_as_it_is() -> None:
    sample = QScheme(8, input_bits=8, input_granularity="sample", smooth=True, rank=8)
    decisions = choose_schemes(
        PARTS,
        STRUCTURE,
        "w8a8",
        overrides={"*": "W4A4", "shortcut": sample},
        treatment=Treatment(
            inputs="static", weight_range="minmax", rounding="gptq", rank=2, smooth=False, rotate=False, directions=0
        ),
    )
    four = QScheme(
        4, 64, "minmax", input_bits=4, input_granularity="token", input_group=32, rank=2, rounding="gptq"
    )  # fmt: skip
    assert decisions["linear"].scheme == four
    assert decisions["conv"].scheme == replace(four, input_granularity="sample")
    assert decisions["narrow"].scheme == replace(four, weight_bits=8, group_size=None)
    assert decisions["shortcut"] == Decision(sample, "set by 'shortcut'")


def test_an_override_cannot_ask_for_what_no_kernel_runs() -> None:
    assert chosen("w8a8", overrides={"*": "W8A8"})["grouped"][0] is None


def test_a_branch_is_no_larger_than_the_narrowest_part() -> None:
    treatment = Treatment(split="all", rank=40)
    decisions = choose_schemes(PARTS, STRUCTURE, "w4a4", overrides={"joined": "W4A4"}, treatment=treatment)
    ranks = {name: d.scheme.rank for name, d in decisions.items() if d.scheme and d.scheme.input_bits == 4}
    assert (ranks["joined.minor"], ranks["behind"], ranks["narrow"]) == (8, 40, 40)
    wider = Treatment(split="all", rank=100)
    decisions = choose_schemes(PARTS, STRUCTURE, "w4a4", treatment=wider)
    assert decisions["behind"].scheme is not None
    assert decisions["behind"].scheme.rank == 64


def test_what_is_asked_for_by_name_is_had_or_refused_with_all_others() -> None:
    overrides = {
        "narrow": "W4A8", "grouped": "W8A16", "fragile.linear": "W8A8", "shortcut": QScheme(8, rank=9),
        "wide": QScheme(8, rotate=True), "linear": "W4A4",
    }  # fmt: skip
    with pytest.raises(SchemeError) as caught:
        choose_schemes(PARTS, STRUCTURE, "w8a8", overrides=overrides)
    head, *lines = caught.value.problem.splitlines()
    assert head == "5 layers cannot be quantized as asked:"
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(overrides.keys() - {"linear"})
    assert any(
        line.startswith("  narrow: W4A8 is asked for by name, but 4-bit weights need groups of 64") for line in lines
    )
    assert caught.value.remedy.count("out of the overrides") == 1, "one remedy for a kind"
    for pattern in ("*", "re:."):
        choose_schemes(PARTS, STRUCTURE, "w8a8", overrides={**dict.fromkeys(overrides, "W4A8"), pattern: "W4A8"})
    choose_schemes(PARTS, STRUCTURE, "w8a8", overrides=overrides, keep=list(overrides))
    choose_schemes(PARTS, STRUCTURE, "w8a8", overrides={"grouped": "float"})


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


def test_a_preset_may_be_given_as_a_table() -> None:
    table = dict(PRESETS["w8a16"])
    table[Role.CONV] = QScheme.from_label("W4A16")
    decisions = choose_schemes(PARTS, STRUCTURE, table, treatment=Treatment(group_size=32))
    assert decisions["conv"].scheme == QScheme(4, 32)
    assert decisions["linear"].scheme == QScheme(8)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SchemeError, match=r"'w2a2'.*w8a8, w4a8, w4a16, w8a16, w4a4, float"):
        choose_schemes(PARTS, STRUCTURE, "w2a2")
