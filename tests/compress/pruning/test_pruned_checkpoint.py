"""Pruned denoisers in folders: with plain diffusers where a config can say what is left, else through dcomp."""

import ast
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from dcomp import DcompError
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import OpenPipeline, open_pipeline
from dcomp.compress.checkpoint import ManifestFields, write_checkpoint
from dcomp.compress.loader import load
from dcomp.compress.pruning.cut import cut, cuts_of
from dcomp.compress.pruning.cut_list import CutError, CutList
from dcomp.compress.pruning.plain import plain_config
from dcomp.compress.pruning.units import find_units
from dcomp.compress.split import quantized_layers
from dcomp.compress.verify import call_denoiser
from tests.compress.pruning.test_cut import some
from tests.support.checkpoints import checked_in_a_fork
from tests.support.quantized import quantized_pipeline
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, TRANSFORMER_NAMES, denoiser_inputs, save_tiny_pipeline

FIELDS = ManifestFields(recipe={"kind": "prune"})
NESTED = "UNet2DConditionModel"


@pytest.fixture(autouse=True, scope="module")
def quick_check() -> Iterator[None]:
    with checked_in_a_fork():
        yield


def pruned(name: str, folder: Path, *, parts: int = 2) -> OpenPipeline:
    pipeline = open_pipeline(save_tiny_pipeline(name, folder))
    units = find_units(pipeline.denoiser)
    branches = [part.name for part in units.parts.values() if part.kind != "block"]
    removed = frozenset(random.Random(1).sample(branches, parts))
    cut(pipeline.denoiser, CutList(removed, some(units, 2)), units)
    return pipeline


def values(denoiser: nn.Module, name: str) -> torch.Tensor:
    return call_denoiser(denoiser, *denoiser_inputs(name))


# Each line is a program that runs in a fork; what it ends with is answered by another line.
PLAIN = """
import os, sys, traceback
import torch, diffusers
from diffusers import DiffusionPipeline
for line in sys.stdin:
    reader, writer = os.pipe()
    if os.fork() == 0:
        problem = ""
        try:
            exec(eval(line))
        except BaseException:
            problem = traceback.format_exc()
        os.write(writer, repr(problem).encode())
        os._exit(0)
    os.close(writer)
    print(open(reader).read(), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[str], str]]:
    """Run a program where diffusers is imported and dcomp is not; gives its traceback, empty if it has none."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-P", "-c", PLAIN], **pipes) as process:
        assert process.stdin
        assert process.stdout

        def call(code: str) -> str:
            print(repr(code), file=process.stdin, flush=True)
            return str(ast.literal_eval(process.stdout.readline()))

        yield call
        process.stdin.close()


@pytest.mark.parametrize("name", sweep(NAMES, FEW_NAMES))
def test_a_pruned_model_is_what_it_was_in_memory(name: str, tmp_path: Path) -> None:
    pipeline = pruned(name, tmp_path / "source")
    expected = values(pipeline.denoiser, name)
    # Writing opens the folder again and compares the bits of a call.
    write_checkpoint(pipeline, tmp_path / "out", FIELDS, probe=denoiser_inputs(name))
    part = check_model_folder(tmp_path / "out").denoiser
    counted = sum(tensor.numel for tensor in part.tensors.values())
    assert counted == sum(tensor.numel() for tensor in pipeline.denoiser.state_dict().values())
    size = sum(path.stat().st_size for path in part.path.glob("*.safetensors"))
    assert 0 < size - 4 * counted < 200 * len(part.tensors) + 2000
    opened = load(tmp_path / "out")
    denoiser: Any = getattr(opened, pipeline.denoiser_name)
    assert cuts_of(denoiser) == cuts_of(pipeline.denoiser)
    assert torch.equal(values(denoiser, name), expected)
    assert denoiser.half().dtype == torch.float16  # no integers, nothing that forbids it


@pytest.mark.parametrize("name", sweep(NAMES, ["SD3Transformer2DModel"]))
def test_a_pruned_model_is_quantized_like_any_other(name: str, tmp_path: Path) -> None:
    write_checkpoint(pruned(name, tmp_path / "source"), tmp_path / "small", FIELDS)
    pipeline = quantized_pipeline(tmp_path / "small")
    assert cuts_of(pipeline.denoiser)
    assert quantized_layers(pipeline.denoiser)
    write_checkpoint(pipeline, tmp_path / "out", FIELDS, probe=denoiser_inputs(name))
    opened = open_pipeline(tmp_path / "out").denoiser
    assert cuts_of(opened) == cuts_of(pipeline.denoiser)
    assert torch.equal(values(opened, name), values(pipeline.denoiser, name))


def test_diffusers_alone_refuses_what_no_config_says(run: Callable[[str], str], tmp_path: Path) -> None:
    write_checkpoint(pruned("DiTTransformer2DModel", tmp_path / "source"), tmp_path / "out", FIELDS)
    problem = run(f"diffusers.DiTTransformer2DModel.from_pretrained({str(tmp_path / 'out/transformer')!r})")
    assert "Unknown quantization type, got dcomp" in problem


def test_saving_again_keeps_the_cuts(tmp_path: Path) -> None:
    pipeline = pruned("SD3Transformer2DModel", tmp_path / "source")
    write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    DiffusionPipeline.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again: Any = DiffusionPipeline.from_pretrained(tmp_path / "again")
    expected = values(pipeline.denoiser, "SD3Transformer2DModel")
    assert torch.equal(values(again.transformer, "SD3Transformer2DModel"), expected)


@pytest.mark.parametrize("name", sweep(TRANSFORMER_NAMES, ["SD3Transformer2DModel"]))
def test_blocks_are_gone_for_plain_diffusers_too(name: str, run: Callable[[str], str], tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline(name, tmp_path / "source"))
    units = find_units(pipeline.denoiser)
    last = [part.name for part in units.parts.values() if part.kind == "block"][-1]
    cut(pipeline.denoiser, CutList(frozenset({last})), units)
    write_checkpoint(pipeline, tmp_path / "out", FIELDS)
    folder = tmp_path / "out" / "transformer"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    torch.save(denoiser_inputs(name), tmp_path / "call.pt")
    problem = run(
        f"args, kwargs = torch.load({str(tmp_path / 'call.pt')!r})\n"
        f"model = diffusers.{name}.from_pretrained({str(folder)!r}).eval()\n"
        "with torch.no_grad(): made = model(*args, **kwargs)[0]\n"
        f"torch.save(made, {str(tmp_path / 'made.pt')!r})\n"
        "assert not any(module.startswith('dcomp') for module in sys.modules)\n"
    )
    assert problem == ""
    assert torch.equal(torch.load(tmp_path / "made.pt"), values(pipeline.denoiser, name))
    load(tmp_path / "out")


def deep_unet() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
            transformer_layers_per_block=[1, 2],
        ).eval()


@pytest.mark.parametrize(
    ("removed", "down", "up"),
    [
        ({"up_blocks.0.attentions.1.transformer_blocks.0"}, [1, 2], [[2, 1], 1]),
        ({"down_blocks.0.attentions.0.transformer_blocks.0"}, [0, 2], [2, 1]),
        (
            {f"{path}.transformer_blocks.1" for path in ("down_blocks.1.attentions.0", "mid_block.attentions.0")},
            [1, 1],
            [2, 1],
        ),
        ({"mid_block.attentions.0.transformer_blocks.1"}, None, None),  # tied to the last stage
        ({"mid_block.attentions.0"}, None, None),
    ],
)
def test_depths_within_a_unet_are_in_its_config(removed: set[str], down: Any, up: Any) -> None:
    denoiser = deep_unet()
    config = dict(denoiser.config)
    cuts = CutList(frozenset(removed))
    cut(denoiser, cuts)
    found = plain_config(denoiser, cuts, config)
    if down is None:
        assert found is None
        return
    assert found is not None
    assert found["transformer_layers_per_block"] == down
    assert found["reverse_transformer_layers_per_block"] == up
    again: Any = UNet2DConditionModel.from_config(json.loads(json.dumps(found))).eval()
    again.load_state_dict(denoiser.state_dict())
    call = (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 16))
    with torch.no_grad():
        assert torch.equal(again(*call).sample, denoiser(*call).sample)


def test_a_model_is_not_cut_twice() -> None:
    denoiser = deep_unet()
    cut(denoiser, CutList(frozenset({"mid_block.attentions.0"})))
    with pytest.raises(CutError, match="cut before"):
        cut(denoiser, CutList(frozenset({"mid_block.resnets.0"})))


EDITS = {
    "a group that stays whole": lambda cuts: cuts["kept"].popitem(),
    "a member that is none": lambda cuts: cuts["kept"].update({next(iter(cuts["kept"])): [[0, 999]]}),
    "another part": lambda cuts: cuts["removed"].append("conv_out"),
    "a part that stays": lambda cuts: cuts["removed"].pop(),
    "no list": lambda cuts: cuts.update(removed=None),
    "nothing": lambda cuts: cuts.update(removed=[], kept={}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_list_of_cuts_is_refused(edit: str, tmp_path: Path) -> None:
    write_checkpoint(pruned("UNet2DModel", tmp_path / "source"), tmp_path / "out", FIELDS)
    file = tmp_path / "out" / "unet" / "config.json"
    config = json.loads(file.read_text())
    EDITS[edit](config["quantization_config"]["cuts"])
    file.write_text(json.dumps(config))
    with pytest.raises(DcompError):
        load(tmp_path / "out")  # the manifest has another hash
    with pytest.raises(DcompError) as caught:
        load(tmp_path / "out", check="none")
    assert "Traceback" not in str(caught.value)
