from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dcomp.calibrate import stored_weights
from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.components import find_denoiser
from dcomp.calibrate.model_files import ModelError
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.stored_weights import StoredWeight, is_large, move_to_files
from dcomp.calibrate.structure import probe_structure
from dcomp.compress.layers import QuantLayer
from dcomp.compress.policy import Treatment, choose_schemes
from dcomp.compress.quantize import quantize_denoiser
from dcomp.recipes.run import run_recipe
from tests.support.checkpoints import checked_in_a_fork, file_hashes, save_lora, short_recipe, with_stage
from tests.support.sweep import sweep
from tests.support.tiny import NAMES, denoiser_inputs, save_tiny_pipeline, tiny_denoiser, tiny_pipeline

UNET, TEXT, DIT = "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"
Models = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folders of tiny pipelines whose denoisers are stored in some dtype."""

    @cache
    def make(name: str, dtype: torch.dtype = torch.float16) -> Path:
        folder, pipe = save_tiny_pipeline(name, tmp_path_factory.mktemp("model") / name), tiny_pipeline(name)
        part = find_denoiser(pipe)
        getattr(pipe, part).to(dtype).save_pretrained(folder / part)
        return folder

    return make


@pytest.fixture(autouse=True, scope="module")
def quick_check() -> Iterator[None]:
    with checked_in_a_fork():
        yield


class Alive:
    """Bytes of weights that were read and still lie in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self._read = 0, list[tuple[StorageWeakRef, int]]()
        inner = stored_weights._read

        def read(file: Path, name: str) -> Tensor:
            value = inner(file, name).float()  # so that the `float` after this makes no copy that would not be seen
            if value.ndim >= stored_weights.MATRIX_AXES:
                self._read.append((StorageWeakRef(value.untyped_storage()), value.nbytes))
                self.most = max(self.most, self.now())
            return value

        monkeypatch.setattr(stored_weights, "_read", read)

    def now(self) -> int:
        self._read = [(storage, nbytes) for storage, nbytes in self._read if not storage.expired()]
        return sum(nbytes for _, nbytes in self._read)

    def reads(self) -> bool:
        return self.most > 0


def matrices(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float16) for name in NAMES), (UNET, torch.bfloat16), (UNET, torch.float32)]
)
def test_a_model_in_its_files_is_the_model_in_memory(name: str, dtype: torch.dtype, models: Models) -> None:
    expected, stored = (open_pipeline(models(name, dtype), low_memory=low) for low in (False, True))
    assert stored.fingerprint() == expected.fingerprint()
    a, b = expected.denoiser, stored.denoiser
    assert dict(a.config) == dict(b.config)
    assert (b.dtype, b.device, b.training) == (a.dtype, a.device, False)
    assert list(a.state_dict()) == list(b.state_dict())
    for values in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(a, values)()), dict(getattr(b, values)())
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            facts = [(t.shape, t.dtype, t.device, t.requires_grad, t.nbytes) for t in (tensor, other[key])]
            assert facts[0] == facts[1]
            assert tensor.equal(other[key])
    assert all(isinstance(weight, StoredWeight) for weight in matrices(b))
    assert not any(isinstance(weight, StoredWeight) for weight in matrices(a))
    resident = [tensor for tensor in (*b.parameters(), *b.buffers()) if not isinstance(tensor, StoredWeight)]
    assert all(parameter.ndim < 2 for parameter in resident if isinstance(parameter, nn.Parameter))
    args, kwargs = denoiser_inputs(name)
    with torch.no_grad():
        assert a(*args, **kwargs)[0].equal(b(*args, **kwargs)[0])


@pytest.mark.parametrize("name", NAMES)
def test_one_matrix_at_a_time_is_in_memory(name: str, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, alive = open_pipeline(models(name), low_memory=True).denoiser, Alive(monkeypatch)
    args, kwargs = denoiser_inputs(name)
    with torch.no_grad():
        denoiser(*args, **kwargs)
    assert alive.now() == 0
    assert alive.most == max(weight.nbytes for weight in matrices(denoiser))


def test_operations_see_the_values_in_float32(tmp_path: Path) -> None:
    file, shapes = tmp_path / "weights.safetensors", {"linear": (6, 8), "conv": (6, 4, 3, 3), "table": (5, 7)}
    values = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(values, file)
    plain = {name: value.float() for name, value in values.items()}
    stored = {name: StoredWeight(file, name, shape) for name, shape in shapes.items()}
    assert all(isinstance(weight, StoredWeight) for weight in nn.ParameterDict(stored).to("cpu").values())
    rows, pixels, places = torch.randn(3, 5, 8), torch.randn(2, 4, 9, 9), torch.tensor([4, 0, 4])

    def results(weights: dict[str, Any]) -> list[Tensor]:
        linear = weights["linear"]
        return [
            nn.functional.linear(rows, linear),
            nn.functional.linear(rows[0], linear, torch.ones(6)),
            nn.functional.conv2d(pixels, weights["conv"], padding=1),
            nn.functional.embedding(places, weights["table"]),
            linear.detach()[:, 2:5],
            linear.float(),
            linear.detach().float().abs(),
            torch.zeros(6, 8).add_(linear),
            linear.detach().cpu().contiguous().reshape(-1).view(torch.uint8),
            linear.to(torch.float16),
            torch.stack([linear, linear]),
        ]

    for expected, found in zip(results(plain), results(stored), strict=True):
        assert type(found) is Tensor
        assert found.dtype == expected.dtype
        assert found.equal(expected)
    inputs = [rows.clone().requires_grad_() for _ in range(2)]
    for x, weights in zip(inputs, (plain, stored), strict=True):
        nn.functional.linear(x, weights["linear"]).square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.equal(inputs[1].grad)


def test_nothing_is_written_to_a_stored_weight(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    weight: Any = nn.Parameter(StoredWeight(tmp_path / "w.safetensors", "w", (2, 2)), requires_grad=False)
    for write in (lambda: weight.add_(1), lambda: weight.copy_(torch.zeros(2, 2)), lambda: weight.data.mul_(2)):
        with pytest.raises(RuntimeError, match="would change w, which stays in"):
            write()
    assert weight.equal(torch.ones(2, 2))


def test_a_file_that_was_taken_away_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    weight = StoredWeight(tmp_path / "w.safetensors", "w", (2, 2))
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(ModelError, match="The weight w can be read no longer") as error:
        weight.abs()
    assert error.value.where == str(tmp_path / "w.safetensors")


def test_weights_stay_in_files_if_a_copy_would_be_large(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = sum(parameter.nbytes for parameter in tiny_denoiser(UNET).parameters())
    for free, stored in ((2 * nbytes, False), (2 * nbytes - 2, True)):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(stored_weights.psutil, "virtual_memory", lambda memory=memory: memory)
        assert is_large(nbytes) == stored
        opened = open_pipeline(models(UNET), low_memory=None).denoiser
        assert isinstance(matrices(opened)[0], StoredWeight) == stored
        # Files of float32 are mapped as they are, so that there is no copy.
        mapped = open_pipeline(models(UNET, torch.float32), low_memory=None).denoiser
        assert not isinstance(matrices(mapped)[0], StoredWeight)


def test_weights_that_are_in_no_file_get_one(tmp_path: Path) -> None:
    model, original = tiny_denoiser(UNET), tiny_denoiser(UNET)
    for each in (model, original):
        each.conv_in.weight.data += 1
    move_to_files(model, tmp_path)
    assert all(isinstance(weight, StoredWeight) for weight in matrices(model))
    args, kwargs = denoiser_inputs(UNET)
    with torch.no_grad():
        assert model(*args, **kwargs)[0].equal(original(*args, **kwargs)[0])


@pytest.mark.parametrize("name", [UNET, DIT])
def test_float_weights_are_gone_when_their_layer_is_quantized(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(models(name), low_memory=True)
    prompts = ["0", "207"]  # a class, or nothing that is read
    calibration = record_calibration_set(pipeline, prompts, Generation(steps=2, batch_size=2), tmp_path / "set")
    call, denoiser = next(calibration.calls()), pipeline.denoiser
    decisions = choose_schemes(
        denoiser, probe_structure(denoiser, call.args, call.kwargs), "w4a8", (), {}, Treatment(rounding="gptq")
    )
    schemes = {key: decision.scheme for key, decision in decisions.items() if decision.scheme}
    largest = max(weight.nbytes for weight in matrices(denoiser))
    alive, finished = Alive(monkeypatch), []

    def progress(text: str, done: int, total: int) -> None:
        finished.append(alive.now())

    bins = StepBins.uniform(calibration.timesteps, 2, pipeline.scheduler)
    quantize_denoiser(denoiser, calibration, schemes, bins, tmp_path / "work", progress)
    assert len(finished) == len(schemes) + 1
    assert set(finished) == {0}
    # A layer's own weight, and once more when its float form runs beside.
    assert largest <= alive.most <= 2 * largest
    left = [weight for weight in matrices(denoiser) if not isinstance(weight, StoredWeight)]
    assert left == []
    assert sum(isinstance(layer, QuantLayer) for layer in denoiser.modules()) >= len(schemes)


@pytest.mark.parametrize(
    ("name", "rounding"), sweep([(TEXT, "nearest"), (DIT, "gptq"), (DIT, "adaround")], [(DIT, "gptq")])
)
def test_checkpoints_are_the_same_bits_wherever_the_weights_are(
    name: str, rounding: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stage(short_recipe(name), rounding=rounding, block_iterations=4)
    run_recipe(models(name), recipe, tmp_path / "memory", low_memory=False)
    alive = Alive(monkeypatch)
    result = run_recipe(models(name), recipe, tmp_path / "files", low_memory=True)
    assert alive.reads()
    assert any("stay in files" in note for note in result.notes)
    assert file_hashes(tmp_path / "files") == file_hashes(tmp_path / "memory")


def test_weights_with_an_adapter_are_written_and_then_stay_there(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_lora(TEXT, tmp_path / "lora", "unet", ["to_q", "to_v"])
    recipe = with_stage(short_recipe(TEXT), rounding="nearest").model_copy(update={"lora": (str(adapter),)})
    run_recipe(models(TEXT), recipe, tmp_path / "memory", low_memory=False)
    alive = Alive(monkeypatch)
    result = run_recipe(models(TEXT), recipe, tmp_path / "files", low_memory=True)
    assert alive.reads()
    assert any("stay in files" in note for note in result.notes)
    assert file_hashes(tmp_path / "files") == file_hashes(tmp_path / "memory")
