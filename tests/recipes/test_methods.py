from typing import Any

import pytest

from dcomp import UsageError
from dcomp.calibrate.structure import Role
from dcomp.compress.policy import choose_schemes
from dcomp.recipes.load import load_recipe
from dcomp.recipes.methods import METHODS, QUALITIES, settings_of
from dcomp.recipes.plan import treatment_of
from dcomp.recipes.schema import Preset, QuantizeStage
from tests.support.parts import PARTS, STRUCTURE

NAMED = [*((name, None) for name in METHODS), *((None, name) for name in QUALITIES)]


@pytest.mark.parametrize(("method", "quality"), NAMED)
def test_names_stand_for_values_of_keys_and_leave_no_trace(method: str | None, quality: str | None) -> None:
    values = settings_of(method, quality)
    assert values.keys() <= QuantizeStage.model_fields.keys()
    recipe = load_recipe("w4a8", (), {f"stages.0.{key}": value for key, value in values.items()})
    assert recipe.to_dict()["stages"][0] == QuantizeStage().model_dump(mode="json") | values


def test_the_default_quality_is_the_default_of_every_key() -> None:
    assert settings_of(None, "default") == settings_of(None, None) == {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quality", QUALITIES)
def test_the_method_decides_where_both_set_a_key(method: str, quality: str) -> None:
    both = settings_of(method, quality)
    assert both == QUALITIES[quality] | METHODS[method]
    assert both["tune"] == 0, "a method alone is not tuned, however much time there is"


def test_more_quality_takes_more_time() -> None:
    def of(quality: str) -> Any:
        return QuantizeStage(**settings_of(None, quality))

    fast, default, best = map(of, ("fast", "default", "best"))
    assert fast.rows < default.rows < best.rows
    assert fast.tune < default.tune == best.tune
    assert best.directions


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_minmax_is_the_naive_baseline(preset: Preset) -> None:
    stage = QuantizeStage(preset=preset, **settings_of("minmax", None))
    decisions = choose_schemes(PARTS, STRUCTURE, preset, treatment=treatment_of(stage))
    schemes = {name: decision.scheme for name, decision in decisions.items() if decision.scheme}
    assert schemes
    for name, scheme in schemes.items():
        assert (scheme.weight_range, scheme.input_range, scheme.rounding) == ("minmax", "minmax", "nearest")
        assert (scheme.boundaries, scheme.smooth, scheme.rotate, scheme.rank) == ((), False, False, 0)
        conv = STRUCTURE.layers[name].kind == "conv2d"
        if scheme.input_bits == 8:
            assert scheme.input_granularity == ("tensor" if conv else "token")
        if scheme.input_group:  # one range for all channels of a row
            assert scheme.input_group >= PARTS.get_submodule(name).weight.shape[1]
    assert (stage.step_bins, stage.tune) == (1, 0)
    assert any(STRUCTURE.layers[name].role is Role.SHORTCUT for name in schemes)


@pytest.mark.parametrize(
    ("method", "quality", "where", "words"),
    [
        ("gtpq", None, "--method", "Did you mean gptq?"),
        ("min-max", "best", "--method", "Did you mean minmax?"),
        (None, "beste", "--quality", "Did you mean best?"),
        ("gptq", "quick", "--quality", "Use fast, default, best."),
        ("", None, "--method", "Use minmax, nearest, gptq, adaround."),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    method: str | None, quality: str | None, where: str, words: str
) -> None:
    with pytest.raises(UsageError, match="There is no") as caught:
        settings_of(method, quality)
    assert caught.value.where == where
    assert words in caught.value.remedy
