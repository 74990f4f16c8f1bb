import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.calibrate import range_search
from dcomp.calibrate.range_search import RangeError, search_weight
from dcomp.kernels.packing import PackedWeight, unpack_int4

FORMATS = [(8, None), (4, 64), (4, 32)]
ALL_MULTIPLIERS = [m for m in range(-15, 16) if m]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rough(*shape: int, seed: int = 0) -> Tensor:
    """Rows and groups of very different size, and a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.exp(
        2 * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    )
    w = w * torch.exp(torch.randn(shape, generator=generator).cumsum(-1) / 10)
    return torch.where(torch.rand(shape, generator=generator) < 0.003, 6 * w, w)


def row_errors(weight: Tensor, packed: PackedWeight) -> Tensor:
    return (packed.dequantize() - weight).double().square().flatten(1).sum(1)


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    return ((packed.dequantize().double() - weight).norm() / weight.double().norm()).item()


def nearest(x: Tensor, step: Tensor | float) -> Tensor:
    return (x / step).round().clamp(-8, 7) * step


def free_scale_error(weight: Tensor, group_size: int) -> float:
    """Error with the best scale of either sign for every group, out of a fine grid, as a lower bound."""
    groups = weight.reshape(-1, group_size).double()
    peak = groups.abs().amax(1, keepdim=True) / 8
    tried = [
        (nearest(groups, s * f * peak) - groups).square().sum(1) for f in torch.linspace(1.2, 0.5, 71) for s in (1, -1)
    ]
    return (torch.stack(tried).amin(0).sum() / groups.square().sum()).sqrt().item()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("shape", [(5, 64), (3, 200), (4, 3, 3, 40), (2, 1, 1, 7), (1, 1)])
def test_layout_and_ranges_are_those_of_the_format(bits: int, group_size: int | None, shape: tuple[int, ...]) -> None:
    packed = search_weight(rough(*shape), bits, group_size)  # PackedWeight checks shapes and dtypes itself
    assert packed.codes().shape == shape
    if bits == 8:
        assert 120 <= packed.codes().abs().max() <= 127
        return
    assert packed.codes().abs().max() <= 120
    assert packed.multiplier is not None
    assert (packed.multiplier != 0).all()
    assert packed.multiplier.abs().max() <= 15
    padding = unpack_int4(packed.qweight)[..., shape[-1] :]
    assert not padding.any()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), channels=st.integers(1, 150))
def test_mse_is_never_worse_than_minmax_in_any_row(bits: int, group_size: int | None, seed: int, channels: int) -> None:
    weight = rough(4, channels, seed=seed)
    found = row_errors(weight, search_weight(weight, bits, group_size, "mse"))
    naive = row_errors(weight, search_weight(weight, bits, group_size, "minmax"))
    # The last terms are the float32 rounding of the scale, which an error of zero has nothing to hide in.
    assert (found <= naive * (1 + 1e-5) + 1e-13 * weight.double().square().sum(1)).all()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("method", ["mse", "minmax"])
@pytest.mark.parametrize("exponent", [-100, -20, 3, 100])
def test_powers_of_two_change_no_code(bits: int, group_size: int | None, method: str, exponent: int) -> None:
    weight = rough(6, 130)
    a, b = (search_weight(w, bits, group_size, method) for w in (weight, torch.ldexp(weight, torch.tensor(exponent))))
    assert torch.equal(a.qweight, b.qweight)
    assert torch.equal(torch.ldexp(a.scale, torch.tensor(exponent)), b.scale)
    if bits == 4:
        assert torch.equal(a.multiplier, b.multiplier)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_every_value_has_its_nearest_code(bits: int, group_size: int | None) -> None:
    weight = rough(8, 3, 3, 96).double()
    packed = search_weight(weight.float(), bits, group_size)
    levels = torch.arange(-127, 128) if bits == 8 else torch.arange(-8, 8)
    step = packed.scale.double().reshape(-1, 1, 1, 1)
    if group_size:
        step = (packed.multiplier * step).repeat_interleave(group_size, -1)[..., :96]
    possible = (step[..., None] * levels - weight[..., None]).abs().amin(-1)
    assert ((packed.dequantize() - weight).abs() <= possible + 1e-6 * weight.abs()).all()


def test_each_group_has_nearly_the_best_of_all_multipliers() -> None:
    for weight in (gaussian(16, 512), rough(16, 512)):
        packed = search_weight(weight, 4, 64)
        groups, scale = weight.reshape(16, 8, 64), packed.scale[:, None, None]
        errors = torch.stack([(nearest(groups, scale * m) - groups).square().sum(2) for m in ALL_MULTIPLIERS])
        # The scale moves a little after the multipliers were chosen, so that another one can be better by a hair.
        assert row_errors(weight, packed).sum() <= 1.003 * errors.amin(0).sum()


@pytest.mark.parametrize("make", [gaussian, rough])
def test_four_bits_are_near_a_brute_force_over_scales_and_multipliers(make) -> None:
    weight = make(6, 192)
    groups = weight.reshape(6, 3, 64)
    full = groups.abs().amax((1, 2)) / 8 / 15
    best = torch.full((6,), math.inf, dtype=torch.float64)
    for factor in torch.linspace(0.5, 1.5, 201).tolist():
        scale = (full * factor)[:, None, None]
        errors = torch.stack([(nearest(groups, scale * m) - groups).double().square().sum(2) for m in ALL_MULTIPLIERS])
        best = torch.minimum(best, errors.amin(0).sum(1))
    found = row_errors(weight, search_weight(weight, 4, 64))
    assert (found <= 1.05 * best).all()
    assert found.sum() <= 1.025 * best.sum()


@pytest.mark.parametrize("make", [gaussian, rough])
def test_eight_bits_are_near_a_brute_force_over_scales(make) -> None:
    weight = make(12, 300)
    full = weight.abs().amax(1, keepdim=True) / 127
    tried = [
        ((weight / s).round().clamp(-127, 127) * s - weight).double().square().sum(1)
        for s in (full * f for f in torch.linspace(0.4, 1.1, 701))
    ]
    found, best = row_errors(weight, search_weight(weight, 8, None)), torch.stack(tried).amin(0)
    assert (found <= 1.15 * best).all()
    assert found.sum() <= 1.05 * best.sum()


def test_lattice_costs_at_most_two_per_cent_against_free_scales() -> None:
    weight = gaussian(64, 1280)
    error = relative_error(weight, search_weight(weight, 4, 64))
    assert error <= 1.02 * free_scale_error(weight, 64)
    assert error < 0.96 * relative_error(weight, search_weight(weight, 4, 64, "minmax"))


def test_golden_small_case() -> None:
    # The first group needs the full 15 * 0.5 with -8 on its positive side, hence a negative multiplier; the second is
    # a third of it on the negative side.
    first = [60.0, -52.5, 7.5, 0.0]
    second = [-20.0, 17.5, 2.5, -5.0]
    packed = search_weight(torch.tensor([first + second]), 4, 4)
    assert packed.scale.tolist() == [0.5]
    assert packed.multiplier.tolist() == [[-15, 5]]
    assert unpack_int4(packed.qweight).tolist() == [[-8, 7, -1, 0, -8, 7, 1, -2]]
    assert packed.dequantize().tolist() == [first + second]
    packed = search_weight(torch.tensor([[127.0, -64.0, 1.0]]), 8, None)
    assert (packed.scale.tolist(), packed.qweight.tolist()) == ([1.0], [[127, -64, 1]])


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_zero_rows_and_groups_are_exact_and_finite(method: str) -> None:
    weight = gaussian(3, 128)
    weight[0] = 0
    weight[1, :64] = 0
    packed = search_weight(weight, 4, 64, method)
    assert packed.scale[0] == 1
    assert packed.multiplier[0].tolist() == [1, 1]
    assert packed.multiplier[1, 0] == 1
    assert not packed.codes()[0].any()
    assert not packed.codes()[1, :64].any()
    eight = search_weight(weight, 8, None, method)
    assert eight.scale[0] == 1
    assert not eight.codes()[0].any()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-30, 3e38])
def test_extreme_weights_have_finite_scales(bits: int, group_size: int | None, value: float) -> None:
    weight = torch.tensor([[value, -value, 0.0]])
    packed = search_weight(weight, bits, group_size)
    assert torch.isfinite(packed.scale).all()
    assert (packed.scale > 0).all()
    assert torch.isfinite(packed.dequantize()).all()
    if value > 1e-35:
        assert relative_error(weight, packed) < 0.13


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float, bits: int, group_size: int | None) -> None:
    weight = gaussian(3, 70)
    weight[2, 69] = bad
    with pytest.raises(RangeError, match=r"NaN or infinite \(mid\.conv\)"):
        search_weight(weight, bits, group_size, name="mid.conv")


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_rows_do_not_depend_on_their_neighbours_or_chunks(
    bits: int, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = rough(7, 2, 2, 70)
    together = search_weight(weight, bits, group_size)
    monkeypatch.setattr(range_search, "_CHUNK", 1)
    apart = search_weight(weight, bits, group_size)
    alone = search_weight(weight[3:4], bits, group_size)
    assert torch.equal(together.qweight, apart.qweight)
    assert torch.equal(together.scale, apart.scale)
    assert torch.equal(together.qweight[3:4], alone.qweight)


def test_a_strided_weight_is_read_as_it_is() -> None:
    weight = rough(6, 5, 3, 3)
    packed = search_weight(weight.permute(0, 2, 3, 1), 8, None)
    assert torch.equal(packed.qweight, search_weight(weight.permute(0, 2, 3, 1).contiguous(), 8, None).qweight)
