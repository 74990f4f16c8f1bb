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
from dcomp.calibrate.pipeline import open_pipeline
from dcomp.compress import split
from dcomp.compress.checkpoint import CheckpointError, ManifestFields, write_checkpoint
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.loader import DcompQuantizationConfig, attach_clock, load
from dcomp.compress.scheme import QScheme
from dcomp.compress.verify import call_denoiser
from tests.support import hostile
from tests.support.quantized import BINS, quantized_pipeline
from tests.support.schemes import quantized_form
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


def test_corrections_of_dynamic_layers_come_back_with_their_step_bins(tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline(NAME, tmp_path / "source"))
    for name, scheme in ((LINEAR, QScheme(8)), ("conv_out", QScheme(8, boundaries=(8,)))):
        layer = quantized_form(pipeline.denoiser.get_submodule(name), scheme)
        width = layer.weight.shape[0]
        layer.correct(torch.rand(2, width) + 0.5, torch.randn(2, width))
        pipeline.denoiser.set_submodule(name, layer)
    attach_clock(pipeline.denoiser, BINS)
    write_checkpoint(pipeline, tmp_path / "out", ManifestFields(recipe={}))  # a fresh process repeats a call
    unet = load(tmp_path / "out").unet
    assert unet.dcomp_clock.bins == BINS
    sample = denoiser_inputs(NAME)[0][0]
    found = {t: unet(sample, t).sample for t in (900, 100)}
    assert all(torch.equal(y, pipeline.denoiser(sample, t).sample) for t, y in found.items())
    mixed = unet(sample, torch.tensor([900, 100])).sample
    assert torch.allclose(mixed, torch.cat([found[900][:1], found[100][1:]]), atol=1e-5)
    assert unet.conv_out.half().parts[0].step_bias.dtype == torch.float32


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


LEVELS = {"smooth": True, "rotate": True, "rank": 2, "directions": 3}
FOUR = {"input_bits": 4, "input_group": 16}
SPLIT, SHORTCUT = "up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut"
MIXED = {
    LINEAR: QScheme(4, 64, input_granularity="token", **FOUR, **LEVELS),
    CONV: QScheme(4, 32, input_granularity="sample", **FOUR, **LEVELS),
    SPLIT: QScheme(8, input_bits=8, input_granularity="tensor", boundaries=(64,), **LEVELS),
    SHORTCUT: QScheme(8, input_bits=8, input_granularity="token", boundaries=(64,), smooth=True),
    "up_blocks.0.resnets.1.conv_shortcut": QScheme(4, 64, boundaries=(16, 64), rank=2),
    "conv_out": QScheme(8, input_bits=8, input_granularity="sample", rounding="gptq"),
    "time_embedding.linear_1": QScheme(8),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A checkpoint with layers of every sort, and what the model said before it was written."""
    folder = tmp_path_factory.mktemp("mixed")
    pipeline = open_pipeline(save_tiny_pipeline(NAME, folder / "source"))
    for name, scheme in MIXED.items():
        layer = pipeline.denoiser.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        setattr(pipeline.denoiser.get_submodule(parent), leaf, quantized_form(layer, scheme, BINS.count))
    attach_clock(pipeline.denoiser, BINS)
    write_checkpoint(pipeline, folder / "out", ManifestFields(recipe={}))
    return folder / "out", output(pipeline.denoiser)


def test_layers_of_every_scheme_come_back(mixed: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = mixed
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    assert set(config["layers"]) == set(MIXED)
    assert {name: QScheme.from_dict(config["schemes"][key]) for name, key in config["layers"].items()} == MIXED
    assert sorted(config["schemes"]) == ["W4A16", "W4A4", "W4A4-2", "W8A16", "W8A8", "W8A8-2", "W8A8-3"]
    stored = load_file(folder / WEIGHTS)
    own = {name for name in stored if name.startswith(f"{SPLIT}.")}
    assert own == {f"{SPLIT}.parts.0.bias"} | {
        f"{SPLIT}.parts.{part}.{leaf}"
        for part in (0, 1)
        for leaf in (
            *("qweight", "scale", "input_scale", "input_zero", "smooth_inv"),
            *("directions", "direction_weight", "direction_scale", "lr_down", "lr_up"),
        )
    }
    unet = load(folder, check="full").unet
    layers = split.quantized_layers(unet)
    assert {name: layer.scheme for name, layer in layers.items()} == MIXED
    assert type(layers[SPLIT]) is split.SplitConv2d
    assert type(layers[CONV]) is QuantConv2d
    assert torch.equal(output(unet), expected)
    unet(denoiser_inputs(NAME)[0][0], 100)
    assert unet.dcomp_clock.bin == 1
    assert all(part.clock is unet.dcomp_clock for layer in layers.values() for part in split.parts_of(layer))
    unet.save_pretrained(tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again), expected)


def test_tensors_of_every_scheme_keep_their_dtype(mixed: tuple[Path, Tensor]) -> None:
    stored = load_file(mixed[0] / WEIGHTS)
    unet = load(mixed[0], torch_dtype=torch.bfloat16).unet
    prefixes = tuple(f"{name}." for name in MIXED)
    found = {name: tensor for name, tensor in unet.state_dict().items() if name.startswith(prefixes)}
    dtypes = {leaf: tensor.dtype for name, tensor in found.items() if (leaf := name.rpartition(".")[2]) != "qweight"}
    assert dtypes == {
        "multiplier": torch.int8, "scale": torch.float32, "bias": torch.bfloat16, "input_scale": torch.float32,
        "input_zero": torch.uint8, "smooth_inv": torch.float32, "lr_down": torch.float16, "lr_up": torch.float16,
        "directions": torch.float16, "direction_weight": torch.int8, "direction_scale": torch.float32,
    }  # fmt: skip
    for name, tensor in found.items():
        if not name.endswith("bias"):
            assert torch.equal(tensor, stored[name])


def mixed_scheme(name: str, **changes: Any) -> Callable[[Path], None]:
    return section(lambda config: config["schemes"][config["layers"][name]].update(changes))


HOSTILE_MIXED: dict[str, tuple[Callable[[Path], None], str]] = {
    "boundary outside": (mixed_scheme(SPLIT, boundaries=[128]), "cannot be split"),
    "boundary far outside": (mixed_scheme(SPLIT, boundaries=[2**70]), "cannot be split"),
    "boundaries descend": (mixed_scheme(SPLIT, boundaries=[64, 32]), "impossible"),
    "boundaries are text": (mixed_scheme(SPLIT, boundaries="64"), "impossible"),
    "boundaries are nested": (mixed_scheme(SPLIT, boundaries=[[64]]), "impossible"),
    "boundaries without end": (mixed_scheme(SPLIT, boundaries=list(range(1, 128))), "impossible"),
    "other boundary": (mixed_scheme(SPLIT, boundaries=[63]), "instead of"),
    "boundaries forgotten": (mixed_scheme(SPLIT, boundaries=[]), "missing"),
    "boundaries invented": (mixed_scheme(CONV, boundaries=[16]), "missing"),
    "rank too large": (mixed_scheme(LINEAR, rank=2**70), "cannot have"),
    "rank too large for a part": (mixed_scheme("up_blocks.0.resnets.1.conv_shortcut", rank=17), "cannot have"),
    "other rank": (mixed_scheme(LINEAR, rank=3), "instead of"),
    "directions too many": (mixed_scheme(LINEAR, directions=2**70), "cannot have"),
    "other directions": (mixed_scheme(LINEAR, directions=2), "instead of"),
    "directions forgotten": (mixed_scheme(LINEAR, directions=0), "not part"),
    "directions invented": (mixed_scheme("conv_out", directions=1), "missing"),
    "directions are text": (mixed_scheme(LINEAR, directions="3"), "impossible"),
    "rank is text": (mixed_scheme(LINEAR, rank="2"), "impossible"),
    "branch forgotten": (mixed_scheme(LINEAR, rank=0), "not part"),
    "branch invented": (mixed_scheme("conv_out", rank=1), "missing"),
    "factors forgotten": (mixed_scheme(LINEAR, smooth=False), "not part"),
    "smooth is a number": (mixed_scheme(LINEAR, smooth=1), "impossible"),
    "rotate is text": (mixed_scheme(LINEAR, rotate="true"), "impossible"),
    "token on a wide kernel": (
        mixed_scheme(CONV, input_bits=8, input_granularity="token", input_group=None),
        "cannot have",
    ),
    "static four bits": (mixed_scheme(CONV, input_granularity="tensor"), "impossible"),
    "input group of zero": (mixed_scheme(CONV, input_group=0), "impossible"),
    "unknown rounding": (mixed_scheme(CONV, rounding=[]), "impossible"),
    "a part as a layer": (section(lambda c: c["layers"].update({f"{SPLIT}.parts.0": "W8A16"})), "never quantized"),
    "factors in half": (
        tensors(lambda t: t.update({f"{LINEAR}.smooth_inv": t[f"{LINEAR}.smooth_inv"].half()})),
        "instead",
    ),
    "branch in float32": (
        tensors(lambda t: t.update({f"{SPLIT}.parts.1.lr_down": t[f"{SPLIT}.parts.1.lr_down"].float()})),
        "instead",
    ),
    "branch is infinite": (tensors(lambda t: t[f"{SPLIT}.parts.0.lr_up"].fill_(float("inf"))), "NaN or infinity"),
    "factors are NaN": (tensors(lambda t: t[f"{LINEAR}.smooth_inv"].fill_(float("nan"))), "NaN"),
    "factors too short": (
        tensors(lambda t: t.update({f"{LINEAR}.smooth_inv": t[f"{LINEAR}.smooth_inv"][1:].clone()})),
        "shape",
    ),
    "part missing": (tensors(lambda t: t.pop(f"{SPLIT}.parts.1.qweight")), "missing"),
    "second bias": (tensors(lambda t: t.update({f"{SPLIT}.parts.1.bias": torch.zeros(64)})), "not part"),
}


@pytest.mark.parametrize("name", HOSTILE_MIXED)
def test_a_hostile_checkpoint_with_every_scheme_is_refused(
    name: str, mixed: tuple[Path, Tensor], tmp_path: Path
) -> None:
    damage, word = HOSTILE_MIXED[name]
    folder = Path(shutil.copytree(mixed[0], tmp_path / "copy"))
    damage(folder)
    with pytest.raises(DcompError, match=word) as caught:
        load(folder, check="none")
    assert caught.value.remedy
    with pytest.raises(CheckpointError):
        DiffusionPipeline.from_pretrained(folder)


def test_an_absurd_group_of_inputs_takes_no_memory(mixed: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed[0], tmp_path / "copy"))
    mixed_scheme(CONV, input_group=2**70)(folder)
    assert torch.isfinite(output(load(folder, check="none").unet)).all()


def test_a_checkpoint_of_the_first_version_opens(checkpoint: Path) -> None:
    expected = output(load(checkpoint).unet)
    old = {"weight_bits", "group_size", "weight_range", "input_bits", "input_granularity", "input_range"}

    def strip(config: dict[str, Any]) -> None:
        config["schemes"] = {
            key: {name: value for name, value in scheme.items() if name in old}
            for key, scheme in config["schemes"].items()
        }

    section(strip)(checkpoint)
    assert torch.equal(output(load(checkpoint, check="none").unet), expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
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
