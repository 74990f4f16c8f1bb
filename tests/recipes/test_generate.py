import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcomp import UsageError
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.recipes.generate import generate, to_picture
from tests.support.tiny import save_tiny_pipeline

TEXT, DIT = "UNet2DConditionModel", "DiTTransformer2DModel"
Models = Callable[[str], Path]


def test_files_hold_what_the_pipeline_makes(tiny_checkpoint: Models, tmp_path: Path) -> None:
    prompts = ["a cat", "A/B: ..\\é?", "!!"]
    result = generate(tiny_checkpoint(TEXT), prompts, tmp_path / "deep" / "pictures")
    names = ["0000-a-cat.png", "0001-a-b.png", "0002-picture.png"]
    assert [Path(file).name for file in result["files"]] == names
    assert sorted(os.listdir(tmp_path / "deep" / "pictures")) == names
    assert (result["steps"], result["seed"], result["unseen_timesteps"]) == (3, 0, 0)
    images = open_pipeline(tiny_checkpoint(TEXT)).run(prompts, range(3), Generation(steps=3, batch_size=2)).images
    assert images is not None
    for file, image in zip(result["files"], images, strict=True):
        found = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        assert (found - image.clamp(0, 1)).abs().max() <= 0.51 / 255


def test_any_batch_size_gives_the_same_noise(tiny_checkpoint: Models, tmp_path: Path) -> None:
    shown = []
    for size in (1, 3):
        files = generate(tiny_checkpoint(TEXT), ["a", "b", "c"], tmp_path / str(size), batch_size=size)["files"]
        shown.append([np.array(Image.open(file)).astype(int) for file in files])
    for one, other in zip(*shown, strict=True):
        # Float sums depend on the batch, and may move a code; other noise would change everything.
        assert abs(one - other).mean() < 1
    assert abs(shown[0][0] - shown[0][1]).max() > 20


def test_seeds_and_steps_are_heeded(tiny_checkpoint: Models, tmp_path: Path) -> None:
    first = generate(tiny_checkpoint(DIT), ["goldfish"], tmp_path / "a")
    other = generate(tiny_checkpoint(DIT), ["goldfish"], tmp_path / "b", seed=1, steps=7)
    assert (other["steps"], other["seed"]) == (7, 1)
    assert Path(first["files"][0]).read_bytes() != Path(other["files"][0]).read_bytes()
    assert other["unseen_timesteps"] >= 0


def test_timesteps_that_calibration_did_not_see_are_counted(static_checkpoint: Models, tmp_path: Path) -> None:
    result = generate(static_checkpoint(TEXT), ["a cat"], tmp_path / "a", steps=5)
    assert 0 < result["unseen_timesteps"] <= 5


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "empty"),
        (["a", " "], {}, "empty"),
        (["a"], {"steps": 0}, "0 steps"),
        (["a"], {"steps": 1001}, "1001 steps"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
        (["a"], {"scheduler": "DDIMSheduler", "steps": 2}, "did you mean DDIMScheduler"),
    ],
)
def test_wrong_use_makes_no_folder(
    prompts: list[str], options: dict[str, object], message: str, tiny_checkpoint: Models, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        generate(tiny_checkpoint(TEXT), prompts, tmp_path / "pictures", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_unknown_classes_make_no_folder(tiny_checkpoint: Models, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no class 'goldfisch'"):
        generate(tiny_checkpoint(DIT), ["1", "goldfisch"], tmp_path / "pictures")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_an_error_of_ours(tiny_checkpoint: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UsageError, match="cannot be made"):
            generate(tiny_checkpoint(DIT), ["1"], output)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_round_to_the_nearest_of_256_values(channels: int) -> None:
    image = torch.linspace(-0.1, 1.1, channels * 20).reshape(channels, 4, 5)
    array = np.array(to_picture(image)).reshape(4, 5, channels)
    expected = (image.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert array.dtype == np.uint8
    assert (array == expected).all()


def test_layers_that_run_ahead_make_the_same_pictures(tiny_checkpoint: Models, tmp_path: Path) -> None:
    prompts = ["goldfish", "tench"]
    shown = []
    for ahead in ("off", "on", "offload"):
        files = generate(tiny_checkpoint(DIT), prompts, tmp_path / ahead, ahead=ahead)["files"]
        shown.append([np.array(Image.open(file)).astype(int) for file in files])
    for off, on, offloaded in zip(*shown, strict=True):
        assert (on == offloaded).all()
        assert abs(on - off).mean() < 1  # float sums depend on the number of rows, and may move a code


def test_a_model_without_layers_that_run_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can be computed ahead"):
        generate(save_tiny_pipeline(DIT, tmp_path / "model"), ["goldfish"], tmp_path / "a", ahead="on")
    assert not (tmp_path / "a").exists()
