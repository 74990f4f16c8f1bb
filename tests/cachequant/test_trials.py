"""Histories that are tried out side by side, against the executor that follows the same plan alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import Actions, CachePlan
from dcomp.cachequant.predict import PREDICTORS
from dcomp.cachequant.trials import Branch, Trials
from dcomp.cachequant.zones import find_zones
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.calibrate.quality import relative_errors
from dcomp.recipes.bench import record_calls
from tests.cachequant.conftest import prompts_of, settings_of
from tests.support.sweep import slow
from tests.support.tiny import XL

SD, UNET, FLUX = "UNet2DConditionModel", "UNet2DModel", "FluxTransformer2DModel"
STEPS = 4


def trials_of(pipeline: OpenPipeline, names: list[str], steps: int = STEPS) -> Trials:
    prompts = prompts_of(pipeline)
    args, kwargs = record_calls(pipeline, prompts, settings_of(pipeline, 2))[0]
    found = find_zones(pipeline.denoiser, args, kwargs, guidance="guidance" in names)
    zones = [zone for zone in found if zone.name in names]
    assert len(zones) == len(names)
    return Trials(pipeline, zones, prompts, [3, 5], settings_of(pipeline, steps))


def possible(branch: Branch, actions: Actions) -> bool:
    return all(
        len(branch.nodes(zone)) >= PREDICTORS[action].nodes
        if isinstance(action, str)
        else {*branch.nodes(zone)} >= {call for call, _ in action}
        for zone, action in actions.items()
    )


def alone(pipeline: OpenPipeline, trials: Trials, branch: Branch) -> list[float]:
    """The errors of a plan that the executor follows, in a run of its own."""
    settings, prompts = settings_of(pipeline, STEPS), prompts_of(pipeline)
    expected = pipeline.run(prompts, [3, 5], settings, decode=False).latents
    plan = CachePlan(trials.zones, trials.timesteps, trials.places, branch.rows)
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) as executor:
        found = pipeline.run(prompts, [3, 5], settings, decode=False).latents
    assert not executor.stats.fallbacks
    return list(relative_errors(expected, found).tolist())


@pytest.mark.parametrize(
    ("name", "menu", "scheduler"),
    [
        (SD, [{"all": "reuse"}, {"deep1": ((0, -0.4), (1, 1.4))}, {"deep3": "linear"}, {"all": "linear"}], None),
        slow(SD, [{"all": "linear"}, {"deep2": "reuse"}], "DPMSolverMultistepScheduler"),
        slow(SD, [{"all": "reuse"}, {"deep1": "reuse"}], "EulerAncestralDiscreteScheduler"),
        (SD, [{"all": "reuse"}], "HeunDiscreteScheduler"),
        (SD, [{"guidance": "reuse"}, {"guidance": "linear"}, {"deep1": "reuse"}], None),
        slow(XL, [{"guidance": "reuse"}, {"all": "linear"}, {"deep1": "reuse"}], None),
        slow("PixArtTransformer2DModel", [{"guidance": "reuse"}, {"all": "linear"}], None),
        slow("SD3Transformer2DModel", [{"guidance": "linear"}, {"blocks[0:2]": "reuse"}], None),
        slow(UNET, [{"deep1": "reuse"}, {"encoder": "reuse"}], None),
        ("DiTTransformer2DModel", [{"blocks[0:1]": "reuse"}, {"all": "quadratic"}, {"attention": "reuse"}], None),
        ("PixArtTransformer2DModel", [{"blocks[0:2]": "linear"}, {"cross_attention": "reuse"}], None),
        slow(FLUX, [{"all": "reuse"}, {"blocks[1:3]": "reuse"}, {"attention": "reuse"}], None),
    ],
)
def test_side_by_side_is_as_alone(
    name: str, menu: list[Actions], scheduler: str | None, folder_of: Callable[[str], Path]
) -> None:
    pipeline = open_pipeline(folder_of(name), scheduler=scheduler)
    trials = trials_of(pipeline, sorted({zone for actions in menu for zone in actions}))
    choices: list[Actions] = [{}, *menu]
    alive = [Branch()]
    with trials:
        for _ in trials.timesteps:
            alive = trials.extend(
                [(branch, actions) for branch in alive for actions in choices if possible(branch, actions)]
            )
            alive = alive[:: max(1, len(alive) // 7)]  # of all kinds
    assert len({repr(branch.rows) for branch in alive}) == len(alive) > 3
    computing = [branch for branch in alive if not any(branch.rows)]
    assert all(max(branch.errors) < 1e-5 for branch in computing)
    for branch in alive:
        if any(branch.rows):
            # Rows of one batch are not bit for bit what they are in another one.
            assert branch.errors == pytest.approx(alone(pipeline, trials, branch), rel=2e-3, abs=1e-5)


def test_nothing_is_left_on_the_denoiser(folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of(SD))
    settings, prompts = settings_of(pipeline, STEPS), prompts_of(pipeline)
    before = pipeline.run(prompts, [3, 5], settings, decode=False).latents
    trials = trials_of(pipeline, ["all", "deep1"])
    with trials:
        trials.extend([(Branch(), {})])
    modules: list[Any] = [*pipeline.denoiser.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "_diffusers_hook" in vars(m) for m in modules)
    assert torch.equal(before, pipeline.run(prompts, [3, 5], settings, decode=False).latents)
    assert len(trials.timesteps) == STEPS
    assert list(trials.places) == sorted(trials.places)


def test_errors_are_distances_from_what_the_original_makes(folder_of: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(folder_of(UNET))
    prompts, settings = prompts_of(pipeline), settings_of(pipeline, STEPS)
    other = pipeline.run(prompts, [8, 9], settings, decode=False, keep_steps=True).step_latents
    assert other is not None
    own = pipeline.run(prompts, [3, 5], settings, decode=False, keep_steps=True).step_latents
    assert own is not None
    branch = Branch()
    with Trials(pipeline, (), prompts, [3, 5], settings, other) as trials:
        for one, another in zip(own, other, strict=True):
            (branch,) = trials.extend([(branch, {})])
            assert branch.errors == pytest.approx(relative_errors(another, one).tolist(), rel=1e-4)
