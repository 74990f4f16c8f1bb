import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

from dcomp import DcompError
from dcomp.calibrate.pipeline import Generation, open_pipeline, prediction_of
from dcomp.calibrate.record import CalibrationSet, record_calibration_set
from dcomp.calibrate.replay import RowBatch, gather_rows
from dcomp.calibrate.structure import probe_structure
from dcomp.compress import attention, transforms
from dcomp.compress.folding import Fold, find_folds, fold_smoothing
from dcomp.compress.policy import Treatment, choose_schemes
from dcomp.compress.quantize import INT_TOLERANCE, LayerErrors, compare_executions, quantize_denoiser
from dcomp.compress.row_watch import Rows
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import parts_of, quantized_layers
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, save_tiny_pipeline

SMOOTH = QScheme(4, 16, input_bits=8, input_granularity="token", smooth=True)
PLAIN = replace(SMOOTH, smooth=False)


@dataclass(frozen=True)
class Case:
    """A tiny denoiser with a calibration set, and the folds of its w4a4 preset."""

    float_denoiser: nn.Module
    calibration: CalibrationSet
    rows: RowBatch

    def schemes(self, **treatment: Any) -> dict[str, QScheme]:
        call = next(self.calibration.calls())
        structure = probe_structure(self.float_denoiser, call.args, call.kwargs)
        chosen = choose_schemes(
            self.float_denoiser, structure, "w4a4", treatment=Treatment(**{"directions": 0, **treatment})
        )
        return {name: decision.scheme for name, decision in chosen.items() if decision.scheme}

    def folds(self, schemes: dict[str, QScheme]) -> tuple[Fold, ...]:
        return find_folds(self.float_denoiser, schemes, self.rows)

    def quantized(self, work: Path, schemes: dict[str, QScheme]) -> tuple[nn.Module, dict[str, LayerErrors]]:
        denoiser = copy.deepcopy(self.float_denoiser)
        folds = self.folds(schemes)
        return denoiser, quantize_denoiser(denoiser, self.calibration, schemes, None, work, rows=8, folds=folds)

    @functools.cached_property
    def nearest(self) -> nn.Module:
        """The denoiser with codes rounded to nearest; who changes it makes a copy."""
        with tempfile.TemporaryDirectory() as work:
            return self.quantized(Path(work), self.schemes(rounding="nearest"))[0]

    def predict(self, denoiser: nn.Module) -> Tensor:
        with torch.no_grad():
            return prediction_of(denoiser(*self.rows.args, **self.rows.kwargs))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        pipeline = open_pipeline(save_tiny_pipeline(name, folder / "model"))
        size = 16 if name == "FluxTransformer2DModel" else None
        prompts = {"class": ["0", "207"], "text": ["a cat", "two dogs"]}.get(pipeline.kind, ["", ""])
        settings = Generation(steps=2, batch_size=2, height=size, width=size)
        calibration = record_calibration_set(pipeline, prompts, settings, folder / "calibration")
        rows = gather_rows(calibration, 2, denoiser=pipeline.denoiser)
        return Case(pipeline.denoiser, calibration, rows)

    return make


def self_attention(block: str, norm: str) -> dict[str, str]:
    return {
        **dict.fromkeys([f"{block}.to_q", f"{block}.to_k", f"{block}.to_v"], norm),
        f"{block}.to_out.0": f"{block}.to_v",
    }


def unet_attention(block: str) -> dict[str, str]:
    return self_attention(block, f"{block}.group_norm")


def unet_transformer(name: str) -> dict[str, str]:
    block = f"{name}.transformer_blocks.0"
    return {  # not `proj_in`, a pointwise convolution with 8-bit inputs, which are not smoothed
        **self_attention(f"{block}.attn1", f"{block}.norm1"),
        f"{block}.attn2.to_q": f"{block}.norm2",
        f"{block}.attn2.to_out.0": f"{block}.attn2.to_v",
        f"{block}.ff.net.0.proj": f"{block}.norm3",
        f"{block}.ff.net.2": f"{block}.ff.net.0.proj",
    }


def added_projections(block: str) -> list[str]:
    return [f"{block}.attn.add_{name}_proj" for name in "qkv"]


def joint_block(block: str) -> dict[str, str]:
    return {
        **dict.fromkeys([f"{block}.attn.to_{name}" for name in "qkv"], f"{block}.norm1.linear"),
        **dict.fromkeys(added_projections(block), f"{block}.norm1_context.linear"),
        f"{block}.ff.net.0.proj": f"{block}.norm1.linear",
    }


def flux_single(block: str) -> dict[str, str]:
    names = [f"{block}.proj_mlp", *(f"{block}.attn.to_{name}" for name in "qkv")]
    return dict.fromkeys(names, f"{block}.norm.linear")


def dit_block(block: str) -> dict[str, str]:
    modulation = f"{block}.norm1.linear"
    return {**self_attention(f"{block}.attn1", modulation), f"{block}.ff.net.0.proj": modulation}


CONDITION = [
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]
BLOCKS = ["transformer_blocks.0", "transformer_blocks.1"]
# Layer -> module that takes its factors. Nothing folds through an activation, so no resnet and no second layer of a
# plain feed-forward does. Layers of the text in a joint block, like the values of a joint attention, meet the others in
# a concatenation. PixArt's modulation is one layer for all blocks.
FOLDED: dict[str, dict[str, str]] = {
    "UNet2DModel": {
        **unet_attention("down_blocks.1.attentions.0"),
        **unet_attention("mid_block.attentions.0"),
        **unet_attention("up_blocks.0.attentions.0"),
        **unet_attention("up_blocks.0.attentions.1"),
    },
    "UNet2DConditionModel": {k: v for name in CONDITION for k, v in unet_transformer(name).items()},
    "UNet2DConditionModel-linear": {
        k: v for name in CONDITION for k, v in {f"{name}.proj_in": f"{name}.norm", **unet_transformer(name)}.items()
    },
    "DiTTransformer2DModel": {k: v for block in BLOCKS for k, v in dit_block(block).items()},
    "PixArtTransformer2DModel": {
        f"{block}.{attention}.to_out.0": f"{block}.{attention}.to_v"
        for block in BLOCKS
        for attention in ("attn1", "attn2")
    },
    "SD3Transformer2DModel": {
        **joint_block(BLOCKS[0]),
        f"{BLOCKS[0]}.ff_context.net.0.proj": f"{BLOCKS[0]}.norm1_context.linear",
        **joint_block(BLOCKS[1]),
    },
    "FluxTransformer2DModel": {
        **joint_block(BLOCKS[0]),
        f"{BLOCKS[0]}.ff_context.net.0.proj": f"{BLOCKS[0]}.norm1_context.linear",
        **flux_single("single_transformer_blocks.0"),
        **flux_single("single_transformer_blocks.1"),
    },
}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_which_layers_fold_into_what(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    before = {key: tensor.clone() for key, tensor in case.float_denoiser.state_dict().items()}
    schemes = case.schemes()
    found = case.folds(schemes)
    assert {layer: fold.module for fold in found for layer in fold.layers} == FOLDED[name]
    assert all(schemes[layer].smooth for layer in FOLDED[name])
    assert same_bits(before, case.float_denoiser.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.float_denoiser.modules())


def test_a_modulation_gives_its_scale_and_its_shift(cases: Callable[[str], Case]) -> None:
    case = cases("SD3Transformer2DModel")
    found = {fold.layers[0]: fold.rows for fold in case.folds(case.schemes())}
    width, last = 64, "transformer_blocks.1.norm1_context.linear"
    assert found["transformer_blocks.1.ff.net.0.proj"] == (
        Rows("transformer_blocks.1.norm1.linear", 3 * width, 4 * width),
        Rows("transformer_blocks.1.norm1.linear", 4 * width, 5 * width, plus=1.0),
    )
    # The last block's norm of the text says scale first.
    assert found["transformer_blocks.1.attn.add_q_proj"] == (
        Rows(last, 0, width, plus=1.0),
        Rows(last, width, 2 * width),
    )


def in_float(denoiser: nn.Module) -> nn.Module:
    """The model with float layers of the weights that the quantized ones amount to."""
    plain = copy.deepcopy(denoiser)
    for name, layer in quantized_layers(plain).items():
        with torch.device("meta"):
            shape = layer.weight.shape
            options: dict[str, Any] = {}
            if isinstance(layer, nn.Conv2d):
                options = {
                    key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")
                }
            float_layer = (nn.Conv2d if options else nn.Linear)(shape[1], shape[0], **options)
        float_layer.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        float_layer.bias = layer.bias
        plain.set_submodule(name, float_layer)
    return plain


@pytest.mark.parametrize("name", sweep(NAMES, FEW_NAMES))
def test_folding_keeps_what_the_denoiser_computes(
    name: str, cases: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_is_integer", lambda layer: False)  # bfloat16 moves more than a last bit
    case = cases(name)
    denoiser = case.nearest
    folded = copy.deepcopy(denoiser)
    found = fold_smoothing(folded, case.folds(case.schemes()))
    # Factors are left out where they do not help, for all layers that read a tensor or none.
    assert found.items() <= FOLDED[name].items()
    assert len(found) >= len(FOLDED[name]) / 2
    float_outputs = case.predict(in_float(denoiser)), case.predict(in_float(folded))
    assert (float_outputs[1] - float_outputs[0]).norm() < 2e-6 * float_outputs[0].norm()
    quantized_outputs = case.predict(denoiser), case.predict(folded)
    # A last bit that differs moves a few codes by one, and on some processors a whole grid of 4-bit inputs.
    assert (quantized_outputs[1] - quantized_outputs[0]).norm() < 0.25 * quantized_outputs[0].norm()
    for key, layer in quantized_layers(folded).items():
        if key in found:
            assert (layer.scheme.smooth, layer.scheme.folded) == (False, True)
            assert [part.smooth_inv for part in parts_of(layer)] == [None]
        else:
            assert layer.scheme.folded == (key in found.values())
            assert layer.scheme.smooth == quantized_layers(denoiser)[key].scheme.smooth
    assert max(compare_executions(folded, case.calibration).values()) <= INT_TOLERANCE


@pytest.mark.parametrize(
    ("name", "rank"),
    sweep([*((name, 0) for name in NAMES), ("UNet2DModel", 3)], [("DiTTransformer2DModel", 0), ("UNet2DModel", 3)]),
)
def test_powers_of_two_fold_without_rounding(
    name: str, rank: int, cases: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, factors = cases(name), transforms.smoothing_factors
    monkeypatch.setattr(transforms, "smoothing_factors", lambda *args: 2 ** factors(*args).log2().round())
    monkeypatch.setattr(transforms, "LEAST_GAIN", -1e9)  # every layer is smoothed
    schemes = case.schemes(rounding="nearest", rank=rank)
    denoiser, _ = case.quantized(tmp_path, schemes)
    folds = case.folds(schemes)
    modulated = {layer for fold in folds for layer in fold.layers if any(rows.plus for rows in fold.rows)}
    folds = tuple(fold for fold in folds if fold.layers[0] not in modulated)
    folded = copy.deepcopy(denoiser)
    found = fold_smoothing(folded, folds)
    assert found == {layer: fold.module for fold in folds for layer in fold.layers}
    assert found or name in ("SD3Transformer2DModel", "FluxTransformer2DModel")  # all of theirs are modulated
    assert case.predict(folded).equal(case.predict(denoiser))
    # With a branch of its own, a quantized layer takes no factors.
    assert not rank or not any(schemes.get(module) and schemes[module].rank for module in found.values())


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "DiTTransformer2DModel"])
def test_layers_that_read_one_tensor_have_the_same_factors_or_none(name: str, cases: Callable[[str], Case]) -> None:
    case = cases(name)
    schemes = case.schemes(rounding="nearest")
    denoiser = case.nearest
    folds = [fold for fold in case.folds(schemes) if len(fold.layers) > 1]
    assert folds
    for fold in folds:
        factors = [parts_of(quantized_layers(denoiser)[layer])[0].smooth_inv for layer in fold.layers]
        assert len({factor is None for factor in factors}) == 1
        assert all(factor is None or torch.equal(factor, factors[0]) for factor in factors)


def test_shared_factors_are_found_again_after_a_restart(cases: Callable[[str], Case], tmp_path: Path) -> None:
    case = cases("UNet2DModel")
    schemes = case.schemes()
    whole, errors = case.quantized(tmp_path, schemes)
    done = {f"{name}.safetensors" for name in list(errors)[: len(errors) // 2]}
    group = [name for name in errors if name.startswith("mid_block.attentions.0.to_")]
    done = (done | {f"{group[0]}.safetensors"}) - {f"{name}.safetensors" for name in group[1:]}
    for file in (tmp_path / "layers").iterdir():
        if file.name not in done:
            file.unlink()
    again, errors_again = case.quantized(tmp_path, schemes)
    assert same_bits(whole.state_dict(), again.state_dict())
    assert errors_again == errors


def test_layers_with_factors_of_their_own_are_left_alone(cases: Callable[[str], Case]) -> None:
    case = cases("UNet2DModel")
    schemes = case.schemes(rounding="nearest")
    folds = case.folds(schemes)
    denoiser = copy.deepcopy(case.nearest)
    layers: Any = quantized_layers(denoiser)
    taken, *others = [fold for fold in folds if len(fold.layers) == 3 and layers[fold.layers[0]].scheme.smooth]
    layers[taken.layers[1]].smooth_inv = layers[taken.layers[1]].smooth_inv * 2
    before = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    assert fold_smoothing(denoiser, [taken]) == {}
    assert same_bits(before, denoiser.state_dict())
    assert fold_smoothing(denoiser, others[:1]).keys() == set(others[0].layers)
    # What is folded once has no factors to fold.
    assert fold_smoothing(denoiser, others[:1]) == {}


def test_an_adapter_for_a_folded_layer_is_refused(cases: Callable[[str], Case]) -> None:
    case = cases("UNet2DConditionModel")
    schemes = case.schemes(rounding="nearest")
    for layer, folded in (("attn1.to_q", True), ("attn2.to_v", True), ("attn2.to_k", False)):
        denoiser: Any = copy.deepcopy(case.nearest)
        assert fold_smoothing(denoiser, case.folds(schemes))
        config = LoraConfig(r=2, target_modules=[f"mid_block.attentions.0.transformer_blocks.0.{layer}"])
        if folded:
            with pytest.raises(DcompError, match="fold=false"):
                denoiser.add_adapter(config)
        else:
            denoiser.add_adapter(config)


class Toy(nn.Module):
    """A norm, what happens to its output, and layers that read it."""

    def __init__(self, read: Callable[["Toy", Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.value = nn.LayerNorm(8), nn.Linear(8, 8)
        self.one, self.two, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


def folds_of(
    read: Callable[[Toy, Tensor], Tensor], norm: nn.Module | None = None, **schemes: QScheme
) -> set[tuple[str, ...]]:
    """The layers of each fold; all layers are smoothed unless it is said otherwise."""
    torch.manual_seed(0)
    toy = Toy(read).eval()
    toy.norm = norm or toy.norm
    for parameter in toy.norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 3, 8)
    rows = RowBatch((x,), {}, x, torch.zeros(4), torch.arange(4), None, frozenset())
    chosen = dict.fromkeys(("value", "one", "two", "other"), SMOOTH) | schemes
    before = {key: tensor.clone() for key, tensor in toy.state_dict().items()}
    found = find_folds(toy, {name: scheme for name, scheme in chosen.items() if scheme}, rows)
    assert same_bits(before, toy.state_dict())
    assert all(fold.channels == 8 for fold in found)
    return {fold.layers for fold in found}


def both(toy: Toy, x: Tensor) -> Tensor:
    y = toy.norm(x)
    return toy.one(y).sin() + toy.two(y)


def test_all_that_read_a_tensor_fold_together() -> None:
    assert folds_of(both) == {("one", "two")}


class OnePlusNorm(nn.RMSNorm):
    """A norm whose weight is added to 1, so that factors do not go into it."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return functional.rms_norm(x, (8,)) * (1 + self.weight)


@pytest.mark.parametrize(
    ("norm", "legal"),
    [
        (nn.RMSNorm(8), True),
        (nn.LayerNorm(8, bias=False), True),
        (nn.LayerNorm(8, elementwise_affine=False), False),
        (OnePlusNorm(8), False),
    ],
)
def test_a_norm_takes_factors_if_it_multiplies_by_a_weight(norm: nn.Module, legal: bool) -> None:
    assert folds_of(both, norm) == ({("one", "two")} if legal else set())


@pytest.mark.parametrize("scheme", [PLAIN, None, replace(SMOOTH, boundaries=(4,))])
def test_one_reader_that_is_not_smoothed_prevents_it(scheme: QScheme) -> None:
    assert folds_of(both, two=scheme) == set()


def through_the_value(toy: Toy, x: Tensor) -> Tensor:
    return toy.one(toy.value(x) * x.sigmoid())


def test_a_layer_takes_factors_if_it_is_quantized_without_a_branch() -> None:
    assert folds_of(through_the_value) == {("one",)}
    assert folds_of(through_the_value, value=replace(PLAIN, weight_bits=8, group_size=None)) == {("one",)}
    assert folds_of(through_the_value, value=replace(SMOOTH, rank=2)) == set()
    assert folds_of(through_the_value, value=replace(SMOOTH, directions=2)) == set()
    assert folds_of(through_the_value, value=None) == set()  # type: ignore[arg-type]
    # A branch of the reader is no matter.
    assert folds_of(through_the_value, one=replace(SMOOTH, rank=2)) == {("one",)}
    assert folds_of(through_the_value, one=replace(SMOOTH, directions=2)) == {("one",)}


def mixed(toy: Toy, x: Tensor) -> Tensor:
    return toy.one(toy.norm(x).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))


def answered(toy: Toy, x: Tensor) -> Tensor:
    y = toy.norm(x)
    toy.one(y)
    return y


def called_twice(toy: Toy, x: Tensor) -> Tensor:
    return toy.one(toy.norm(x)) + toy.one(x)


def two_tensors(toy: Toy, x: Tensor) -> Tensor:
    y = toy.norm(x)
    return toy.one(y) + toy.two(y.clone())


def hidden_reader(toy: Toy, x: Tensor) -> Tensor:
    y = toy.norm(x)
    return toy.one(y) + torch.from_numpy(y.numpy())


@pytest.mark.parametrize("read", [mixed, answered, called_twice, two_tensors, hidden_reader])
def test_what_only_looks_like_a_fold_is_refused(read: Callable[[Toy, Tensor], Tensor]) -> None:
    assert folds_of(read) == set()


def test_one_bad_candidate_does_not_take_the_good_ones_with_it() -> None:
    def some(toy: Toy, x: Tensor) -> Tensor:
        return both(toy, x) + toy.other(toy.value(x).unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))

    assert folds_of(some) == {("one", "two")}
