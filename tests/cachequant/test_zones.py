"""Zones of real architectures, as lists that were written by hand, and cuts that are none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.cachequant.zones import SUBLAYERS, SUBMODULES, Zone, ZoneError, find_zones, is_cut, single_modules

BLOCK = "transformer_blocks.0"
EXPECTED: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "UNet2DModel": {
        "all": (("",), ()),
        "deep1": (("up_blocks.1.resnets.0",), ("down_blocks.0", "down_blocks.1", "up_blocks.0", "mid_block")),
        "deep2": (
            ("up_blocks.0.upsamplers.0",),
            (
                "down_blocks.0.downsamplers.0",
                "down_blocks.1",
                *(f"up_blocks.0.attentions.{i}" for i in (0, 1)),
                *(f"up_blocks.0.resnets.{i}" for i in (0, 1)),
                "mid_block",
            ),
        ),
        "deep3": (("up_blocks.0.attentions.0",), ("down_blocks.1", "up_blocks.0.resnets.0", "mid_block")),
        "encoder": (("down_blocks.0", "down_blocks.1", "mid_block"), ()),
    },
    "UNet2DConditionModel": {
        "all": (("",), ()),
        "deep1": (
            ("up_blocks.1.attentions.0",),
            ("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1.resnets.0", "mid_block"),
        ),
        "deep2": (
            ("up_blocks.0.upsamplers.0",),
            (
                "down_blocks.0.downsamplers.0",
                "down_blocks.1",
                "up_blocks.0.resnets.0",
                "up_blocks.0.resnets.1",
                "mid_block",
            ),
        ),
        "deep3": (("up_blocks.0.resnets.0",), ("down_blocks.1", "mid_block")),
        "encoder": (("down_blocks.0", "down_blocks.1", "mid_block"), ()),
        **{
            name: (
                tuple(
                    f"{place}.{BLOCK}.{child}"
                    for place in (
                        "down_blocks.0.attentions.0",
                        "mid_block.attentions.0",
                        "up_blocks.1.attentions.0",
                        "up_blocks.1.attentions.1",
                    )
                ),
                (),
            )
            for name, child in (("attention", "attn1"), ("cross_attention", "attn2"), ("feed_forward", "ff"))
        },
    },
    "DiTTransformer2DModel": {
        "all": (("",), ()),
        "blocks[0:2]": (("transformer_blocks.0", "transformer_blocks.1"), ()),
        "blocks[1:2]": (("transformer_blocks.1",), ()),
        "blocks[0:1]": (("transformer_blocks.0",), ()),
        "attention": (("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"), ()),
        "feed_forward": (("transformer_blocks.0.ff", "transformer_blocks.1.ff"), ()),
    },
    "SD3Transformer2DModel": {
        "all": (("",), ()),
        "blocks[0:2]": (("transformer_blocks.0", "transformer_blocks.1"), ()),
        "blocks[1:2]": (("transformer_blocks.1",), ()),
        "blocks[0:1]": (("transformer_blocks.0",), ()),
        "attention": (("transformer_blocks.0.attn", "transformer_blocks.1.attn"), ()),
        "feed_forward": (("transformer_blocks.0.ff", "transformer_blocks.0.ff_context", "transformer_blocks.1.ff"), ()),
    },
    "FluxTransformer2DModel": {
        "all": (("",), ()),
        "blocks[0:3]": (("transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"), ()),
        "blocks[1:3]": (("single_transformer_blocks.0", "single_transformer_blocks.1"), ()),
        "blocks[1:2]": (("single_transformer_blocks.0",), ()),
        "blocks[0:1]": (("transformer_blocks.0",), ()),
        "attention": (
            ("transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in (0, 1))),
            (),
        ),
        "feed_forward": (("transformer_blocks.0.ff", "transformer_blocks.0.ff_context"), ()),
    },
}
EXPECTED["PixArtTransformer2DModel"] = {
    **EXPECTED["DiTTransformer2DModel"],
    "cross_attention": (("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"), ()),
}
for _zones in EXPECTED.values():
    _kinds = [_zones[kind][0] for kind in SUBMODULES if kind in _zones]
    if len(_kinds) > 1:
        _zones[SUBLAYERS] = (tuple(name for names in _kinds for name in names), ())


@pytest.mark.parametrize("name", EXPECTED)
def test_zones_of_an_architecture(name: str, recorded_call: Any) -> None:
    denoiser, args, kwargs = recorded_call(name)
    found = find_zones(denoiser, args, kwargs)
    # In which order sublayers run is tested with `single_modules`.
    by_name = {z.name: (tuple(sorted(z.predicted)) if z.name == SUBLAYERS else z.predicted, z.skipped) for z in found}
    expected = {key: (tuple(sorted(p)) if key == SUBLAYERS else p, s) for key, (p, s) in EXPECTED[name].items()}
    assert by_name == expected


def test_single_modules_are_in_the_order_in_which_they_run(recorded_call: Any) -> None:
    denoiser, args, kwargs = recorded_call("UNet2DConditionModel")
    found = single_modules(find_zones(denoiser, args, kwargs))
    blocks = [zone.name.rpartition(".")[0] for zone in found]
    assert [zone.name.rpartition(".")[2] for zone in found] == ["attn1", "attn2", "ff"] * 4
    assert [block.split(".")[0] for block in blocks[::3]] == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    assert all(zone.predicted == (zone.name,) for zone in found)
    together = {zone.name: zone for zone in find_zones(denoiser, args, kwargs)}[SUBLAYERS]
    assert together.predicted == tuple(zone.name for zone in found)
    assert all(is_cut(denoiser, zone, args, kwargs) for zone in found)


@pytest.mark.parametrize(
    ("name", "order"),
    [("SD3Transformer2DModel", (1, 0)), ("FluxTransformer2DModel", (1, 0)), ("DiTTransformer2DModel", (0,))],
)
def test_streams_through_blocks(name: str, order: tuple[int, ...], recorded_call: Any) -> None:
    names = ("hidden_states", "encoder_hidden_states")[: len(order)]
    found = find_zones(*recorded_call(name))
    residual = [zone for zone in found if zone.kind == "residual"]
    assert residual
    assert {streams for zone in residual for streams in zone.streams} == {tuple(zip(names, order, strict=True))}


@pytest.mark.parametrize(
    "zone",
    [
        Zone("leaks", "output", ("up_blocks.0",), ("down_blocks.0", "down_blocks.1", "mid_block")),
        Zone("middle alone", "output", ("down_blocks.1",), ("mid_block",)),
        Zone("never runs", "output", ("mid_block.attentions.0.transformer_blocks.0.ff.net.1",), ("up_blocks",)),
    ],
)
def test_what_others_still_read_cannot_be_skipped(zone: Zone, recorded_call: Any) -> None:
    assert not is_cut(*(lambda d, a, k: (d, zone, a, k))(*recorded_call("UNet2DConditionModel")))


class Mixed(nn.Module):
    """Compares the samples of a batch with each other: half of them are not what they are among all."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x - x.mean(0)


def test_contexts_that_need_each_other_are_no_zone(recorded_call: Any) -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    assert "guidance" not in [zone.name for zone in find_zones(Mixed(), (x, torch.tensor(1)), {}, guidance=True)]
    denoiser, args, kwargs = recorded_call("UNet2DConditionModel")
    found = {zone.name: zone for zone in find_zones(denoiser, args, kwargs, guidance=True)}
    assert Zone.from_dict(found["guidance"].to_dict()) == found["guidance"]
    assert found["guidance"].silences(found["deep1"])
    with pytest.raises(ZoneError):
        Zone.from_dict(found["guidance"].to_dict() | {"predicted": ["mid_block"]})


class Twice(nn.Module):
    """Runs one block two times: there is no one tensor to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.transformer_blocks[0](self.transformer_blocks[0](x))


def test_a_block_that_runs_twice_is_no_zone() -> None:
    names = [zone.name for zone in find_zones(Twice().eval(), (torch.randn(2, 4), torch.tensor(1)), {})]
    assert names == ["all"]
