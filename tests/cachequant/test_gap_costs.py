"""Costs of gaps, against what plans with these gaps do to the final latents."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dcomp.cachequant.dynamic import best_schedules
from dcomp.cachequant.executor import following
from dcomp.cachequant.gap_costs import _line, measure_gap_costs, measure_sensitivities
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import Actions, CachePlan
from dcomp.cachequant.trials import Branch
from dcomp.calibrate.pipeline import open_pipeline
from dcomp.calibrate.quality import relative_errors
from tests.cachequant.conftest import prompts_of, settings_of
from tests.cachequant.test_trials import trials_of

STEPS = 8
PRICES = {"all": 0.0, "deep1": 0.4}


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"])
def test_expected_errors_are_those_of_plans(name: str, folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of(name))
    prices = {zone: price for zone, price in PRICES.items() if "DiT" not in name or zone == "all"}
    with trials_of(pipeline, [*prices], STEPS) as trials:
        costs = measure_gap_costs(trials, dict.fromkeys(prices, 3), measure_sensitivities(trials))
    settings, prompts = settings_of(pipeline, STEPS), prompts_of(pipeline)
    original = pipeline.run(prompts, [3, 5], settings, decode=False).latents

    def measured(rows: tuple[Actions, ...]) -> float:
        plan = CachePlan(trials.zones, trials.timesteps, trials.places, rows)
        with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)):
            made = pipeline.run(prompts, [3, 5], settings, decode=False).latents
        return float(relative_errors(original, made).log().mean().exp())

    calls = len(trials.timesteps)
    assert len(costs.sensitivities) == calls
    for skipped in (1, calls // 2, calls - 1):
        skip = costs.of_call("all", None, skipped - 1, skipped)
        assert skip is not None
        rows: tuple[Actions, ...] = tuple({"all": skip.reads} if call == skipped else {} for call in range(calls))
        assert measured(rows) == pytest.approx(skip.error, rel=0.3)
    front = best_schedules(costs, prices)
    chosen = random.Random(0).sample(front[:-1], min(8, len(front) - 1))
    assert spearmanr([one.error for one in chosen], [measured(one.rows) for one in chosen]).statistic > 0.8
    uniform: tuple[Actions, ...] = tuple({"all": "reuse"} if call % 2 else {} for call in range(calls))
    cost = sum(not row for row in uniform)
    assert measured([one for one in front if one.cost <= cost + 1e-9][-1].rows) < 1.02 * measured(uniform)


@pytest.mark.parametrize(("zone", "near"), [("all", 1e-3), ("deep1", 0.2), ("deep2", 0.2)])
def test_the_error_of_two_calls_follows_from_those_of_each(
    zone: str, near: float, folder_of: Callable[[str], Path]
) -> None:
    pipeline = open_pipeline(folder_of("UNet2DConditionModel"))
    whole = Branch()
    ratios = []
    with trials_of(pipeline, [zone], STEPS) as trials:
        costs = measure_gap_costs(trials, {zone: 2}, [1.0] * STEPS)
        for call in range(STEPS):
            pairs = [(nodes, skip) for nodes, skip in costs.skips[zone][call].items() if len(nodes) == 2]
            tries: list[tuple[Branch, Any]] = [(whole, {}), *((whole, {zone: skip.reads}) for _, skip in pairs)]
            whole, *others = trials.extend(tries)
            for (nodes, skip), branch in zip(pairs, others, strict=True):
                error = trials.difference(branch, whole).norm(dim=1).square().mean().sqrt()
                ratios.append(abs(math.log(float(error) / skip.error)))
                alone = costs.skips[zone][call][nodes[1:]]
                assert skip.error <= alone.error * (1 + 1e-9)
    assert sum(ratios) / len(ratios) < near
    assert max(ratios) < 3 * near


@given(*[st.lists(st.floats(-5, 5), min_size=3, max_size=3)] * 2)
def test_the_slope_of_a_line_is_the_best_one(r: list[float], s: list[float]) -> None:
    one, other = (torch.tensor(x, dtype=torch.float64) for x in (r, s))
    slope, error = _line(*(float(a @ b) for a, b in ((one, one), (one, other), (other, other))))

    def off(a: float) -> float:
        return float((other + a * (other - one)).norm())

    assert error == pytest.approx(off(slope), abs=1e-6)
    assert all(error <= off(slope + change) + 1e-6 for change in (-1.0, -0.1, 0.1, 1.0))
    assert error <= math.sqrt(float(other @ other)) + 1e-6


@given(*[st.lists(st.floats(-5, 5), min_size=3, max_size=3)] * 2, st.floats(0.01, 10))
def test_noise_makes_lines_flatter_until_they_average(r: list[float], s: list[float], noise: float) -> None:
    # Of independent noise each of two calls has its own square, and no product with the other's.
    one, other = (torch.tensor(x, dtype=torch.float64) for x in (r, s))
    rr, rs, ss = (float(a @ b) for a, b in ((one, one), (one, other), (other, other)))
    clean, _ = _line(rr, rs, ss)
    noisy, _ = _line(rr + noise, rs, ss + noise)
    assert abs(noisy + 0.5) <= abs(clean + 0.5) + 1e-6 or rr - 2 * rs + ss < 1e-6


def test_a_model_with_noise_gets_flatter_lines(folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of("UNet2DModel"))
    now, noise = 0.0, 0.0

    def look(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal now
        now = float(torch.as_tensor(kwargs.get("timestep", args[-1])).flatten()[0])

    def move(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        """Go in a straight line over time, with other noise in each call."""
        other = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(round(now)))
        return (now / 1000 + noise * other).expand_as(output)

    def slopes() -> list[float]:
        with trials_of(pipeline, ["all"], STEPS) as trials:
            costs = measure_gap_costs(trials, {"all": 1}, [1.0] * STEPS)
        found = [costs.of_call("all", call - 2, call - 1, call) for call in range(2, STEPS)]
        return [-skip.reads[0][1] for skip in found if skip is not None]

    pipeline.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    pipeline.denoiser.conv_out.register_forward_hook(move)
    clean = slopes()
    noise = 0.5
    noisy = slopes()
    assert clean == pytest.approx([1.0] * (STEPS - 2), abs=1e-3)  # a line goes on
    assert max(noisy) < 0  # a mean of two calls has less noise than either


def test_a_gap_that_cannot_be_has_no_cost(folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of("UNet2DModel"))
    with trials_of(pipeline, ["all", "deep1"], 4) as trials:
        costs = measure_gap_costs(trials, {"all": 2, "deep1": 1}, [1.0] * 4)
    first = costs.of_call("all", None, 0, 1)
    assert first is not None
    assert first.reads == ((0, 1.0),)
    line = costs.of_call("all", 0, 1, 2)
    assert line is not None
    assert [call for call, _ in line.reads] == [0, 1]
    assert sum(weight for _, weight in line.reads) == pytest.approx(1)
    assert costs.of_call("all", None, 0, 3) is None  # longer than asked for
    assert costs.of_call("deep1", None, 0, 1) is not None
    assert costs.of_call("deep1", None, 0, 2) is None
