import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum.quanto.library.extensions import cpp as quanto_cpp

from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.calibrate.safetensors_file import read_safetensors_header
from dcomp.compress.foreign import ForeignFormatError, _trial, check_foreign, quantize_foreign
from dcomp.compress.weight_files import write_weights
from tests.support.tiny import NAMES, denoiser_inputs, save_tiny_pipeline

# Reads int8 weights [64, 64] through a mapped file, as diffusers does, and multiplies bfloat16 activations with them.
MAPPED_PRODUCT = """
import sys, torch
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    weight = file.get_tensor("weight")
print(weight.data_ptr() % 64, flush=True)
torch._weight_int8pack_mm(torch.ones(8, 64, dtype=torch.bfloat16), weight, torch.ones(64, dtype=torch.bfloat16))
"""


@pytest.fixture(scope="session", params=NAMES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenPipeline:
    return open_pipeline(save_tiny_pipeline(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="session")
def unet(tmp_path_factory: pytest.TempPathFactory) -> OpenPipeline:
    return open_pipeline(save_tiny_pipeline("UNet2DConditionModel", tmp_path_factory.mktemp("unet")))


def reopen(pipeline: OpenPipeline, folder: Path, **options: Any) -> torch.nn.Module:
    return type(pipeline.denoiser).from_pretrained(folder, **options).eval()


def predict(model: torch.nn.Module, name: str) -> torch.Tensor:
    args, kwargs = denoiser_inputs(name)
    with torch.no_grad():
        return model(*args, **kwargs)[0]


def test_quanto_8_bit_opens_in_plain_diffusers_close_to_the_original(pipeline: OpenPipeline, tmp_path: Path) -> None:
    name = next(n for n in NAMES if n.split("-")[0] == type(pipeline.denoiser).__name__)
    result = quantize_foreign(pipeline, "quanto", 8, tmp_path / "denoiser")
    reopened = reopen(pipeline, result.folder)
    original, output = predict(pipeline.denoiser, name), predict(reopened, name)
    # Half a step of 1/127 in every weight: far below one percent of the output, far above float noise.
    assert 1e-5 < ((output - original).norm() / original.norm()).item() < 0.03
    assert sum(type(layer).__name__ == "QLinear" for layer in reopened.modules()) == result.layers
    assert all(isinstance(pipeline.denoiser.get_submodule(layer), torch.nn.Module) for layer in result.left_float)
    assert result.bytes == sum(file.stat().st_size for file in result.folder.iterdir())


def test_no_int8_weight_can_crash_the_bfloat16_product(pipeline: OpenPipeline, tmp_path: Path) -> None:
    """Mapped rows start on vector boundaries: aligned start, whole vectors; other row lengths take another route."""
    reopened = reopen(
        pipeline, quantize_foreign(pipeline, "quanto", 8, tmp_path / "d").folder, torch_dtype=torch.bfloat16
    )
    codes = [layer.weight._data for layer in reopened.modules() if type(layer).__name__ == "QLinear"]
    assert codes
    assert [code.shape for code in codes if code.data_ptr() % 16 and code.shape[1] % 4 == 0] == []
    assert [code.shape for code in codes if code.shape[1] % 16 and code.shape[1] % 4 == 0] == []


def test_same_model_gives_the_same_bytes_and_no_path(unet: OpenPipeline, tmp_path: Path) -> None:
    first, second = (quantize_foreign(unet, "quanto", 8, tmp_path / name).folder for name in ("a", "b"))
    names = {file.name for file in first.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    config = (first / "config.json").read_text()
    assert str(tmp_path) not in config
    assert json.loads(config)["quantization_config"]["quant_method"] == "quanto"


def test_float_layers_keep_the_narrow_dtype_of_the_source(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("UNet2DConditionModel", tmp_path / "model")
    plain = open_pipeline(folder)
    plain.denoiser.half().save_pretrained(folder / "unet")
    pipeline = open_pipeline(folder)
    result = quantize_foreign(pipeline, "quanto", 8, tmp_path / "out")
    tensors = read_safetensors_header(result.folder / "diffusion_pytorch_model.safetensors").tensors
    assert tensors["conv_in.weight"].dtype == "F16"
    assert torch.equal(reopen(pipeline, result.folder).conv_in.weight, pipeline.denoiser.float().conv_in.weight)


def test_adapted_weights_in_memory_are_what_is_written(tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline("UNet2DConditionModel", tmp_path / "model"))
    with torch.no_grad():
        pipeline.denoiser.conv_in.weight.add_(1)
    result = quantize_foreign(pipeline, "quanto", 8, tmp_path / "out")
    assert torch.equal(reopen(pipeline, result.folder).conv_in.weight, pipeline.denoiser.conv_in.weight)


def test_existing_output_of_a_killed_run_is_replaced(unet: OpenPipeline, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rest").write_text("of a killed run")
    quantize_foreign(unet, "quanto", 8, tmp_path / "out")
    assert not (tmp_path / "out" / "rest").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("format", "bits"), [("quanto", 3), ("hqq", 4), ("", 8)])
def test_unknown_format_is_refused_with_the_known_ones(
    format: str, bits: int, unet: OpenPipeline, tmp_path: Path
) -> None:
    for act in (lambda: check_foreign(format, bits), lambda: quantize_foreign(unet, format, bits, tmp_path / "out")):
        with pytest.raises(ForeignFormatError, match="quanto") as caught:
            act()
        assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_quantized_denoiser_is_refused(unet: OpenPipeline, tmp_path: Path) -> None:
    folder = quantize_foreign(unet, "quanto", 8, tmp_path / "out").folder
    again = SimpleNamespace(denoiser=reopen(unet, folder), denoiser_name="unet", source=unet.source)
    with pytest.raises(ForeignFormatError, match="quantized already"):
        quantize_foreign(again, "quanto", 8, tmp_path / "again")


def test_a_format_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python itself takes for "not installed"
    with pytest.raises(ForeignFormatError, match="not installed") as caught:
        check_foreign("bnb", 8)
    assert "dcomp[bnb]" in caught.value.remedy


@pytest.mark.slow
def test_bitsandbytes_runs_on_a_gpu_and_is_refused_without() -> None:
    if torch.cuda.is_available():
        check_foreign("bnb", 8, "cuda")
        check_foreign("bnb", 4, "cuda")
        return
    with pytest.raises(ForeignFormatError, match="GPU") as caught:
        check_foreign("bnb", 8)
    assert "--format dcomp" in caught.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bitsandbytes_of_4_bits_needs_a_gpu_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _trial("bnb", "4", "cpu")
    assert "GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trial_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ForeignFormatError, match=r"did not end within 0\.5 s"):
        check_foreign("quanto", 8, seconds=0.5)


def test_quanto_4_bit_is_tried_and_runs(unet: OpenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a line of Python in place of quanto's C++ of the same, which takes two minutes to compile."""

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    monkeypatch.setattr(quanto_cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
    _trial("quanto", "4", "cpu")
    result = quantize_foreign(unet, "quanto", 4, tmp_path / "four")
    original, output = (predict(m, "UNet2DConditionModel") for m in (unet.denoiser, reopen(unet, result.folder)))
    assert 1e-3 < ((output - original).norm() / original.norm()).item() < 0.2
    assert result.bytes < quantize_foreign(unet, "quanto", 8, tmp_path / "eight").bytes


def run_mapped_product(file: Path) -> tuple[int, int]:
    command = [sys.executable, "-P", "-c", MAPPED_PRODUCT, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout), done.returncode


def test_unaligned_mapped_weights_crash_torch_and_ours_do_not(tmp_path: Path) -> None:
    weight = torch.ones(64, 64, dtype=torch.int8)
    write_weights(tmp_path, {"weight": weight, "odd": torch.ones(3)}, 1 << 30, {"format": "pt"})
    assert run_mapped_product(tmp_path / "diffusion_pytorch_model.safetensors") == (0, 0)

    header = json.dumps({"weight": {"dtype": "I8", "shape": [64, 64], "data_offsets": [0, 4096]}}).encode()
    header += b" " * (-(8 + len(header)) % 64 + 8)  # valid for the format: 8 bytes past a 64-byte boundary
    unaligned = tmp_path / "unaligned.safetensors"
    unaligned.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4096))
    place, code = run_mapped_product(unaligned)
    assert place == 8
    if code == 0:
        pytest.skip("torch's int8 product takes unaligned weights on this processor")
    assert code < 0


@settings(max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 33), max_size=3), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from([torch.int8, torch.uint8, torch.float16, torch.float32]), min_size=8, max_size=8),
)
def test_every_tensor_of_whole_vectors_is_aligned_in_our_files(
    shapes: list[list[int]], dtypes: list[torch.dtype], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("file")
    tensors = {
        f"t{i}": torch.zeros(shape, dtype=dtype) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    write_weights(folder, tensors, 1 << 30, {})
    header = read_safetensors_header(folder / "diffusion_pytorch_model.safetensors")
    assert header.data_start % 64 == 0
    assert [t.name for t in header.tensors.values() if t.nbytes % 16 == 0 and t.nbytes and t.begin % 16] == []
