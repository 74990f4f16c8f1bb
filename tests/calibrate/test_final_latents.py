"""The verdict of whole trajectories."""

from pathlib import Path

import pytest

from dcomp.calibrate import final_latents
from dcomp.calibrate.final_latents import FIRST_INDEX, FinalLatents
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from tests.support.tiny import save_tiny_pipeline

SETTINGS = Generation(steps=3, guidance=2.0, height=16, width=16, batch_size=2)
PROMPTS = ["a cat", "a dog", "a bee"]


@pytest.fixture
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OpenPipeline:
    return open_pipeline(save_tiny_pipeline("UNet2DConditionModel", tmp_path_factory.mktemp("model") / "model"))


def test_the_error_is_the_geometric_mean_over_pictures(
    pipeline: OpenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final_latents, "PICTURES", 2)
    judge = FinalLatents(pipeline, PROMPTS, SETTINGS, tmp_path / "latents.safetensors")
    assert judge.error() == pytest.approx(1e-12)
    indices = range(FIRST_INDEX, FIRST_INDEX + 2)
    before = pipeline.run(PROMPTS[:2], indices, SETTINGS, decode=False).latents
    pipeline.denoiser.conv_out.weight.mul_(1.1)
    after = pipeline.run(PROMPTS[:2], indices, SETTINGS, decode=False).latents
    one, other = ((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).tolist()
    assert judge.error() == pytest.approx((one * other) ** 0.5, rel=1e-4)


def test_what_float_made_is_kept_and_belongs_to_prompts_and_settings(pipeline: OpenPipeline, tmp_path: Path) -> None:
    file = tmp_path / "latents.safetensors"
    FinalLatents(pipeline, PROMPTS, SETTINGS, file)
    pipeline.denoiser.conv_out.weight.mul_(1.1)
    # A run that goes on may open a model that is changed already; the float latents are those of the file.
    assert FinalLatents(pipeline, PROMPTS, SETTINGS, file).error() > 1e-3
    for prompts, settings in ((PROMPTS[::-1], SETTINGS), (PROMPTS, Generation(steps=2, height=16, width=16))):
        assert FinalLatents(pipeline, prompts, settings, file).error() == pytest.approx(1e-12)
