import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp import UsageError
from dcomp.calibrate import quality

GOLDEN_WEIGHTS = [0.48011422, 0.108909, 0.26637873]
GOLDEN_FEATURES = [0, 0.0079332115, 0.0032028544, 0.0071519585, 0.033496752]


def pictures(count: int, side: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_relative_error_is_that_of_the_definition_sample_by_sample() -> None:
    original = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    compressed = torch.tensor([[3.0, 4.5], [0.0, 0.0]])
    assert quality.relative_errors(original, compressed).tolist() == pytest.approx([0.1, 1.0])


def test_identical_latents_have_error_exactly_zero_even_when_all_are_zero() -> None:
    latents = torch.cat([torch.zeros(1, 4, 8, 8), pictures(2)[:, :1, :8, :8].expand(2, 4, 8, 8)])
    assert quality.relative_errors(latents, latents.clone()).tolist() == [0.0, 0.0, 0.0]


def test_zero_sample_that_is_not_matched_has_infinite_error_and_nan_spreads() -> None:
    original, compressed = torch.zeros(2, 3), torch.ones(2, 3)
    compressed[1, 0] = math.nan
    errors = quality.relative_errors(original, compressed)
    assert math.isinf(errors[0])
    assert math.isnan(errors[1])
    assert [quality.finite_or_none(e) for e in errors] == [None, None]


@settings(max_examples=30)
@given(st.floats(0.001, 0.5), st.integers(1, 4))
def test_psnr_of_a_constant_offset_is_known(offset: float, count: int) -> None:
    original = torch.full((count, 3, 12, 12), 0.25)
    mse = quality.mean_squared_errors(original, original + offset)
    exact = (torch.tensor(0.25) + offset).double() - 0.25  # what fp32 makes of the sum
    assert quality.decibels(mse).tolist() == pytest.approx([-20 * math.log10(exact)] * count)


def test_identical_pictures_have_capped_psnr_and_ssim_one() -> None:
    images = torch.cat([pictures(2), torch.full((1, 3, 24, 24), 0.3)])
    assert quality.decibels(quality.mean_squared_errors(images, images)).tolist() == [quality.MAX_DB] * 3
    similarities = quality.structural_similarities(images, images)
    assert similarities is not None
    assert similarities.tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_mean_of_decibels_and_decibels_of_the_mean_differ_as_jensen_says() -> None:
    mse = torch.tensor([1e-2, 1e-4])
    assert quality.decibels(mse).mean() == pytest.approx(30.0)
    assert quality.decibels(mse.mean()) < quality.decibels(mse).mean()


def test_ssim_does_not_depend_on_the_batch_and_falls_with_noise() -> None:
    original = pictures(3)
    noisy = (original + 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    together = quality.structural_similarities(original, noisy)
    alone = [quality.structural_similarities(original[i : i + 1], noisy[i : i + 1]) for i in range(3)]
    assert together is not None
    assert together.tolist() == pytest.approx([float(value) for value in alone if value is not None])
    assert together.max() < 0.99


def test_pictures_smaller_than_the_window_have_no_ssim() -> None:
    assert quality.structural_similarities(pictures(1, side=10), pictures(1, side=10)) is None
    assert quality.structural_similarities(pictures(1, side=11), pictures(1, side=11)) is not None


def test_flat_and_non_finite_pictures_are_counted_once_each() -> None:
    images = pictures(5)
    images[0] = 0.5
    images[1] = torch.tensor([0.1, 0.9, 0.4])[:, None, None]  # one colour is flat, whichever it is
    images[2, 0, 3, 3] = math.nan
    images[3, 1] = math.inf
    assert quality.examine(images) == quality.Health(flat=2, non_finite=2)
    assert quality.examine(images[:2]) + quality.examine(images[2:]) == quality.examine(images)


def test_sides_of_different_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="different shapes"):
        quality.relative_errors(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 16))


@pytest.mark.parametrize("name", quality.EXTRACTORS)
class TestExtractor:
    def test_features_are_the_same_in_every_instance_and_for_every_cut_of_the_set(self, name: str) -> None:
        images = pictures(7)
        features = quality.open_extractor(name)(images)
        assert features.shape == (7, quality.open_extractor(name).num_features)
        again = torch.cat([quality.open_extractor(name)(part) for part in images.split([3, 4])])
        torch.testing.assert_close(again, features, rtol=1e-5, atol=1e-6)

    def test_distance_of_a_set_from_itself_is_zero_and_grows_with_noise(self, name: str) -> None:
        images = pictures(40, side=16)
        extract = quality.open_extractor(name)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
        fids = []
        for level in (0.0, 0.1, 0.4):
            changed = (images + level * noise).clamp(0, 1)
            distance = quality.feature_distance(extract(images), extract(changed), extract.id, seed=3)
            assert (distance.samples, distance.seed, distance.extractor) == (40, 3, extract.id)
            fids.append(distance.fid)
        assert fids[0] == pytest.approx(0, abs=1e-6)
        assert fids[0] < fids[1] < fids[2]

    def test_distance_is_repeatable_and_leaves_the_global_generator_alone(self, name: str) -> None:
        extract = quality.open_extractor(name)
        a, b = extract(pictures(8)), extract(pictures(8, seed=1))
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first = quality.feature_distance(a, b, extract.id)
        assert torch.rand(1) == expected
        assert quality.feature_distance(a, b, extract.id) == first


def test_random_conv_weights_are_frozen() -> None:
    """Golden values: numbers of two versions are comparable only while the id means the same network."""
    net = quality.RandomConv()
    assert net.id == "random-conv/1?seed=0"
    assert net.get_buffer("weight0").flatten()[:3].tolist() == pytest.approx(GOLDEN_WEIGHTS, rel=1e-6)
    ramp = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    assert net(ramp)[0, [0, 8, 24, 40, 63]].tolist() == pytest.approx(GOLDEN_FEATURES, rel=1e-4)


def test_fid_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = quality.feature_distance(features, features + 0.5, "any")
    assert distance.fid == pytest.approx(6 * 0.5**2, rel=1e-6)


def test_features_that_are_not_finite_give_nan_not_a_crash() -> None:
    features = torch.rand(4, 6)
    broken = features.clone()
    broken[0, 0] = math.nan
    distance = quality.feature_distance(features, broken, "any")
    assert math.isnan(distance.fid)
    assert quality.finite_or_none(distance.kid) is None


def test_one_sample_and_unknown_extractors_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        quality.feature_distance(torch.rand(1, 6), torch.rand(1, 6), "any")
    with pytest.raises(UsageError, match="inception"):
        quality.open_extractor("inception")
