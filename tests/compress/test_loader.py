import copy
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dcomp
from dcomp import DcompError, UsageError
from dcomp.compress.checkpoint import CheckpointError, ManifestFields, write_checkpoint
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.loader import DcompQuantizationConfig, load
from dcomp.compress.verify import call_denoiser
from tests.support import hostile
from tests.support.quantized import BINS, quantized_pipeline
from tests.support.tiny import denoiser_inputs, save_tiny_pipeline

NAME = "UNet2DModel"
WEIGHTS = f"unet/{hostile.WEIGHTS}"
LINEAR = "time_embedding.linear_2"
CODES, SCALE = f"{LINEAR}.qweight", f"{LINEAR}.scale"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_checkpoint(
        quantized_pipeline(save_tiny_pipeline(NAME, folder / "source")), folder / "out", ManifestFields(recipe={})
    )
    return folder / "out"


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantLayer]:
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, QuantLayer)}


def output(denoiser: nn.Module) -> Tensor:
    return call_denoiser(denoiser, *denoiser_inputs(NAME))


def test_plain_diffusers_and_load_give_the_same_integer_model(written: Path) -> None:
    models = [
        load(written, check="full").unet,
        DiffusionPipeline.from_pretrained(written).unet,
        UNet2DModel.from_pretrained(written / "unet"),
        UNet2DModel.from_pretrained(written, subfolder="unet"),
    ]
    expected = output(models[0])
    for model in models:
        layers = quantized_layers(model)
        assert {type(layer) for layer in layers.values()} == {QuantLinear, QuantConv2d}
        assert {layer.scheme.weight_bits for layer in layers.values()} == {4, 8}
        assert not model.training
        assert torch.equal(output(model), expected)


def test_codes_and_tables_keep_their_dtype_whatever_the_user_asks_for(written: Path) -> None:
    stored = load_file(written / WEIGHTS)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        unet = load(written, torch_dtype=dtype).unet
        assert unet.conv_norm_out.weight.dtype == dtype
        for name, layer in quantized_layers(unet).items():
            assert layer.bias is None or layer.bias.dtype == dtype
            for key, tensor in layer.named_buffers():
                assert tensor.dtype == stored[f"{name}.{key}"].dtype
                assert torch.equal(tensor, stored[f"{name}.{key}"])


def test_every_tensor_lies_in_aligned_memory(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(hostile.file_bytes(content[8 : 8 + length] + b" " * 8, content[8 + length :]))
    for tensor in load(checkpoint, check="none").unet.state_dict().values():
        assert tensor.data_ptr() % 64 == 0


def test_a_loaded_model_saves_the_same_tensors_and_config(written: Path, tmp_path: Path) -> None:
    load(written).unet.save_pretrained(tmp_path / "again")
    before, after = load_file(written / WEIGHTS), load_file(tmp_path / "again" / hostile.WEIGHTS)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    configs = [json.loads((path / "config.json").read_text()) for path in (written / "unet", tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = UNet2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again), output(load(written).unet))


def test_the_clock_follows_the_calls(written: Path) -> None:
    unet = load(written).unet
    sample = denoiser_inputs(NAME)[0][0]
    for timestep, step_bin in ((900, 0), (500, 0), (100, 1), (0, 1)):
        unet(sample, timestep)
        assert unet.dcomp_clock.bin == step_bin
    assert {id(layer.clock) for layer in quantized_layers(unet).values()} == {id(unet.dcomp_clock)}
    assert unet.dcomp_clock.bins == BINS


def test_a_copied_model_has_a_clock_of_its_own(written: Path) -> None:
    unet = load(written).unet
    other = copy.deepcopy(unet)
    other(denoiser_inputs(NAME)[0][0], 100)
    assert (unet.dcomp_clock.bin, other.dcomp_clock.bin) == (0, 1)
    assert all(layer.clock is other.dcomp_clock for layer in quantized_layers(other).values())


def test_config_survives_its_own_json(written: Path) -> None:
    config = load(written).unet.config.quantization_config
    again = DcompQuantizationConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() == config.to_diff_dict()
    assert DcompQuantizationConfig.from_dict(config.to_dict(), return_unused_kwargs=True, x=1)[1] == {"x": 1}


def section(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "unet" / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def first_scheme(**changes: Any) -> Callable[[Path], None]:
    return section(lambda config: next(iter(config["schemes"].values())).update(changes))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown layer": (section(lambda c: c["layers"].update({"no.such": "W8A8"})), "no layer"),
    "layer outside": (section(lambda c: c["layers"].update({"conv_in.__class__": "W8A8"})), "no layer"),
    "the model itself": (section(lambda c: c["layers"].update({"": "W8A8"})), "no layer"),
    "layer of a wrong kind": (section(lambda c: c["layers"].update({"conv_norm_out": "W8A8"})), "GroupNorm"),
    "layer that is float in the file": (
        section(lambda c: c["layers"].update({"conv_in": c["layers"][CONV]})),
        "conv_in",
    ),
    "layer forgotten": (section(lambda c: c["layers"].pop(LINEAR)), LINEAR),
    "unknown scheme": (section(lambda c: c["layers"].update({LINEAR: "W1A1"})), "unknown scheme"),
    "layers are a list": (section(lambda c: c.update(layers=[LINEAR])), "object"),
    "scheme is a list": (section(lambda c: c["schemes"].update({"W8A8": []})), "object"),
    "unknown key": (section(lambda c: c.update(surprise=1)), "unknown"),
    "other version": (section(lambda c: c.update(schema=2)), "schema"),
    "5 bits": (first_scheme(weight_bits=5), "impossible"),
    "bits are text": (first_scheme(weight_bits="8"), "impossible"),
    "unknown key in a scheme": (first_scheme(surprise=1), "impossible"),
    "huge group": (first_scheme(weight_bits=4, group_size=2**70), "cannot have"),
    "large group": (first_scheme(weight_bits=4, group_size=2**50), "instead of"),
    "bins contradict": (section(lambda c: c["step_bins"].update(bin_of=[1, 0, 0])), "step bins"),
    "bins are text": (section(lambda c: c.update(step_bins="many")), "step bins"),
    "bins forgotten": (section(lambda c: c.update(step_bins=None)), "instead of"),
    "too many bins": (
        section(
            lambda c: c.update(
                step_bins={
                    "timesteps": [float(5000 - i) for i in range(2000)],
                    "bin_of": list(range(2000)),
                    "boundaries": [4999.5 - i for i in range(1999)],
                }
            )
        ),
        "1000 step bins",
    ),
    "tensor missing": (tensors(lambda t: t.pop(f"{CONV}.input_scale")), "missing"),
    "float tensor missing": (tensors(lambda t: t.pop("conv_norm_out.weight")), "missing"),
    "tensor too many": (tensors(lambda t: t.update(extra=torch.zeros(3))), "not part"),
    "codes of another dtype": (
        tensors(lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].int()})),
        "instead",
    ),
    "scale in half": (tensors(lambda t: t.update({f"{LINEAR}.scale": t[f"{LINEAR}.scale"].half()})), "instead"),
    "scale is NaN": (tensors(lambda t: t[SCALE].fill_(float("nan"))), "NaN"),
    "scale too short": (tensors(lambda t: t.update({SCALE: t[SCALE][1:].clone()})), "shape"),
    "integers for a norm": (tensors(lambda t: t.update({"conv_norm_out.weight": torch.ones(32).int()})), "instead"),
    "other widths": (lambda f: hostile.edit_json(f / "unet" / "config.json", block_out_channels=[64, 64]), "tensor"),
    "endless layers": (lambda f: hostile.edit_json(f / "unet" / "config.json", layers_per_block=1 << 23), "far larger"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused(name: str, checkpoint: Path) -> None:
    damage, word = HOSTILE[name]
    damage(checkpoint)
    with pytest.raises(DcompError, match=word) as caught:
        load(checkpoint, check="none")
    assert caught.value.remedy


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "endless layers"])
def test_plain_diffusers_refuses_a_hostile_checkpoint_with_our_error(name: str, checkpoint: Path) -> None:
    HOSTILE[name][0](checkpoint)
    with pytest.raises(CheckpointError):
        DiffusionPipeline.from_pretrained(checkpoint)


def test_a_changed_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(checkpoint, check="full")
    hostile.edit_json(checkpoint / "scheduler" / "scheduler_config.json", beta_end=0.5)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: its content has changed"):
        load(checkpoint)


def test_a_pipeline_that_dcomp_did_not_make_is_explained(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not made by dcomp"):
        load(written.parent / "source")
    with pytest.raises(CheckpointError, match="no compressed checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no compressed checkpoint"):
        load(tmp_path / "nowhere")


def test_a_device_that_is_not_there_is_a_wrong_use(written: Path) -> None:
    with pytest.raises(UsageError, match="device nowhere"):
        load(written, device="nowhere")


def test_load_is_what_the_package_offers() -> None:
    assert dcomp.load is load


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_random_damage_gives_a_pipeline_or_our_error(data: st.DataObject, written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(written, folder)
    name = data.draw(st.sampled_from(["unet/config.json", WEIGHTS, "model_index.json", "dcomp.json"]))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(hostile.damaged(content)))
    try:
        with suppress(DcompError):
            assert quantized_layers(load(folder, check="none").unet)
        if data.draw(st.booleans()):
            with suppress(DcompError):
                load(folder)
    finally:
        (folder / name).write_bytes(content)
