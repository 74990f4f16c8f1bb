import copy
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dcomp import UsageError
from dcomp.calibrate.adapters import AdapterError, fuse_lora, parse_adapter
from tests.support.tiny import tiny_pipeline

TARGETS = ["to_q", "to_k", "to_v"]
RANK, ALPHA = 4, 8


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return tiny_pipeline("UNet2DConditionModel")


def save_lora(pipe: Any, folder: Path, component: str = "unet", targets: list[str] | None = None) -> Path:
    """Write a random adapter for one component, as a training script would."""
    model = copy.deepcopy(getattr(pipe, component))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets or TARGETS, init_lora_weights=False)
    torch.manual_seed(0)
    model.add_adapter(config)
    layers = f"{component}_lora_layers" if component != "text_encoder" else "text_encoder_lora_layers"
    metadata = {f"{component}_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(folder, **{layers: get_peft_model_state_dict(model)}, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def weights(pipe: Any, component: str = "unet") -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in getattr(pipe, component).state_dict().items()}


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_fused_weight_is_the_sum_of_both(scale: float, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file, before = save_lora(pipe, tmp_path), weights(pipe)
    (record,) = fuse_lora(pipe, [f"{file}:{scale}"])
    after, lora = weights(pipe), load_file(file)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if name.split(".")[-2] in TARGETS and name.endswith("weight")}
    for name in changed:
        stem = "unet." + name.removesuffix(".weight")
        update = lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"] * (scale * ALPHA / RANK)
        # One float32 addition after a product of depth 4: a few units in the last place of the largest term.
        torch.testing.assert_close(
            after[name], before[name] + update, rtol=0, atol=1e-6 * (1 + update.abs().max().item())
        )
    assert (record.name, record.scale, record.layers) == (file.name, scale, len(changed))
    assert (record.components, record.ignored) == (("unet",), 0)
    assert record.sha256 == sha256(file.read_bytes()).hexdigest()


def test_no_adapter_layer_is_left_behind(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    classes = {name: type(layer) for name, layer in pipe.unet.named_modules()}
    fuse_lora(pipe, [str(save_lora(pipe, tmp_path))])
    assert {name: type(layer) for name, layer in pipe.unet.named_modules()} == classes


def test_two_adapters_add_up_in_any_order(tmp_path: Path) -> None:
    pipes = [tiny_pipeline("UNet2DConditionModel") for _ in range(2)]
    one = save_lora(pipes[0], tmp_path / "one")
    two = save_lora(pipes[0], tmp_path / "two", targets=["to_q", "proj_in"])
    assert len(fuse_lora(pipes[0], [str(one), f"{two}:0.5"])) == 2
    fuse_lora(pipes[1], [f"{two}:0.5", str(one)])
    for a, b in zip(weights(pipes[0]).values(), weights(pipes[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_text_encoder_adapter_is_named_in_the_record(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file, before = save_lora(pipe, tmp_path, "text_encoder", ["q_proj", "v_proj"]), weights(pipe, "text_encoder")
    (record,) = fuse_lora(pipe, [str(file)])
    assert record.components == ("text_encoder",)
    after = weights(pipe, "text_encoder")
    assert sum(not torch.equal(after[name], before[name]) for name in before) == record.layers > 0


def test_no_adapters_change_nothing(pipe: DiffusionPipeline) -> None:
    before = weights(pipe)
    assert fuse_lora(pipe, []) == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(pipe).items())


def test_adapter_for_another_model_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    for name, layer in (("other", "unet.nowhere.to_q"), ("prefix", "transformer.to_q")):
        pair = {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}
        save_file(pair, tmp_path / f"{name}.safetensors")
    before = weights(pipe)
    for name in ("other", "prefix"):
        with pytest.raises(AdapterError, match=r"fit|matches no layer"):
            fuse_lora(pipe, [str(tmp_path / f"{name}.safetensors")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(pipe).items())


def test_adapter_of_another_width_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file = save_lora(pipe, tmp_path)
    save_file({name: torch.cat([x, x], dim=1) for name, x in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="does not fit"):
        fuse_lora(pipe, [str(file)])


def test_adapter_that_changes_nothing_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file = save_lora(pipe, tmp_path)
    save_file({name: torch.zeros_like(x) for name, x in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="changes no weight"):
        fuse_lora(pipe, [str(file)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_loading(
    value: float, pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    file, before = save_lora(pipe, tmp_path), weights(pipe)
    tensors = load_file(file)
    name = min(tensors)
    tensors[name][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        fuse_lora(pipe, [str(file)])
    assert name in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(pipe).items())


def test_a_scale_that_overflows_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="infinite"):
        fuse_lora(pipe, [f"{save_lora(pipe, tmp_path)}:1e39"])


def test_all_files_are_checked_before_the_first_is_fused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    good, before = save_lora(pipe, tmp_path / "good"), weights(pipe)
    with pytest.raises(AdapterError, match="not found"):
        fuse_lora(pipe, [str(good), str(tmp_path / "missing.safetensors")])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(pipe).items())


def test_file_without_lora_matrices_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(AdapterError, match="no LoRA"):
        fuse_lora(pipe, [str(tmp_path / "plain.safetensors")])


def test_damaged_file_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    file = save_lora(pipe, tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UsageError, match="cut off"):
        fuse_lora(pipe, [str(file)])


def test_pipeline_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="takes no adapters"):
        fuse_lora(tiny_pipeline("DiTTransformer2DModel"), [str(tmp_path)])


def test_spec_is_path_and_scale(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.touch()
    (tmp_path / "b:2.safetensors").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "only.safetensors").touch()
    assert parse_adapter(str(file)) == (file, 1.0)
    assert parse_adapter(f"{file}:0.7") == (file, 0.7)
    assert parse_adapter(str(tmp_path / "b:2.safetensors")) == (tmp_path / "b:2.safetensors", 1.0)
    assert parse_adapter(f"{tmp_path / 'folder'}:-1") == (tmp_path / "folder" / "only.safetensors", -1.0)


@pytest.mark.parametrize("tail", [":0", ":nan", ":inf", ":much", "x", "/nothing"])
def test_impossible_spec_is_refused(tail: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.touch()
    with pytest.raises(AdapterError):
        parse_adapter(f"{file}{tail}")


def test_pickled_adapter_is_refused(tmp_path: Path) -> None:
    torch.save({"lora": torch.ones(1)}, tmp_path / "lora.bin")
    with pytest.raises(AdapterError, match="pickled"):
        parse_adapter(str(tmp_path / "lora.bin"))
    with pytest.raises(AdapterError, match="0 safetensors"):
        parse_adapter(str(tmp_path))
