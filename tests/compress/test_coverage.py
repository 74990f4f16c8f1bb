from typing import Literal

import pytest
import torch
from torch import nn

from dcomp.calibrate.structure import probe_structure
from dcomp.compress.coverage import Coverage, FloatPart, coverage
from dcomp.compress.policy import PRESETS, Decision, Treatment, choose_schemes
from dcomp.compress.scheme import QScheme
from tests.support.parts import PARTS, STRUCTURE
from tests.support.tiny import NAMES, denoiser_inputs, tiny_denoiser


def test_coverage_counts_every_parameter_once_and_lists_what_is_float() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(5))
    model.big, model.small = nn.Linear(64, 32), nn.Linear(64, 4, bias=False)
    model.norm = nn.LayerNorm(64).half()
    model.copy = nn.Linear(64, 32)
    model.copy.weight = model.big.weight
    decisions = {
        "big": Decision(None, "kept"),
        "small": Decision(QScheme(4, 64), ""),
        "copy": Decision(None, "also kept"),
    }
    parameters = 5 + (64 * 32 + 32) + 64 * 4 + 128 + 32
    after = 4 * 5 + 4 * (64 * 32 + 32) + (128 + 4 * 4 + 4) + 2 * 128 + 4 * 32
    assert coverage(model, decisions) == Coverage(
        parameters,
        4 * parameters,
        after,
        after / (4 * parameters),
        8 * after / parameters,
        (
            FloatPart("big", "Linear", 64 * 32 + 32, 4 * (64 * 32 + 32), "kept"),
            FloatPart("norm", "LayerNorm", 128, 256, "not a linear layer or convolution"),
            FloatPart("copy", "Linear", 32, 128, "also kept"),
            FloatPart("", "Module", 5, 20, "not a linear layer or convolution"),
        ),
    )


def test_static_tables_are_counted() -> None:
    def grown(inputs: Literal["static", "dynamic"]) -> int:
        decisions = choose_schemes(PARTS, STRUCTURE, "w8a8", treatment=Treatment(inputs=inputs, split="all"))
        return coverage(PARTS, decisions, 21).bytes_after - coverage(PARTS, decisions, 1).bytes_after

    convs = ("conv", "narrow_conv", "strided", "inset", "pointwise", "even", "shortcut", "behind")
    parts = sum(1 + len(STRUCTURE.layers[name].boundaries) for name in convs)
    assert parts == len(convs) + 2
    assert grown("static") == 20 * 5 * parts  # a scale in fp32 and a zero in one byte
    assert grown("dynamic") == 0


@pytest.mark.parametrize("name", NAMES)
def test_presets_shrink_every_architecture_in_their_order(name: str) -> None:
    denoiser = tiny_denoiser(name)
    args, kwargs = denoiser_inputs(name)
    structure = probe_structure(denoiser, args, kwargs)
    treatment = Treatment(directions=0)  # which take many bytes where channels are few
    sizes = {
        preset: coverage(denoiser, choose_schemes(denoiser, structure, preset, treatment=treatment))
        for preset in PRESETS
    }
    total = sum(t.numel() for t in denoiser.state_dict().values())
    assert all(size.parameters == total for size in sizes.values())
    assert sizes["float"].ratio == 1
    assert sizes["w4a16"].ratio < sizes["w8a16"].ratio <= sizes["w8a8"].ratio < 0.6  # DiT: embeddings of 1000 classes
    assert sizes["w4a8"].ratio < sizes["w8a8"].ratio
    assert sizes["w4a8"].ratio <= sizes["w4a4"].ratio < sizes["w8a8"].ratio  # factors of inputs take some bytes
    undecided = {part.name for part in sizes["w4a8"].left_in_float} & set(structure.layers)
    assert undecided == set()
