import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.calibrate.range_search import search_weight
from dcomp.compress import moments
from dcomp.compress.gptq import metric_error, round_gptq
from dcomp.compress.moments import MomentsError, input_moments
from dcomp.kernels.packing import pack_weight


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Rows of X by torch's own unfolding, brought into the order (taps, channels)."""
    unfolded = functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    samples, _, places = unfolded.shape
    return unfolded.view(samples, x.shape[1], -1, places).permute(0, 3, 2, 1).reshape(samples * places, -1)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": (3, 2), "padding": (2, 0), "stride": (2, 3), "dilation": (1, 2)},
    ],
)
@pytest.mark.parametrize("small_chunks", [False, True])
def test_moments_of_a_convolution_are_those_of_its_patches(
    options: dict[str, object], small_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:
        monkeypatch.setattr(moments, "_PATCH_ELEMENTS", 300)
        monkeypatch.setattr(moments, "_IMAGE_ELEMENTS", 1500)
        monkeypatch.setattr(moments, "_STRIPE", 7)
    conv, x = nn.Conv2d(5, 4, **options), gaussian(7, 5, 9, 11)
    rows = patches(conv, x)
    found = input_moments(conv, x)
    assert found.rows == len(rows)
    torch.testing.assert_close(found.blocks[0], by_hand(rows), rtol=1e-5, atol=1e-6)
    # The layout is that of the weight: the moments give the mean square of the layer's very output.
    weight = conv.weight.detach().permute(0, 2, 3, 1)
    y = functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation).detach()
    zero = pack_weight(torch.zeros(weight.shape, dtype=torch.int8), torch.ones(4))
    torch.testing.assert_close(metric_error(weight, zero, found).float(), y.square().mean((0, 2, 3)))


def test_moments_of_a_linear_layer() -> None:
    layer, x = nn.Linear(12, 3), gaussian(4, 6, 12)
    rows = x.view(-1, 12)
    torch.testing.assert_close(input_moments(layer, x).blocks[0], by_hand(rows))


def test_moments_are_exactly_symmetric_and_repeat_bit_for_bit() -> None:
    layer, x = nn.Linear(600, 3), gaussian(5000, 600)
    one, two = input_moments(layer, x), input_moments(layer, x)
    assert one.rows == two.rows == 4800
    assert torch.equal(one.blocks[0], two.blocks[0])
    assert torch.equal(one.blocks[0], one.blocks[0].t())


@pytest.mark.parametrize(("total", "count"), [(10, 10), (9, 30), (10, 7), (100_000, 999), (4096, 4095)])
def test_rows_are_one_of_each_equal_part(total: int, count: int) -> None:
    chosen = moments.spread_rows(total, count)
    assert len(chosen) == min(total, count)
    assert (chosen.diff() > 0).all()
    if count < total:
        parts = torch.arange(count + 1) * total // count
        assert (chosen >= parts[:-1]).all()
        assert (chosen < parts[1:]).all()


def test_few_rows_come_from_all_samples_and_from_all_columns_of_the_picture() -> None:
    # Each sample, then each column of the picture, has a channel of its own.
    x = torch.zeros(64, 66, 16, 16)
    x[torch.arange(64), torch.arange(64)] = 1
    found = input_moments(nn.Conv2d(66, 1, 1), x, max_rows=1024)
    assert found.rows == 1024
    torch.testing.assert_close(found.blocks[0].diagonal()[:64], torch.full((64,), 1 / 64))
    x = torch.zeros(64, 16, 16, 16)
    x[:, torch.arange(16), :, torch.arange(16)] = 1
    share = input_moments(nn.Conv2d(16, 1, 1), x, max_rows=1024).blocks[0].diagonal() * 16
    assert 0.5 < share.min() < share.max() < 1.5  # equal distances would give one column all


def test_shrinking_leaves_the_size_of_columns_and_takes_a_part_of_what_they_share() -> None:
    found = input_moments(nn.Linear(12, 3), gaussian(40, 12))
    (before,), (after,) = found.blocks, found.shrunk(0.25).blocks
    assert torch.equal(before.diagonal(), after.diagonal())
    ratio = (after / before).masked_fill(torch.eye(12, dtype=torch.bool), 0.75)
    torch.testing.assert_close(ratio, torch.full((12, 12), 0.75))
    assert found.shrunk().rows == found.rows


def test_codes_from_few_rows_are_better_on_others_when_moments_are_shrunk() -> None:
    layer, weight = nn.Linear(96, 1), gaussian(64, 96, seed=1) / 10
    mixing = gaussian(96, 96, seed=2) * 0.7 ** torch.arange(96)
    few, many = gaussian(160, 96, seed=3) @ mixing, gaussian(20_000, 96, seed=4) @ mixing
    truth, known = input_moments(layer, many), input_moments(layer, few)
    start = search_weight(weight, 4, 32)
    plain, shrunk = (metric_error(weight, round_gptq(weight, start, m), truth).sum() for m in (known, known.shrunk()))
    assert shrunk < plain


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = gaussian(8, 4)
    x[3, 2] = value
    with pytest.raises(MomentsError, match="not finite"):
        input_moments(nn.Linear(4, 4), x)
    with pytest.raises(MomentsError, match="missing"):
        input_moments(nn.Linear(4, 4), x[:0])
