"""The reconstruction pass over a whole denoiser: what it records, learns, leaves alone and resumes."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.structure import probe_structure
from dcomp.calibrate.tree_file import decode, open_tensors, read_description
from dcomp.compress.block_pass import BlockError, batched_leaves, reconstruct_blocks, record_blocks
from dcomp.compress.policy import Treatment, choose_schemes
from dcomp.compress.quantize import quantize_denoiser, rows_of_pass
from dcomp.compress.quantize_layer import to_canonical, transformed_weight
from dcomp.compress.soft_rounding import fake_execution
from dcomp.compress.split import quantized_layers
from tests.support.sweep import sweep
from tests.support.tiny import save_tiny_pipeline

ROWS, ITERATIONS = 40, 30


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("blocks")
    pipeline = open_pipeline(save_tiny_pipeline("UNet2DModel", folder / "model"))
    recorded = record_calibration_set(pipeline, [""] * 12, Generation(steps=4, batch_size=6), folder / "calibration")
    call = next(recorded.calls())
    structure = probe_structure(pipeline.denoiser, call.args, call.kwargs)
    # From the nearest codes, which leave room for learning in few iterations.
    treatment = Treatment(rounding="nearest", inputs="static", split="all", smooth=True)
    decisions = choose_schemes(pipeline.denoiser, structure, "w4a8", treatment=treatment)
    schemes = {name: d.scheme for name, d in decisions.items() if d.scheme}
    original = copy.deepcopy(pipeline.denoiser)
    rows = rows_of_pass(original, recorded, ROWS, 0)
    reference = record_blocks(original, rows, structure.blocks, list(schemes), folder / "float")
    quantize_denoiser(pipeline.denoiser, recorded, schemes, None, folder / "work", rows=ROWS)
    return SimpleNamespace(
        original=original, quantized=pipeline.denoiser, rows=rows, reference=reference, structure=structure
    )


def reconstructed(case: SimpleNamespace, folder: Path, **options):
    denoiser = copy.deepcopy(case.quantized)
    results = reconstruct_blocks(denoiser, case.rows, case.reference, folder, iterations=ITERATIONS, **options)
    return denoiser, results


def codes(denoiser) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in denoiser.state_dict().items() if key.endswith(("qweight", "scale"))}


def test_every_quantized_layer_belongs_to_exactly_one_block(case: SimpleNamespace) -> None:
    for name in quantized_layers(case.quantized):
        owners = [block for block in case.reference.names if name == block or name.startswith(f"{block}.")]
        assert len(owners) == 1, (name, owners)
    assert set(case.structure.blocks) <= set(case.reference.names)


def test_the_recorded_outputs_are_those_of_the_float_blocks(case: SimpleNamespace) -> None:
    seen = {}
    blocks = list(case.structure.blocks)
    hooks = [
        case.original.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
        for name in blocks
    ]
    with torch.no_grad():
        case.original(*case.rows.args, **case.rows.kwargs)
    for hook in hooks:
        hook.remove()
    for name in blocks:
        file = case.reference.folder / f"{name}.safetensors"
        assert torch.equal(decode(read_description(file)["output"], open_tensors(file)), seen[name])


def test_blocks_are_learned_in_order_and_only_what_got_better_is_kept(case: SimpleNamespace, tmp_path: Path) -> None:
    denoiser, results = reconstructed(case, tmp_path)
    assert set(results) == set(case.reference.names)
    executed = [name for name in results if name in case.structure.blocks]
    assert executed == list(case.structure.blocks)
    before, after = codes(case.quantized), codes(denoiser)
    assert any(result.kept for result in results.values())
    for name, result in results.items():
        own = [key for key in before if key == name or key.startswith(f"{name}.")]
        same = all(torch.equal(before[key], after[key]) for key in own)
        assert same == (result.changed == 0)
        assert result.kept == (result.held_out_final < result.held_out_initial)
        assert result.kept or same
    assert all(layer.execution == "int" for layer in quantized_layers(denoiser).values())
    assert not any("forward" in vars(module) for module in denoiser.modules())
    scales = [key for key in before if key.endswith("scale")]
    assert all(torch.equal(before[key], after[key]) for key in scales)  # the grid stays


class _StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on_with_the_next_block_and_ends_with_the_same_bits(
    case: SimpleNamespace, tmp_path: Path
) -> None:
    whole, results = reconstructed(case, tmp_path / "whole")
    stop_at = len(results) // 2

    def stop(text: str, done: int, _: int) -> None:
        if text == "blocks" and done == stop_at:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        reconstructed(case, tmp_path / "stopped", progress=stop)
    texts: list[str] = []
    rest, again = reconstructed(case, tmp_path / "stopped", progress=lambda text, done, total: texts.append(text))
    learned = {text for text in texts if text != "blocks"}
    assert len(learned) == len(results) - stop_at
    assert again == results
    assert codes(rest).keys() == codes(whole).keys()
    assert all(torch.equal(value, codes(whole)[key]) for key, value in codes(rest).items())


def test_an_exception_leaves_no_trace(case: SimpleNamespace, tmp_path: Path) -> None:
    broken = replace(case.reference, folder=tmp_path / "nowhere")
    denoiser = copy.deepcopy(case.quantized)
    with pytest.raises(Exception, match="nowhere"):
        reconstruct_blocks(denoiser, case.rows, broken, tmp_path / "out", iterations=1)
    assert not any("forward" in vars(module) for module in denoiser.modules())
    assert all(layer.execution == "int" for layer in quantized_layers(denoiser).values())


def test_float_weights_in_the_coordinates_of_the_codes_are_near_them(case: SimpleNamespace) -> None:
    for name, layer in quantized_layers(case.quantized).items():
        weight = case.reference.weights[name]
        parts = list(layer.parts) if layer.scheme.boundaries else [layer]
        for part, own in zip(parts, transformed_weight(weight, layer), strict=True):
            codes_stand_for = to_canonical(part.values())
            assert own.shape == codes_stand_for.shape
            assert (own - codes_stand_for).norm() < 0.2 * own.norm(), name


# Written by hand from the architectures. Flux's blocks also get a table of positions for 16 + 7 tokens, without rows.
BATCHED = {
    "FluxTransformer2DModel": {
        "transformer_blocks.0": {("hidden_states",), ("encoder_hidden_states",), ("temb",)},
        "single_transformer_blocks.1": {("hidden_states",), ("encoder_hidden_states",), ("temb",)},
    },
    "SD3Transformer2DModel": {
        "transformer_blocks.1": {("hidden_states",), ("encoder_hidden_states",), ("temb",)},
    },
    "PixArtTransformer2DModel": {
        "transformer_blocks.1": {(0,), ("encoder_hidden_states",), ("encoder_attention_mask",), ("timestep",)},
    },
}
TOKENS = {"FluxTransformer2DModel": 23, "SD3Transformer2DModel": 16, "PixArtTransformer2DModel": 16}


@pytest.mark.parametrize("name", sweep(BATCHED, [name for name in BATCHED if not name.startswith("Flux")]))
def test_what_has_rows_is_not_told_by_its_length(name: str, tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline(name, tmp_path / "model"))
    denoiser, settings = pipeline.denoiser, Generation(steps=4, batch_size=6, height=16, width=16)
    recorded = record_calibration_set(pipeline, ["a cat"] * 12, settings, tmp_path / "calibration")
    call = next(recorded.calls())
    structure = probe_structure(denoiser, call.args, call.kwargs)
    decisions = choose_schemes(denoiser, structure, "w4a8", treatment=Treatment(rounding="adaround"))
    schemes = {name: d.scheme for name, d in decisions.items() if d.scheme}
    rows = rows_of_pass(denoiser, recorded, 40, 0).take(range(TOKENS[name]))
    reference = record_blocks(denoiser, rows, structure.blocks, list(schemes), tmp_path / "float")
    for block, leaves in BATCHED[name].items():
        assert reference.batched[block] == leaves
    quantize_denoiser(denoiser, recorded, schemes, None, tmp_path / "work", rows=TOKENS[name])
    predictions = []
    hook = denoiser.register_forward_hook(lambda _, __, output: predictions.append(output[0]))
    results = reconstruct_blocks(denoiser, rows, reference, tmp_path / "out", iterations=2)
    hook.remove()
    with fake_execution(quantized_layers(denoiser).values()), torch.no_grad():
        expected = denoiser(*rows.args, **rows.kwargs)[0]
    assert set(results) == set(reference.names)
    # Other batch sizes sum in another order; a wrong row would be off by the size of the prediction.
    assert (predictions[-1] - expected).abs().max() <= 1e-4 * expected.abs().max()


class _Folded(torch.nn.Module):
    """Puts rows and heads into one axis before its block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.block(x.reshape(-1, 4))


def test_rows_that_share_an_axis_are_refused_by_name() -> None:
    rows = RowBatch((torch.zeros(5, 3, 4), torch.zeros(5)), {}, *[torch.zeros(5)] * 3, None, frozenset({(0,), (1,)}))
    with pytest.raises(BlockError, match="argument 0") as error:
        batched_leaves(_Folded(), rows, ["block"])
    assert error.value.where == "block"
