import pytest
import torch
from torch import nn

from dcomp.compress.dead_channels import SHOWN, find_remarks
from dcomp.compress.scheme import QScheme

PLAIN, STATIC = QScheme(8), QScheme(8, input_bits=8, input_granularity="tensor")


def layer_and_input(kind: str) -> tuple[nn.Linear | nn.Conv2d, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(7, 5), torch.randn(6, 3, 7)
    return nn.Conv2d(7, 5, 3), torch.randn(6, 7, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dead_and_constant_channels_are_numbered(kind: str) -> None:
    layer, x = layer_and_input(kind)
    assert find_remarks(layer, x, PLAIN, None) == ()
    channels = x.movedim(1, -1) if kind == "conv" else x
    channels[..., 2] = 0
    channels[..., 3] = -0.0
    channels[..., 6] = 4.5
    layer.weight[1] = 0
    layer.weight[:, 0] = 0
    assert find_remarks(layer, x, PLAIN, None) == (
        "2 of 7 input channels are always 0: 2, 3",
        "1 of 7 input channels is constant: 6",
        "1 of 5 output channels is made with weights that are all 0: 1",
        "1 of 7 input channels is met by weights that are all 0: 0",
    )
    channels[3, ..., 6][0] = 4.4999  # one value of one row is enough
    assert not any("constant" in remark for remark in find_remarks(layer, x, PLAIN, None))


def test_a_channel_with_one_value_is_not_called_constant() -> None:
    layer, _ = layer_and_input("linear")
    assert find_remarks(layer, torch.randn(1, 7), PLAIN, None) == ()


@torch.no_grad()
def test_only_the_first_channels_are_listed() -> None:
    x = torch.zeros(3, SHOWN + 2)
    assert find_remarks(nn.Linear(SHOWN + 2, 2), x, PLAIN, None) == (
        f"{SHOWN + 2} of {SHOWN + 2} input channels are always 0: 0, 1, 2, 3, ...",
    )


@torch.no_grad()
def test_channels_in_groups_are_not_mixed_up() -> None:
    layer = nn.Conv2d(4, 4, 1, groups=4)
    layer.weight[2] = 0
    assert find_remarks(layer, torch.randn(2, 4, 3, 3), PLAIN, None) == (
        "1 of 4 output channels is made with weights that are all 0: 2",
    )


def test_static_ranges_without_width_are_named_by_bin_and_part() -> None:
    layer, x = layer_and_input("conv")
    bins = torch.tensor([0, 0, 1, 1, 3, 3])
    assert find_remarks(layer, x, STATIC, bins) == ()
    x[2:4], x[4:, :3] = 0.25, 0
    assert find_remarks(layer, x, STATIC, bins) == ("the static range has no width in 1 of 3 step bins: 1",)
    split = QScheme(8, input_bits=8, input_granularity="tensor", boundaries=(3,))
    assert find_remarks(layer, x, split, bins) == (
        "the static range of part 0 has no width in 2 of 3 step bins: 1, 3",
        "the static range of part 1 has no width in 1 of 3 step bins: 1",
    )
    x[:] = 1.0
    assert find_remarks(layer, x, STATIC, None)[-1] == "the static range has no width in 1 of 1 step bins: 0"
    assert not any("range" in remark for remark in find_remarks(layer, x, PLAIN, bins))
