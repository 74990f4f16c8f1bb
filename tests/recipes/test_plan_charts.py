from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcomp import UsageError
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import MeasuredPlan
from dcomp.cachequant.zones import WHOLE, Zone
from dcomp.recipes.plan_charts import draw_plans, kind_of
from dcomp.recipes.schedule import ScheduleResult


def result_of(*rows: dict[str, object]) -> ScheduleResult:
    zone = Zone(WHOLE, "output", ("",))
    times = tuple(float(9 - call) for call in range(len(rows)))
    plan = CachePlan((zone,), times, tuple(-t for t in times), rows)  # type: ignore[arg-type]
    plans = (MeasuredPlan("2x", plan, 2.0, 0.1, 0.1, 40.0), MeasuredPlan("3x", plan, 3.0, 0.2, 0.2, 30.0))
    fewer, faster = {"2x": (2, 25.0), "3x": (1, 20.0)}, {"2x": 1.9, "3x": 2.8}
    return ScheduleResult(
        file=None,
        plans=plans,
        fewer_steps=fewer,
        measured_speedups=faster,
        time_ratios={},
        cache_bytes={},
        calls=len(rows),
        additivity=None,
        ladder=(),
        notes=(),
        seconds=1.0,
    )


COMPUTES, REUSES, FORECASTS = {}, {WHOLE: "reuse"}, {WHOLE: ((0, -1.0), (1, 2.0))}  # type: ignore[var-annotated]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_results_give_equal_files(suffix: str, tmp_path: Path) -> None:
    files = [tmp_path / name / f"plans{suffix}" for name in ("a", "b")]
    for file in files:
        draw_plans(result_of(COMPUTES, COMPUTES, FORECASTS), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_bytes()) > 5_000


def test_other_actions_and_other_figures_give_another_picture(tmp_path: Path) -> None:
    base = result_of(COMPUTES, COMPUTES, REUSES)
    better = replace(base, plans=(replace(base.plans[0], psnr=45.0), base.plans[1]))
    results = (base, result_of(COMPUTES, COMPUTES, COMPUTES), result_of(COMPUTES, COMPUTES, FORECASTS), better)
    pictures = []
    for number, result in enumerate(results):
        draw_plans(result, tmp_path / f"{number}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png")).tobytes())
    assert len(set(pictures)) == len(pictures)


def test_a_file_without_a_known_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ending"):
        draw_plans(result_of(COMPUTES, REUSES), tmp_path / "plans.gif")


def test_kinds_of_actions() -> None:
    assert [kind_of(action) for action in ("reuse", "taylor1", ((0, 1.0),), ((0, -1.0), (1, 2.0)))] == [
        "reuse", "forecast", "reuse", "forecast",
    ]  # fmt: skip
