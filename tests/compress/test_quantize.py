import copy
import functools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline, prediction_of
from dcomp.calibrate.record import CalibrationSet, record_calibration_set
from dcomp.calibrate.replay import RowBatch, gather_rows
from dcomp.calibrate.structure import Structure, probe_structure
from dcomp.compress import quantize
from dcomp.compress.layers import QuantConv2d, QuantLayer
from dcomp.compress.policy import Treatment, choose_schemes
from dcomp.compress.quantize import (
    CHUNK_ROWS,
    INT_TOLERANCE,
    LayerErrors,
    QuantizationError,
    RowSteps,
    compare_executions,
    in_chunks,
    quantize_denoiser,
)
from dcomp.compress.quantize_layer import quantize_layer
from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.compress.scheme_check import WeightError
from dcomp.compress.split import is_quantized, parts_of, quantized_layers
from tests.support.sweep import slow, sweep
from tests.support.tiny import NAMES, save_tiny_pipeline

INTEGERS = ["w8a8", "w4a8", "w4a16", "w8a16", "w4a4"]
KINDS = ["UNet2DConditionModel-linear", "SD3Transformer2DModel", "DiTTransformer2DModel"]  # of blocks and their layers
STEPS = 3
STATIC = QScheme(8, input_bits=8, input_granularity="tensor")
FULL = Treatment(inputs="static", rounding="gptq", split="all", smooth=True)  # every part of the pass has work to do


@dataclass(frozen=True)
class Case:
    """A tiny pipeline with what quantization needs to know of it."""

    pipeline: OpenPipeline
    calibration: CalibrationSet
    structure: Structure
    bins: StepBins
    made_before: dict[tuple[str, Treatment], tuple[nn.Module, dict[str, LayerErrors]]] = field(default_factory=dict)

    def schemes(self, preset: str, treatment: Treatment | None = None) -> dict[str, QScheme]:
        decisions = choose_schemes(self.pipeline.denoiser, self.structure, preset, treatment=treatment)
        return {name: decision.scheme for name, decision in decisions.items() if decision.scheme}

    def denoiser(self) -> nn.Module:
        return copy.deepcopy(self.pipeline.denoiser)

    def quantized(
        self, preset: str, work: Path, treatment: Treatment | None = None
    ) -> tuple[nn.Module, dict[str, LayerErrors]]:
        denoiser, schemes = self.denoiser(), self.schemes(preset, treatment)
        return denoiser, quantize_denoiser(denoiser, self.calibration, schemes, self.bins, work)

    def made(self, preset: str, treatment: Treatment) -> tuple[nn.Module, dict[str, LayerErrors]]:
        """The same, made once; nobody may change it."""
        if (preset, treatment) not in self.made_before:
            with tempfile.TemporaryDirectory() as work:
                self.made_before[preset, treatment] = self.quantized(preset, Path(work), treatment)
        return self.made_before[preset, treatment]

    def rows(self, count: int = 512) -> RowBatch:
        return gather_rows(self.calibration, count, denoiser=self.pipeline.denoiser)

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


def untouched(denoiser: nn.Module, original: nn.Module) -> bool:
    """Whether a denoiser is a float one again: weights, forward methods and hooks."""
    return (
        same_weights(denoiser, original)
        and not any("forward" in vars(module) or module._forward_hooks for module in denoiser.modules())
        and not any(map(is_quantized, denoiser.modules()))
        and not denoiser._forward_pre_hooks
    )


@pytest.mark.parametrize(
    ("name", "preset"),
    sweep(
        [(name, preset) for name in NAMES for preset in INTEGERS if name in KINDS or preset == "w4a8"],
        [*((name, "w4a8") for name in KINDS), (KINDS[0], "w8a16"), (KINDS[2], "w4a4")],
    ),
)
def test_every_layer_computes_in_integers_what_its_fake_form_stands_for(
    name: str, preset: str, cases: Callable[[str], Case]
) -> None:
    case = cases(name)
    treatment = Treatment(inputs="static")
    schemes = case.schemes(preset, treatment)
    denoiser, errors = case.made(preset, treatment)
    differences = compare_executions(denoiser, case.calibration)
    assert differences.keys() == schemes.keys() == errors.keys()
    assert max(differences.values()) <= INT_TOLERANCE == 1e-5
    layers = quantized_layers(denoiser)
    assert layers.keys() == schemes.keys()
    assert case.bins.count == STEPS
    for key, layer in layers.items():
        original = case.pipeline.denoiser.get_submodule(key)
        assert isinstance(layer, nn.Conv2d if isinstance(original, nn.Conv2d) else nn.Linear)
        assert layer.execution == "int"
        assert replace(layer.scheme, smooth=schemes[key].smooth, rotate=schemes[key].rotate) == schemes[key]
        assert layer.scheme.smooth <= schemes[key].smooth
        assert layer.scheme.rotate <= schemes[key].rotate
        static = schemes[key].input_granularity == "tensor"
        for part in parts_of(layer):
            assert (part.input_scale is not None and part.input_scale.shape == (STEPS,)) == static
        bound = 0.12 if layer.scheme.weight_bits == 4 else 0.012
        # Factors make room for inputs at the expense of the weight, by as much as the output gains from it.
        assert 0 < errors[key].weight < bound * (2.5 if layer.scheme.smooth else 1)
        assert 0 < errors[key].output < (0.3 if layer.scheme.input_bits == 4 else 0.2)
        assert len(errors[key].by_step) in (0, STEPS)
        assert errors[key].int_vs_fake is None
    before = case.pipeline.denoiser.state_dict()
    for key, tensor in denoiser.state_dict().items():
        if not any(key.startswith(f"{layer}.") for layer in layers):
            assert tensor.equal(before[key])


@pytest.mark.parametrize("name", KINDS)
def test_eight_bits_are_closer_than_four_in_every_layer_and_in_the_prediction(
    name: str, cases: Callable[[str], Case]
) -> None:
    case = cases(name)
    # By default 4-bit inputs have directions, and W4A4 is then nearer than W4A8.
    alike = {preset: Treatment(inputs="static", directions=0 if preset == "w4a4" else None) for preset in INTEGERS}
    results = {preset: case.made(preset, treatment) for preset, treatment in alike.items()}
    four, eight = results["w4a16"][1], results["w8a16"][1]
    narrow = [key for key, scheme in case.schemes("w4a16").items() if scheme.weight_bits == 4]
    assert narrow
    # A step of 8 bits is about 16 times finer than one of 4; the scales of groups win back a part of that.
    assert all(eight[key].weight < four[key].weight / 6 for key in narrow)
    predictions = {preset: case.error(denoiser) for preset, (denoiser, _) in results.items()}
    assert predictions["w8a16"] < predictions["w8a8"] < predictions["w4a8"] < predictions["w4a4"] < 0.4
    assert predictions["w8a16"] < predictions["w4a16"] < 0.2
    assert predictions["w4a8"] < 0.2
    assert predictions["w8a8"] < 0.05
    assert case.error(case.pipeline.denoiser) == 0.0


@pytest.mark.parametrize("name", KINDS)
def test_moved_errors_of_codes_cost_the_outputs_less(name: str, cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases(name)
    nearest, gptq = (
        case.quantized("w4a16", tmp_path / rounding, Treatment(rounding=rounding))  # type: ignore[arg-type]
        for rounding in ("nearest", "gptq")
    )
    four = [key for key, scheme in case.schemes("w4a16").items() if scheme.weight_bits == 4]
    ratios = torch.tensor([gptq[1][key].output / nearest[1][key].output for key in four])
    assert ratios.log().mean().exp() < 0.9
    assert case.error(gptq[0]) < case.error(nearest[0])


def step_by_step(case: Case, schemes: dict[str, QScheme], order: list[str]) -> nn.Module:
    """The definition of the pass: find a layer's inputs in what is quantized so far, quantize it, take the next one."""
    denoiser, rows, clock = case.denoiser(), case.rows(), StepClock(case.bins)
    assert len(rows) <= CHUNK_ROWS  # so that both take all rows in one product
    with clock.attach(denoiser), torch.no_grad():
        for name in order:
            seen: list[tuple[Tensor, Tensor | None]] = []
            layer: Any = denoiser.get_submodule(name)
            hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append((args[0], clock.row_bins)))
            denoiser(*rows.args, **rows.kwargs)
            hook.remove()
            x, row_bins = seen[0]
            row_bins = row_bins if row_bins is not None and len(row_bins) == len(x) else None
            result = quantize_layer(layer, x, schemes[name], row_bins=row_bins, bins=case.bins.count).eval()
            result.clock, result.execution = clock, "fake"
            parent, _, child = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, result)
    return denoiser


@pytest.mark.parametrize(("name", "preset"), [("UNet2DModel", "w4a8"), slow("DiTTransformer2DModel", "w4a4")])
def test_each_layer_is_quantized_on_what_the_quantized_layers_before_it_say(
    name: str, preset: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    case = cases(name)
    denoiser, errors = case.quantized(preset, tmp_path, FULL)
    expected = step_by_step(case, case.schemes(preset, FULL), list(errors))
    assert same_weights(denoiser, expected)
    schemes = {key: layer.scheme for key, layer in quantized_layers(denoiser).items()}
    assert schemes == {key: layer.scheme for key, layer in quantized_layers(expected).items()}


def test_the_errors_are_those_of_the_output_for_the_same_input(unet: Case, tmp_path: Path) -> None:
    denoiser, errors = unet.quantized("w4a8", tmp_path, FULL)
    for layer in quantized_layers(denoiser).values():
        layer.execution = "fake"
    rows = unet.rows()
    for name, error in errors.items():
        original: Any = unet.pipeline.denoiser.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        hook = denoiser.get_submodule(name).register_forward_hook(
            lambda _, args, y, seen=seen: seen.append((args[0], y))
        )
        with torch.no_grad():
            denoiser(*rows.args, **rows.kwargs)
            hook.remove()
            x, y = seen[0]
            reference = original(x)
        squares, norms = ((t.double() ** 2).flatten(1).sum(1) for t in (y - reference, reference))
        assert error.output == pytest.approx(float((squares.sum() / norms.sum()).sqrt()), rel=1e-5)
        by_step = [
            float((squares[rows.timesteps == t].sum() / norms[rows.timesteps == t].sum()).sqrt())
            for t in unet.calibration.timesteps
        ]
        assert error.by_step == pytest.approx(by_step, rel=1e-5)
        weight = original.weight
        off = (quantized_layers(denoiser)[name].dequantize() - weight).norm() / weight.norm()
        assert error.weight == pytest.approx(float(off), rel=1e-5)


def test_rows_of_one_timestep_are_taken_together_noisiest_first() -> None:
    steps = RowSteps(torch.tensor([5.0, 900.0, 5.0, 40.0]))
    squares, norms = torch.tensor([1.0, 16.0, 3.0, 0.0]), torch.tensor([10.0, 4.0, 6.0, 0.0])
    assert steps.relative(squares.double(), norms.double()) == (2.0, 0.0, 0.5)


@pytest.mark.parametrize("rows", [CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
def test_chunks_of_rows_keep_their_step_bins(rows: int) -> None:
    clock = StepClock(StepBins.uniform([900.0, 500.0, 100.0], 3))
    row_bins = torch.arange(rows) % 3
    x = torch.randn(rows, 4)
    clock.row_bins = row_bins
    sizes: list[int] = []

    def layer(part: Tensor) -> Tensor:
        assert clock.row_bins is not None
        sizes.append(len(part))
        return part * (1 + clock.row_bins[:, None])

    assert in_chunks(layer, x, clock, rows).equal(x * (1 + row_bins[:, None]))
    assert max(sizes) <= CHUNK_ROWS
    assert clock.row_bins is row_bins
    # What has other rows than the batch, such as a table of positions, is one input.
    assert in_chunks(lambda part: part[:1], x, clock, rows + 1).equal(x[:1])

    def broken(part: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_chunks(broken, x, clock, rows)
    assert clock.row_bins is row_bins


def test_as_many_rows_are_used_as_asked_for_or_fit(unet: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(layer: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        counts.append(len(x))
        return quantize_layer(layer, x, *args, **options)

    monkeypatch.setattr(quantize, "quantize_layer", counted)
    monkeypatch.setattr(quantize, "_rows_that_fit", lambda denoiser, call: 5)
    schemes = {"conv_in": QScheme(8), "conv_out": STATIC}
    for asked, used in ((2, 2), (4, 4), (512, 5)):
        counts.clear()
        quantize_denoiser(unet.denoiser(), unet.calibration, schemes, unet.bins, tmp_path / str(asked), rows=asked)
        assert counts == [used, used]


def test_the_rows_that_fit_follow_from_the_largest_layer(unet: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = next(unet.calibration.calls())
    # The widest layer reads a concatenation of 64 + 32 channels and makes 32, at 8 x 8 pixels: 4 such pairs in fp32.
    largest = 4 * 4 * 8 * 8 * (96 + 32)
    monkeypatch.setattr(quantize, "ROWS_BYTES", 100 * largest)
    assert quantize._rows_that_fit(unet.pipeline.denoiser, call) == 100
    monkeypatch.setattr(quantize, "ROWS_BYTES", 1)
    assert quantize._rows_that_fit(unet.pipeline.denoiser, call) == 8
    assert untouched(unet.pipeline.denoiser, unet.denoiser())


def test_fake_execution_predicts_the_same(unet: Case, tmp_path: Path) -> None:
    denoiser, _ = unet.quantized("w4a8", tmp_path)
    call = next(unet.calibration.calls())
    with torch.no_grad():
        integers = prediction_of(denoiser(*call.args, **call.kwargs))
        for layer in denoiser.modules():
            if isinstance(layer, QuantLayer):
                layer.execution = "fake"
        fake = prediction_of(denoiser(*call.args, **call.kwargs))
    # A last bit that differs may move a code by one, hence codes of all later layers: a step of 8 bits, a few times.
    assert (integers - fake).norm() < 3e-2 * fake.norm()


@pytest.mark.parametrize("broken", ["down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut"])
def test_an_integer_layer_that_computes_something_else_is_found(
    broken: str, unet: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, _ = unet.quantized("w8a8", tmp_path)
    layer: Any = denoiser.get_submodule(broken)
    part = parts_of(layer)[-1]
    right = part.int_forward
    for error, caught in ((1e-7, False), (1e-3, True)):
        monkeypatch.setattr(part, "int_forward", lambda x, error=error: right(x) * (1 + error))
        if not caught:
            assert max(compare_executions(denoiser, unet.calibration).values()) <= INT_TOLERANCE
            continue
        with pytest.raises(QuantizationError, match="Integer and fake-quantized execution differ by") as found:
            compare_executions(denoiser, unet.calibration)
        assert found.value.where == broken
    monkeypatch.setattr(part, "int_forward", lambda x: right(x) * float("nan"))
    with pytest.raises(QuantizationError, match="differ by inf"):
        compare_executions(denoiser, unet.calibration)
    assert not any(module._forward_hooks for module in denoiser.modules())


class Stop(Exception):  # noqa: N818 - stands for a killed process
    pass


def stop_at(text: str, done: int) -> Callable[[str, int, int], None]:
    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (text, done):
            raise Stop

    return progress


def test_a_run_that_is_killed_at_every_layer_gives_the_same_bits(
    cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("DiTTransformer2DModel")
    whole, errors = case.quantized("w4a4", tmp_path / "whole", FULL)
    work, schemes = tmp_path / "work", case.schemes("w4a4", FULL)
    made: list[str] = []

    def noted(*args: Any, **options: Any) -> Any:
        made.append(options["name"])
        return quantize_layer(*args, **options)

    monkeypatch.setattr(quantize, "quantize_layer", noted)
    denoiser = case.denoiser()
    for done in range(1, len(schemes) + 1):
        with pytest.raises(Stop):
            quantize_denoiser(denoiser, case.calibration, schemes, case.bins, work, stop_at("layers", done))
    assert untouched(denoiser, case.pipeline.denoiser)
    assert made == list(errors), "each layer is quantized once, in order of execution"
    again = quantize_denoiser(denoiser, case.calibration, schemes, case.bins, work)
    assert made == list(errors)
    assert again == errors
    assert list(again) == list(errors)
    assert same_weights(denoiser, whole)
    for key, layer in quantized_layers(denoiser).items():
        assert (layer.scheme, layer.execution) == (quantized_layers(whole)[key].scheme, "int")
        assert not layer.training
    assert not [file for file in work.rglob("*") if file.name.startswith(".")]


def test_a_layer_that_fails_leaves_the_denoiser_and_the_work_as_they_were(
    unet: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, errors = unet.quantized("w4a8", tmp_path / "whole", FULL)
    unlucky = list(errors)[7]

    def failing(*args: Any, **options: Any) -> Any:
        if options["name"] == unlucky:
            raise MemoryError
        return quantize_layer(*args, **options)

    denoiser, work = unet.denoiser(), tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "quantize_layer", failing)
        with pytest.raises(MemoryError):
            quantize_denoiser(denoiser, unet.calibration, unet.schemes("w4a8", FULL), unet.bins, work)
    assert untouched(denoiser, unet.pipeline.denoiser)
    assert {file.stem for file in (work / "layers").iterdir()} == set(list(errors)[:7])
    assert quantize_denoiser(denoiser, unet.calibration, unet.schemes("w4a8", FULL), unet.bins, work) == errors
    assert same_weights(denoiser, whole)


def test_four_bit_weights_take_four_bits_on_the_way_too(unet: Case, tmp_path: Path) -> None:
    schemes = unet.schemes("w4a8", Treatment(split="none"))
    unet.quantized("w4a8", tmp_path, Treatment(split="none"))
    for name, scheme in schemes.items():
        with safe_open(tmp_path / "layers" / f"{name}.safetensors", "pt") as file:
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
    denoiser, _ = unet.quantized("w8a8", tmp_path, FULL)
    tables = [layer.input_scale for layer in denoiser.modules() if isinstance(layer, QuantConv2d)]
    assert any(len(table.unique()) == STEPS for table in tables if table is not None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_layer(bad: float, unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    with torch.no_grad():
        denoiser.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = bad
        denoiser.conv_in.bias[1] = bad
    before = copy.deepcopy(denoiser)
    with pytest.raises(WeightError, match="NaN or infinite") as caught:
        quantize_denoiser(denoiser, unet.calibration, unet.schemes("w4a8"), unet.bins, tmp_path)
    assert caught.value.problem.splitlines()[1:] == [
        "  conv_in.bias: 1 of 32 values, the first at [1]",
        "  mid_block.resnets.0.conv1.weight: 1 of 36864 values, the first at [0, 0, 0, 0]",
    ]
    assert not list(tmp_path.iterdir()), "refused before anything is measured"
    with torch.no_grad():
        for model in (denoiser, before):
            model.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = 0
            model.conv_in.bias[1] = 0
    assert untouched(denoiser, before)


def test_an_input_that_is_not_finite_is_refused_with_its_layer(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    with torch.no_grad():
        denoiser.conv_norm_out.weight[0] = float("inf")
    before = copy.deepcopy(denoiser)
    with pytest.raises(QuantizationError, match="input of a layer is not finite") as caught:
        quantize_denoiser(denoiser, unet.calibration, unet.schemes("w8a8"), unet.bins, tmp_path)
    assert caught.value.where == "conv_out"
    rows = unet.rows()
    first, count = f"{float(rows.timesteps[0]):g}", len(rows)
    words = rf"{count * 64} of {count * 32 * 64} values, in {count} of {count} calibration rows, .* row 0, at timestep"
    assert re.search(f"{words} {first}$", caught.value.problem), caught.value.problem
    assert untouched(denoiser, before)


def test_an_output_that_is_not_finite_is_refused_with_its_layer(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    with torch.no_grad():
        denoiser.conv_in.weight[0] = 3e38
    with pytest.raises(QuantizationError, match=r"output of a layer is not finite: \d+ of") as caught:
        quantize_denoiser(denoiser, unet.calibration, {"conv_in": QScheme(8)}, unet.bins, tmp_path)
    assert caught.value.where == "conv_in"


def test_all_schemes_that_cannot_be_had_are_refused_before_the_pass(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    schemes = unet.schemes("w8a8") | {"conv_in": QScheme(8, rank=4), "conv_out": QScheme(8, rank=4)}
    with pytest.raises(SchemeError, match=r"2 layers cannot(.|\n)*conv_in: (.|\n)*conv_out: "):
        quantize_denoiser(denoiser, unet.calibration, schemes, unet.bins, tmp_path)
    assert not list(tmp_path.iterdir())
    assert untouched(denoiser, unet.pipeline.denoiser)


def test_dead_channels_are_remarked_on_and_survive_a_kill(unet: Case, tmp_path: Path) -> None:
    denoiser, name = unet.denoiser(), "mid_block.resnets.0.conv1"
    with torch.no_grad():
        denoiser.get_submodule(name).weight[5] = 0
        # A norm whose weight is 0 and a SiLU: the input of conv_out is the same everywhere.
        denoiser.conv_norm_out.weight[:2], denoiser.conv_norm_out.bias[0] = 0, 0
    schemes = {name: QScheme(8), "conv_out": STATIC}
    errors = quantize_denoiser(copy.deepcopy(denoiser), unet.calibration, schemes, unet.bins, tmp_path)
    assert errors[name].remarks == ("1 of 64 output channels is made with weights that are all 0: 5",)
    assert errors["conv_out"].remarks == (
        "1 of 32 input channels is always 0: 0", "1 of 32 input channels is constant: 1",
    )  # fmt: skip
    assert quantize_denoiser(denoiser, unet.calibration, schemes, unet.bins, tmp_path) == errors


def test_a_layer_that_is_never_called_is_refused(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    denoiser.spare, denoiser.other = nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
    before = copy.deepcopy(denoiser)
    schemes = {"conv_in": QScheme(8), "spare": STATIC, "other": QScheme(8)}
    with pytest.raises(QuantizationError, match=r"2 layer\(s\) were never called") as caught:
        quantize_denoiser(denoiser, unet.calibration, schemes, unet.bins, tmp_path)
    assert (caught.value.where, "--keep" in caught.value.remedy) == ("spare, other", True)
    assert untouched(denoiser, before)


def test_what_is_no_float_layer_is_refused(unet: Case, tmp_path: Path) -> None:
    denoiser, _ = unet.quantized("w8a16", tmp_path / "work")
    words = "no float linear or convolution"
    for name, message in (("conv_norm_out", words), ("conv_in", words), ("mid_block", words), ("x", "no such layer")):
        with pytest.raises(QuantizationError, match=message) as caught:
            quantize_denoiser(denoiser, unet.calibration, {name: QScheme(8)}, unet.bins, tmp_path)
        assert caught.value.where == name


def test_no_schemes_change_nothing(unet: Case, tmp_path: Path) -> None:
    denoiser = unet.denoiser()
    assert quantize_denoiser(denoiser, unet.calibration, {}, unet.bins, tmp_path) == {}
    assert same_weights(denoiser, unet.pipeline.denoiser)
