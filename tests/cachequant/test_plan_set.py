"""The file of plans: what is written is read again, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcomp import DcompError
from dcomp.cachequant.plan import CachePlan, PlanError
from dcomp.cachequant.plan_set import MeasuredPlan, PlanSet, Trajectory, _hash
from dcomp.cachequant.zones import Zone

ZONE = Zone("all", "output", ("",))
ABOUT = Trajectory("a" * 64, "UNet2DModel", "DDIMScheduler", "b" * 64, 3)


def plan(*rows: dict[str, str]) -> CachePlan:
    calls = len(rows)
    return CachePlan((ZONE,), tuple(map(float, range(calls, 0, -1))), tuple(map(float, range(calls))), rows)


SLOW = MeasuredPlan("1.5x", plan({}, {}, {"all": "reuse"}), 1.5, 0.01, 0.02, 40.0)
FAST = MeasuredPlan("3x", plan({}, {"all": "reuse"}, {"all": "reuse"}), 3.0, 0.1, 0.2, 20.0)
PLANS = PlanSet(ABOUT, (SLOW, FAST))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    PLANS.write(tmp_path / "plans.json")
    assert PlanSet.read(tmp_path / "plans.json") == PLANS
    assert [file.name for file in tmp_path.iterdir()] == ["plans.json"]


def test_a_plan_is_chosen_by_name_or_by_speed() -> None:
    assert PLANS.choose("3x") is FAST
    assert PLANS.choose("1.2x") is SLOW
    assert PLANS.choose("1.51x") is FAST
    assert PLANS.choose("balanced") is SLOW
    for name in ("4x", "careful", ""):
        with pytest.raises(PlanError, match="no plan"):
            PLANS.choose(name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"denoiser": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"model": "c" * 64}, "other weights"),
        ({"steps": 4}, "4 are asked for"),
        ({"scheduler": "PNDMScheduler"}, "PNDMScheduler"),
        ({"scheduler_sha256": "c" * 64}, "other settings"),
    ],
)
def test_what_plans_were_not_made_for_is_named(changes: dict[str, Any], words: str) -> None:
    assert ABOUT.difference(ABOUT) is None
    difference = ABOUT.difference(replace(ABOUT, **changes))
    assert difference is not None
    assert words in difference


def resealed(data: dict[str, Any]) -> str:
    return json.dumps(data | {"sha256": _hash(data)})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["plans"][0].update(speedup="fast"),
        lambda d: d["plans"][0].update(name=7),
        lambda d: d["plans"][0].pop("error"),
        lambda d: d["plans"][0]["plan"]["calls"][0].update(predict={"all": "reuse"}),
        lambda d: d["plans"][0]["plan"]["calls"][1].update(predict={"all": "magic"}),
        lambda d: d["plans"][0]["plan"]["zones"][0].update(predicted=[1]),
        lambda d: d.update(plans=[]),
        lambda d: d.update(plans=d["plans"] * 40),
        lambda d: d.update(version=2),
        lambda d: d["trajectory"].update(steps="50"),
        lambda d: d["trajectory"].update(more="x"),
        lambda d: d.update(trajectory=[]),
    ],
)
def test_a_file_of_another_form_is_refused(change: Any, tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    PLANS.write(file)
    data = json.loads(file.read_text())
    data.pop("sha256")
    change(data)
    file.write_text(resealed(data))
    with pytest.raises(DcompError) as caught:
        PlanSet.read(file)
    assert "search-schedule" in caught.value.remedy


def test_a_file_that_was_edited_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    PLANS.write(file)
    file.write_text(file.read_text().replace('"error": 0.2', '"error": 0.1'))
    with pytest.raises(PlanError, match="changed or is damaged"):
        PlanSet.read(file)
    file.write_text("{")
    with pytest.raises(DcompError):
        PlanSet.read(file)
    with pytest.raises(PlanError, match="no plans"):
        PlanSet.read(tmp_path / "missing.json")
