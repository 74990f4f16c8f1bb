import json
from typing import Any

import pytest
from hypothesis import given

from dcomp.compress.scheme import QScheme, SchemeError
from tests.support.schemes import schemes


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
    "folded": False, "corrected": False, "directions": 0,
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
        rank=16, directions=4,
    )  # fmt: skip
    assert str(full) == (
        "4-bit weights in groups of 64, 4-bit input per token in groups of 32, split at 128, 192, smoothed, rotated, "
        "4 directions in float, with a branch of rank 16"
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
