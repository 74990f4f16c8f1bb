"""Costs of calls: products that are counted while a plan runs are those that were planned."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.zones import Zone, find_zones
from dcomp.calibrate.cost import count_macs, macs_per_output


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel"])
def test_a_zone_saves_the_products_of_what_it_skips(name: str, recorded_call: Any) -> None:
    denoiser, args, kwargs = recorded_call(name)
    zones = find_zones(denoiser, args, kwargs)
    prices, whole = CallPrices(denoiser, args, kwargs, zones), count_macs(denoiser, args, kwargs)
    assert prices.macs() == whole.total
    assert prices.macs(["all"]) == 0
    layers = Counter(whole.layers)
    for zone in zones[1:]:
        inside = sum(n for layer, n in layers.items() if any(layer.startswith(f"{m}.") for m in zone.modules))
        saved = whole.total - prices.macs([zone.name])
        # Attention's own products have no layer: they are saved too where a zone has attention in it.
        assert inside <= saved <= inside + whole.attention, zone.name
    names = [zone.name for zone in zones]
    for narrow, wide in ((a, b) for a in zones for b in zones if b.encloses(a)):
        assert prices.macs([narrow.name, wide.name]) == prices.macs([wide.name]) <= prices.macs([narrow.name])
    assert prices.macs(names) == 0


def test_one_of_two_contexts_costs_half(recorded_call: Any) -> None:
    denoiser, args, kwargs = recorded_call("UNet2DConditionModel")
    prices = CallPrices(denoiser, args, kwargs, find_zones(denoiser, args, kwargs, guidance=True))
    assert prices.macs(["guidance"]) * 2 == prices.macs()


class Denoiser(nn.Module):
    """A chain of two blocks between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))
        self.conv_out = nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Any) -> tuple[Tensor]:
        x = self.conv_in(x)
        for block in self.blocks:
            x = block(x)
        return (self.conv_out(x),)


def test_a_trajectory_runs_the_products_of_its_plan() -> None:
    torch.manual_seed(0)
    denoiser, x = Denoiser().eval(), torch.randn(3, 8)
    zones = find_zones(denoiser, (x, torch.tensor(9.0)), {})
    assert [zone.name for zone in zones] == ["all", "blocks[0:2]", "blocks[1:2]", "blocks[0:1]"]
    rows: list[dict[str, str]] = [{}, {"blocks[0:2]": "reuse"}, {"all": "reuse"}, {"blocks[1:2]": "reuse"}, {}]
    plan = CachePlan(zones, (9, 8, 7, 6, 5), (9, 8, 7, 6, 5), tuple(rows))
    prices = CallPrices(denoiser, (x, torch.tensor(9.0)), {}, zones)
    done = 0

    def count(layer: nn.Linear, args: Any, output: Tensor) -> None:
        nonlocal done
        done += output.numel() * macs_per_output(layer)

    with following(denoiser, None, PlanGuide(plan)) as executor, torch.no_grad():
        hooks = [m.register_forward_hook(count) for m in denoiser.modules() if isinstance(m, nn.Linear)]
        for timestep in plan.timesteps:
            denoiser(x, timestep)
        for hook in hooks:
            hook.remove()
    assert not executor.stats.fallbacks
    one = 3 * 16 * 8
    assert done == (6 + (6 - 4) + 0 + (6 - 2) + 6) * one
    assert prices.macs_of(plan) == done / (5 * prices.macs())


def test_time_is_measured_against_a_call_that_computes_everything(recorded_call: Any) -> None:
    denoiser, args, kwargs = recorded_call("DiTTransformer2DModel")
    whole = Zone("all", "output", ("",))
    prices = CallPrices(denoiser, args, kwargs, [whole])
    assert prices.seconds([]) == 1.0
    assert 0 < prices.seconds(["all"]) < 0.9
    plan = CachePlan((whole,), (9, 8), (9, 8), ({}, {"all": "reuse"}))
    assert prices.seconds_of(plan) == (1 + prices.seconds(["all"])) / 2
