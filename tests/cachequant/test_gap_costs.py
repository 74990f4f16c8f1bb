"""Costs of gaps, against what plans with these gaps do to the final latents."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from dcomp.cachequant.dynamic import best_schedules
from dcomp.cachequant.executor import following
from dcomp.cachequant.gap_costs import measure_gap_costs
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.calibrate.pipeline import open_pipeline
from dcomp.calibrate.quality import relative_errors
from tests.cachequant.conftest import prompts_of, settings_of
from tests.cachequant.test_trials import trials_of

STEPS = 8
WAYS = {("all", "reuse"): 0.0, ("all", "linear"): 0.0, ("deep1", "reuse"): 0.4}


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"])
def test_expected_errors_are_those_of_plans(name: str, folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of(name))
    ways = {way: price for way, price in WAYS.items() if "DiT" not in name or way[0] == "all"}
    trials = trials_of(pipeline, sorted({zone for zone, _ in ways}), STEPS)
    with trials:
        costs = measure_gap_costs(trials, [*ways], 3)
    settings, prompts = settings_of(pipeline, STEPS), prompts_of(pipeline)
    original = pipeline.run(prompts, [3, 5], settings, decode=False).latents

    def measured(rows: tuple[dict[str, str], ...]) -> float:
        plan = CachePlan(trials.zones, trials.timesteps, trials.places, rows)
        with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)):
            made = pipeline.run(prompts, [3, 5], settings, decode=False).latents
        return float(relative_errors(original, made).mean())

    calls = len(trials.timesteps)
    assert len(costs.sensitivities) == calls
    for skipped in (1, calls // 2, calls - 1):
        rows = tuple({"all": "reuse"} if call == skipped else {} for call in range(calls))
        before = skipped - 2 if skipped > 1 else None
        expected = costs.of_gap(("all", "reuse"), before, skipped - 1, min(calls, skipped + 1))
        assert measured(rows) == pytest.approx(expected, rel=0.3)
    front = best_schedules(costs, ways)
    chosen = random.Random(0).sample(front[:-1], min(8, len(front) - 1))
    found = [measured(tuple(dict(row) for row in one.rows)) for one in chosen]
    assert spearmanr([one.error for one in chosen], found).statistic > 0.8
    uniform = tuple({"all": "reuse"} if call % 2 else {} for call in range(calls))
    cost = sum(not row for row in uniform)
    best = min((one for one in front if one.cost <= cost + 1e-9), key=lambda one: one.error)
    assert measured(tuple(dict(row) for row in best.rows)) < 1.02 * measured(uniform)


def test_a_gap_that_cannot_be_has_no_cost(folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of("UNet2DModel"))
    with trials_of(pipeline, ["all"], 4) as trials:
        costs = measure_gap_costs(trials, [("all", "reuse"), ("all", "linear")], 2)
    assert costs.of_gap(("all", "linear"), None, 0, 2) is None
    assert costs.of_gap(("all", "linear"), 0, 1, 3) is not None
    assert costs.of_gap(("all", "reuse"), None, 0, 4) is None  # longer than asked for
    assert costs.of_gap(("all", "reuse"), None, 3, 4) == 0
