import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.pipeline import Generation, NotFiniteError, OpenPipeline, open_pipeline, picture_generator
from tests.support import tiny

UNET, DIT = "UNet2DModel", "DiTTransformer2DModel"
SD, SD3, FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
PROMPTS = {"text": ["a cat", "a dog", "a tree"], "class": ["1", "207", "golden retriever"], "unconditional": [""] * 3}
Opener = Callable[..., OpenPipeline]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Open a tiny pipeline, the same object each time unless a fresh one or other options are asked for."""
    folder, shared = tmp_path_factory.mktemp("models"), {}

    def open_one(name: str, fresh: bool = False, **options: object) -> OpenPipeline:
        if name not in shared:
            shared[name] = open_pipeline(tiny.save_tiny_pipeline(name, folder / name))
        return open_pipeline(folder / name, **options) if fresh or options else shared[name]

    return open_one


def settings(name: str, **changes: object) -> Generation:
    size = {"height": 16, "width": 16} if name in tiny.TEXT_NAMES else {}
    return Generation(**({"steps": 3, "batch_size": 2} | size | changes))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_architecture_opens_and_makes_pictures(name: str, opened: Opener) -> None:
    pipeline = opened(name)
    assert pipeline.denoiser_name == ("transformer" if name in tiny.TRANSFORMER_NAMES else "unet")
    assert pipeline.denoiser is getattr(pipeline.pipe, pipeline.denoiser_name)
    assert not pipeline.denoiser.training
    steps: list[tuple[int, int]] = []
    made = pipeline.run(
        PROMPTS[pipeline.kind],
        range(3),
        settings(name),
        on_step=lambda done, total, latents: steps.append((done, total)),
        keep_steps=True,
    )
    side = 8 if name == UNET else 16
    assert made.images is not None
    assert made.images.shape == (3, 3, side, side)
    assert made.images.dtype == torch.float32
    assert 0 <= made.images.min() < made.images.max() <= 1
    assert steps == [(done, 6) for done in range(1, 7)]  # two batches of three steps
    assert made.step_latents is not None
    assert len(made.step_latents) == 3
    assert torch.equal(made.step_latents[-1], made.latents)
    assert len(made.latents) == 3


@pytest.mark.parametrize("name", tiny.NAMES)
def test_pictures_are_those_of_plain_diffusers(name: str, opened: Opener) -> None:
    pipeline = opened(name)
    prompts = PROMPTS[pipeline.kind][:2]
    ours = pipeline.run(prompts, [4, 9], settings(name, guidance=None)).images
    plain = tiny.load_pipeline(pipeline.source)
    conditions = {"text": {"prompt": prompts}, "class": {"class_labels": [1, 207]}, "unconditional": {"batch_size": 2}}
    options = tiny.pipeline_options(name)
    options.pop("max_sequence_length", None)
    generators = [picture_generator(0, index) for index in (4, 9)]
    theirs = plain(
        num_inference_steps=3, generator=generators, output_type="pt", **conditions[pipeline.kind], **options
    ).images
    assert torch.equal(ours, theirs.float())


def test_classes_are_those_with_names(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = opened(DIT)
    assert list(pipeline.classes) == [0, 1, 207]
    monkeypatch.setattr(pipeline.pipe, "labels", {"cat": 3, "kitten": 3, "too many": 10**6})
    assert list(pipeline.classes) == [3]
    monkeypatch.setattr(pipeline.pipe, "labels", {})
    assert pipeline.classes == range(pipeline.denoiser.config.num_embeds_ada_norm)
    assert not opened(UNET).classes


@pytest.mark.parametrize("name", [UNET, SD, DIT, FLUX])
def test_batches_and_shards_change_no_noise(name: str, opened: Opener) -> None:
    # DiT's pipeline gives the scheduler no generator: with a noisy scheduler the wrapper must.
    pipeline = opened(name) if name == FLUX else opened(name, scheduler="DDPM")
    prompts = PROMPTS[pipeline.kind]
    together = pipeline.run(prompts, range(3), settings(name, batch_size=3), decode=False).latents
    apart = [pipeline.run([prompts[i]], [i], settings(name, batch_size=1), decode=False).latents[0] for i in (2, 0, 1)]
    for i, latents in zip((2, 0, 1), apart, strict=True):
        assert torch.allclose(latents, together[i], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_seed_and_index_make_the_noise(opened: Opener) -> None:
    pipeline = opened(SD)

    def latents(seed: int, index: int) -> Tensor:
        return pipeline.run(["a"], [index], settings(SD, seed=seed), decode=False).latents

    base = latents(0, 1)
    assert torch.equal(base, latents(0, 1))
    assert not torch.equal(base, latents(0, 2))
    assert not torch.equal(base, latents(1, 1))
    assert picture_generator(1, 11).initial_seed() != picture_generator(11, 1).initial_seed()


def test_running_leaves_the_global_generator_alone(opened: Opener) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    opened(DIT, scheduler="DDPM").run(["1"], [0], settings(DIT))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", [SD, DIT, FLUX])
def test_without_decoding_the_decoder_does_not_run(name: str, opened: Opener) -> None:
    pipeline = opened(name, fresh=True)
    prompts = PROMPTS[pipeline.kind]
    decoded = pipeline.run(prompts, range(3), settings(name))
    calls: list[int] = []
    decode = pipeline.pipe.vae.decode
    pipeline.pipe.vae.decode = lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs)
    made = pipeline.run(prompts, range(3), settings(name), decode=False)
    assert calls == []
    assert made.images is None
    assert torch.equal(made.latents, decoded.latents)


@pytest.mark.parametrize("decode", [True, False])
def test_a_run_leaves_no_trace_even_when_it_is_interrupted(decode: bool, opened: Opener) -> None:
    pipeline, clock = opened(SD), StepClock()
    hooks = dict(pipeline.denoiser._forward_hooks), dict(pipeline.denoiser._forward_pre_hooks)

    def interrupt(done: int, total: int, latents: Tensor) -> None:
        if done == 2:
            raise KeyboardInterrupt

    pipeline.run(["a"], [0], settings(SD), decode=decode, clock=clock)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(["a"], [0], settings(SD), decode=decode, clock=clock, on_step=interrupt)
    assert (clock.trajectory, clock.call) == (1, 2)
    assert (dict(pipeline.denoiser._forward_hooks), dict(pipeline.denoiser._forward_pre_hooks)) == hooks
    assert "step" not in vars(pipeline.scheduler)
    assert "set_timesteps" not in vars(pipeline.scheduler)


def test_another_scheduler_is_taken_by_name(opened: Opener) -> None:
    for name in ("HeunDiscreteScheduler", "heundiscrete"):
        pipeline = opened(SD, scheduler=name)
        assert type(pipeline.scheduler) is HeunDiscreteScheduler
        assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    clock = StepClock()
    pipeline.run(["a"], [0], settings(SD), decode=False, clock=clock)
    assert (clock.call, clock.step) == (5, 2)
    assert opened(SD3, scheduler="FlowMatchHeunDiscrete").run(["a"], [0], settings(SD3), clock=clock).images is not None
    assert (clock.trajectory, clock.call, clock.step) == (1, 5, 2)


@pytest.mark.parametrize(
    ("name", "scheduler", "hint"),
    [
        (SD, "EulerDiscreet", "did you mean EulerDiscreteScheduler"),
        (SD, "zzzz", "DDIMScheduler"),
        (SD, "FlowMatchEulerDiscreteScheduler", "did you mean"),
        (FLUX, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"),
        (FLUX, "UNet2DModel", "FlowMatch"),
    ],
)
def test_an_unknown_or_unfit_scheduler_is_refused_with_a_hint(
    name: str, scheduler: str, hint: str, opened: Opener
) -> None:
    with pytest.raises(UsageError, match=hint):
        opened(name, scheduler=scheduler)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        (SD, {"steps": 0}, "0 steps.*has 1000"),
        (SD, {"steps": 1001}, "1001 steps"),
        (SD, {"batch_size": 0}, "batch_size is 0"),
        (SD, {"height": -8}, "height is -8"),
        (SD, {"height": 17}, "refuses these settings.*divisible"),
        (DIT, {"height": 16}, "no height to set"),
        (UNET, {"guidance": 2.0}, "no guidance to set"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_call(
    name: str, changes: dict, problem: str, opened: Opener
) -> None:
    pipeline, calls = opened(name), []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    with hook, pytest.raises(UsageError, match=problem):
        pipeline.run(PROMPTS[pipeline.kind], range(3), settings(name, **changes))
    assert calls == []


@pytest.mark.parametrize("prompt", ["1000", "-1", "goldfisch", "1.5", "", "9" * 5000])
def test_an_unknown_class_is_refused(prompt: str, opened: Opener) -> None:
    with pytest.raises(UsageError, match="did you mean 'goldfish'" if prompt == "goldfisch" else "0 to 999"):
        opened(DIT).run(["1", prompt], [0, 1], settings(DIT))


def test_no_prompts_are_refused(opened: Opener) -> None:
    with pytest.raises(UsageError, match="nothing to make"):
        opened(SD).run([], [], settings(SD))


def test_a_prediction_that_is_not_finite_names_its_step(opened: Opener) -> None:
    pipeline = opened(SD, fresh=True)
    count: list[int] = []

    def poison(module: nn.Module, args: object, output: tuple[Tensor]) -> tuple[Tensor]:
        count.append(1)
        return (output[0] * (float("nan") if len(count) == 2 else 1),)

    pipeline.denoiser.register_forward_hook(poison)
    with pytest.raises(NotFiniteError, match=r"prediction .*call 1, step 1, timestep 334"):
        pipeline.run(["a"], [0], settings(SD))


def test_latents_that_overflow_name_their_step(opened: Opener) -> None:
    pipeline = opened(SD, fresh=True)
    pipeline.denoiser.register_forward_hook(lambda module, args, output: (torch.full_like(output[0], 3e38),))
    with pytest.raises(NotFiniteError, match=r"latents .*call 0, step 0, timestep 667"):
        pipeline.run(["a"], [0], settings(SD, guidance=1.0))


def test_pictures_blanked_by_a_safety_checker_are_told(opened: Opener) -> None:
    pipeline = opened(SD, fresh=True)
    pipeline.pipe.run_safety_checker = lambda image, device, dtype: (image, [False, True][: len(image)])
    assert pipeline.run(["a", "b", "c"], range(3), settings(SD)).blanked == (1,)


def test_the_fingerprint_is_that_of_the_weights_and_the_schedule(opened: Opener, tmp_path: Path) -> None:
    one, two = opened(SD), opened(SD, fresh=True)
    assert one.fingerprint() == two.fingerprint()
    shutil.copytree(one.source, tmp_path / "copy")
    assert open_pipeline(tmp_path / "copy").fingerprint() == one.fingerprint()
    assert opened(SD, scheduler="EulerDiscrete").fingerprint() != one.fingerprint()
    next(two.pipe.text_encoder.parameters()).data[0, 0] += 1e-3
    assert one.fingerprint() != two.fingerprint()


def test_the_denoiser_is_found_by_what_it_takes() -> None:
    pipe = DDPMPipeline(unet=tiny.tiny_denoiser(UNET), scheduler=DDPMScheduler())
    parts = pipe.components
    other = SimpleNamespace(components={"prior": parts["unet"], "scheduler": parts["scheduler"]})
    from dcomp.calibrate.components import find_denoiser

    assert find_denoiser(other) == "prior"
    other.components["prior_2"] = parts["unet"]
    with pytest.raises(UsageError, match=r"one denoiser.*prior, prior_2"):
        find_denoiser(other)
    with pytest.raises(UsageError, match="has: none"):
        find_denoiser(SimpleNamespace(components={"unet": nn.Linear(1, 1)}))


def test_a_pipeline_of_another_kind_is_refused_with_what_it_needs(opened: Opener) -> None:
    class Inpainting(StableDiffusionImg2ImgPipeline):
        def __call__(self, prompt: str, image: Tensor, mask: Tensor) -> None: ...

    pipe = Inpainting(**opened(SD).pipe.components, requires_safety_checker=False)
    with pytest.raises(UsageError, match="cannot make up: image, mask"):
        OpenPipeline(pipe, Path())


def test_a_device_that_is_not_there_is_refused(opened: Opener) -> None:
    with pytest.raises(UsageError, match="cannot be moved to the device nonsense"):
        opened(UNET, device="nonsense")


def test_missing_folders_are_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_pipeline(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        open_pipeline("./nowhere")


@pytest.mark.slow
def test_opening_prints_nothing(opened: Opener) -> None:
    code = (
        "import sys; from dcomp.calibrate.pipeline import open_pipeline, Generation; "
        "open_pipeline(sys.argv[1]).run(['a'], [0], Generation(steps=2, height=16, width=16))"
    )
    command = [sys.executable, "-P", "-c", code, str(opened(SD).source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    assert (done.stdout, done.stderr) == ("", "")
    assert json.loads((opened(SD).source / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_a_scheduler_that_the_pipeline_calls_otherwise_is_refused(tmp_path: Path) -> None:
    unet = tiny.tiny_denoiser("UNet2DModel")
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    pipeline = open_pipeline(tmp_path, scheduler="DPMSolverMultistepScheduler")
    with pytest.raises(UsageError, match=r"DPMSolverMultistepScheduler cannot sample in this pipeline.*'eta'"):
        pipeline.run([""], [0], Generation(steps=2))
    open_pipeline(tmp_path).run([""], [0], Generation(steps=2))
