import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dcomp.cachequant.planners import PLANNERS
from dcomp.compress import policy
from dcomp.recipes.load import load_recipe
from dcomp.recipes.schedule import BUDGETS, SAMPLES
from dcomp.recipes.schema import PRESETS, Calibration, QuantizeStage, Recipe, ScheduleStage

CALIBRATIONS = st.builds(
    Calibration,
    prompts=st.none() | st.text(max_size=20),
    samples=st.integers(1, 65_536),
    steps=st.integers(1, 10_000),
    guidance=st.none() | st.floats(0, 100),
    scheduler=st.none() | st.just("DDIMScheduler"),
    height=st.none() | st.integers(8, 16_384),
    seed=st.integers(0, 2**63 - 1),
    batch_size=st.integers(1, 1024),
)
STAGES = st.builds(
    QuantizeStage,
    preset=st.sampled_from(PRESETS),
    format=st.sampled_from(["dcomp", "quanto", "bnb"]),
    rounding=st.sampled_from(["nearest", "gptq", "adaround"]),
    inputs=st.sampled_from(["dynamic", "static"]),
    step_bins=st.integers(1, 1000),
    weight_range=st.sampled_from(["mse", "minmax"]),
    split=st.sampled_from(["direct", "all", "none"]),
    smooth=st.none() | st.booleans(),
    fold=st.booleans(),
    rotate=st.none() | st.booleans(),
    input_group=st.integers(0, 999).map(lambda half: 2 * half),
    rank=st.integers(0, 1024),
    rows=st.integers(1, 65_536),
    tune=st.integers(0, 1_000_000),
    tune_rounding=st.booleans(),
    correct=st.booleans(),
    keep=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
    overrides=st.dictionaries(st.text(min_size=1, max_size=9), st.sampled_from([*PRESETS, "W8A8"]), max_size=3),
)
SCHEDULES = st.builds(
    ScheduleStage,
    budgets=st.lists(st.sampled_from(["2x", "800ms", "150GMACs", "20calls"]), min_size=1, max_size=3).map(tuple),
    planner=st.sampled_from(["joint", "uniform"]),
    samples=st.integers(1, 1000),
)
RECIPES = st.builds(
    Recipe,
    calibration=CALIBRATIONS,
    stages=st.tuples(st.lists(STAGES, max_size=1), st.lists(SCHEDULES, max_size=1)).map(lambda x: (*x[0], *x[1])),
)


@given(RECIPES)
def test_a_resolved_recipe_is_json_and_reads_back_as_itself(recipe: Recipe) -> None:
    data = json.loads(json.dumps(recipe.to_dict(), allow_nan=False))
    again = Recipe.model_validate(data)
    assert again == recipe
    assert again.hash() == recipe.hash()


@given(RECIPES, RECIPES)
def test_hashes_are_equal_for_equal_recipes_alone(one: Recipe, other: Recipe) -> None:
    assert (one.hash() == other.hash()) == (one.to_dict() == other.to_dict())


def test_every_default_is_spelled_out() -> None:
    data = Recipe(stages=(QuantizeStage(),)).to_dict()
    assert set(data) == {"schema_version", "name", "lora", "calibration", "stages"}
    assert set(data["calibration"]) == set(Calibration.model_fields)
    assert set(data["stages"][0]) == set(QuantizeStage.model_fields)
    assert data["stages"][0]["kind"] == "quantize"


def test_planners_and_budgets_of_recipes_are_those_of_the_search() -> None:
    assert get_args(ScheduleStage.model_fields["planner"].annotation) == tuple(PLANNERS)
    assert ScheduleStage().budgets == BUDGETS
    assert ScheduleStage().samples == SAMPLES
    recipe = Recipe(stages=(QuantizeStage(), ScheduleStage()))
    assert (recipe.quantize, recipe.schedule) == recipe.stages
    assert (Recipe().quantize, Recipe().schedule) == (None, None)


def test_presets_of_recipes_are_those_of_the_policy() -> None:
    assert set(PRESETS) == set(policy.PRESETS)
    assert all(load_recipe(preset).stages[0].preset == load_recipe(preset).name == preset for preset in PRESETS)


def test_order_of_keys_does_not_change_the_hash() -> None:
    data = Recipe(stages=(QuantizeStage(),)).to_dict()
    assert Recipe.model_validate(dict(reversed(data.items()))).hash() == Recipe.model_validate(data).hash()


@pytest.mark.parametrize(
    ("part", "values"),
    [
        *[
            (Calibration, {key: bad})
            for key in ("samples", "steps", "batch_size", "max_calls")
            for bad in (0, -1, 10**9)
        ],
        (Calibration, {"samples": 1.5}),
        (Calibration, {"steps": "many"}),
        (Calibration, {"guidance": -0.1}),
        (Calibration, {"guidance": float("nan")}),
        (Calibration, {"guidance": float("inf")}),
        (Calibration, {"seed": -1}),
        (Calibration, {"seed": 2**63}),
        (Calibration, {"height": 4}),
        (Calibration, {"max_megabytes": 0}),
        (Calibration, {"step": 3}),
        (QuantizeStage, {"preset": "w2a2"}),
        (QuantizeStage, {"format": "gguf"}),
        (QuantizeStage, {"step_bins": 0}),
        (QuantizeStage, {"step_bins": 1001}),
        (QuantizeStage, {"weight_range": "best"}),
        (QuantizeStage, {"rounding": "stochastic"}),
        (QuantizeStage, {"inputs": "tensor"}),
        (QuantizeStage, {"split": True}),
        (QuantizeStage, {"smooth": "maybe"}),
        (QuantizeStage, {"rank": -1}),
        (QuantizeStage, {"rank": 1025}),
        (QuantizeStage, {"rows": 0}),
        (QuantizeStage, {"tune": -1}),
        (QuantizeStage, {"tune": 10**9}),
        (QuantizeStage, {"method": "gptq"}),
        (QuantizeStage, {"quality": "best"}),
        (QuantizeStage, {"keep": ("",)}),
        (QuantizeStage, {"keep": "conv_in"}),
        (QuantizeStage, {"overrides": {"conv_in": "w3a3"}}),
        (QuantizeStage, {"kind": "prune"}),
        (ScheduleStage, {"budgets": ("1x",)}),
        (ScheduleStage, {"budgets": ()}),
        (ScheduleStage, {"samples": 0}),
        (Recipe, {"stages": ({"kind": "schedule"}, {"kind": "quantize"})}),
        (Recipe, {"schema_version": 2}),
        (Recipe, {"name": "n" * 101}),
        (Recipe, {"stages": ({"kind": "quantize"},) * 101}),
    ],
)
def test_values_out_of_bounds_are_refused(part: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        part.model_validate(values)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().name = "other"
