import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dcomp import DcompError
from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline, prediction_of
from dcomp.calibrate.record import CalibrationSet, record_calibration_set
from dcomp.calibrate.structure import Structure, probe_structure
from dcomp.compress import quantize
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.policy import choose_schemes
from dcomp.compress.quantize import INT_TOLERANCE, LayerErrors, QuantizationError, quantize_denoiser
from dcomp.compress.scheme import QScheme
from tests.support.tiny import NAMES, save_tiny_pipeline

INTEGERS = ["w8a8", "w4a8", "w4a16", "w8a16"]
STEPS = 3
STATIC = QScheme(8, input_bits=8, input_granularity="tensor")


@dataclass(frozen=True)
class Case:
    """A tiny pipeline with what quantization needs to know of it."""

    pipeline: OpenPipeline
    calibration: CalibrationSet
    structure: Structure
    bins: StepBins

    def schemes(self, preset: str) -> dict[str, QScheme]:
        decisions = choose_schemes(self.pipeline.denoiser, self.structure, preset)
        return {name: decision.scheme for name, decision in decisions.items() if decision.scheme}

    def denoiser(self) -> nn.Module:
        return copy.deepcopy(self.pipeline.denoiser)

    def quantized(self, preset: str, work: Path) -> tuple[nn.Module, dict[str, LayerErrors]]:
        denoiser = self.denoiser()
        return denoiser, quantize_denoiser(denoiser, self.calibration, self.schemes(preset), self.bins, work)

    def error(self, denoiser: nn.Module) -> float:
        """Relative error of all recorded predictions."""
        wrong = right = 0.0
        with torch.no_grad():
            for call in self.calibration.calls():
                prediction = prediction_of(denoiser(*call.args, **call.kwargs))
                wrong += (prediction - call.output).square().sum().item()
                right += call.output.square().sum().item()
        return float((wrong / right) ** 0.5)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        pipeline = open_pipeline(save_tiny_pipeline(name, folder / "model"))
        size = 16 if name == "FluxTransformer2DModel" else None
        prompts = {"class": ["0", "207"], "text": ["a cat", "two dogs"]}.get(pipeline.kind, ["", ""])
        settings = Generation(steps=STEPS, batch_size=2, height=size, width=size)
        calibration = record_calibration_set(pipeline, prompts, settings, folder / "calibration")
        call = next(calibration.calls())
        structure = probe_structure(pipeline.denoiser, call.args, call.kwargs)
        bins = StepBins.uniform(calibration.timesteps, 25, pipeline.scheduler, others=calibration.all_timesteps)
        return Case(pipeline, calibration, structure, bins)

    return make


@pytest.fixture
def unet(cases: Callable[[str], Case]) -> Case:
    return cases("UNet2DModel")


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("preset", INTEGERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_computes_in_integers_what_its_fake_form_stands_for(
    name: str, preset: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases(name)
    schemes = case.schemes(preset)
    denoiser, errors = case.quantized(preset, tmp_path)
    assert max(error.int_vs_fake for error in errors.values()) <= INT_TOLERANCE == 1e-5
    assert list(errors) == list(schemes)
    layers = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, QuantLayer)}
    assert layers.keys() == schemes.keys()
    assert case.bins.count == STEPS
    for key, layer in layers.items():
        original = case.pipeline.denoiser.get_submodule(key)
        assert type(layer) is (QuantConv2d if isinstance(original, nn.Conv2d) else QuantLinear)
        assert (layer.scheme, layer.execution) == (schemes[key], "int")
        static = schemes[key].input_granularity == "tensor"
        assert (layer.input_scale is not None and layer.input_scale.shape == (STEPS,)) == static
        assert 0 < errors[key].weight < (0.12 if layer.scheme.weight_bits == 4 else 0.012)
        assert 0 < errors[key].output < 0.2
    untouched = case.pipeline.denoiser.state_dict()
    for key, tensor in denoiser.state_dict().items():
        if key.rpartition(".")[0] not in layers:
            assert tensor.equal(untouched[key])


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_are_closer_than_four_in_every_layer_and_in_the_prediction(
    name: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases(name)
    results = {preset: case.quantized(preset, tmp_path / preset) for preset in INTEGERS}
    four, eight = results["w4a16"][1], results["w8a16"][1]
    narrow = [key for key, scheme in case.schemes("w4a16").items() if scheme.weight_bits == 4]
    assert narrow
    # A step of 8 bits is about 16 times finer than one of 4; the scales of groups win back a part of that.
    assert all(eight[key].weight < four[key].weight / 6 for key in narrow)
    predictions = {preset: case.error(denoiser) for preset, (denoiser, _) in results.items()}
    assert predictions["w8a16"] < predictions["w8a8"] < predictions["w4a8"] < 0.2
    assert predictions["w8a16"] < predictions["w4a16"] < 0.2
    assert predictions["w8a8"] < 0.05
    assert case.error(case.pipeline.denoiser) == 0.0


def test_fake_execution_predicts_the_same(unet: Case, tmp_path: Path) -> None:
    denoiser, _ = unet.quantized("w4a8", tmp_path)
    call = next(unet.calibration.calls())
    with torch.no_grad():
        integers = prediction_of(denoiser(*call.args, **call.kwargs))
        for layer in denoiser.modules():
            if isinstance(layer, QuantLayer):
                layer.execution = "fake"
        fake = prediction_of(denoiser(*call.args, **call.kwargs))
    # A last bit that differs moves a code of a later layer by one at most.
    assert (integers - fake).abs().max() < 2e-2 * fake.abs().max()
    assert (integers - fake).norm() < 2e-3 * fake.norm()


class Stop(Exception):  # noqa: N818 - stands for a killed process
    pass


def stop_at(text: str, done: int) -> Callable[[str, int, int], None]:
    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (text, done):
            raise Stop

    return progress


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["after a snapshot", "before any snapshot"])
def test_a_restart_gives_the_same_bits(
    seconds: float, name: str, cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases(name)
    whole, errors = case.quantized("w4a8", tmp_path / "whole")
    monkeypatch.setattr(quantize, "SNAPSHOT_SECONDS", seconds)
    work, schemes = tmp_path / "work", case.schemes("w4a8")
    for text, done in (("weights", 3), ("activation ranges", 1), ("activation ranges", 2), ("layer errors", 0)):
        with pytest.raises(Stop):
            quantize_denoiser(case.denoiser(), case.calibration, schemes, case.bins, work, stop_at(text, done))
    seen: list[tuple[str, int]] = []
    denoiser = case.denoiser()
    again = quantize_denoiser(
        denoiser, case.calibration, schemes, case.bins, work, lambda text, done, total: seen.append((text, done))
    )
    assert same_weights(denoiser, whole)
    assert again == errors
    # Everything was observed before the last stop, so nothing is observed again.
    assert [done for text, done in seen if text == "activation ranges"] == [len(case.calibration)]


def test_finished_weights_are_not_searched_again(unet: Case, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize_denoiser(
            unet.denoiser(), unet.calibration, unet.schemes("w4a8"), unet.bins, tmp_path, stop_at("weights", 5)
        )
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "weights").iterdir()}
    assert len(before) == 5
    unet.quantized("w4a8", tmp_path)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith(".")]


def test_four_bit_weights_take_four_bits_on_the_way_too(unet: Case, tmp_path: Path) -> None:
    schemes = unet.schemes("w4a8")
    unet.quantized("w4a8", tmp_path)
    for name, scheme in schemes.items():
        with safe_open(tmp_path / "weights" / f"{name}.safetensors", "pt") as file:
            codes = file.get_tensor("qweight")
        weight = unet.pipeline.denoiser.get_submodule(name).weight
        if scheme.weight_bits == 8:
            assert (codes.dtype, codes.numel()) == (torch.int8, weight.numel())
        else:
            padded = -(-weight.shape[1] // 64) * 64 * weight.numel() // weight.shape[1]
            assert (codes.dtype, codes.numel() * 2) == (torch.uint8, padded)


def test_a_bin_without_calls_takes_the_table_of_its_nearest_neighbour(tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline("UNet2DModel", tmp_path / "model"))
    settings = Generation(steps=4, batch_size=2)
    calibration = record_calibration_set(pipeline, [""], settings, tmp_path / "calibration", max_calls=2)
    assert len(calibration.timesteps) == 2 < len(calibration.all_timesteps) == 4
    bins = StepBins.uniform(calibration.all_timesteps, 4, pipeline.scheduler)
    quantize_denoiser(pipeline.denoiser, calibration, {"conv_in": STATIC}, bins, tmp_path / "work")
    scale = pipeline.denoiser.conv_in.input_scale
    assert scale.shape == (4,)
    assert len(scale.unique()) == 2
    assert scale[0] == scale[1]
    assert scale[2] == scale[3]


def test_other_ranges_for_other_steps(unet: Case, tmp_path: Path) -> None:
    denoiser, _ = unet.quantized("w8a8", tmp_path)
    tables = [layer.input_scale for layer in denoiser.modules() if isinstance(layer, QuantConv2d)]
    assert any(len(table.unique()) == STEPS for table in tables if table is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_layer(bad: float, unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    with torch.no_grad():
        denoiser.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = bad
    with pytest.raises(DcompError, match="NaN or infinite") as caught:
        quantize_denoiser(denoiser, unet.calibration, unet.schemes("w4a8"), unet.bins, tmp_path)
    assert caught.value.where == "mid_block.resnets.0.conv1"
    assert not any(isinstance(layer, QuantLayer) for layer in denoiser.modules())


def test_an_input_that_is_not_finite_is_refused_with_its_layer_and_timestep(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    with torch.no_grad():
        denoiser.conv_norm_out.weight[0] = float("inf")
    with pytest.raises(QuantizationError, match=f"timestep {unet.calibration.timesteps[0]:g}") as caught:
        quantize_denoiser(denoiser, unet.calibration, {"conv_out": STATIC}, unet.bins, tmp_path)
    assert caught.value.where == "conv_out"


def test_a_layer_that_is_never_called_needs_no_static_range_but_cannot_have_one(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    denoiser.spare = nn.Conv2d(8, 8, 3)
    spare = copy.deepcopy(denoiser)
    with pytest.raises(QuantizationError, match="never called") as caught:
        quantize_denoiser(denoiser, unet.calibration, {"spare": STATIC}, unet.bins, tmp_path)
    assert (caught.value.where, "--keep" in caught.value.remedy) == ("spare", True)
    errors = quantize_denoiser(spare, unet.calibration, {"spare": QScheme(8)}, unet.bins, tmp_path / "other")
    assert 1e-4 < errors["spare"].weight < 0.012
    assert (errors["spare"].output, errors["spare"].int_vs_fake) == (None, None)


def test_what_is_no_float_layer_is_refused(unet: Case, tmp_path: Path) -> None:
    denoiser, _ = unet.quantized("w8a16", tmp_path / "work")
    for name in ("conv_norm_out", "conv_in", "mid_block"):
        with pytest.raises(QuantizationError, match="no float linear or convolution") as caught:
            quantize_denoiser(denoiser, unet.calibration, {name: QScheme(8)}, unet.bins, tmp_path)
        assert caught.value.where == name


def test_no_schemes_change_nothing(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    assert quantize_denoiser(denoiser, unet.calibration, {}, unet.bins, tmp_path) == {}
    assert same_weights(denoiser, unet.pipeline.denoiser)
