"""Bits for each layer under a budget, from the recipe to the checkpoint."""

from pathlib import Path

import pytest

from dcomp import UsageError
from dcomp.compress.allocation import AllocationError
from dcomp.compress.layer_times import LayerTimes
from dcomp.recipes import bit_budget
from dcomp.recipes.load import load_recipe
from dcomp.recipes.run import run_recipe
from tests.support.checkpoints import checked_in_a_fork, short_recipe, with_stage
from tests.support.sweep import slow

UNET = "UNet2DModel"


def bits_of(result):
    return {record.scheme for record in result.manifest.layers.values() if record.scheme}


@pytest.mark.parametrize(
    ("preset", "budgets", "labels"),
    [("w4a8", (7.0, 8.5), {"W4A8", "W8A8", "W8A16"}), slow("w4a4", (7.0,), {"W4A4"})],
)
def test_the_budget_is_met_and_used(
    tiny_model, tmp_path: Path, preset: str, budgets: tuple[float, ...], labels: set[str]
) -> None:
    source = tiny_model(UNET)
    with checked_in_a_fork():
        sizes = {
            bits: run_recipe(
                source,
                with_stage(short_recipe(UNET, preset), target_bits=bits, directions=0),
                tmp_path / f"{bits}",
            )
            for bits in budgets
        }
    for bits, result in sizes.items():
        assert result.manifest.totals.bits_per_param <= bits + 1e-9
    used = [result.manifest.totals.bits_per_param for result in sizes.values()]
    assert used == sorted(set(used))
    assert labels <= set().union(*map(bits_of, sizes.values()))
    assert any("correlation" in note for note in sizes[7.0].notes)


def test_the_file_is_no_larger_than_a_budget_of_bytes(tiny_model, tmp_path: Path) -> None:
    megabytes = 0.56
    recipe = with_stage(short_recipe(UNET), max_megabytes=megabytes, directions=0)
    with checked_in_a_fork():
        run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    (file,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    assert 0.8 * megabytes * 1e6 < file.stat().st_size <= megabytes * 1e6


def test_a_budget_that_cannot_be_met_names_the_smallest(tiny_model, tmp_path: Path) -> None:
    recipe = with_stage(short_recipe(UNET), max_megabytes=0.001)
    with checked_in_a_fork(), pytest.raises(AllocationError, match="or more"):
        run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every second layer takes half as long in integers, the others twice as long; all else takes nothing.

    Of what a choice saves by these times, a call saves the returned `part`.
    """
    known, seconds = {"part": 1.0}, {}

    def times(denoiser, rows, candidates, **options) -> LayerTimes:
        for place, (name, schemes) in enumerate(candidates.items()):
            seconds[name] = {"float": 1e-3, **dict.fromkeys(schemes, 5e-4 if place % 2 == 0 else 2e-3)}
        return LayerTimes(seconds, rest=0.0)

    def speedup(denoiser, rows, candidates, chosen, **options) -> float:
        total = sum(forms["float"] for forms in seconds.values())
        saved = total - sum(seconds[name][label] for name, label in chosen.items())
        return total / (total - known["part"] * saved)

    monkeypatch.setattr(bit_budget, "measure_layer_times", times)
    monkeypatch.setattr(bit_budget, "measure_speedup", speedup)
    return known


@pytest.mark.parametrize("part", [1.0, 0.8])
def test_under_a_budget_of_time_layers_stay_float_where_integers_do_not_pay(
    tiny_model, tmp_path: Path, known_times: dict[str, float], part: float
) -> None:
    known_times["part"] = part
    recipe = with_stage(short_recipe(UNET), min_speedup=1.2)
    with checked_in_a_fork():
        result = run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    chosen = {name: record for name, record in result.manifest.layers.items() if "under the budget" in record.reason}
    fast = [name for place, name in enumerate(chosen) if place % 2 == 0]
    quantized = [name for name, record in chosen.items() if record.scheme]
    assert set(quantized) <= set(fast)
    # Each of these saves a part of half its millisecond; one fewer would not be enough, but for the margin.
    saved, asked = 0.5 * part * len(quantized), len(chosen) * (1 - 1 / 1.2)
    margin = bit_budget.TIME_MARGIN * len(chosen) if part < 1 else 0
    assert asked <= saved < asked + margin + 0.5 + 1e-9
    assert any("1.2" in note and "as fast as float, measured" in note for note in result.notes)


def test_a_budget_of_time_that_only_single_layers_keep_is_refused(
    tiny_model, tmp_path: Path, known_times: dict[str, float]
) -> None:
    known_times["part"] = 0.1
    recipe = with_stage(short_recipe(UNET), min_speedup=1.2)
    with checked_in_a_fork(), pytest.raises(AllocationError, match=r"was not measured .* 1\.0\d times as fast"):
        run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("known_times")
def test_a_budget_of_time_that_no_form_keeps_names_the_fastest(tiny_model, tmp_path: Path) -> None:
    recipe = with_stage(short_recipe(UNET), max_milliseconds=0.5)
    with checked_in_a_fork(), pytest.raises(AllocationError, match=r"1\.3\d? times as fast"):
        run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values", [{"stages.0.preset": "float"}, {"stages.0.preset": "w8a16", "stages.0.format": "quanto"}]
)
@pytest.mark.parametrize("budget", ["target_bits", "max_megabytes", "max_milliseconds", "min_speedup"])
def test_a_budget_without_layers_of_ours_is_refused_at_once(values: dict[str, str], budget: str) -> None:
    with pytest.raises(UsageError, match="need a preset that quantizes"):
        load_recipe("w4a8", (), values | {f"stages.0.{budget}": 5.0})
