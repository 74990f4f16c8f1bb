import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcomp import UsageError
from dcomp.recipes.load import MAX_BYTES, RecipeError, builtin_names, load_recipe, parse_recipe
from dcomp.recipes.schema import PRESETS, Recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert [stage.preset for stage in recipe.stages] == [name]
    assert parse_recipe(recipe.to_dict(), where="") == recipe


def test_the_presets_are_all_there_is() -> None:
    assert builtin_names() == sorted([*PRESETS, "all", "joint", "prune"])
    assert [stage.kind for stage in load_recipe("joint").stages] == ["quantize", "schedule"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.1.budget=2x"], "unknown key 'stages.1.budget', did you mean 'budgets'"),
        (["stages.1.budgets=[2y]"], "stages.1.budgets: Value error, '2y' is no budget"),
        (["stages.1.budgets=[]"], "stages.1.budgets: "),
        (["stages.1.planner=magic"], "stages.1.planner: "),
        (["stages.0.kind=schedule"], "unknown key 'stages.0.preset', known are kind, budgets"),
        (["stages=[{kind: schedule}, {kind: schedule}]"], "at most one of each kind"),
        (["stages.1.kind=quantize"], "unknown key|at most one of each kind"),
        (["stages.1.kind=prone"], "stages.1: "),
        (["stages.1.kind=7"], "stages.1: "),
    ],
)
def test_errors_of_a_second_stage_name_its_keys(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("joint", overrides)


def test_a_file_in_yaml_or_json_is_a_recipe_too(tmp_path: Path) -> None:
    recipe = load_recipe("w4a8", ["calibration.steps=7", "stages.0.keep=[conv_in, 'mid_block.*']"])
    for name, text in (("r.yaml", yaml.safe_dump(recipe.to_dict())), ("r.json", json.dumps(recipe.to_dict()))):
        (tmp_path / name).write_text(text)
        assert load_recipe(tmp_path / name) == load_recipe(str(tmp_path / name)) == recipe
    assert recipe.stages[0].keep == ("conv_in", "mid_block.*")


def test_overrides_come_after_values_and_the_last_one_counts() -> None:
    recipe = load_recipe(
        "w4a8",
        ["calibration.steps=9", "calibration.steps=11", "stages.0.overrides={conv_in: W8A8}"],
        {"calibration.steps": 5, "calibration.samples": 6, "calibration.guidance": None, "lora": ["a.safetensors:2"]},
    )
    assert (recipe.calibration.steps, recipe.calibration.samples, recipe.calibration.guidance) == (11, 6, None)
    assert recipe.stages[0].overrides == {"conv_in": "W8A8"}
    assert recipe.lora == ("a.safetensors:2",)


def test_an_equal_sign_in_a_value_is_part_of_it() -> None:
    assert load_recipe("w4a8", ["calibration.prompts=a=b.txt"]).calibration.prompts == "a=b.txt"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibraton.steps=3"], "unknown key 'calibraton', did you mean 'calibration'?"),
        (["calibration.step=3"], "unknown key 'calibration.step', did you mean 'steps'?"),
        (["stages.0.stepbins=3"], "unknown key 'stages.0.stepbins', did you mean 'step_bins'?"),
        (["nonsense=3"], "known are schema_version, name, lora, calibration, stages"),
        (["calibration.steps=0"], "calibration.steps: "),
        (["calibration.steps=many"], "calibration.steps: "),
        (["stages.0.preset=w4a9"], "stages.0.preset: "),
        (["stages.0.overrides={conv_in: w9}"], "'w9' for 'conv_in' is not one of w8a8"),
        (["stages.1.preset=w4a8"], "'1' is not one of the 1 items"),
        (["stages.first.preset=w4a8"], "'first' is not one of the 1 items"),
        (["stages.-1.preset=w4a8"], "'-1' is not one of the 1 items"),
        (["name.more=1"], "name: "),
        (["name"], "'name' is not KEY=VALUE"),
        (["=3"], "'=3' is not KEY=VALUE"),
        (["stages=[1"], "Not valid YAML"),
        (["stages=&a [*a]"], "alias"),
        (["schema_version=2"], "schema_version: "),
        (["stages={}"], "stages: "),
        (["stages.²=1"], "'²' is not one of the 1 items"),
    ],
)
def test_wrong_overrides_are_refused_with_their_place(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("w4a8", overrides)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("w4a8", ["calibraton.steps=3", "calibration.samples=0", "stages.0.preset=w4a9"])
    assert caught.value.problem.count(";") == 2
    many = {"calibration": {f"key{i}": i for i in range(50)}}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(many, where="here")
    assert len(caught.value.problem) < 2_000


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no recipe 'w4a9'") as caught:
        load_recipe("w4a9")
    assert "Did you mean 'w4a8'?" in caught.value.remedy
    with pytest.raises(RecipeError, match="no recipe") as caught:
        load_recipe("../../etc/passwd-that-is-not-there")
    assert "Built-in recipes are" in caught.value.remedy


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not fit"),
    "a list": (b"[1, 2]", "does not fit"),
    "a word": (b"hello", "does not fit"),
    "binary": (bytes(range(256)), "UTF-8"),
    "control characters": (b"name: a\x00b", "YAML"),
    "broken": (b"stages: [\n  {kind: quantize\n", "line"),
    "a python object": (b"!!python/object/apply:os.system ['true']", "YAML"),
    "an alias": (b"a: &a [x]\nb: *a\n", "alias in line 2"),
    "a thousand levels": (b"[" * 100_000, "YAML"),
    "a bomb": (b"".join(b"a%d: &a%d [%s]\n" % (i, i, b"*a%d," % (i - 1) * 9) for i in range(1, 30)), "alias"),
    "a date for a name": (b"name: 2020-01-01", "name: "),
    "not a number": (b"calibration: {guidance: .nan}", "calibration.guidance"),
    "a key given twice": (b"name: a\nname: b\n", "twice"),
    "a number for a key": (b"1: 2", "does not fit"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_recipes_are_refused(name: str, tmp_path: Path) -> None:
    content, message = FILES[name]
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(caught.value)
    assert str(tmp_path / "recipe.yaml") in (caught.value.where or "")
    assert len(str(caught.value)) < 1_500


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(RecipeError, match="10,737,418,240 bytes") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert f"{MAX_BYTES:,}" in caught.value.remedy


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(tmp_path)


ANYTHING: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["calibration", "stages", "name", "kind", "steps", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(ANYTHING)
def test_any_data_is_a_recipe_or_an_error_of_ours(data: Any) -> None:
    with suppress(RecipeError):
        assert isinstance(parse_recipe(data, where="data"), Recipe)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(alphabet="&*[]{}:,-!#|>'\" \nab01", max_size=40).map(str.encode))
def test_any_file_is_a_recipe_or_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with suppress(RecipeError):
        assert isinstance(load_recipe(tmp_path / "recipe.yaml"), Recipe)


@given(st.text(max_size=30))
def test_any_override_is_taken_or_an_error_of_ours(text: str) -> None:
    for item in (text, f"stages.{text}=1", f"calibration.steps={text}", f"name={text}"):
        with suppress(RecipeError):
            assert isinstance(load_recipe("w4a8", [item]), Recipe)
