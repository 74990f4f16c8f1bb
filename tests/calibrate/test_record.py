import inspect
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcomp import DcompError
from dcomp.calibrate.calibration_set import SCHEMA, sha256_of_json
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline, prediction_of
from dcomp.calibrate.record import CalibrationError, CalibrationSet, record_calibration_set, spread
from dcomp.calibrate.safetensors_file import ModelError
from dcomp.calibrate.sampling import Sampling
from tests.support import tiny

UNET, SD, DIT = "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"
PROMPTS = {"text": ["a cat", "a dog", "a tree"], "class": ["1", "207", "7"], "unconditional": [""] * 3}
CONTEXTS = {UNET: ("uncond",), DIT: ("cond", "uncond"), "FluxTransformer2DModel": ("cond",)}
Opener = Callable[..., OpenPipeline]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Open a tiny pipeline, the same object each time unless a fresh one is asked for."""
    folder, shared = tmp_path_factory.mktemp("models"), {}

    def open_one(name: str, fresh: bool = False) -> OpenPipeline:
        if name not in shared:
            shared[name] = open_pipeline(tiny.save_tiny_pipeline(name, folder / name))
        return open_pipeline(folder / name) if fresh else shared[name]

    return open_one


def settings(name: str, **changes: Any) -> Generation:
    size = {"height": 16, "width": 16} if name in tiny.TEXT_NAMES else {}
    return Generation(**({"steps": 6, "batch_size": 2} | size | changes))


def record(pipeline: OpenPipeline, folder: Path, name: str = SD, **options: Any) -> CalibrationSet:
    changes = {key: options.pop(key) for key in ("steps", "batch_size", "seed", "guidance") if key in options}
    prompts = options.pop("prompts", PROMPTS[pipeline.kind])
    return record_calibration_set(pipeline, prompts, settings(name, **changes), folder, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_recorded_call_replays_bit_for_bit(name: str, opened: Opener, tmp_path: Path) -> None:
    pipeline = opened(name)
    recorded = record(pipeline, tmp_path, name, max_calls=3)
    calls = list(recorded.calls())
    assert len(calls) == len(recorded) == 6  # two batches, three calls each
    assert [call.trajectory for call in calls] == [0, 0, 0, 1, 1, 1]
    assert [call.call for call in calls] == [call.step for call in calls] == [0, 3, 5] * 2
    assert len(recorded.timesteps) == 3
    assert len(recorded.all_timesteps) == 6
    assert [call.timestep for call in calls] == list(recorded.timesteps) * 2
    for call in calls:
        assert call.contexts == CONTEXTS.get(name, ("uncond", "cond"))
        with torch.no_grad():
            assert torch.equal(prediction_of(pipeline.denoiser(*call.args, **call.kwargs)), call.output)


def test_what_is_recorded_is_what_the_pipeline_passed(opened: Opener, tmp_path: Path) -> None:
    pipeline = opened("FluxTransformer2DModel")
    passed: list[tuple[Any, Any]] = []
    hook = pipeline.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: passed.append((args, dict(kwargs))), with_kwargs=True
    )
    recorded = record(pipeline, tmp_path, "FluxTransformer2DModel", max_calls=6, prompts=["a"])
    hook.remove()
    for (args, kwargs), call in zip(passed, recorded.calls(), strict=True):
        assert args == call.args == ()
        assert kwargs.keys() == call.kwargs.keys()
        for key, value in kwargs.items():
            other = call.kwargs[key]
            assert type(value) is type(other)
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value, other)
            else:
                assert value == other


def test_equal_tensors_of_a_chunk_are_stored_once(opened: Opener, tmp_path: Path) -> None:
    recorded = record(opened(SD), tmp_path, max_calls=6, prompts=["a", "b"])
    embeddings = [call.kwargs["encoder_hidden_states"] for call in recorded.calls()]
    assert len(embeddings) == 6
    assert len({tensor.data_ptr() for tensor in embeddings}) == 1
    latents = [call.args[0] for call in recorded.calls()]
    assert recorded.nbytes < embeddings[0].nbytes + 6 * 2 * latents[0].nbytes + 12_000


def test_the_hash_is_that_of_the_contents(opened: Opener, tmp_path: Path) -> None:
    one, two = record(opened(SD), tmp_path / "a"), record(opened(SD), tmp_path / "b")
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1, 1))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert one.hash == two.hash == CalibrationSet.open(tmp_path / "b").hash
    assert record(opened(SD), tmp_path / "c", seed=1).hash != one.hash
    assert record(opened(SD), tmp_path / "d", prompts=["a cat", "a dog", "a bee"]).hash != one.hash


def test_a_finished_set_is_not_recorded_again(opened: Opener, tmp_path: Path) -> None:
    first = record(opened(SD), tmp_path)
    before, calls = files(tmp_path), []
    pipeline = opened(SD, fresh=True)
    pipeline.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    assert record(pipeline, tmp_path).hash == first.hash
    assert (calls, files(tmp_path)) == ([], before)


@pytest.mark.parametrize("interrupted_at", [1, 6, 7, 15])
def test_an_interrupted_recording_goes_on_where_it_stopped(interrupted_at: int, opened: Opener, tmp_path: Path) -> None:
    whole = record(opened(SD), tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        assert total == 12
        if done == interrupted_at:
            raise KeyboardInterrupt

    pipeline, calls = opened(SD, fresh=True), []
    if interrupted_at <= 12:
        with pytest.raises(KeyboardInterrupt):
            record(pipeline, tmp_path / "part", progress=interrupt)
    else:  # killed after the last chunk, before the index knew
        record(pipeline, tmp_path / "part")
        index = tmp_path / "part" / "calibration.json"
        content = json.loads(index.read_text())
        content["chunks"][1] |= {"sha256": None, "calls": 0, "bytes": 0}
        index.write_text(json.dumps(content))
        with pytest.raises(CalibrationError, match="1 of 2 chunks"):
            CalibrationSet.open(tmp_path / "part")
    pipeline.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    assert record(pipeline, tmp_path / "part").hash == whole.hash
    assert len(calls) == {1: 12, 6: 12, 7: 6, 15: 0}[interrupted_at]
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_a_killed_recording_is_resumed_by_another_process(opened: Opener, tmp_path: Path) -> None:
    part = tmp_path / "part"

    def kill(done: int, total: int) -> None:
        if done == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=lambda: record(opened(SD), part, progress=kill))
    opened(SD)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(files(part)) == ["calibration.json", "chunk-00000.safetensors"]
    assert record(opened(SD), part).hash == record(opened(SD), tmp_path / "whole").hash


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"steps": 4},
        {"prompts": ["a cat"]},
        {"max_calls": 2},
        {"max_bytes": 1 << 20},
        {"guidance": 2.0},
        {"sampling": Sampling("normal")},
    ],
)
def test_a_set_of_other_settings_is_refused(change: dict, opened: Opener, tmp_path: Path) -> None:
    record(opened(SD), tmp_path)
    before = files(tmp_path)
    with pytest.raises(CalibrationError, match="another model, or of other prompts"):
        record(opened(SD), tmp_path, **change)
    assert files(tmp_path) == before


def test_a_set_of_another_model_is_refused(opened: Opener, tmp_path: Path) -> None:
    record(opened(SD), tmp_path)
    with pytest.raises(CalibrationError, match="another model"):
        record(opened("UNet2DConditionModel-linear"), tmp_path)


def test_a_set_of_an_older_version_is_still_the_same_set(opened: Opener, tmp_path: Path) -> None:
    first = record(opened(SD), tmp_path)
    index = tmp_path / "calibration.json"
    content = json.loads(index.read_text())
    asked = [SCHEMA, opened(SD).fingerprint(), asdict(settings(SD)), PROMPTS["text"], 25, 2 << 30]
    assert content["fingerprint"] == sha256_of_json(asked)
    assert "sampling" not in content
    del content["components"]
    index.write_text(json.dumps(content))
    again = record(opened(SD), tmp_path, sampling=Sampling("uniform", 0.1, 0.1))
    assert (again.hash, again.sampling, again.components) == (first.hash, Sampling(), {})


def test_normal_sampling_decides_which_calls_are_kept(opened: Opener, tmp_path: Path) -> None:
    how = Sampling("normal", 0.3, 0.2)
    recorded = record(opened(SD), tmp_path, steps=12, max_calls=4, seed=2, sampling=how)
    assert recorded.sampling == CalibrationSet.open(tmp_path).sampling == how
    assert {call.call for call in recorded.calls()} == set(how.choose(12, 4, 2))
    assert len(recorded) == 8
    with pytest.raises(CalibrationError, match="another model, or of other prompts"):
        record(opened(SD), tmp_path, steps=12, max_calls=4, seed=2, sampling=Sampling("normal", 0.3, 0.21))


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_every_recorded_label_is_that_of_the_deployed_trajectory(
    kind: Any, name: str, opened: Opener, tmp_path: Path
) -> None:
    pipeline, deployed = opened(name), []
    parameters = list(inspect.signature(pipeline.denoiser.forward).parameters)
    prompts = PROMPTS[pipeline.kind][:2]
    recorded = record(pipeline, tmp_path, name, max_calls=3, prompts=prompts, sampling=Sampling(kind))

    def latents_and_time(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        given = dict(zip(parameters, args, strict=False)) | kwargs
        return given[parameters[0]], given["timestep"]

    hook = pipeline.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: deployed.append(latents_and_time(args, kwargs)), with_kwargs=True
    )
    pipeline.run(prompts, [0, 1], settings(name), decode=False)
    hook.remove()
    assert len(deployed) == 6
    for call in recorded.calls():
        latents, time = latents_and_time(call.args, call.kwargs)
        assert torch.equal(latents, deployed[call.call][0])
        assert torch.equal(torch.as_tensor(time), torch.as_tensor(deployed[call.call][1]))
        assert call.timestep == float(torch.as_tensor(time).flatten()[0])


class GaussianScore(UNet2DModel):
    """The exact noise prediction for data of N(0, 0.25) under a scheduler's schedule."""

    variance = 0.25

    def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> Any:
        signal = DDIMScheduler().alphas_cumprod[int(timestep)]
        prediction = (1 - signal).sqrt() * sample / (signal * self.variance + 1 - signal)
        return UNet2DOutput(sample=prediction)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_levels_of_a_gaussian_are_those_of_their_labels(kind: Any, tmp_path: Path) -> None:
    sizes = {"sample_size": 32, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = OpenPipeline(DDIMPipeline(GaussianScore(**sizes, **blocks), scheduler), tmp_path)
    recorded = record(
        pipeline, tmp_path, UNET, steps=50, batch_size=4, prompts=[""] * 4, max_calls=12, sampling=Sampling(kind)
    )
    assert len(recorded.timesteps) == 12
    for call in recorded.calls():
        signal = float(scheduler.alphas_cumprod[int(call.timestep)])
        expected = (signal * GaussianScore.variance + 1 - signal) ** 0.5
        assert float(call.args[0].std()) == pytest.approx(expected, rel=0.05)


def test_calls_are_given_up_evenly_and_told(opened: Opener, tmp_path: Path) -> None:
    full = record(opened(SD), tmp_path / "full", steps=20, max_calls=20)
    limit = full.nbytes * 2 // 3
    bounded = record(opened(SD), tmp_path / "bounded", steps=20, max_calls=20, max_bytes=limit)
    kept = sorted({call.call for call in bounded.calls()})
    assert bounded.nbytes <= limit
    assert 7 <= len(kept) < 20
    assert (kept[0], kept[-1]) == (0, 19)
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 4
    assert bounded.prompts == PROMPTS["text"]
    assert full.notes == ()
    assert bounded.notes == (f"Kept {len(kept)} of 20 calls of each trajectory to stay within {limit} bytes.",)


def test_then_batches_are_given_up_evenly_and_told(opened: Opener, tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    full = record(opened(SD), tmp_path / "full", steps=10, max_calls=10, batch_size=1, prompts=prompts)
    limit = full.nbytes // 5
    bounded = record(
        opened(SD), tmp_path / "few", steps=10, max_calls=10, batch_size=1, prompts=prompts, max_bytes=limit
    )
    assert bounded.nbytes <= limit
    assert sorted({call.call for call in bounded.calls()}) == spread(10, 5)
    assert 1 < len(bounded.prompts) < 8
    assert bounded.prompts[0] == prompts[0]
    assert bounded.prompts[-1] == prompts[-1]
    assert any(f"{len(bounded.prompts)} of 8 batches" in note for note in bounded.notes)


@pytest.mark.parametrize("bounds", [{"max_bytes": 1000}, {"max_bytes": 0}, {"max_calls": 0}])
def test_bounds_that_hold_nothing_are_refused(bounds: dict, opened: Opener, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"bound of|max_calls"):
        record(opened(SD), tmp_path, **bounds)
    assert not list(tmp_path.glob("*.safetensors"))


class SequentialGuidance(DDPMPipeline):
    """Runs its contexts one after the other, as newer pipelines do."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler, note: Any = None) -> None:
        super().__init__(unet, scheduler)
        self.note = note

    @torch.no_grad()
    def __call__(
        self, prompt: list[str], num_inference_steps: int = 3, generator: Any = None, output_type: str = "pt"
    ) -> None:
        x = torch.stack([torch.randn(3, 8, 8, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            cond = self.unet(x, t, class_labels=self.note).sample
            uncond = self.unet(x, t, class_labels=self.note).sample
            x = self.scheduler.step(uncond + 2 * (cond - uncond), t, x).prev_sample


def test_contexts_run_one_by_one_are_calls_of_their_own(tmp_path: Path) -> None:
    pipeline = OpenPipeline(SequentialGuidance(tiny.tiny_denoiser(UNET), DDPMScheduler()), tmp_path)
    recorded = record(pipeline, tmp_path, UNET, steps=3, prompts=["a", "b"])
    assert [(call.call, call.contexts) for call in recorded.calls()] == [
        (call, context) for call in range(3) for context in (("cond",), ("uncond",))
    ]


def test_an_argument_that_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    pipe = SequentialGuidance(tiny.tiny_denoiser(UNET), DDPMScheduler(), note=object())
    with pytest.raises(DcompError, match=r"builtins.object.*\(class_labels\)"):
        record(OpenPipeline(pipe, tmp_path), tmp_path, UNET, prompts=["a"])
    assert not list(tmp_path.glob("*.safetensors"))


def test_two_recordings_in_one_folder_are_kept_apart(opened: Opener, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(CalibrationError, match="Another process"):
        record(opened(SD), tmp_path)


def test_a_full_disk_leaves_no_half_chunk(opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(DcompError, match=r"No space left on device.*goes on where it stopped"):
            record(opened(SD), tmp_path)
    assert files(tmp_path) == {}
    assert len(record(opened(SD), tmp_path)) == 12


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content + b"x",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"",
    ],
)
def test_a_damaged_chunk_is_refused(damage: Callable[[bytes], bytes], opened: Opener, tmp_path: Path) -> None:
    record(opened(SD), tmp_path)
    chunk = tmp_path / "chunk-00001.safetensors"
    chunk.write_bytes(damage(chunk.read_bytes()))
    with pytest.raises((ModelError, CalibrationError)) as error:
        list(CalibrationSet.open(tmp_path).calls())
    assert "chunk-00001" in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 99},
        {"chunks": None},
        {"chunks": [{"file": "../../etc/passwd"}]},
        {"kept_calls": [99]},
        {"prompts": [1]},
        {"settings": {}},
        {"timesteps": ["a"]},
        {"sampling": {"kind": "best"}},
        {"sampling": []},
        {"components": {"unet": 1}},
    ],
)
def test_a_damaged_index_is_refused(damage: dict, opened: Opener, tmp_path: Path) -> None:
    record(opened(SD), tmp_path)
    index = tmp_path / "calibration.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | damage))
    with pytest.raises(CalibrationError, match="no index of a calibration set"):
        CalibrationSet.open(tmp_path)


def test_a_chunk_that_leads_elsewhere_is_refused(opened: Opener, tmp_path: Path) -> None:
    record(opened(SD), tmp_path)
    index = tmp_path / "calibration.json"
    content = json.loads(index.read_text())
    content["chunks"][0]["file"] = "../chunk-00000.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="no index"):
        CalibrationSet.open(tmp_path)


def test_a_folder_without_a_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration set"):
        CalibrationSet.open(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(CalibrationError, match="cannot be written"):
        record(opened(SD), tmp_path / "set")


def test_recording_leaves_the_denoiser_as_it_was(opened: Opener, tmp_path: Path) -> None:
    pipeline = opened(SD)
    before = dict(pipeline.denoiser._forward_hooks), dict(pipeline.denoiser._forward_pre_hooks)
    record(pipeline, tmp_path)
    assert (dict(pipeline.denoiser._forward_hooks), dict(pipeline.denoiser._forward_pre_hooks)) == before


def test_settings_are_checked_before_the_folder_is_made(opened: Opener, tmp_path: Path) -> None:
    with pytest.raises(DcompError, match="0 steps"):
        record_calibration_set(opened(SD), ["a"], replace(settings(SD), steps=0), tmp_path / "set")
    assert not (tmp_path / "set").exists()


@given(total=st.integers(1, 200), count=st.integers(1, 200))
def test_spread_is_even_distinct_and_keeps_both_ends(total: int, count: int) -> None:
    kept = spread(total, count)
    assert len(set(kept)) == len(kept) == min(total, count)
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert len(kept) == 1 or kept[-1] == total - 1
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert not gaps or max(gaps) - min(gaps) <= 1
