import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import rankdata

from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.cost import layer_bytes
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline, prediction_of
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.replay import RowBatch, gather_rows
from dcomp.compress.allocation import allocate
from dcomp.compress.candidates import CandidateError
from dcomp.compress.quantize_layer import quantize_layer
from dcomp.compress.scheme import QScheme
from dcomp.compress.sensitivity import (
    Sensitivity,
    SensitivityError,
    measure_sensitivity,
    options_of,
    proxy_correlation,
)
from tests.support import tiny
from tests.support.errors import accumulating_error

SD = "UNet2DConditionModel"
SETTINGS = Generation(steps=3, height=16, width=16, guidance=3.0, batch_size=2)
LINEAR, CONV = "mid_block.attentions.0.transformer_blocks.0.ff.net.2", "up_blocks.0.resnets.0.conv1"
SCHEMES = {"W8A16": QScheme(8), "W4A16": QScheme(4, 64)}
CANDIDATES = {LINEAR: SCHEMES, CONV: SCHEMES, "mid_block.resnets.0.conv1": SCHEMES}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> OpenPipeline:
    return open_pipeline(tiny.save_tiny_pipeline(SD, tmp_path_factory.mktemp("model") / SD))


@pytest.fixture(scope="module")
def rows(pipeline: OpenPipeline, tmp_path_factory: pytest.TempPathFactory) -> RowBatch:
    folder = tmp_path_factory.mktemp("set")
    recorded = record_calibration_set(pipeline, ["a cat", "a dog", "a tree", "a bee"], SETTINGS, folder)
    return gather_rows(recorded, 18, denoiser=pipeline.denoiser)


@pytest.fixture(scope="module")
def measured(pipeline: OpenPipeline, rows: RowBatch) -> Sensitivity:
    return measure_sensitivity(pipeline.denoiser, rows, CANDIDATES, guidance=3.0)


def input_of(pipeline: OpenPipeline, rows: RowBatch, name: str) -> torch.Tensor:
    seen = []
    hook = pipeline.denoiser.get_submodule(name).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        pipeline.denoiser(*rows.args, **rows.kwargs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_the_error_is_that_of_the_guided_prediction_with_one_layer_replaced(
    name: str, pipeline: OpenPipeline, rows: RowBatch, measured: Sensitivity
) -> None:
    denoiser = pipeline.denoiser
    layer, x = denoiser.get_submodule(name), input_of(pipeline, rows, name)
    quantized = quantize_layer(layer, x, SCHEMES["W4A16"], name=name)
    # Float inputs: what the quantized layer computes is the float layer with another weight.
    kept = layer.weight.clone()
    layer.weight.copy_(quantized.dequantize())
    with torch.no_grad():
        error = prediction_of(denoiser(*rows.args, **rows.kwargs)) - rows.outputs
    layer.weight.copy_(kept)
    error, exact = (t[0::2] + 3.0 * (t[1::2] - t[0::2]) for t in (error, rows.outputs))
    squares = accumulating_error(error, exact, steps=3)
    times = rows.timesteps[0::2]
    expected = [float(squares[times == t].mean()) for t in measured.timesteps]
    assert measured.timesteps == tuple(sorted(set(times.tolist()), reverse=True))
    assert len(measured.timesteps) == 3
    assert measured.by_step[name]["W4A16"] == pytest.approx(expected, rel=1e-3)


def test_eight_bits_hurt_less_than_four(measured: Sensitivity) -> None:
    for errors in measured.errors.values():
        assert 0 < errors["W8A16"] < errors["W4A16"] / 10


def test_input_quantizers_count_too(pipeline: OpenPipeline, rows: RowBatch) -> None:
    schemes = {
        "W8A16": QScheme(8),
        "sample": QScheme(8, input_bits=8, input_granularity="sample"),
        "tensor": QScheme(8, input_bits=8, input_granularity="tensor"),
    }
    bins = StepBins.uniform(rows.timesteps.tolist(), 3, pipeline.scheduler)
    one = StepBins.uniform(rows.timesteps.tolist(), 1, pipeline.scheduler)
    found = [measure_sensitivity(pipeline.denoiser, rows, {CONV: schemes}, guidance=3.0, bins=b) for b in (bins, one)]
    first, second = (each.by_step[CONV] for each in found)
    assert first["W8A16"] == second["W8A16"]
    assert first["sample"] == second["sample"]
    assert first["tensor"] != second["tensor"]
    assert sum(first["sample"]) > sum(first["W8A16"])


def test_measuring_leaves_the_denoiser_as_it_was(pipeline: OpenPipeline, rows: RowBatch) -> None:
    denoiser, fingerprint = pipeline.denoiser, pipeline.fingerprint()
    layers = dict(denoiser.named_modules())

    def fail(text: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(denoiser, rows, CANDIDATES, progress=fail)
    measure_sensitivity(denoiser, rows, {LINEAR: SCHEMES})
    assert dict(denoiser.named_modules()) == layers
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())
    assert pipeline.fingerprint() == fingerprint


def test_a_killed_measurement_goes_on_where_it_stopped(
    pipeline: OpenPipeline, rows: RowBatch, measured: Sensitivity, tmp_path: Path
) -> None:
    file, calls = tmp_path / "sensitivity.json", []

    def interrupt(text: str, done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(pipeline.denoiser, rows, CANDIDATES, guidance=3.0, file=file, progress=interrupt)
    assert list(json.loads(file.read_text())["by_step"]) == [LINEAR, CONV]
    hook = pipeline.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    assert measure_sensitivity(pipeline.denoiser, rows, CANDIDATES, guidance=3.0, file=file) == measured
    chunks = -(-len(rows) // 16)
    assert len(calls) == 3 * chunks  # inputs and two schemes of the one layer that was left
    assert measure_sensitivity(pipeline.denoiser, rows, CANDIDATES, guidance=3.0, file=file) == measured
    hook.remove()
    assert len(calls) == 3 * chunks


@pytest.mark.parametrize("change", ["guidance", "schemes", "rows"])
def test_the_file_of_another_measurement_is_refused(
    change: str, pipeline: OpenPipeline, rows: RowBatch, tmp_path: Path
) -> None:
    file, few = tmp_path / "sensitivity.json", {LINEAR: SCHEMES}
    measure_sensitivity(pipeline.denoiser, rows, few, guidance=3.0, file=file)
    options: dict[str, Any] = {"guidance": 2.0 if change == "guidance" else 3.0}
    candidates = {LINEAR: {"W8A16": QScheme(8, weight_range="minmax")}} if change == "schemes" else few
    other = rows.take(range(6)) if change == "rows" else rows
    with pytest.raises(SensitivityError, match="another measurement"):
        measure_sensitivity(pipeline.denoiser, other, candidates, file=file, **options)


def test_a_layer_that_is_not_called_is_refused(pipeline: OpenPipeline, rows: RowBatch) -> None:
    pipeline.denoiser.register_module("stranger", torch.nn.Linear(64, 64))
    try:
        with pytest.raises(CandidateError, match=r"not called \(stranger\)"):
            measure_sensitivity(pipeline.denoiser, rows, {"stranger": SCHEMES})
    finally:
        del pipeline.denoiser.stranger


def test_steps_have_the_same_say() -> None:
    by_step = {"a": {"x": (100.0, 1.0), "y": (300.0, 3.0)}, "b": {"x": (500.0, 0.0)}}
    errors = Sensitivity((9.0, 1.0), by_step).errors
    # Means are 300 and 4/3.
    assert errors["a"]["x"] == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert errors["a"]["y"] == pytest.approx((1 + 9 / 4) / 2)
    assert errors["b"]["x"] == pytest.approx((5 / 3 + 0) / 2)
    assert sum(errors["a"].values()) + sum(errors["b"].values()) == pytest.approx(3)
    scaled = {layer: {k: (s[0] / 64, s[1] * 4) for k, s in labels.items()} for layer, labels in by_step.items()}
    assert Sensitivity((9.0, 1.0), scaled).errors == errors


def test_a_step_without_errors_does_not_count() -> None:
    errors = Sensitivity((9.0, 1.0), {"a": {"x": (2.0, 0.0), "y": (6.0, 0.0)}}).errors
    assert errors == {"a": {"x": 0.5, "y": 1.5}}
    assert Sensitivity((9.0,), {"a": {"x": (0.0,)}}).errors == {"a": {"x": 0.0}}


def test_options_have_the_sizes_costs_and_errors_of_their_schemes(
    pipeline: OpenPipeline, measured: Sensitivity
) -> None:
    seconds = {name: {"W8A16": 0.9 * i, "W4A16": 0.8 * i} for i, name in enumerate(CANDIDATES)}
    seconds[CONV]["float"] = 1.0
    options = options_of(pipeline.denoiser, CANDIDATES, measured, seconds=seconds)
    assert [option.label for option in options[CONV]] == ["float", "W8A16", "W4A16"]
    assert [option.label for option in options[LINEAR]] == ["W8A16", "W4A16"]
    for option in itertools.chain(*options.values()):
        layer = pipeline.denoiser.get_submodule(option.layer)
        assert option.nbytes == layer_bytes(layer, SCHEMES.get(option.label))
        assert option.cost == seconds[option.layer][option.label]
        assert option.error == measured.errors[option.layer].get(option.label, 0.0)
    sizes = [sum(o.nbytes for each in options.values() for o in each if o.label == label) for label in SCHEMES]
    found = allocate(options, parameters=1, max_bytes=sum(sizes) // 2 + 1)
    assert {option.label for option in found.chosen.values()} == {"W8A16", "W4A16"}


def test_the_correlation_is_that_of_the_ranks(pipeline: OpenPipeline, rows: RowBatch, measured: Sensitivity) -> None:
    before = pipeline.fingerprint()
    found = proxy_correlation(pipeline, rows, CANDIDATES, measured, ["a fox", "a hat"], SETTINGS, count=5, seed=1)
    assert found.count == len({pair[:2] for pair in found.pairs}) == 5
    assert all(proxy == measured.errors[name][label] for name, label, proxy, _ in found.pairs)
    assert all(latents > 0 for *_, latents in found.pairs)
    ranks = [rankdata([pair[column] for pair in found.pairs]) for column in (2, 3)]
    differences = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    assert found.rho == pytest.approx(1 - 6 * differences / (5 * (25 - 1)))
    assert found.rho > 0  # eight bits rank before four in both
    assert pipeline.fingerprint() == before
    again = proxy_correlation(pipeline, rows, CANDIDATES, measured, ["a fox", "a hat"], SETTINGS, count=5, seed=1)
    assert again == found


def test_one_change_has_no_rank(pipeline: OpenPipeline, rows: RowBatch, measured: Sensitivity) -> None:
    found = proxy_correlation(pipeline, rows, CANDIDATES, measured, ["a fox"], SETTINGS, count=1)
    assert (found.rho, found.count) == (None, 1)
