import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import open_pipeline, prediction_of
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.layers import QuantConv2d, QuantLinear
from dcomp.compress.loader import attach_clock
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import quantized_layers
from dcomp.compress.unrounded import unrounded, unrounded_calls
from tests.support.quantized import BINS, quantized_pipeline
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, denoiser_inputs, save_tiny_pipeline, tiny_denoiser


@torch.no_grad()
def predict(denoiser: nn.Module, name: str) -> Tensor:
    args, kwargs = denoiser_inputs(name)
    return prediction_of(denoiser(*args, **kwargs))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", sweep(NAMES, FEW_NAMES))
def test_where_no_input_is_rounded_nothing_changes(name: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcomp.compress.unrounded.is_large", lambda _: not held)
    denoiser = tiny_denoiser(name)
    for path, layer in [*denoiser.named_modules()]:
        if type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        weight, scheme = layer.weight.detach(), QScheme(4, 64)
        if isinstance(layer, nn.Conv2d):
            packed = search_weight(weight.permute(0, 2, 3, 1).contiguous(), 4, 64)
            quantized: nn.Module = QuantConv2d.from_float(layer, packed, scheme)
        else:
            quantized = QuantLinear.from_float(layer, search_weight(weight, 4, 64), scheme)
        parent, _, leaf = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), leaf, quantized)
    attach_clock(denoiser, BINS)
    assert len(quantized_layers(denoiser)) > 10
    expected = predict(denoiser, name)
    with unrounded(denoiser):
        assert (predict(denoiser, name) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(predict(denoiser, name), expected)


@pytest.mark.parametrize("name", FEW_NAMES)
def test_layers_are_their_float_weights_and_come_back(name: str, tmp_path: Path) -> None:
    pipeline = quantized_pipeline(save_tiny_pipeline(name, tmp_path / "model"))
    twin = copy.deepcopy(pipeline.denoiser)
    for path, layer in quantized_layers(pipeline.denoiser).items():
        plain: Any = open_pipeline(tmp_path / "model").denoiser.get_submodule(path)
        plain.weight.data = layer.dequantize()
        parent, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, plain)
    rounded = predict(pipeline.denoiser, name)
    with unrounded(pipeline.denoiser):
        found = predict(pipeline.denoiser, name)
    assert torch.allclose(found, predict(twin, name), rtol=0, atol=1e-5 * float(found.abs().max()))
    assert 0 < (found - rounded).norm() / found.norm() < 0.2
    assert torch.equal(predict(pipeline.denoiser, name), rounded)


def test_single_calls_do_the_same_as_often_as_they_are_asked(tmp_path: Path) -> None:
    name = "UNet2DModel"
    denoiser = quantized_pipeline(save_tiny_pipeline(name, tmp_path / "model")).denoiser
    rounded = predict(denoiser, name)
    with unrounded(denoiser):
        exact = predict(denoiser, name)
    again = unrounded_calls(denoiser)
    for _ in range(2):
        with again():
            assert torch.equal(predict(denoiser, name), exact)
        assert torch.equal(predict(denoiser, name), rounded)
    assert not torch.equal(exact, rounded)


def test_small_errors_stay_small_without_rounding(tmp_path: Path) -> None:
    pipeline = quantized_pipeline(save_tiny_pipeline("UNet2DModel", tmp_path / "model"))
    (latents, timestep), kwargs = denoiser_inputs("UNet2DModel")

    @torch.no_grad()
    def moved(by: float) -> float:
        """How far a prediction moves when the latents do."""
        one, other = (prediction_of(pipeline.denoiser(x, timestep, **kwargs)) for x in (latents, latents * (1 + by)))
        return float((one - other).norm() / one.norm())

    with unrounded(pipeline.denoiser):
        smooth = [moved(1e-3), moved(1e-4)]
    assert smooth[0] / smooth[1] == pytest.approx(10, rel=0.1)
    assert moved(1e-4) > 3 * smooth[1]
