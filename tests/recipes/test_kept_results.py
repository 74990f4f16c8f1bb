"""Results that outlive their run, and searches that go on with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcomp.cachequant.plan_set import FILE
from dcomp.recipes import planning
from dcomp.recipes.inspect import inspect
from dcomp.recipes.kept_results import KeptResults
from dcomp.recipes.plan_choice import PlanJudge
from dcomp.recipes.schedule import search_schedule

pytestmark = pytest.mark.usefixtures("time_goes_by_products")
Models = Callable[[str], Path]
STEPS = 8


def test_results_are_made_once_for_each_question(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list[float]:
        made.append(1)
        return [0.1, float("inf")]

    for question, count in (("a", 1), ("a", 1), ({"b": [1]}, 2), ("a", 2)):
        assert KeptResults(tmp_path, question).get("name", make, list) == [0.1, float("inf")]
        assert len(made) == count
    assert KeptResults(tmp_path, "a").get("other", make, list) == [0.1, float("inf")]
    assert len(made) == 3
    KeptResults().get("name", make, list)
    KeptResults().get("name", make, list)
    assert len(made) == 5


def test_a_result_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    kept = KeptResults(tmp_path, "a")
    kept.get("name", lambda: {"x": 1}, dict)
    (file,) = tmp_path.rglob("name.json")
    for damaged in (file.read_text()[:4], "[]", '{"y": 1}', "1", "[" * 100_000):
        file.write_text(damaged)
        assert kept.get("name", lambda: {"x": 2}, lambda data: data["x"] + 1) == 3
        assert json.loads(file.read_text()) == {"x": 2}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the slow parts of a search ran."""
    counts = {"sensitivities": 0, "costs": 0, "followed": 0}
    parts = {"sensitivities": planning.measure_sensitivities, "costs": planning.measure_gap_costs}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(planning, "measure_sensitivities", counting("sensitivities", parts["sensitivities"]))
    monkeypatch.setattr(planning, "measure_gap_costs", counting("costs", parts["costs"]))
    monkeypatch.setattr(PlanJudge, "follow", counting("followed", PlanJudge.follow))
    return counts


def test_an_interrupted_search_goes_on_where_it_stopped(
    tiny_checkpoint: Models, counted: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tiny_checkpoint("UNet2DModel"), tmp_path / "plans.json"
    work = tmp_path / ".plans.json.dcomp-work"
    options: dict[str, Any] = {"budgets": ("1.3x", "1.6x"), "steps": STEPS, "samples": 2, "output": file}
    expected = search_schedule(model, **options).plans
    assert not work.exists()
    once = dict(counted)
    assert once["sensitivities"] == once["costs"] == 1
    file.unlink()

    finish = PlanJudge._of_steps

    def stop(judge: PlanJudge, steps: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlanJudge, "_of_steps", stop)
    with pytest.raises(KeyboardInterrupt):
        search_schedule(model, **options)
    assert not file.exists()
    assert any(work.rglob("costs.json"))
    monkeypatch.setattr(PlanJudge, "_of_steps", finish)
    followed = counted["followed"]
    assert search_schedule(model, **options).plans == expected
    assert (counted["sensitivities"], counted["costs"]) == (2, 2)  # of the first search and the interrupted one
    # What the first budget needed was followed before the interruption.
    assert counted["followed"] - followed < once["followed"]
    assert not work.exists()


@pytest.mark.slow
def test_another_seed_is_another_question_and_fresh_forgets(
    tiny_checkpoint: Models, counted: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"budgets": ("1.3x",), "steps": STEPS, "samples": 1, "output": tmp_path / "plans.json"}

    def stop(judge: PlanJudge, steps: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlanJudge, "_of_steps", stop)
    for seed, fresh, measured in ((5, False, 1), (5, False, 1), (6, False, 2), (6, True, 3)):
        with pytest.raises(KeyboardInterrupt):
            search_schedule(tiny_checkpoint("UNet2DModel"), seed=seed, fresh=fresh, **options)
        assert counted["costs"] == measured


def test_plans_in_a_checkpoint_leave_nothing_else_there(tiny_checkpoint: Models, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("UNet2DModel"), folder)
    before = {path.name for path in folder.iterdir()}
    result = search_schedule(folder, budgets=("1.3x",), steps=STEPS, samples=2)
    assert result.plans, result.notes
    assert {path.name for path in folder.iterdir()} == before | {FILE}
    (plan,) = inspect(folder).plans
    assert plan["name"] == "1.3x"
    assert sum(not call for call in plan["predicted"]) == sum(not row for row in result.plans[0].plan.actions)
    assert ("cache plans", f"1.3x ({result.plans[0].psnr:.1f} dB)") in list(inspect(folder).facts())
