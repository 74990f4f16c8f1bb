"""Step-wise correction: the fit by itself, and the pass over tiny denoisers."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline, prediction_of
from dcomp.calibrate.record import CalibrationSet, record_calibration_set
from dcomp.calibrate.replay import RowBatch, gather_rows
from dcomp.calibrate.structure import probe_structure
from dcomp.compress import step_correction
from dcomp.compress.held_out import hold_out
from dcomp.compress.policy import Treatment, choose_schemes
from dcomp.compress.quantize import INT_TOLERANCE, compare_executions, quantize_denoiser
from dcomp.compress.split import is_quantized, parts_of, quantized_layers
from dcomp.compress.step_correction import (
    HELD_OUT,
    LEAST_GAIN,
    CorrectionResult,
    correct_steps,
    fit_steps,
    float_modules,
)
from tests.support.tiny import save_tiny_pipeline

ROW_BINS = torch.tensor([0, 2, 0, 1, 2, 2, 0, 1, 1, 2])


def affine_case(noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Outputs `[10, 6, 4]` and what each bin and channel makes of them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(10, 6, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    scale, bias = torch.rand(4, 4, generator=generator) + 0.5, torch.randn(4, 4, generator=generator)
    noises = noise * torch.randn(y.shape, generator=generator)
    return y, y * scale[ROW_BINS].unsqueeze(1) + bias[ROW_BINS].unsqueeze(1) + noises


def test_without_a_prior_the_fit_is_least_squares_of_each_channel_and_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_correction, "PRIOR_ROWS", 0.0)
    y, reference = affine_case()
    scale, bias = fit_steps(y, reference, ROW_BINS, 3)
    assert scale.dtype == bias.dtype == torch.float32
    for b in range(3):
        for channel in range(4):
            own, target = (t[b == ROW_BINS][..., channel].flatten().double() for t in (y, reference))
            solved = torch.linalg.lstsq(torch.stack([own, torch.ones_like(own)], 1), target.unsqueeze(1)).solution
            assert scale[b, channel].item() == pytest.approx(solved[0].item(), rel=1e-6)
            assert bias[b, channel].item() == pytest.approx(solved[1].item(), rel=1e-5, abs=1e-5)
            left = target - scale[b, channel].double() * own - bias[b, channel].double()
            assert abs(left.mean()) < 1e-6
            assert abs((left * (own - own.mean())).mean()) < 1e-5


def test_the_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    y, reference = affine_case()
    offset = 1e4  # raw sums of squares would cancel
    whole = step_correction._Moments.of(y + offset, reference)
    parts = [step_correction._Moments.of(y[rows] + offset, reference[rows]) for rows in torch.arange(10).split(3)]
    total = sum(parts, step_correction._Moments.of(y[:0], reference[:0]))
    for name in ("rows", "count", "y", "reference", "yy", "yr"):
        assert torch.allclose(*(torch.as_tensor(getattr(m, name)).double() for m in (whole, total)), rtol=1e-9)


def test_equal_outputs_need_no_correction() -> None:
    y, _ = affine_case()
    scale, bias = fit_steps(y, y, ROW_BINS, 3)
    assert torch.allclose(scale, torch.ones(3, 4), atol=1e-7)
    assert torch.allclose(bias, torch.zeros(3, 4), atol=1e-6)


def test_a_bin_without_rows_has_the_line_of_all_bins_and_few_rows_lean_on_it() -> None:
    y, reference = affine_case()
    rows = ROW_BINS.clamp(max=1)
    scale, bias = fit_steps(y, reference, rows, 3)
    common_scale, common_bias = fit_steps(y, reference, torch.zeros(10, dtype=torch.int64), 1)
    prior = step_correction.PRIOR_ROWS
    # One bin alone is corrected twice: towards the common line, which leans on the identity.
    trust = 10 / (10 + prior)
    flat = y.flatten(0, 1).double()
    slope = ((flat - flat.mean(0)) * reference.flatten(0, 1).double()).sum(0) / (flat - flat.mean(0)).square().sum(0)
    slope = slope.clamp(*step_correction.SLOPES)
    assert torch.allclose(scale[2].double(), 1 + trust * (slope - 1), rtol=1e-6)
    middle = flat.mean(0) + trust * (reference.double().mean((0, 1)) - flat.mean(0))
    assert torch.allclose((scale[2] * flat.mean(0) + bias[2]).double(), middle, rtol=1e-5)
    assert torch.allclose(common_scale[0].double(), scale[2] + trust * (slope - scale[2].double()), rtol=1e-6)
    assert common_bias.isfinite().all()


def test_a_channel_that_does_not_vary_keeps_its_factor_and_gets_a_bias() -> None:
    y = torch.full((40, 5, 2), 7.0)
    y[..., 1] += 1e-6 * torch.randn(40, 5)
    scale, bias = fit_steps(y, y + torch.randn(1, 1, 2), torch.zeros(40, dtype=torch.int64), 1)
    assert scale.eq(1).all()
    assert bias.abs().min() > 0


@dataclass(frozen=True)
class Case:
    pipeline: OpenPipeline
    calibration: CalibrationSet
    rows: RowBatch
    original: dict[str, nn.Module]
    quantized: nn.Module
    bins: StepBins

    def corrected(self, folder: Path, **options: Any) -> tuple[nn.Module, CorrectionResult]:
        denoiser = copy.deepcopy(self.quantized)
        return denoiser, correct_steps(denoiser, self.original, self.rows, self.bins, folder, **options)

    def errors(self, denoiser: nn.Module) -> Tensor:
        """Squared error of the prediction of each row."""
        with torch.no_grad():
            predictions = torch.cat([prediction_of(denoiser(*b.args, **b.kwargs)) for b in self.rows.chunks(16)])
        return (predictions - self.rows.outputs).square().flatten(1).mean(1)


def case_of(name: str, folder: Path, inputs: str) -> Case:
    pipeline = open_pipeline(save_tiny_pipeline(name, folder / "model"))
    prompts = ["a cat", "two dogs", "", "a red house"] * 2 if pipeline.kind == "text" else [""] * 8
    settings = Generation(steps=3, batch_size=4)
    calibration = record_calibration_set(pipeline, prompts, settings, folder / "calibration")
    call = next(calibration.calls())
    structure = probe_structure(pipeline.denoiser, call.args, call.kwargs)
    treatment = Treatment(rounding="nearest", inputs=inputs, split="all", directions=0)  # type: ignore[arg-type]
    decisions = choose_schemes(pipeline.denoiser, structure, "w4a8", treatment=treatment)
    schemes = {key: decision.scheme for key, decision in decisions.items() if decision.scheme}
    bins = StepBins.uniform(calibration.timesteps, 3, pipeline.scheduler)
    rows = gather_rows(calibration, 48, denoiser=pipeline.denoiser)
    original = float_modules(pipeline.denoiser, schemes)
    quantize_denoiser(pipeline.denoiser, calibration, schemes, bins, folder / "work", rows=24)
    norm = next(
        m for m in pipeline.denoiser.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm) and m.weight is not None
    )
    norm.weight.data *= 1.01  # as tuning may leave it
    return Case(pipeline, calibration, rows, original, pipeline.denoiser, bins)


@pytest.fixture(scope="module", params=[("UNet2DModel", "static"), ("UNet2DConditionModel", "dynamic")], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, inputs = request.param
    return case_of(name, tmp_path_factory.mktemp(name), inputs)


def tensors(denoiser: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in denoiser.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_error_of_held_out_rows_goes_down_and_integers_follow(case: Case, tmp_path: Path) -> None:
    denoiser, result = case.corrected(tmp_path)
    assert result.kept
    assert result.held_out_final < result.held_out_initial
    _, judges = hold_out(case.rows.trajectories, 0, HELD_OUT)
    before, after = (case.errors(model)[judges] for model in (case.quantized, denoiser))
    assert after.mean() < before.mean()
    layers = quantized_layers(denoiser)
    assert set(result.layers) == set(layers)
    for name, layer in layers.items():
        told = result.layers[name]
        assert told.kept == layer.scheme.corrected
        assert told.kept == (told.after**2 <= (1 - LEAST_GAIN) * told.before**2)
        for position, part in enumerate(parts_of(layer)):
            assert (part.step_scale is not None) == told.kept
            assert (part.step_bias is not None) == (told.kept and position == 0)
    assert any(layer.scheme.corrected and layer.scheme.boundaries for layer in layers.values())
    assert denoiser.dcomp_clock.bins == case.bins
    assert max(compare_executions(denoiser, case.calibration).values()) <= INT_TOLERANCE
    assert not any("forward" in vars(module) for module in denoiser.modules())


def test_a_layer_is_compared_with_what_the_float_model_has_in_its_place(case: Case, tmp_path: Path) -> None:
    seen: list[Tensor] = []
    denoiser = copy.deepcopy(case.quantized)
    denoiser.register_forward_hook(lambda _, args, output: seen.append(prediction_of(output)))
    correct_steps(denoiser, case.original, case.rows, case.bins, tmp_path)
    count = len(case.rows)
    (both,) = [prediction for prediction in seen if len(prediction) == 2 * count]
    assert torch.allclose(both[:count], case.rows.outputs, atol=1e-4 * case.rows.outputs.abs().max().item())
    # The other half is the deployed model, but for codes that rounding tips over.
    error = (both[count:] - case.rows.outputs).square().mean()
    assert error.item() == pytest.approx(case.errors(denoiser).mean().item(), rel=0.05)


class _StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(case: Case, tmp_path: Path) -> None:
    whole, result = case.corrected(tmp_path / "whole")

    def stop(text: str, done: int, total: int) -> None:
        if text == "corrections" and done == total // 2:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        case.corrected(tmp_path / "stopped", progress=stop)
    done = len(list((tmp_path / "stopped").iterdir()))
    assert 0 < done < len(result.layers)
    rest, again = case.corrected(tmp_path / "stopped")
    assert again == result
    assert same(tensors(rest), tensors(whole))


def test_where_predictions_get_no_better_the_denoiser_stays_what_it_was(case: Case, tmp_path: Path) -> None:
    wrong = copy.deepcopy(case.original)
    for module in wrong.values():
        for parameter in module.parameters():
            parameter.data += 0.2 * parameter.std(unbiased=False) * torch.randn(parameter.shape)
    denoiser = copy.deepcopy(case.quantized)
    result = correct_steps(denoiser, wrong, case.rows, case.bins, tmp_path)
    assert any(layer.kept for layer in result.layers.values())
    assert not result.kept
    assert same(tensors(denoiser), tensors(case.quantized))
    assert not any(module.scheme.corrected for module in denoiser.modules() if is_quantized(module))
    static = any(
        part.input_scale is not None for layer in quantized_layers(denoiser).values() for part in parts_of(layer)
    )
    assert denoiser.dcomp_clock.bins == (case.bins if static else None)


def test_skipped_layers_get_no_tables(case: Case, tmp_path: Path) -> None:
    names = list(quantized_layers(case.quantized))
    denoiser, result = case.corrected(tmp_path, skip=names[::2])
    assert set(result.layers) == set(names[1::2])
    assert not any(quantized_layers(denoiser)[name].scheme.corrected for name in names[::2])
