import shutil
from pathlib import Path

import pytest
import torch

from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.compress.checkpoint import CheckpointError, ManifestFields, check_manifest, write_checkpoint
from dcomp.compress.verify import call_denoiser, compare, save_probe
from tests.support.hostile import WEIGHTS
from tests.support.quantized import quantized_pipeline
from tests.support.tiny import denoiser_inputs, save_tiny_pipeline, tiny_denoiser

NAME = "UNet2DModel"
FIELDS = ManifestFields(recipe={})
CALL = denoiser_inputs(NAME)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OpenPipeline:
    return quantized_pipeline(save_tiny_pipeline(NAME, tmp_path_factory.mktemp("source") / "tiny"))


@pytest.fixture(scope="module")
def written(pipeline: OpenPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("written") / "out"
    write_checkpoint(pipeline, output, FIELDS, probe=CALL)  # the one run of a fresh process that succeeds
    return output


@pytest.fixture
def probe(pipeline: OpenPipeline, tmp_path: Path) -> Path:
    save_probe(tmp_path / "probe.safetensors", pipeline.denoiser, "unet", *CALL)
    return tmp_path / "probe.safetensors"


@pytest.mark.slow
def test_a_fresh_process_agrees_bit_for_bit(written: Path) -> None:
    check_manifest(written)


def test_the_comparison_sees_equal_bits(written: Path, probe: Path) -> None:
    assert compare(written, probe) == {"equal": True, "max_difference": 0.0}


def test_the_last_bit_of_one_scale_is_seen(pipeline: OpenPipeline, written: Path, tmp_path: Path) -> None:
    scale = pipeline.denoiser.time_embedding.linear_2.scale
    kept = scale.clone()
    scale.copy_(torch.nextafter(scale, torch.tensor(torch.inf)))
    try:
        save_probe(tmp_path / "probe.safetensors", pipeline.denoiser, "unet", *CALL)
    finally:
        scale.copy_(kept)
    result = compare(written, tmp_path / "probe.safetensors")
    assert result["equal"] is False
    assert 0 < result["max_difference"] < 1e-3


def test_a_file_that_differs_from_its_manifest_is_named(written: Path, probe: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    (folder / "unet" / WEIGHTS).write_bytes((folder / "unet" / WEIGHTS).read_bytes()[:-1] + b"\x01")
    assert compare(folder, probe) == {"differences": [f"unet/{WEIGHTS}: its content has changed"]}


@pytest.mark.slow
def test_nothing_is_published_when_the_fresh_process_disagrees(pipeline: OpenPipeline, tmp_path: Path) -> None:
    def add_one(_: object, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (output[0] + 1,)

    handle = pipeline.denoiser.register_forward_hook(add_one)
    try:
        with pytest.raises(CheckpointError, match="gives another result, by up to 1"):
            write_checkpoint(pipeline, tmp_path / "out", FIELDS, probe=CALL)
    finally:
        handle.remove()
    assert {path.name for path in tmp_path.iterdir()} <= {"out.lock"}


def test_where_weights_lie_in_memory_makes_no_difference(tmp_path: Path) -> None:
    (args, kwargs), bits = CALL, []
    latents = torch.cat([args[0][:1]])
    for shift in (0, 1, 3):
        denoiser = tiny_denoiser(NAME)
        for parameter in denoiser.parameters():
            room = torch.empty(parameter.numel() + 16)
            parameter.data = room[shift : shift + parameter.numel()].view(parameter.shape).copy_(parameter.data)
        assert (shift == 0) == all(parameter.data_ptr() % 64 == 0 for parameter in denoiser.parameters())
        bits.append(call_denoiser(denoiser, (latents, *args[1:]), kwargs))
        assert all(parameter.data_ptr() % 64 == 0 for parameter in denoiser.parameters())
    assert all(torch.equal(bits[0], other) for other in bits[1:])
