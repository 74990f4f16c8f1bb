"""Plans in which some calls of a quantized model round no inputs, from the search to the picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dcomp
from dcomp import UsageError
from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import MeasuredPlan, PlanSet
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import WHOLE, Zone, find_zones
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.quality import decibels, mean_squared_errors, relative_errors
from dcomp.compress.unrounded import unrounded, unrounded_calls
from dcomp.recipes.bench import record_calls
from dcomp.recipes.follow import FollowedPlan
from dcomp.recipes.plan_fit import fit_plan
from dcomp.recipes.planning import planning_task
from dcomp.recipes.schedule import search_schedule, trajectory_of

Models = Callable[[str], Path]
UNET, STEPS = "UNet2DModel", 8
PRICE = 1.02  # rounding does little to tiny models, so that little is spent on it
ZONE = Zone(WHOLE, "output", ("",))


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Models) -> OpenPipeline:
    return open_pipeline(tiny_checkpoint(UNET))


def latents(pipeline: OpenPipeline, plan: CachePlan | None = None) -> Tensor:
    settings = Generation(steps=STEPS)
    if plan is None:
        return pipeline.run(["", ""], [1, 2], settings, decode=False).latents
    exact = unrounded_calls(pipeline.denoiser)
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan), exact) as executor:
        made = pipeline.run(["", ""], [1, 2], settings, decode=False).latents
    assert not executor.stats.fallbacks
    assert executor.stats.unrounded == dict.fromkeys(plan.unrounded, 1)
    return made


@pytest.fixture(scope="module")
def trials(pipeline: OpenPipeline) -> Trials:
    return Trials(pipeline, (), ["", ""], [1, 2], Generation(steps=STEPS))


def test_all_none_and_some_calls(pipeline: OpenPipeline, trials: Trials) -> None:
    whole, rows = latents(pipeline), ({},) * STEPS
    with unrounded(pipeline.denoiser):
        exact = latents(pipeline)
    assert not torch.equal(whole, exact)
    assert torch.equal(latents(pipeline, trials.plan(rows, (ZONE,))), whole)
    assert torch.equal(latents(pipeline, trials.plan(rows, (ZONE,), frozenset(range(STEPS)))), exact)
    # Calls without rounding are those that the plan names: the others begin from what they left.
    some = latents(pipeline, trials.plan(rows, (ZONE,), frozenset({0, 1, 2, 5})))
    assert not torch.equal(some, whole)
    assert float(relative_errors(exact, some).mean()) < float(relative_errors(exact, whole).mean())
    assert torch.equal(latents(pipeline), whole)


def test_a_failure_in_such_a_call_leaves_rounding_as_it_was(pipeline: OpenPipeline, trials: Trials) -> None:
    whole = latents(pipeline)

    def fail(*_: object) -> None:
        raise RuntimeError("half-way")

    plan = trials.plan(({},) * STEPS, (ZONE,), frozenset({0}))
    hook = pipeline.denoiser.conv_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        latents(pipeline, plan)
    hook.remove()
    assert torch.equal(latents(pipeline), whole)


@pytest.fixture(autouse=True, scope="module")
def price(time_goes_by_products: pytest.MonkeyPatch) -> None:
    time_goes_by_products.setattr(CallPrices, "unrounded", PRICE)


def test_a_search_pays_for_calls_that_do_not_round(pipeline: OpenPipeline) -> None:
    args, kwargs = record_calls(pipeline, [""], Generation(steps=STEPS))[0]
    zones, exact = find_zones(pipeline.denoiser, args, kwargs), unrounded_calls(pipeline.denoiser)
    prices = CallPrices(pipeline.denoiser, args, kwargs, zones, exact)
    about = (["", ""], [1, 2], Generation(steps=STEPS))
    task, trials = planning_task(pipeline, zones, prices, *about)
    task.unrounded = lambda: prices.unrounded
    assert task.costs.rounding is not None
    assert all(0 < error < 0.2 for error in task.costs.rounding)
    shares = {zone: prices.macs([zone]) / prices.macs() for zone in task.zones}
    front = task.front(shares)
    spent = [one for one in front if one.unrounded]
    assert spent
    for one in front:
        paid = sum(min((shares[zone] for zone in row), default=1.0) for row in one.rows)
        assert one.cost == pytest.approx(paid + (PRICE - 1) * len(one.unrounded))
    # What rounding does to the last latents is expected as it is measured, where nothing else is done.
    whole = latents(pipeline)
    with unrounded(pipeline.denoiser):
        reference = latents(pipeline)
    expected = sum(task.costs.of_rounding(call, call + 1) ** 2 for call in range(STEPS)) ** 0.5
    assert expected == pytest.approx(float(relative_errors(reference, whole).mean()), rel=1.0)
    best = max(spent, key=lambda one: len(one.unrounded))
    error = relative_errors(reference, latents(pipeline, trials.plan(best.rows, zones, best.unrounded))).mean()
    without = relative_errors(reference, latents(pipeline, trials.plan(best.rows, zones))).mean()
    assert float(error) < 1.02 * float(without)


@pytest.fixture(scope="module")
def planned(pipeline: OpenPipeline, trials: Trials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plans.json"
    rows: list[dict[str, str]] = [{WHOLE: "reuse"} if call % 2 else {} for call in range(STEPS)]
    plan = MeasuredPlan("2x", trials.plan(rows, (ZONE,), frozenset({0, 4})), 2.0, None, 0.1, 20.0)
    PlanSet(trajectory_of(pipeline.source, pipeline, STEPS), (plan,)).write(file)
    return file


def test_an_opened_checkpoint_follows_such_a_plan(planned: Path, pipeline: OpenPipeline, tmp_path: Path) -> None:
    (plan,) = PlanSet.read(planned).plans
    with dcomp.follow_plan(pipeline.pipe, f"{planned}:2x", pipeline.source) as followed:
        made = pipeline.run(["", ""], [1, 2], Generation(steps=STEPS), decode=False).latents
    assert followed.stats.unrounded == {0: 1, 4: 1}
    assert torch.equal(made, latents(pipeline, plan.plan))
    with unrounded(pipeline.denoiser):
        exact = pipeline.run(["", ""], [800_000, 800_001], Generation(steps=STEPS + 1)).images
    fitted = fit_plan(f"{planned}:2x", pipeline.source, pipeline, ["", ""], Generation(steps=STEPS + 1))
    assert fitted.plan is not None
    assert fitted.plan.plan.unrounded
    with FollowedPlan(fitted.plan, pipeline.denoiser, pipeline.scheduler):
        other = pipeline.run(["", ""], [800_000, 800_001], Generation(steps=STEPS + 1)).images
    assert exact is not None
    assert other is not None
    assert fitted.plan.psnr == pytest.approx(float(decibels(mean_squared_errors(exact, other)).mean()), abs=1e-3)


@pytest.mark.slow
def test_a_search_asked_for_them_writes_what_it_found(tiny_checkpoint: Models, tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    options: dict[str, Any] = {"budgets": ("1.4x",), "steps": STEPS, "samples": 2, "unrounded_calls": True}
    result = search_schedule(tiny_checkpoint(UNET), output=file, **options)
    assert result.plans, result.notes
    assert PlanSet.read(file).plans == result.plans
    for each, shown in zip(result.plans, result.to_dict()["plans"], strict=True):
        assert shown["unrounded_calls"] == len(each.plan.unrounded)
        # What such calls take longer is paid for within the budget.
        assert STEPS / each.speedup + (PRICE - 1) * len(each.plan.unrounded) <= STEPS / 1.4 + 1e-6


def test_a_float_model_has_nothing_to_leave_unrounded(tiny_model: Models, tmp_path: Path) -> None:
    result = search_schedule(
        tiny_model(UNET), budgets=("2x",), output=tmp_path / "a.json", steps=STEPS, samples=1, unrounded_calls=True
    )
    assert not any(each.plan.unrounded for each in result.plans)
    assert all("unrounded" not in call for plan in json.loads(_text(tmp_path)) for call in plan["plan"]["calls"])


def _text(folder: Path) -> str:
    file = folder / "a.json"
    return json.dumps(json.loads(file.read_text())["plans"]) if file.is_file() else "[]"


def test_rules_of_the_literature_know_nothing_of_rounding(tiny_checkpoint: Models) -> None:
    with pytest.raises(UsageError, match="uniform knows nothing of rounding"):
        search_schedule(tiny_checkpoint(UNET), planner="uniform", unrounded_calls=True)
