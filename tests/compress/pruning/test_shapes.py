"""What can be cut out of published models, from their shapes alone."""

import pytest
import torch

from dcomp.compress.pruning.choose import Problem
from dcomp.compress.pruning.costs import Saving, measure_costs, sites
from dcomp.compress.pruning.cut import cut
from dcomp.compress.pruning.importance import Subject
from dcomp.compress.pruning.options import list_options
from dcomp.compress.pruning.units import find_units
from tests.support.shapes import SHAPES, shape_of

# Parameters as published; blocks, attentions, feed-forwards, residual blocks and transformers; groups.
KNOWN = {
    "SD1.5": (859_520_964, (16, 32, 16, 22, 16), 70),
    "SDXL": (2_567_463_684, (70, 140, 70, 17, 11), 227),
    "DiT-XL/2": (749_826_464, (27, 28, 28, 0, 0), 56),
    "PixArt": (610_856_096, (28, 56, 28, 0, 0), 84),
    "SD3-medium": (2_028_328_000, (24, 24, 47, 0, 0), 71),
    "FLUX-dev": (11_901_408_320, (57, 19, 38, 0, 0), 133),
}
KINDS = ("block", "attention", "feed_forward", "resnet", "transformer")


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_units_of_published_models(name: str) -> None:
    denoiser, (args, kwargs) = shape_of(name)
    units = find_units(denoiser)
    with torch.device("meta"):
        costs = measure_costs(denoiser, units, args, kwargs)
    found = tuple(sum(part.kind == kind for part in units.parts.values()) for kind in KINDS)
    assert (costs.whole.parameters, found, len(units.groups)) == KNOWN[name]
    assert {*units.left} == ({"transformer_blocks.0"} if name.startswith("DiT") else set())
    # A fifth of the parameters, where each member of a group is as dear as any other.
    subject = Subject(denoiser, units, None)  # type: ignore[arg-type]
    scores = {group.name: torch.ones(group.members) for group in units.groups.values()}
    problem = Problem(list_options(subject, costs, scores, round_to=64), dict(sites(units)))
    needed = Saving(costs.whole.parameters // 5, 0)
    (chosen,) = problem.best(needed)
    assert chosen.saving.parameters >= needed.parameters
    cut(denoiser, chosen.cuts, units)
    left = sum(parameter.numel() for parameter in denoiser.parameters())
    assert left == costs.whole.parameters - chosen.saving.parameters or name == "SD3-medium"
    assert left <= costs.whole.parameters - needed.parameters
    assert all(tensor.is_meta for tensor in denoiser.state_dict().values())
