"""Cache plans from the search to the picture, on tiny checkpoints."""

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dcomp
from dcomp import UsageError
from dcomp.cachequant.budget import Budget
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.executor import following
from dcomp.cachequant.gap_costs import GapCosts
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import PlanError
from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet
from dcomp.cachequant.planners import PLANNERS, PlanningTask
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import WHOLE, Zone
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.calibrate.quality import decibels, mean_squared_errors
from dcomp.compress.manifest import check_manifest
from dcomp.recipes.generate import generate
from dcomp.recipes.plan_choice import Additivity, Distance, PlanChoice
from dcomp.recipes.plan_fit import ALLOWED_LOSS, FittedPlan, fit_plan
from dcomp.recipes.planning import different_zones
from dcomp.recipes.run import run_recipe
from dcomp.recipes.schedule import ScheduleResult, search_schedule, trajectory_of
from dcomp.recipes.schema import ScheduleStage
from dcomp.recipes.settings import generation_settings
from dcomp.recipes.validate import validate
from tests.support.checkpoints import checked_in_a_fork, short_recipe
from tests.support.sweep import slow

pytestmark = pytest.mark.usefixtures("time_goes_by_products")
Models = Callable[[str], Path]
UNET = "UNet2DModel"
STEPS = 8


@pytest.fixture(scope="module")
def searched(
    time_goes_by_products: pytest.MonkeyPatch, tiny_model: Models, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ScheduleResult]:
    file = tmp_path_factory.mktemp("plans") / "plans.json"
    budgets = ("1.25x", "1.6x", "3calls", "50x")
    return file, search_schedule(tiny_model(UNET), budgets=budgets, output=file, steps=STEPS, samples=2)


def test_plans_are_as_fast_as_asked_and_better_than_fewer_steps(searched: tuple[Path, ScheduleResult]) -> None:
    file, result = searched
    assert result.file == file
    plans = {plan.name: plan for plan in result.plans}
    assert plans.keys() == {"1.25x", "1.6x", "3calls"} == result.measured_speedups.keys() == result.fewer_steps.keys()
    assert plans["1.25x"].speedup >= 1.25
    assert plans["1.6x"].speedup >= 1.6
    assert sum(not row for row in plans["3calls"].plan.actions) <= 3
    assert [plan.speedup for plan in result.plans] == sorted(plan.speedup for plan in result.plans)
    assert all(plan.psnr > result.fewer_steps[plan.name][1] for plan in result.plans)
    assert all(0 < steps < STEPS for steps, _ in result.fewer_steps.values())
    assert plans["1.25x"].error < plans["1.6x"].error
    assert any(note.startswith("No plan keeps 50x: with gaps of 6 calls") for note in result.notes)
    assert PlanSet.read(file).plans == result.plans
    json.dumps(result.to_dict(), allow_nan=False)


def test_products_that_are_made_are_those_that_were_promised(
    searched: tuple[Path, ScheduleResult], tiny_model: Models
) -> None:
    pipeline = open_pipeline(tiny_model(UNET))

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # torch counts the attention of other devices only.
    added = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}

    def products() -> int:
        with FlopCounterMode(display=False, custom_mapping=added) as counter:
            pipeline.run(["x"], [0], Generation(steps=STEPS), decode=False)
        return int(counter.get_total_flops())

    whole = products()
    for each in searched[1].plans:
        with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(each.plan)) as executor:
            assert whole / products() == pytest.approx(each.speedup, rel=1e-3)
        assert not executor.stats.fallbacks
        assert executor.stats.peak_bytes == searched[1].cache_bytes[each.name] > 0


def test_a_plan_is_followed_when_pictures_are_made(
    searched: tuple[Path, ScheduleResult], tiny_model: Models, tmp_path: Path
) -> None:
    file, result = searched
    model = tiny_model(UNET)
    made = generate(model, ["x", "y"], tmp_path / "fast", plan=f"{file}:1.6x", steps=STEPS)
    whole = generate(model, ["x", "y"], tmp_path / "whole", steps=STEPS)
    assert (made["plan"], made["plan_fallbacks"]) == ("1.6x", 0)
    assert made["plan_speedup"] == next(plan.speedup for plan in result.plans if plan.name == "1.6x")
    assert (whole["plan"], whole["plan_speedup"]) == (None, None)
    pairs = zip(made["files"], whole["files"], strict=True)
    assert all(Image.open(one).tobytes() != Image.open(other).tobytes() for one, other in pairs)


def test_plans_of_something_else_are_refused(
    searched: tuple[Path, ScheduleResult], tiny_model: Models, tmp_path: Path
) -> None:
    file, _ = searched
    with pytest.raises(PlanError, match="DiTTransformer2DModel"):
        generate(tiny_model("DiTTransformer2DModel"), ["1"], tmp_path / "out", plan=f"{file}:1.6x", steps=STEPS)
    with pytest.raises(PlanError, match="no plan"):
        generate(tiny_model(UNET), ["x"], tmp_path / "out", plan=f"{file}:9x", steps=STEPS)
    with pytest.raises(PlanError, match="There are no plans"):
        generate(tiny_model(UNET), ["x"], tmp_path / "out", plan="2x", steps=STEPS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 2 * STEPS}, "asked for"),
        ({"scheduler": "DDIMScheduler"}, "DDIMScheduler"),
        ({}, "other weights"),
    ],
)
def test_a_plan_for_something_near_is_carried_over_and_looked_at(
    options: dict[str, Any],
    words: str,
    searched: tuple[Path, ScheduleResult],
    tiny_model: Models,
    tiny_checkpoint: Models,
    tmp_path: Path,
) -> None:
    file, result = searched
    model = tiny_model(UNET) if options else tiny_checkpoint(UNET)
    options = {"steps": STEPS} | options
    pipeline = open_pipeline(model, scheduler=options.get("scheduler"))
    settings = Generation(steps=options["steps"], seed=generation_settings(model).seed)
    fitted = fit_plan(f"{file}:1.6x", model, pipeline, ["x", "y"], settings)
    made = generate(model, ["x", "y"], tmp_path / "out", plan=f"{file}:1.6x", **options)
    assert made["notes"] == list(fitted.notes)
    assert "was made for" in fitted.notes[0]
    assert words in fitted.notes[0]
    assert fitted.plan is not None
    assert made["plan"] == fitted.plan.name
    assert made["plan_fallbacks"] == 0
    assert made["plan_speedup"] == pytest.approx(fitted.plan.speedup)
    assert fitted.plan.plan.calls == options["steps"]
    theirs = next(plan for plan in result.plans if plan.name == fitted.plan.name)
    assert fitted.plan.psnr >= theirs.psnr - ALLOWED_LOSS
    rows = [not row for row in fitted.plan.plan.actions]
    if options["steps"] == STEPS:
        assert rows == [not row for row in theirs.plan.actions]
    assert 0 < sum(rows) < len(rows)


def test_plans_that_spoil_pictures_elsewhere_are_left_for_slower_ones_and_for_none(
    searched: tuple[Path, ScheduleResult], tiny_model: Models, tmp_path: Path
) -> None:
    file, result = searched
    model = tiny_model(UNET)
    pipeline = open_pipeline(model)
    other = replace(PlanSet.read(file).trajectory, model="0" * 64)

    def fitted(*psnr: float) -> FittedPlan:
        plans = tuple(replace(plan, psnr=value) for plan, value in zip(result.plans, psnr, strict=True))
        PlanSet(other, plans).write(tmp_path / "plans.json")
        fastest = f"{tmp_path / 'plans.json'}:{plans[-1].name}"
        return fit_plan(fastest, model, pipeline, ["x", "y"], Generation(steps=STEPS))

    first, second, third = (fitted(-50.0, 200.0, 200.0), fitted(200.0, 200.0, 200.0), fitted(-50.0, -50.0, -50.0))
    assert first.plan is not None
    assert first.plan.name == result.plans[0].name
    assert [" is not: " in note for note in first.notes] == [False, True, True, False]
    assert second.plan is None
    assert "Every call is computed" in second.notes[-1]
    assert third.plan is not None
    assert third.plan.name == result.plans[-1].name


@pytest.fixture
def checkpoint(tiny_checkpoint: Models, tmp_path: Path) -> Path:
    """A copy, since plans go into it."""
    return Path(shutil.copytree(tiny_checkpoint(UNET), tmp_path / "copy"))


def test_plans_of_a_checkpoint_lie_in_it_and_it_stays_what_it_was(checkpoint: Path, tmp_path: Path) -> None:
    before = check_manifest(checkpoint)
    result = search_schedule(checkpoint, budgets=("1.3x",), planner="uniform", steps=STEPS, samples=2)
    assert result.file == checkpoint / FILE
    assert check_manifest(checkpoint) == before
    made = generate(checkpoint, ["x"], tmp_path / "out", plan="1.3x", steps=STEPS)
    assert made["plan_fallbacks"] == 0


def test_a_recipe_quantizes_and_then_plans_or_leaves_nothing(tiny_model: Models, tmp_path: Path) -> None:
    stage = ScheduleStage(budgets=("4calls",), planner="uniform", samples=1)
    calibration = short_recipe(UNET).calibration.model_copy(update={"steps": STEPS})
    recipe = short_recipe(UNET).model_copy(update={"calibration": calibration})
    recipe = recipe.model_copy(update={"stages": (*recipe.stages, stage)})

    def stop(text: str, done: int, total: int) -> None:
        if text == "plans followed to the end":
            raise KeyboardInterrupt

    with checked_in_a_fork():
        with pytest.raises(KeyboardInterrupt):
            run_recipe(tiny_model(UNET), recipe, tmp_path / "out", progress=stop)
        assert not (tmp_path / "out").exists()
        result = run_recipe(tiny_model(UNET), recipe, tmp_path / "out")
    assert result.schedules is not None
    assert result.schedules.file == tmp_path / "out" / FILE
    assert result.to_dict()["schedules"]["plans"][0]["name"] == "4calls"
    check_manifest(tmp_path / "out")
    made = generate(tmp_path / "out", ["x"], tmp_path / "pictures", plan="4calls")
    assert (made["plan"], made["plan_fallbacks"]) == ("4calls", 0)
    sides = (tmp_path / "out", tiny_model(UNET))
    with_plan, without = (validate(*sides, samples=2, plan=plan, bench=False) for plan in ("4calls", None))
    assert (with_plan.settings["plan"], without.settings["plan"]) == ("4calls", None)
    assert with_plan.macs_ratio == pytest.approx(without.macs_ratio / made["plan_speedup"])
    assert with_plan.latent_rel_error != without.latent_rel_error
    assert any("follow the plan 4calls" in warning for warning in with_plan.warnings)


def test_a_model_that_dcomp_did_not_make_is_left_as_it_is(tiny_model: Models) -> None:
    with pytest.raises(UsageError, match="left as it is"):
        search_schedule(tiny_model(UNET))
    assert not (tiny_model(UNET) / FILE).exists()


@pytest.mark.parametrize("planner", [name for name in PLANNERS if name != "joint"])
def test_rules_of_the_literature_make_plans_too(
    planner: str, tiny_model: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dcomp.recipes.planning.EVALUATIONS", 20)
    file = tmp_path / "plans.json"
    options: dict[str, Any] = {"output": file, "steps": STEPS, "samples": 1}
    result = search_schedule(tiny_model(UNET), budgets=["1.5x"], planner=planner, **options)
    for each in result.plans:
        assert each.speedup >= 1.5
        assert (each.expected_error is None) == (planner != "evolve")
    assert (PlanSet.read(file).plans if result.file else ()) == result.plans
    assert len(result.plans) + len(result.notes) == 1


@pytest.mark.parametrize(("name", "kinds"), [("DiTTransformer2DModel", 2), slow("PixArtTransformer2DModel", 3)])
def test_modules_of_a_transformer_have_schedules_of_their_own(
    name: str, kinds: int, tiny_model: Models, tmp_path: Path
) -> None:
    file, model = tmp_path / "plans.json", tiny_model(name)
    options: dict[str, Any] = {"output": file, "steps": STEPS, "samples": 1}
    result = search_schedule(model, budgets=["1.4x", "1.2x"], planner="blockwise", **options)
    assert [each.name for each in result.plans] == ["1.2x", "1.4x"], result.notes
    pipeline = open_pipeline(model)
    for each in result.plans:
        assert each.speedup >= float(each.name[:-1])
        assert len(each.plan.zones) == 2 * kinds
        with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(each.plan)) as executor:
            pipeline.run(["1"], [0], Generation(steps=STEPS), decode=False)
        assert not executor.stats.fallbacks
        for zone in each.plan.zones:
            ran = {call for call, ran, _ in executor.stats.ran if ran == zone.name}
            assert ran == {call for call in range(STEPS) if each.plan.computes(call, zone.name)}


def test_budgets_that_save_nothing_and_planners_that_are_none_are_refused(tiny_model: Models, tmp_path: Path) -> None:
    model, file = tiny_model(UNET), tmp_path / "plans.json"
    with pytest.raises(UsageError, match="saves nothing"):
        search_schedule(model, budgets=["2x", "1x"], output=file)
    for options in ({"budgets": []}, {"samples": 0}):
        with pytest.raises(UsageError, match="nothing to search"):
            search_schedule(model, output=file, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no planner 'magic'"):
        search_schedule(model, planner="magic", output=file)


def test_a_search_leaves_no_trace_on_a_pipeline_and_finds_the_same_again(
    tiny_model: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = open_pipeline(tiny_model("DiTTransformer2DModel"))
    before = pipeline.run(["1"], [0], Generation(steps=4), decode=False).latents
    monkeypatch.setattr("dcomp.recipes.schedule.open_pipeline", lambda *_, **__: pipeline)
    files = [tmp_path / "plans.json", tmp_path / "again.json"]
    for file in files:
        search_schedule(pipeline.source, budgets=("2x",), output=file, steps=6, samples=1)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(before, pipeline.run(["1"], [0], Generation(steps=4), decode=False).latents)
    modules: list[Any] = [*pipeline.denoiser.modules()]
    assert not any("_diffusers_hook" in vars(module) for module in modules)


def test_an_open_pipeline_follows_a_plan_until_it_is_stopped(
    searched: tuple[Path, ScheduleResult], tiny_model: Models
) -> None:
    file, _ = searched
    pipe = DiffusionPipeline.from_pretrained(tiny_model(UNET))
    pipe.set_progress_bar_config(disable=True)

    def picture(steps: int = STEPS) -> Any:
        return pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images

    whole, shorter = picture(), picture(STEPS - 3)
    plan = dcomp.follow_plan(pipe, f"{file}:1.6x")
    fast = picture()
    assert not plan.stats.fallbacks
    assert plan.stats.peak_bytes > 0
    assert not np.array_equal(fast, whole)
    assert np.array_equal(fast, picture())
    with pytest.raises(PlanError, match="follows a plan already"):
        dcomp.follow_plan(pipe, f"{file}:1.25x")
    assert np.array_equal(picture(STEPS - 3), shorter)  # steps that the plan does not know compute
    assert plan.stats.fallbacks
    plan.stop()
    plan.stop()
    assert np.array_equal(picture(), whole)
    with dcomp.follow_plan(pipe, f"{file}:1.6x"):
        assert np.array_equal(picture(), fast)
    assert np.array_equal(picture(), whole)
    assert not any("_diffusers_hook" in vars(module) for module in pipe.unet.modules())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(PlanError, match="DDIMScheduler"):
        dcomp.follow_plan(pipe, f"{file}:1.6x")


def test_a_denoiser_alone_follows_a_plan_when_its_caller_says_where_steps_end(
    searched: tuple[Path, ScheduleResult], tiny_model: Models, tiny_checkpoint: Models
) -> None:
    file, _ = searched
    pipeline = open_pipeline(tiny_model(UNET))
    unet, scheduler = pipeline.denoiser, DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(2, 1, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))

    def sample(x: torch.Tensor, end_step: Callable[[], None], contexts: int = 1) -> torch.Tensor:
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                found = [unet(x + context, timestep).sample for context in range(contexts)]
            x = scheduler.step(found[0], timestep, x).prev_sample
            end_step()
        return x

    whole = sample(noise[0], lambda: None)
    plan = dcomp.follow_plan(unet, f"{file}:1.6x", pipeline.source)
    with plan.trajectory() as end_step:
        fast = sample(noise[0], end_step)
    assert not torch.equal(fast, whole)
    with plan.trajectory() as end_step:
        sample(noise[1], end_step, contexts=2)
    with plan.trajectory() as end_step:
        assert torch.equal(sample(noise[0], end_step, contexts=2), fast)
    assert not plan.stats.fallbacks
    predicted = sum(bool(row) for row in plan.plan.plan.actions)
    assert sum(plan.stats.predicted.values()) == predicted * (1 + 2 + 2)
    plan.stop()
    assert torch.equal(sample(noise[0], lambda: None), whole)
    pipe = pipeline.pipe
    pipe.scheduler = None
    with pytest.raises(UsageError, match="no scheduler"):
        dcomp.follow_plan(pipe, f"{file}:1.6x", pipeline.source)
    with pytest.raises(UsageError, match="denoiser does not know its folder"):
        dcomp.follow_plan(unet, f"{file}:1.6x")
    with pytest.raises(PlanError, match="other weights"):
        dcomp.follow_plan(unet, f"{file}:1.6x", tiny_checkpoint(UNET))


def test_adapters_that_plans_do_not_know_are_named(tiny_model: Models, tmp_path: Path) -> None:
    folder, file = tiny_model("UNet2DConditionModel"), tmp_path / "plans.json"
    pipeline = open_pipeline(folder)
    trials = Trials(pipeline, (), ["x"], [0], Generation(steps=4, height=16, width=16))
    plan = trials.plan([{}, {WHOLE: "reuse"}, {}, {}], [Zone(WHOLE, "output", ("",))])
    plans = (MeasuredPlan("2x", plan, 2.0, None, 0.1, 20.0),)
    PlanSet(trajectory_of(folder, pipeline, 4), plans).write(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcomp.follow_plan(pipeline.pipe, f"{file}:2x", folder).stop()
    pipeline.pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "ink")
    with pytest.warns(UserWarning, match=r"adapters \(ink\)"):
        dcomp.follow_plan(pipeline.pipe, f"{file}:2x", folder).stop()


def test_where_plans_cannot_go_is_said_before_the_search(tiny_model: Models, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "missing" / "plans.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            search_schedule(tiny_model(UNET), output=output)
    assert list(tmp_path.iterdir()) == []


def test_the_ladder_compares_bits_and_plans_alone_and_together_with_the_original(
    checkpoint: Path, tiny_model: Models
) -> None:
    original = tiny_model(UNET)
    options: dict[str, Any] = {"budgets": ("4calls",), "planner": "uniform", "steps": STEPS, "samples": 2}
    result = search_schedule(checkpoint, against=original, **options)
    alone = search_schedule(original, output=checkpoint / "plans.json", **options)
    (rung,) = result.ladder
    settings, indices = Generation(steps=STEPS), range(700_000, 700_002)
    whole = open_pipeline(original).run(["", ""], indices, settings)
    assert whole.images is not None

    def psnr(model: Path, plan: Any = None) -> float:
        pipeline = open_pipeline(model)
        with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) if plan else nullcontext():
            made = pipeline.run(["", ""], indices, settings).images
        assert made is not None
        return float(decibels(mean_squared_errors(whole.images, made)).mean())

    own, theirs = result.plans[0].plan, alone.plans[0].plan
    assert rung.name == "4calls"
    assert rung.bits_alone == pytest.approx(psnr(checkpoint), abs=0.01)
    assert rung.cache_alone == pytest.approx(psnr(original, theirs), abs=0.01)
    assert rung.naive == pytest.approx(psnr(checkpoint, theirs), abs=0.01)
    assert rung.joint == pytest.approx(psnr(checkpoint, own), abs=0.01)
    assert result.to_dict()["ladder"][0]["joint"] == rung.joint
    assert search_schedule(checkpoint, **options).ladder == ()


def test_expected_errors_are_compared_with_measured_ones(searched: tuple[Path, ScheduleResult]) -> None:
    additivity = searched[1].additivity
    assert additivity is not None
    assert additivity.plans >= 3
    assert additivity.rank_correlation is not None
    assert additivity.rank_correlation > 0.5
    assert 0.2 < additivity.median_ratio < 5


@pytest.mark.parametrize(
    ("inner", "names"), [(28, ["all", "wide", "inner", "other", "many"]), (24, ["all", "wide", "other", "many"])]
)
def test_of_zones_within_one_another_that_save_about_the_same_one_is_searched(inner: int, names: list[str]) -> None:
    # Hundredths of a call that are computed then.
    left = {WHOLE: 0, "wide": 5, "inner": inner, "other": inner, "many": 6}
    zones = [
        Zone(WHOLE, "output", ("",)),
        Zone("wide", "output", ("b",), ("a", "c", "d")),
        Zone("inner", "output", ("c",), ("d",)),
        Zone("other", "output", ("e",)),
        Zone("many", "output", ("b", "c")),
    ]
    prices = SimpleNamespace(macs=lambda chosen=(): sum(left[name] for name in chosen) if chosen else 100)
    assert [zone.name for zone in different_zones(zones, prices)] == names  # type: ignore[arg-type]


class MadeUpJudge:
    """Knows the decibels of every plan, which is a number, on each of eight pictures."""

    samples = 8

    def __init__(self, decibels: dict[int, list[float]]) -> None:
        self._decibels = decibels
        self.followed: list[tuple[int, range]] = []

    def plan(self, schedule: Schedule) -> int:
        return int(schedule.cost)

    def judge(self, plan: int, places: range) -> Distance:
        self.followed.append((plan, places))
        return Distance((0.1 * plan,) * len(places), tuple(self._decibels[plan][i] for i in places))

    def choose(self, count: int) -> tuple[MeasuredPlan, Additivity | None]:
        choice = PlanChoice(None, SimpleNamespace(macs_of=lambda _: 0.5), self)  # type: ignore[arg-type]
        return choice.best("2x", [Schedule((), float(i), 0.1) for i in range(count)])[0], choice.additivity


FIRST, SECOND, LAST = range(2), range(2, 4), range(4, 8)


def test_most_proposals_are_out_after_a_few_pictures() -> None:
    """Six proposals; four are left after two pictures, two after four, and the last four tell which one is best."""
    first = [28.0, 31.0, 30.0, 29.0, 27.9, 10.0]
    second = [28.0, 27.0, 28.5, 31.0, 40.0, 10.0]
    last = [40.0, 40.0, 32.0, 31.0, 40.0, 10.0]
    made_up = {i: [first[i]] * 2 + [second[i]] * 2 + [last[i]] * 4 for i in range(6)}
    judge = MadeUpJudge(made_up)
    best, additivity = judge.choose(6)
    halves = [*((i, FIRST) for i in range(6)), *((i, SECOND) for i in (1, 2, 3, 0)), (3, LAST), (2, LAST)]
    assert judge.followed == halves
    assert (best.plan, best.psnr, best.error) == (2, fmean(made_up[2]), pytest.approx(0.2))
    assert best.speedup == 2.0
    assert additivity == Additivity(2, None, pytest.approx(3.0))


def test_proposals_that_are_far_behind_the_best_are_followed_no_further() -> None:
    judge = MadeUpJudge({0: [20.0] * 8, 1: [33.5, 34.5, *[32.0] * 6], 2: [30.0] * 8, 3: [31.5, 31.5, *[20.0] * 6]})
    best, _ = judge.choose(4)
    assert judge.followed == [*((i, FIRST) for i in range(4)), (1, SECOND), (3, SECOND), (1, LAST)]
    assert (best.plan, best.psnr) == (1, pytest.approx(32.5))


@pytest.mark.parametrize("expected", [0.1, 0.04])
def test_plans_without_an_expectation_are_followed_where_expectations_do_not_hold(expected: float) -> None:
    judge = MadeUpJudge({1: [30.0] * 8, 5: [40.0] * 8})
    choice = PlanChoice(None, SimpleNamespace(macs_of=lambda _: 0.5), judge)  # type: ignore[arg-type]
    proposed = [Schedule((), 1.0, expected), Schedule((), 5.0, None)]
    best, _ = choice.best("2x", proposed)
    assert best.plan == (1 if expected == 0.1 else 5), "0.1 was measured, and twice as much as expected will do"
    alone, _ = choice.best("2x", proposed[1:])
    assert (alone.plan, alone.expected_error) == (5, None)


@pytest.mark.parametrize("better", [True, False])
def test_corrections_are_kept_where_pictures_that_they_were_not_fitted_to_are_better(better: bool) -> None:
    judge = MadeUpJudge({0: [30.0] * 8, 7: [30.5 if better else 29.5] * 8})
    prices = SimpleNamespace(macs_of=lambda _: 0.5, seconds_of=lambda _: 0.5)
    choice = PlanChoice(None, prices, judge, lambda plan: 7)  # type: ignore[arg-type, return-value]
    plain, seen = choice.best("2x", [Schedule((), 0.0, 0.1)])
    kept, _ = choice._corrected(lambda plan: 7, plain, seen)  # type: ignore[arg-type, return-value]
    assert (kept.plan, kept.psnr, kept.error) == ((7, 30.5, pytest.approx(0.7)) if better else (0, 30.0, 0.0))
    notes = ["At 2x corrections make pictures no better (29.5 dB, 30.0 dB without them), and are left out."]
    assert choice.notes == ([] if better else notes)


def test_plans_that_another_one_beats_in_both_are_left_out() -> None:
    choice = PlanChoice(None, None, MadeUpJudge({}))  # type: ignore[arg-type]
    figures = {"1.5x": (1.5, 47.0), "2x": (2.0, 43.0), "2.5x": (2.5, 45.0), "2.4calls": (2.4, 45.0), "4x": (4.0, 44.0)}
    for name, (speedup, psnr) in figures.items():
        choice.plans.append(MeasuredPlan(name, None, speedup, None, 0.1, psnr))  # type: ignore[arg-type]
        choice.faster[name], choice.fewer_steps[name], choice.cache_bytes[name] = speedup, (3, 20.0), 1
    choice.faster["2.5x"] = 2.3  # here it is slower than it should be
    choice.leave_out_beaten()
    assert [plan.name for plan in choice.plans] == ["1.5x", "2.5x", "2.4calls", "4x"]
    assert choice.faster.keys() == choice.fewer_steps.keys() == choice.cache_bytes.keys() == figures.keys() - {"2x"}
    assert choice.notes == ["At 2x the plan of 2.5x is better, and saves more (45.0 dB, 43.0 dB)."]


@pytest.mark.slow
def test_a_search_asked_for_corrections_has_them_or_says_why_not(tiny_model: Models, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budgets": ("1.5x",), "steps": 6, "samples": 2, "output": tmp_path / "plans.json"}
    result = search_schedule(tiny_model("UNet2DModel"), correct="scale", **options)
    (plan,) = result.to_dict()["plans"]
    assert (plan["corrected_calls"] > 0) != any("corrections make" in note for note in result.notes)
    (read,) = PlanSet.read(tmp_path / "plans.json").plans
    assert len(read.plan.corrections) == plan["corrected_calls"]


def test_the_joint_planner_proposes_plain_plans_too_and_measures_nothing_for_them() -> None:
    costs = GapCosts(STEPS, 0, {WHOLE: [{}] * STEPS}, (1.0,) * STEPS)
    drifts = partial(pytest.fail, "drifts were measured")
    task = PlanningTask(STEPS, (WHOLE, "deep1"), (), lambda: costs, drifts, lambda *_: [])
    proposed = PLANNERS["joint"](task, {WHOLE: 0.0, "deep1": 0.5}, 4.0)
    plain = {name: PLANNERS[name](task, {WHOLE: 0.0}, 4.0) for name in ("uniform", "power", "taylor", "hermite")}
    assert proposed == [plan for plans in plain.values() for plan in plans]
    assert len({str(plan.rows) for plan in proposed}) == 6 == len(proposed)
    assert all(sum(not row for row in plan.rows) == 4 == plan.cost for plan in proposed)
    assert len(PLANNERS["joint"](task, {WHOLE: 0.0, "deep1": 0.5}, 1.0)) == 1  # all of them reuse the first call


@pytest.mark.parametrize(
    ("unit", "zone", "price"),
    [
        ("2x", "fine", 0.2),
        ("2x", "slow", 0.5),
        ("2x", "ff", 0.2),
        ("9GMACs", "slow", 0.5),
        ("9ms", "fine", 0.25),
        ("9ms", "ff", 0.9),
        ("5calls", "slow", 0.0),
    ],
)
def test_a_zone_that_takes_longer_than_its_products_costs_its_time(unit: str, zone: str, price: float) -> None:
    seconds = {"fine": 0.25, "slow": 0.5, "ff": 0.9}
    prices = SimpleNamespace(macs=lambda chosen=(): 20 if chosen else 100, seconds=lambda chosen: seconds[chosen[0]])
    task = SimpleNamespace(modules=("ff",))
    choice = PlanChoice(task, prices, MadeUpJudge({}))  # type: ignore[arg-type]
    assert choice._price(zone, Budget.parse(unit).measure) == price
