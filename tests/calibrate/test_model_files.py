import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dcomp import DcompError
from dcomp.calibrate.model_files import (
    ModelError,
    check_finite,
    check_model_folder,
    read_safetensors_header,
)
from tests.support import hostile
from tests.support.tiny import NAMES, save_tiny_pipeline

VALID = hostile.file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": hostile.entry(),
        "b": hostile.entry("I8", [3], [16, 19]),
        "c": hostile.entry("F16", [], [19, 21]),
    },
    bytes(21),
)
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline("UNet2DModel", tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_model_folder(path)
    assert caught.value.remedy
    assert caught.value.where
    assert caught.value.exit_code == 2
    return caught.value


def test_a_valid_header_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 5), "codes": torch.ones(7, dtype=torch.int8), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt", "more": "text"})
    header = read_safetensors_header(tmp_path / "f.safetensors")
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"format": "pt", "more": "text"}
    content = (tmp_path / "f.safetensors").read_bytes()
    info = header.tensors["w"]
    stored = content[header.data_start + info.begin : header.data_start + info.end]
    assert stored == tensors["w"].numpy().tobytes()


@pytest.mark.parametrize("name", hostile.HEADERS)
def test_a_lying_header_is_refused(name: str, tmp_path: Path) -> None:
    content, word = hostile.HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=word) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((90 << 20).to_bytes(8, "little"))
        file.truncate(100 << 20)
    tracemalloc.start()
    with pytest.raises(ModelError, match="limit"):
        read_safetensors_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@FUZZ
@given(content=st.one_of(hostile.damaged(VALID), st.binary(max_size=200)))
def test_any_bytes_give_a_header_that_safetensors_accepts_too_or_our_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        header = read_safetensors_header(path)
    except DcompError:
        return
    assert sum(tensor.nbytes for tensor in header.tensors.values()) == len(content) - header.data_start
    for tensor in header.tensors.values():
        assert tensor.nbytes >= tensor.numel


@pytest.mark.parametrize("name", NAMES)
def test_every_tiny_pipeline_passes(name: str, tmp_path: Path) -> None:
    folder = check_model_folder(save_tiny_pipeline(name, tmp_path / "model"))
    stored = load_file(folder.denoiser.path / hostile.WEIGHTS)
    assert {key: info.shape for key, info in folder.denoiser.tensors.items()} == {
        key: tuple(tensor.shape) for key, tensor in stored.items()
    }
    assert folder.denoiser.class_name == name.split("-")[0]
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert folder.nbytes == sum(path.stat().st_size for path in files)
    for component in folder.components.values():
        check_finite(component)


@pytest.mark.parametrize("name", hostile.FOLDERS)
def test_a_tampered_folder_is_refused(name: str, model: Path) -> None:
    damage, word = hostile.FOLDERS[name]
    damage(model)
    assert word in refusal(model).problem


def test_a_single_file_is_refused_with_the_way_to_convert_it(original: Path) -> None:
    assert "from_single_file" in refusal(original / "unet" / hostile.WEIGHTS).remedy


def test_a_component_folder_is_no_pipeline(original: Path) -> None:
    assert "model_index.json" in refusal(original / "unet").problem


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_named(value: float, dtype: torch.dtype, model: Path) -> None:
    path = model / "unet" / hostile.WEIGHTS
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    tensors["mid_block.resnets.0.conv1.weight"].flatten()[17] = value
    save_file(tensors, path)
    folder = check_model_folder(model)
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.conv1\.weight \(1 of"):
        check_finite(folder.denoiser)


def test_pickles_and_code_beside_good_weights_are_ignored(model: Path) -> None:
    for name in ("diffusion_pytorch_model.bin", "evil.py", "weights.ckpt", "other.safetensors"):
        (model / "unet" / name).write_bytes(b"cos\nsystem\n")
    assert set(check_model_folder(model).denoiser.files) == {"config.json", hostile.WEIGHTS}


def test_a_hub_cache_may_link_to_its_own_blobs_only(original: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = Path(shutil.copytree(original, cache / "snapshots" / "abc"))
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = cache / "blobs" / f"{number:064x}"
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    folder = check_model_folder(snapshot)
    assert folder.denoiser.files[hostile.WEIGHTS].parent == cache / "blobs"
    (snapshot / "unet" / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    (snapshot / "unet" / "config.json").symlink_to(tmp_path / "config.json")
    assert "outside" in refusal(snapshot).problem


def test_a_lone_variant_is_found_and_listed_under_its_plain_name(model: Path) -> None:
    (model / "unet" / hostile.WEIGHTS).rename(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    folder = check_model_folder(model)
    assert folder.variant == "fp16"
    assert set(folder.denoiser.files) == {"config.json", hostile.WEIGHTS}


def test_names_of_older_diffusers_are_understood(tmp_path: Path) -> None:
    model = save_tiny_pipeline("DiTTransformer2DModel", tmp_path / "model")
    hostile.edit_json(model / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    hostile.edit_json(model / "transformer" / "config.json", norm_type="ada_norm_zero")
    path = model / "vae" / hostile.WEIGHTS
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        old = next((name.replace(new, old) for new, old in older.items() if f"attentions.0.{new}." in name), name)
        renamed[old] = tensor
    assert sum("query" in name for name in renamed) == 4
    save_file(renamed, path)
    check_model_folder(model)


def test_shards_are_read_through_their_index(model: Path) -> None:
    path = model / "unet" / hostile.WEIGHTS
    tensors = sorted(load_file(path).items())
    path.unlink()
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file(dict(part), model / "unet" / name)
        weight_map |= {key: name for key, _ in part}
    index = {"metadata": {"total_size": sum(t.nbytes for _, t in tensors)}, "weight_map": weight_map}
    (model / "unet" / hostile.INDEX).write_text(json.dumps(index))
    assert check_model_folder(model).denoiser.tensors.keys() == dict(tensors).keys()


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_random_damage_gives_a_good_folder_or_our_error(data: st.DataObject, original: Path, tmp_path: Path) -> None:
    model = tmp_path / "fuzzed"
    if not model.exists():
        shutil.copytree(original, model)
    name = data.draw(st.sampled_from(["model_index.json", "unet/config.json", f"unet/{hostile.WEIGHTS}"]))
    content = (model / name).read_bytes()
    (model / name).write_bytes(data.draw(hostile.damaged(content)))
    try:
        folder = check_model_folder(model)
        check_finite(folder.denoiser)
    except DcompError:
        pass
    finally:
        (model / name).write_bytes(content)


def test_a_config_with_endless_layers_costs_no_memory(model: Path) -> None:
    hostile.edit_json(model / "unet" / "config.json", layers_per_block=1 << 23)
    check_model_folder(model, match_weights=False)
    tracemalloc.start()
    refusal(model)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_reading_headers_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, dcomp.calibrate.model_files; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)
