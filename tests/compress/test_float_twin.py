import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import Generation, open_pipeline, prediction_of
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.float_twin import float_twin
from dcomp.compress.layers import QuantConv2d, QuantLinear
from dcomp.compress.loader import attach_clock
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import quantized_layers
from tests.support.quantized import BINS, quantized_pipeline
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, denoiser_inputs, save_tiny_pipeline, tiny_denoiser


@torch.no_grad()
def predict(denoiser: nn.Module, name: str) -> Tensor:
    args, kwargs = denoiser_inputs(name)
    return prediction_of(denoiser(*args, **kwargs))


@pytest.mark.parametrize("name", sweep(NAMES, FEW_NAMES))
def test_where_no_input_is_rounded_the_twin_computes_the_same(name: str) -> None:
    denoiser = tiny_denoiser(name)
    for path, layer in [*denoiser.named_modules()]:
        if type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        weight = layer.weight.detach()
        scheme = QScheme(4, 64)
        if isinstance(layer, nn.Conv2d):
            packed = search_weight(weight.permute(0, 2, 3, 1).contiguous(), 4, 64)
            quantized: nn.Module = QuantConv2d.from_float(layer, packed, scheme)
        else:
            quantized = QuantLinear.from_float(layer, search_weight(weight, 4, 64), scheme)
        parent, _, leaf = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), leaf, quantized)
    attach_clock(denoiser, BINS)
    count, expected = len(quantized_layers(denoiser)), predict(denoiser, name)
    twin = float_twin(denoiser)
    assert count > 10
    assert not quantized_layers(twin)
    assert (predict(twin, name) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(quantized_layers(denoiser)) == count
    assert torch.equal(predict(denoiser, name), expected)


@pytest.mark.parametrize("name", FEW_NAMES)
def test_a_pipeline_runs_with_the_twin_and_keeps_its_own(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    pipeline = quantized_pipeline(save_tiny_pipeline(name, tmp_path_factory.mktemp(name) / "model"))
    twin = float_twin(pipeline.denoiser)
    for path, layer in quantized_layers(pipeline.denoiser).items():
        assert torch.equal(twin.get_submodule(path).weight, layer.dequantize())
    prompts = ["1" if pipeline.kind == "class" else "a cat"]

    def latents(source: object) -> Tensor:
        return source.run(prompts, [0], Generation(steps=3), decode=False).latents  # type: ignore[attr-defined]

    before, other = latents(pipeline), pipeline.with_denoiser(twin)
    assert other.denoiser is twin
    moved = (latents(other) - before).norm() / before.norm()
    assert 0 < moved < 0.2
    assert torch.equal(latents(pipeline), before)
    assert len(quantized_layers(pipeline.denoiser)) > 0


def test_without_quantized_layers_the_twin_is_a_copy(tmp_path_factory: pytest.TempPathFactory) -> None:
    name = FEW_NAMES[0]
    denoiser = open_pipeline(save_tiny_pipeline(name, tmp_path_factory.mktemp(name) / "model")).denoiser
    twin = float_twin(denoiser)
    assert twin is not denoiser
    assert torch.equal(predict(twin, name), predict(denoiser, name))
