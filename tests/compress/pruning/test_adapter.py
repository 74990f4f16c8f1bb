"""Adapters of whole models on pruned ones, against adapters that were merged before pruning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dcomp
from dcomp.calibrate.adapters import AdapterError, fuse_lora
from dcomp.calibrate.pipeline import open_pipeline
from dcomp.compress.checkpoint import ManifestFields, write_checkpoint
from dcomp.compress.pruning.adapter import fit_lora
from dcomp.compress.pruning.cut import cut
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.units import find_units
from dcomp.compress.verify import call_denoiser
from tests.compress.pruning.test_cut import some
from tests.support.checkpoints import save_lora
from tests.support.tiny import denoiser_inputs, save_tiny_pipeline

UNET, FLUX = "UNet2DConditionModel", "FluxTransformer2DModel"
CASES = {
    UNET: ("unet", ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"]),
    FLUX: ("transformer", ["to_q", "to_v", "to_out.0", "proj_mlp", "proj_out", "add_q_proj"]),
    "SD3Transformer2DModel": ("transformer", ["to_q", "to_out.0", "ff.net.2", "add_k_proj"]),
}


def cuts_for(denoiser: Any) -> CutList:
    """Some members of each group, a branch, and a block."""
    units = find_units(denoiser)
    parts = [part.name for part in units.parts.values() if part.kind == "attention"][:1]
    blocks = [part.name for part in units.parts.values() if part.kind == "block"][-1:]
    return CutList(frozenset(parts + blocks), some(units, 4))


@pytest.mark.parametrize("name", CASES)
def test_a_fitted_adapter_is_the_one_that_was_merged_before(name: str, tmp_path: Path) -> None:
    component, targets = CASES[name]
    source = save_tiny_pipeline(name, tmp_path / "source")
    file = save_lora(name, tmp_path / "lora", component, targets)
    before, after = open_pipeline(source), open_pipeline(source)
    fuse_lora(before.pipe, [str(file)])
    cuts = cuts_for(after.denoiser)
    cut(before.denoiser, cuts)
    cut(after.denoiser, cuts)
    plain = call_denoiser(after.denoiser, *denoiser_inputs(name))
    fuse_lora(after.pipe, [str(file)], fit_lora)
    expected, found = (call_denoiser(one.denoiser, *denoiser_inputs(name)) for one in (before, after))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_scales_of_the_file_are_those_of_the_matrices(tmp_path: Path) -> None:
    source = save_tiny_pipeline(UNET, tmp_path / "source")
    file = save_lora(UNET, tmp_path / "lora", "unet", ["to_q"])
    doubled = tmp_path / "doubled.safetensors"
    metadata = {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}'}
    save_file(load_file(file), doubled, metadata)
    pipeline = open_pipeline(source)
    cut(pipeline.denoiser, CutList(frozenset({"mid_block.attentions.0"})))
    one, two = (fit_lora(pipeline.pipe, path) for path in (file, doubled))
    assert one is not None
    assert two is not None
    assert not any("mid_block" in key for key in one)
    for key, tensor in one.items():
        factor = 2 if "lora_B" in key else 1
        assert torch.equal(two[key], factor * tensor), key


def test_blocks_that_a_config_leaves_out_are_known_from_the_manifest(tmp_path: Path) -> None:
    name = "PixArtTransformer2DModel"
    pipeline = open_pipeline(save_tiny_pipeline(name, tmp_path / "source"))
    cut(pipeline.denoiser, CutList(frozenset({"transformer_blocks.0"})))
    write_checkpoint(pipeline, tmp_path / "out", ManifestFields({}, pruning={"removed": ["transformer_blocks.0"]}))
    opened: Any = dcomp.load(tmp_path / "out")
    keys = [f"transformer.transformer_blocks.{i}.attn1.to_q.lora_{which}.weight" for i in (0, 1) for which in "AB"]
    save_file({key: torch.full((72, 72), float(i)) for i, key in enumerate(keys)}, tmp_path / "lora.safetensors")
    fitted = dcomp.fit_lora(opened, tmp_path / "lora.safetensors")
    assert fitted is not None
    assert {key: float(tensor.mean()) for key, tensor in fitted.items()} == dict(zip(keys[:2], (2.0, 3.0), strict=True))


def test_a_whole_model_takes_the_file_as_it_is(tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline(UNET, tmp_path / "source"))
    assert fit_lora(pipeline.pipe, save_lora(UNET, tmp_path / "lora", "unet", ["to_q"])) is None


REFUSED = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.diff": "no matrix of a LoRA",
    "lora_unet_down_blocks_0_attentions_0.lora_down.weight": "another format",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "were cut out",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight": "not of this model",
    f"unet.mid_block.attentions.{10**15}.transformer_blocks.{'9' * 60}.attn1.to_q.lora_A.weight": "were cut out",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(key: str, tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline(UNET, tmp_path / "source"))
    kept = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1:heads": (0, 2)}
    cut(pipeline.denoiser, CutList(frozenset({"mid_block.attentions.0"}), kept))
    tensors = {key: torch.ones(4, 4)}
    if "unet." not in key or "diff" in key:
        tensors["unet.conv_in.lora_A.weight"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError, match=REFUSED[key]):
        fit_lora(pipeline.pipe, tmp_path / "lora.safetensors")
