"""Plans that run: against the pipeline without one, and against a run in which nothing is skipped but replaced."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch import Tensor, nn

from dcomp.cachequant.executor import CacheExecutor, CacheStats, following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan, PlanError
from dcomp.cachequant.tensors import leaves, like, map_tensors, parts_of, with_leaves
from dcomp.cachequant.zones import Zone, find_zones
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline, picture_generator
from dcomp.recipes.bench import record_calls
from tests.cachequant.conftest import prompts_of, settings_of
from tests.support.sweep import sweep

ARCHITECTURES = [
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
]
SD = "UNet2DConditionModel"
SCHEDULERS = [
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
]
STEPS = 6


def timesteps_of(pipeline: OpenPipeline, steps: int = STEPS) -> list[float]:
    """The timestep of every call of a trajectory, as the denoiser is told it."""
    clock, told = StepClock(), {}
    hook = pipeline.denoiser.register_forward_pre_hook(lambda *_: told.__setitem__(clock.call, clock.timestep))
    prompts = prompts_of(pipeline, 1)
    pipeline.run(prompts, [0], settings_of(pipeline, steps), decode=False, clock=clock)
    hook.remove()
    return [told[call] for call in range(len(told))]


def plan_of(
    pipeline: OpenPipeline, zones: Sequence[Zone], rows: dict[int, dict[str, str]], steps: int = STEPS
) -> CachePlan:
    timesteps = timesteps_of(pipeline, steps)
    actions = tuple(rows.get(call, {}) for call in range(len(timesteps)))
    return CachePlan(tuple(zones), tuple(timesteps), tuple(map(float, range(len(timesteps)))), actions)


def every_other(zone: str, calls: int, name: str = "reuse", first: int = 1) -> dict[int, dict[str, str]]:
    return {call: {zone: name} for call in range(first, calls, 2)}


def made(pipeline: OpenPipeline, plan: CachePlan | None = None, count: int = 2, steps: int = STEPS) -> Any:
    """Latents of a run with a plan, and what the executor counted."""
    settings = settings_of(pipeline, steps)
    prompts = prompts_of(pipeline, count)
    if plan is None:
        return pipeline.run(prompts, range(count), settings, decode=False).latents
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) as executor:
        latents = pipeline.run(prompts, range(count), settings, decode=False).latents
    return latents, executor.stats


@contextmanager
def replaced(pipeline: OpenPipeline, plan: CachePlan) -> Iterator[None]:
    """Run every module, and replace what zones return by hand: the plan in plain words, with nothing skipped."""
    call = {"now": -1, "trajectory": 0}
    store: dict[tuple[str, str, int], Any] = {}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        call["now"] = call["now"] + 1

    def output(zone: Zone, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            now = call["now"]
            if zone.name in plan.actions[now]:
                p = plan.predictions[now][zone.name]
                nodes = [leaves(store[zone.name, name, c]) for c in p.calls]
                sums = [sum(w * t for w, t in zip(p.weights, ts, strict=True)) for ts in zip(*nodes, strict=True)]
                return with_leaves(result, sums)
            store[zone.name, name, now] = map_tensors(torch.clone, result)
            return result

        return hook

    def residual(zone: Zone) -> tuple[Any, Any]:
        entered: dict[str, Tensor] = {}

        def first(module: nn.Module, args: Any, kwargs: Any) -> None:
            entered.update({name: kwargs.get(name, args[0] if args else None) for name, _ in zone.streams[0]})

        def last(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            now, parts = call["now"], parts_of(result)
            for name, place in zone.streams[-1]:
                if parts[place] is None:
                    continue
                if zone.name in plan.actions[now]:
                    p = plan.predictions[now][zone.name]
                    changes = (w * store[zone.name, name, c] for c, w in zip(p.calls, p.weights, strict=True))
                    parts[place] = entered[name] + sum(changes)
                else:
                    store[zone.name, name, now] = parts[place] - entered[name]
            return like(result, parts)

        return first, last

    with ExitStack() as stack:
        denoiser = pipeline.denoiser
        stack.callback(denoiser.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for zone in plan.zones:
            modules = [denoiser.get_submodule(name) for name in zone.predicted]
            if zone.kind == "residual":
                first, last = residual(zone)
                stack.callback(modules[0].register_forward_pre_hook(first, with_kwargs=True).remove)
                stack.callback(modules[-1].register_forward_hook(last, with_kwargs=True).remove)
            for name, module in zip(zone.predicted, modules, strict=True) if zone.kind == "output" else ():
                stack.callback(module.register_forward_hook(output(zone, name), with_kwargs=True).remove)
        yield


@pytest.fixture
def opened(folder_of: Callable[[str], Path]) -> Callable[..., OpenPipeline]:
    return lambda name, scheduler=None: open_pipeline(folder_of(name), scheduler=scheduler)


@pytest.fixture
def zones_of(recorded_call: Any) -> Callable[[str], dict[str, Zone]]:
    return lambda name: {zone.name: zone for zone in find_zones(*recorded_call(name))}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plan_that_computes_everything_changes_no_bit(name: str, opened: Any, zones_of: Any) -> None:
    pipeline = opened(name)
    before = made(pipeline)
    latents, stats = made(pipeline, plan_of(pipeline, [*zones_of(name).values()], {}))
    assert torch.equal(latents, before)
    assert not stats.fallbacks
    assert not stats.predicted
    assert stats.peak_bytes == 0


@pytest.mark.parametrize(
    "scheduler", sweep(SCHEDULERS, ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])
)
def test_every_scheduler_with_a_plan_that_computes_everything_and_one_that_does_not(
    scheduler: str, opened: Any, zones_of: Any
) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    pipeline.pipe.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    before = made(pipeline)
    chosen = [zones["all"], zones["deep1"]]
    latents, stats = made(pipeline, plan_of(pipeline, chosen, {}))
    assert torch.equal(latents, before)
    calls = len(timesteps_of(pipeline))
    # Four calls for each of the first three steps; and two for each but the last.
    assert calls == {"PNDMScheduler": STEPS + 9, "HeunDiscreteScheduler": 2 * STEPS - 1}.get(scheduler, STEPS)
    rows = {call: {"deep1": "reuse"} if call % 3 else {} for call in range(calls)} | {calls - 1: {"all": "linear"}}
    plan = plan_of(pipeline, chosen, {call: row for call, row in rows.items() if row})
    latents, stats = made(pipeline, plan)
    assert not stats.fallbacks
    with replaced(pipeline, plan):
        expected = made(pipeline)
    # Weights 1 and 2 - 1: the sums of both are the same sums.
    assert torch.equal(latents, expected)
    assert not torch.equal(latents, before)


class Told(nn.Module):
    """A denoiser whose prediction is a known function of the latents, the timestep and the text."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.config, self.add_embedding = denoiser.config, None
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.calls = 0
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> Any:
        self.calls += 1
        text = encoder_hidden_states.mean((1, 2), keepdim=True)[..., None]
        return (torch.sin(sample * 1.7 + text) * self.scale + timestep / 1000,)


def sampled(pipeline: OpenPipeline, plan: CachePlan, prompt: str) -> Tensor:
    """A sampler in plain words that shares nothing with the executor, its clock or the pipeline's own loop."""
    pipe, scheduler, settings = pipeline.pipe, pipeline.scheduler, settings_of(pipeline, STEPS)
    generator = picture_generator(settings.seed, 0)
    asked, empty = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt="")
    scheduler.set_timesteps(STEPS)
    shape = (1, pipeline.denoiser.config.in_channels, *[settings.height // pipe.vae_scale_factor] * 2)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    drawn = "generator" in inspect.signature(scheduler.step).parameters
    told: list[Tensor] = []
    for call, t in enumerate(scheduler.timesteps):
        if "all" in plan.actions[call]:
            weights = plan.predictions[call]["all"]
            both = sum(w * told[c] for c, w in zip(weights.calls, weights.weights, strict=True))
        else:
            both = pipeline.denoiser(scheduler.scale_model_input(torch.cat([x, x]), t), t, torch.cat([empty, asked]))[0]
        told.append(both)
        without, wanted = both.chunk(2)
        guided = without + pipe.guidance_scale * (wanted - without)
        x = scheduler.step(guided, t, x, **({"generator": [generator]} if drawn else {})).prev_sample
    return x


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@torch.no_grad()
def test_a_sampler_in_plain_words_makes_the_same_latents(scheduler: str, opened: Any, zones_of: Any) -> None:
    pipeline, zone = opened(SD), zones_of(SD)["all"]
    pipeline.pipe.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.pipe.unet = denoiser = Told(pipeline.denoiser)
    calls = len(timesteps_of(pipeline))
    rows = {call: {"all": "reuse" if call % 3 == 1 else "linear"} for call in range(2, calls) if call % 3}
    plan = plan_of(pipeline, [zone], rows)
    denoiser.calls = 0
    latents, stats = made(pipeline, plan, count=1)
    assert denoiser.calls == calls - len(rows)
    assert not stats.fallbacks
    expected = sampled(pipeline, plan, prompts_of(pipeline, 1)[0])
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)  # weighted sums in another order


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_zone_predicts_what_replacing_its_tensors_gives(name: str, opened: Any, zones_of: Any) -> None:
    pipeline = opened(name)
    for zone in zones_of(name).values():
        plan = plan_of(pipeline, [zone], {1: {zone.name: "reuse"}, 2: {zone.name: "reuse"}}, steps=4)
        latents, stats = made(pipeline, plan, steps=4)
        with replaced(pipeline, plan):
            expected = made(pipeline, steps=4)
        assert torch.equal(latents, expected), zone.name
        assert not stats.fallbacks, zone.name


@pytest.mark.parametrize("name", [SD, "SD3Transformer2DModel"])
@pytest.mark.parametrize("predictor", sweep(["linear", "quadratic", "taylor2", "hermite1"], ["quadratic"]))
def test_forecasts_are_the_weighted_sums_of_the_plan(name: str, predictor: str, opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(name), zones_of(name)
    zone = zones["deep2" if name == SD else "blocks[0:2]"]
    plan = plan_of(pipeline, [zone], {3: {zone.name: predictor}, 5: {zone.name: predictor}})
    latents, _ = made(pipeline, plan)
    with replaced(pipeline, plan):
        expected = made(pipeline)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_ran_and_what_was_kept_is_what_the_plan_says(name: str, opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(name), zones_of(name)
    # Modules of a zone that a wider one skips do not run, so that the counters of nested zones differ.
    chosen = [zones["all"], *list(zones.values())[1:3]]
    inner = chosen[1].name
    rows = {1: {inner: "reuse"}, 2: {"all": "linear"}, 4: {inner: "linear"}, 5: {"all": "reuse", inner: "reuse"}}
    plan = plan_of(pipeline, chosen, rows)
    _, stats = made(pipeline, plan)
    for zone in chosen:
        ran = {call for (call, own, _), times in stats.ran.items() if own == zone.name and times == 1}
        assert ran == {call for call in range(STEPS) if plan.computes(call, zone.name)}, zone.name
    predicted = {(call, zone) for call, zone, _ in stats.predicted}
    assert predicted == {(1, inner), (2, "all"), (4, inner), (5, "all")}
    sizes = {zone.name: bytes_kept(pipeline, zone) for zone in chosen}
    assert stats.peak_bytes == plan.peak_bytes(sizes)


def bytes_kept(pipeline: OpenPipeline, zone: Zone) -> int:
    """Size of what a zone's modules return, the streams that change for a residual zone."""
    found: list[int] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        parts = [parts_of(output)[place] for _, place in zone.streams[-1]] if zone.streams else leaves(output)
        pieces = {part.data_ptr(): part.nbytes for part in parts if part is not None}
        found.append(sum(pieces.values()) + 4 * sum(part is None for part in parts))

    names = zone.predicted if zone.kind == "output" else zone.predicted[-1:]
    hooks = [pipeline.denoiser.get_submodule(name).register_forward_hook(hook) for name in names]
    pipeline.run(prompts_of(pipeline, 2), range(2), settings_of(pipeline, 1), decode=False)
    for handle in hooks:
        handle.remove()
    return sum(found)


@pytest.mark.parametrize("name", [SD, "FluxTransformer2DModel"])
def test_detached_executors_leave_no_trace_and_can_come_again(name: str, opened: Any, zones_of: Any) -> None:
    pipeline = opened(name)

    def state() -> list[tuple[str, list[str], int, int]]:
        return [
            (path, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for path, module in pipeline.denoiser.named_modules()
        ]

    latents = made(pipeline)  # some pipelines make a registry of hooks for themselves
    before = state()
    plan = plan_of(pipeline, [*zones_of(name).values()], every_other("all", STEPS))
    first, _ = made(pipeline, plan)
    assert state() == before
    assert torch.equal(made(pipeline), latents)
    second, _ = made(pipeline, plan)
    assert torch.equal(first, second)
    assert state() == before


def test_runs_of_other_sizes_in_between_change_nothing(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["all"], zones["deep1"]], {1: {"deep1": "reuse"}, 3: {"all": "linear"}})
    alone, _ = made(pipeline, plan)
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) as executor:
        for batch, size in ((1, 16), (2, 32), (3, 16)):
            settings = settings_of(pipeline, STEPS, height=size, width=size)
            pipeline.run(prompts_of(pipeline, batch), range(batch), settings, decode=False)
        settings = settings_of(pipeline, STEPS)
        assert not executor.stats.fallbacks
        assert torch.equal(pipeline.run(prompts_of(pipeline), range(2), settings, decode=False).latents, alone)


def test_another_number_of_steps_computes_what_the_plan_does_not_know(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["all"]], every_other("all", STEPS))
    plain = made(pipeline, steps=4)
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) as executor:
        latents = pipeline.run(prompts_of(pipeline), range(2), settings_of(pipeline, 4), decode=False).latents
    shared = set(timesteps_of(pipeline, 4)) & set(plan.timesteps)
    assert sum(executor.stats.fallbacks.values()) == 4 - len({t for t in shared if plan.timesteps.index(t) % 2 == 0})
    assert torch.equal(latents, plain)


def test_a_trajectory_that_starts_late_computes_first(opened: Any, zones_of: Any) -> None:
    """As img2img does: the denoiser is driven by hand over the rear part of the schedule."""
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["all"]], {call: {"all": "reuse"} for call in (1, 2, 4, 5)})
    text = torch.randn(1, 5, pipeline.denoiser.config.cross_attention_dim)
    scheduler, outputs = pipeline.scheduler, []
    with following(pipeline.denoiser, scheduler, PlanGuide(plan)) as executor, torch.no_grad():
        scheduler.set_timesteps(STEPS)
        x = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps[2:]:
            outputs.append(pipeline.denoiser(x, t, encoder_hidden_states=text).sample)
            x = scheduler.step(outputs[-1], t, x).prev_sample
    assert executor.stats.fallbacks == {"the first call of a trajectory": 1}
    assert {call for call, *_ in executor.stats.ran} == {2, 3}
    assert torch.equal(outputs[1], outputs[2])
    assert torch.equal(outputs[2], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


def test_contexts_that_run_one_after_the_other_have_tensors_of_their_own(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["deep1"]], every_other("deep1", STEPS))
    width, scheduler = pipeline.denoiser.config.cross_attention_dim, pipeline.scheduler
    texts = torch.randn(2, 5, width)

    def run(contexts: list[int], guide: PlanGuide | None) -> tuple[list[Tensor], CacheStats]:
        outputs: dict[int, list[Tensor]] = {context: [] for context in contexts}
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with following(pipeline.denoiser, scheduler, guide or PlanGuide(plan)) as executor, torch.no_grad():
            scheduler.set_timesteps(STEPS)
            for step, t in enumerate(scheduler.timesteps):
                x = noise * (1 - 0.1 * step)  # the same for both, whatever is predicted
                for context in contexts:
                    text = texts[context : context + 1]
                    outputs[context].append(pipeline.denoiser(x, t, encoder_hidden_states=text).sample)
                scheduler.step(outputs[contexts[0]][-1], t, x)
        return [torch.cat(outputs[context]) for context in contexts], executor.stats

    (both_a, both_b), stats = run([0, 1], None)
    (alone_a,), _ = run([0], None)
    (alone_b,), _ = run([1], None)
    assert torch.equal(both_a, alone_a)
    assert torch.equal(both_b, alone_b)
    assert not stats.fallbacks
    assert {context for *_, context in stats.predicted} == {0, 1}


@pytest.mark.parametrize("name", [SD, "PixArtTransformer2DModel", "SD3Transformer2DModel"])
def test_one_context_of_guidance_runs_and_the_other_one_is_as_far_away_as_before(name: str, opened: Any) -> None:
    pipeline = opened(name)
    args, kwargs = record_calls(pipeline, prompts_of(pipeline), settings_of(pipeline, 2))[0]
    (zone,) = (z for z in find_zones(pipeline.denoiser, args, kwargs, guidance=True) if z.kind == "guidance")
    plan = plan_of(pipeline, [zone], {1: {zone.name: "reuse"}, 3: {zone.name: "linear"}})
    seen: list[Tensor] = []
    rows: list[int] = []
    block = next(m for m in pipeline.denoiser.modules() if isinstance(m, nn.Linear))
    hooks = [
        block.register_forward_hook(lambda module, args, output: rows.append(len(output))),
        pipeline.denoiser.register_forward_hook(lambda module, args, output: seen.append(leaves(output)[0])),
    ]
    latents, stats = made(pipeline, plan)
    for hook in hooks:
        hook.remove()
    assert not stats.fallbacks
    assert stats.predicted == Counter({(1, zone.name, 0): 1, (3, zone.name, 0): 1})
    assert not torch.equal(latents, made(pipeline))
    assert {len(output) for output in seen} == {4}
    apart = [second - first for first, second in (output.chunk(2) for output in seen)]
    torch.testing.assert_close(apart[1], apart[0], rtol=1e-4, atol=1e-5)
    slope = (plan.places[3] - plan.places[2]) / (plan.places[2] - plan.places[0])
    torch.testing.assert_close(apart[3], apart[2] + slope * (apart[2] - apart[0]), rtol=1e-4, atol=1e-5)
    assert [2 * count == max(rows) for count in rows] == [call in (1, 3) for call in range(STEPS)]
    # The same plan where the rows are two pictures and no contexts: everything computes, and it is counted.
    settings = settings_of(pipeline, STEPS, guidance=1.0)
    alone = pipeline.run(prompts_of(pipeline), range(2), settings, decode=False).latents
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)) as executor:
        other = pipeline.run(prompts_of(pipeline), range(2), settings, decode=False).latents
    assert torch.equal(other, alone)
    assert executor.stats.fallbacks == Counter({"no batch of two guidance contexts": 2})


def test_a_scheduler_that_is_not_there_leaves_timesteps_to_go_by(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["all"]], every_other("all", STEPS))
    text, clock = torch.randn(1, 5, pipeline.denoiser.config.cross_attention_dim), StepClock()
    x = torch.randn(1, 4, 8, 8)
    with clock.attach(pipeline.denoiser), CacheExecutor(pipeline.denoiser, PlanGuide(plan), clock) as executor:
        for _ in range(2):
            with torch.no_grad():
                first = pipeline.denoiser(x, plan.timesteps[0], encoder_hidden_states=text).sample
                second = pipeline.denoiser(x + 1, plan.timesteps[1], encoder_hidden_states=text).sample
            assert torch.equal(first, second)
    assert not executor.stats.fallbacks
    assert executor.stats.predicted[1, "all", 0] == 2


def test_gradients_and_failures_make_it_forget(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["deep1"]], every_other("deep1", STEPS))
    denoiser, clock = pipeline.denoiser, StepClock()
    text, x = torch.randn(1, 5, denoiser.config.cross_attention_dim), torch.randn(1, 4, 8, 8)
    with clock.attach(denoiser), CacheExecutor(denoiser, PlanGuide(plan), clock) as executor:
        denoiser(x, plan.timesteps[0], encoder_hidden_states=text)
        out = denoiser(x.requires_grad_(), plan.timesteps[1], encoder_hidden_states=text).sample
        assert executor.stats.fallbacks == {"gradients are asked for": 1}
        out.sum().backward()
        assert x.grad.abs().sum() > 0
        x = x.detach()
        denoiser(x, plan.timesteps[2], encoder_hidden_states=text)
        kept = executor.kept_bytes
        assert kept > 0
        with pytest.raises(RuntimeError):
            denoiser(x, plan.timesteps[3], encoder_hidden_states=torch.randn(1, 5, 3))
        assert executor.kept_bytes == 0
        denoiser(x, plan.timesteps[4], encoder_hidden_states=text)
        assert executor.kept_bytes == kept


def test_what_the_pipeline_does_to_a_prediction_does_not_reach_the_kept_one(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["all"]], {1: {"all": "reuse"}, 2: {"all": "reuse"}})
    text, x = torch.randn(1, 5, pipeline.denoiser.config.cross_attention_dim), torch.randn(1, 4, 8, 8)
    clock = StepClock()
    with (
        clock.attach(pipeline.denoiser),
        CacheExecutor(pipeline.denoiser, PlanGuide(plan), clock),
        torch.no_grad(),
    ):
        first = pipeline.denoiser(x, plan.timesteps[0], encoder_hidden_states=text).sample.clone()
        second = pipeline.denoiser(x, plan.timesteps[1], encoder_hidden_states=text).sample
        second.mul_(0)
        assert torch.equal(pipeline.denoiser(x, plan.timesteps[2], encoder_hidden_states=text).sample, first)


def test_a_second_plan_another_model_and_a_cache_of_diffusers_are_refused(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened(SD), zones_of(SD)
    plan = plan_of(pipeline, [zones["all"], zones["deep1"]], every_other("all", STEPS))
    with following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)):
        with (
            pytest.raises(PlanError, match="follows a plan already"),
            following(pipeline.denoiser, pipeline.scheduler, PlanGuide(plan)),
        ):
            pass
        assert not torch.equal(made_with(pipeline), made(opened(SD)))  # the first plan is still at work
    other = opened("DiTTransformer2DModel")
    with (
        pytest.raises(PlanError, match=r"no module 'up_blocks\.1\.attentions\.0'"),
        following(other.denoiser, other.scheduler, PlanGuide(plan)),
    ):
        pass
    assert all("_diffusers_hook" not in vars(module) for module in other.denoiser.modules())
    flux = opened("FluxTransformer2DModel")
    flux.denoiser.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with (
        pytest.raises(PlanError, match="disable_cache"),
        following(flux.denoiser, flux.scheduler, PlanGuide(plan)),
    ):
        pass


def made_with(pipeline: OpenPipeline) -> Tensor:
    return pipeline.run(prompts_of(pipeline), range(2), settings_of(pipeline, STEPS), decode=False).latents


def test_two_pipelines_in_one_process_do_not_meet(opened: Any, zones_of: Any) -> None:
    one, other = opened(SD), opened("DiTTransformer2DModel")
    plans = [
        plan_of(p, [zones_of(n)["all"]], every_other("all", STEPS))
        for p, n in ((one, SD), (other, "DiTTransformer2DModel"))
    ]
    alone = [made(pipeline, plan)[0] for pipeline, plan in zip((one, other), plans, strict=True)]
    with (
        following(one.denoiser, one.scheduler, PlanGuide(plans[0])),
        following(other.denoiser, other.scheduler, PlanGuide(plans[1])),
    ):
        together = [made_with(other), made_with(one)]
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[0], alone[1])


def test_blocks_may_be_compiled(opened: Any, zones_of: Any) -> None:
    pipeline, zones = opened("DiTTransformer2DModel"), zones_of("DiTTransformer2DModel")
    plan = plan_of(pipeline, [zones["blocks[1:2]"]], every_other("blocks[1:2]", STEPS))
    expected, _ = made(pipeline, plan)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for block in pipeline.denoiser.transformer_blocks:
        block.compile(backend="aot_eager")
    latents, stats = made(pipeline, plan)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert len(stats.predicted) == STEPS // 2
    counters = torch._dynamo.utils.counters
    compiled = counters["stats"]["unique_graphs"]
    # One graph of each block; the first reads what the patches are made of, which lies otherwise in memory.
    assert compiled == len(pipeline.denoiser.transformer_blocks)
    assert all("_ZoneHook" in reason for reason in counters["graph_break"])  # none within a block
    again, _ = made(pipeline, plan)
    assert torch.equal(again, latents)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zone"), [("DiTTransformer2DModel", "blocks[1:2]"), (SD, "deep2"), (SD, "all")])
def test_a_whole_denoiser_may_be_compiled(name: str, zone: str, opened: Any, zones_of: Any) -> None:
    pipeline = opened(name)
    plan = plan_of(pipeline, [zones_of(name)[zone]], every_other(zone, STEPS))
    expected, _ = made(pipeline, plan)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    pipeline.denoiser.compile(backend="aot_eager")
    latents, stats = made(pipeline, plan)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert len(stats.predicted) == STEPS // 2
    assert not stats.fallbacks
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again, _ = made(pipeline, plan)
    assert torch.equal(again, latents)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def adapted(denoiser: Any) -> None:
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def offloaded(denoiser: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(denoiser, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize(
    ("name", "change"),
    [(SD, adapted), (SD, offloaded), ("SD3Transformer2DModel", adapted), ("DiTTransformer2DModel", offloaded)],
)
def test_plans_go_with_adapters_and_offloaded_layers(
    name: str, change: Callable[[Any], None], folder_of: Callable[[str], Path], zones_of: Any
) -> None:
    pipeline, zones = open_pipeline(folder_of(name)), zones_of(name)
    untouched = made(pipeline)
    change(pipeline.denoiser)
    before = made(pipeline)
    assert torch.equal(before, untouched) == (change is offloaded)
    zone = zones["deep1" if name == SD else "blocks[1:2]"]
    plan = plan_of(pipeline, [zones["all"], zone], {1: {zone.name: "reuse"}, 3: {"all": "reuse"}, 4: {"all": "linear"}})
    latents, stats = made(pipeline, plan)
    with replaced(pipeline, plan):
        expected = made(pipeline)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert not stats.fallbacks
    assert not torch.equal(latents, before)
    assert torch.equal(made(pipeline), before)
