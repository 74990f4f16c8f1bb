"""What cuts save, against cut denoisers that are counted."""

import random
from typing import Any

import pytest
import torch

from dcomp.calibrate.cost import count_macs
from dcomp.compress.pruning.costs import Saving, measure_costs, sites
from dcomp.compress.pruning.cut import cut_copy
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.units import find_units
from tests.compress.pruning.test_cut import ALL_NAMES, some
from tests.support.tiny import denoiser_inputs, tiny_denoiser


def counted(denoiser: Any, name: str) -> Saving:
    args, kwargs = denoiser_inputs(name)
    return Saving(sum(p.numel() for p in denoiser.parameters()), count_macs(denoiser, args, kwargs).total)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_what_is_saved_is_what_a_cut_denoiser_lacks(name: str) -> None:
    denoiser = tiny_denoiser(name)
    units = find_units(denoiser)
    args, kwargs = denoiser_inputs(name)
    costs = measure_costs(denoiser, units, args, kwargs)
    assert costs.whole == counted(denoiser, name)
    last = [part.name for part in units.parts.values() if part.kind == "block"][-1:]
    parts = [part for part in units.parts if not name.startswith("SD3") or part not in last]
    draw = random.Random(0)
    cases = [CutList(frozenset({part})) for part in parts]
    cases += [CutList(kept=some(units, seed)) for seed in range(2)]
    cases += [CutList(frozenset(draw.sample(parts, len(parts) // 2)), some(units, seed)) for seed in range(3)]
    for cuts in cases:
        small = counted(cut_copy(denoiser, cuts, units), name)
        saving = costs.of(cuts, units)
        assert Saving(costs.whole.parameters - small.parameters, costs.whole.macs - small.macs) == saving, cuts


def test_shapes_are_enough() -> None:
    name = "UNet2DConditionModel"
    denoiser, (args, kwargs) = tiny_denoiser(name), denoiser_inputs(name)
    units = find_units(denoiser)
    expected = measure_costs(denoiser, units, args, kwargs)
    with torch.device("meta"):
        empty: Any = type(denoiser).from_config(denoiser.config)  # type: ignore[attr-defined]
    call = (
        tuple(arg.to("meta") for arg in args),
        kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"].to("meta")},
    )
    assert measure_costs(empty, find_units(empty), *call) == expected


def test_sites_are_parts_and_groups_without_one() -> None:
    found = dict(sites(find_units(tiny_denoiser("FluxTransformer2DModel"))))
    assert found["transformer_blocks.0.attn"] == ("transformer_blocks.0",)
    assert found["single_transformer_blocks.1.attn:heads"] == ("single_transformer_blocks.1",)
    assert found["single_transformer_blocks.1:channels"] == ("single_transformer_blocks.1",)
    assert found["single_transformer_blocks.1"] == ()
    assert "transformer_blocks.0.attn:heads" not in found
