"""Corrections of predictions: fitted in closed form, kept in the plan, and applied where it says."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcomp import UsageError
from dcomp.cachequant.correction import Correction
from dcomp.cachequant.correction_fit import FITS, fit_affine, fit_corrections, fit_scale
from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan, PlanError
from dcomp.cachequant.trials import Branch, Trials
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from tests.cachequant.conftest import prompts_of, settings_of
from tests.cachequant.test_trials import trials_of

STEPS = 5
ROWS = {
    "all": ({}, {}, {"all": "reuse"}, {"all": "linear"}, {}),
    "part": ({}, {"part": "reuse"}, {"part": "reuse"}, {}, {}),
}


def channels(seed: int, count: int = 3, size: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(count, size, generator=generator, dtype=torch.float64) + 2
    return p, 0.7 * p + 0.2 * torch.randn(count, size, generator=generator, dtype=torch.float64)


@given(st.integers(0, 1000), st.integers(0, 2), st.floats(-0.2, 0.2), st.floats(-0.2, 0.2))
def test_no_other_scale_and_shift_have_less_squares(seed: int, channel: int, more: float, higher: float) -> None:
    p, c = channels(seed)
    found = fit_affine(p, c)

    def squares(scale: float, shift: float) -> float:
        return float((p[channel] * scale + shift - c[channel]).square().mean())

    scale, shift = found.scale[channel], found.shift[channel]
    assert squares(scale, shift) <= squares(scale + more, shift + higher) + 1e-8


def test_what_is_an_affine_map_is_found_and_what_never_changes_is_only_moved() -> None:
    p, _ = channels(0)
    p[2] = 3.0
    truth = torch.tensor([0.5, -2.0, 1.0])[:, None] * p + torch.tensor([1.0, 0.0, 4.0])[:, None]
    found = fit_affine(p, truth)
    assert found.scale == pytest.approx((0.5, -2.0, 1.0), rel=1e-4)
    assert found.shift == pytest.approx((1.0, 0.0, 4.0), abs=1e-4)


def test_one_scale_gives_the_variance() -> None:
    p, c = channels(1)
    found = fit_scale(p, c)
    assert found.shift == (0.0,)
    assert (p * found.scale[0]).var().item() == pytest.approx(c.var().item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 7, 3), (2, 3), (2, 3, 2, 4, 5)])
def test_channels_are_the_second_dimension_of_pictures_and_the_last_of_tokens(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = Correction((2.0, 1.0, 0.5), (0.0, 1.0, -1.0)).apply(x)
    at = (lambda t, i: t[:, i]) if len(shape) > 3 else (lambda t, i: t[..., i])
    for i, (scale, shift) in enumerate(((2.0, 0.0), (1.0, 1.0), (0.5, -1.0))):
        torch.testing.assert_close(at(found, i), at(x, i) * scale + shift)
    with pytest.raises(UsageError, match="has 4 channels"):
        Correction((1.0,) * 4, (0.0,) * 4).apply(x)


def plan_of(trials: Trials, zone: str, kind: str) -> CachePlan:
    rows = [{zone: next(iter(row.values()))} if row else {} for row in ROWS[kind]]
    return trials.plan(rows, trials.zones)


def latents_of(pipeline: OpenPipeline, plan: CachePlan | None = None) -> Tensor:
    settings, prompts = settings_of(pipeline, STEPS), prompts_of(pipeline)
    if plan is None:
        return pipeline.run(prompts, [3, 5], settings, decode=False).latents
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) as executor:
        latents = pipeline.run(prompts, [3, 5], settings, decode=False).latents
    assert not executor.stats.fallbacks
    return latents


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize(
    ("name", "zone", "rows"),
    [
        ("UNet2DConditionModel", "all", "all"),
        ("UNet2DConditionModel", "deep2", "part"),
        ("PixArtTransformer2DModel", "blocks[0:2]", "part"),
    ],
)
def test_the_executor_corrects_what_was_fitted(
    name: str, zone: str, rows: str, kind: str, folder_of: Callable[[str], Path]
) -> None:
    pipeline = open_pipeline(folder_of(name))
    with trials_of(pipeline, [zone], STEPS) as trials:
        plain = plan_of(trials, zone, rows)
        plan = fit_corrections(plain, trials, kind)
        predicted = [call for call, row in enumerate(plan.actions) if row]
        assert {*plan.corrections} == {(call, zone) for call in predicted}
        branch = Branch()
        for row in plan.predictions:
            (computed,) = trials.extend([(branch, {})])
            own = {name: each.correction for name, each in row.items() if each.correction}
            actions = {name: tuple(zip(each.calls, each.weights, strict=True)) for name, each in row.items()}
            (uncorrected,) = trials.extend([(branch, actions)])
            (branch,) = trials.extend([(branch, actions)], own)
            if zone == "all" and kind == "affine" and row:
                # The least squares of the prediction itself, before guidance.
                off, still = (
                    sum(
                        (a[0] - b[0]).square().sum()
                        for a, b in zip(each._answers[-1], computed._answers[-1], strict=True)
                    )
                    for each in (uncorrected, branch)
                )
                assert still < off
    whole = latents_of(pipeline)
    errors = (latents_of(pipeline, plan) - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    assert errors.tolist() == pytest.approx(branch.errors, rel=2e-3, abs=1e-5)
    assert not torch.equal(latents_of(pipeline, plan), latents_of(pipeline, plain))
    read = CachePlan.from_dict(json.loads(plan.to_json()))
    assert read == plan
    assert torch.equal(latents_of(pipeline, read), latents_of(pipeline, plan))


def test_zones_of_many_tensors_are_left_as_they_are(folder_of: Callable[[str], Path]) -> None:
    with trials_of(open_pipeline(folder_of("UNet2DConditionModel")), ["encoder"], STEPS) as trials:
        plan = plan_of(trials, "encoder", "part")
        assert fit_corrections(plan, trials, "affine") == plan


@pytest.mark.parametrize(
    "edited",
    [
        {"scale": [1.0], "shift": []},
        {"scale": [], "shift": []},
        {"scale": [1e9], "shift": [0.0]},
        {"scale": [True], "shift": [0.0]},
        {"scale": ["1"], "shift": [0.0]},
        {"scale": [1.0] * 20_000, "shift": [0.0] * 20_000},
        {"scale": [1.0]},
        [1.0],
        None,
    ],
)
def test_edited_corrections_are_refused(edited: object, folder_of: Callable[[str], Path]) -> None:
    trials = trials_of(open_pipeline(folder_of("UNet2DModel")), ["all"], STEPS)
    plan = replace(plan_of(trials, "all", "all"), corrections={(2, "all"): Correction((1.0,), (0.5,))})
    data = plan.to_dict()
    assert CachePlan.from_dict(data) == plan
    data["calls"][2]["correct"]["all"] = edited
    with pytest.raises(PlanError, match="correction of call 2"):
        CachePlan.from_dict(data)


def test_corrections_of_what_is_computed_are_refused(folder_of: Callable[[str], Path]) -> None:
    trials = trials_of(open_pipeline(folder_of("UNet2DModel")), ["all"], STEPS)
    plan = plan_of(trials, "all", "all")
    for place in ((1, "all"), (2, "deep1"), (9, "all")):
        with pytest.raises(PlanError, match="which has a correction"):
            replace(plan, corrections={place: Correction((1.0,), (0.0,))})
    with pytest.raises(ValueError, match="no correction"):
        Correction((math.nan,), (0.0,))
