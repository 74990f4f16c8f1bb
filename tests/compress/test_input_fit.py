import pytest
import torch
from torch import Tensor, nn

from dcomp.compress.input_fit import fit_to_inputs
from dcomp.compress.moments import cross_moments, input_moments
from dcomp.kernels import qparams


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def few_directions(rows: int, seed: int) -> Tensor:
    return gaussian(rows, 8, seed=seed) @ gaussian(8, 64, seed=99) + 0.02 * gaussian(rows, 64, seed=seed + 1)


def fitted(weight: Tensor, x: Tensor, z: Tensor, damp: float) -> Tensor:
    layer = nn.Linear(weight.shape[1], len(weight))
    return fit_to_inputs(weight, cross_moments(layer, x, z), input_moments(layer, z), damp)


def test_it_is_the_least_squares_solution() -> None:
    weight, x = gaussian(5, 12), gaussian(300, 12, seed=1)
    z = x + 0.3 * gaussian(300, 12, seed=2)
    expected = torch.linalg.lstsq(z.double(), (x @ weight.t()).double()).solution.t()
    torch.testing.assert_close(fitted(weight, x, z, 0.0).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_exact_inputs_leave_the_weight_as_it_is(damp: float) -> None:
    weight, x = gaussian(5, 12), few_directions(300, 1)[:, :12]
    torch.testing.assert_close(fitted(weight, x, x, damp), weight, rtol=1e-4, atol=1e-4)


def test_channels_without_inputs_keep_their_weight() -> None:
    weight, x = gaussian(5, 12), gaussian(300, 12, seed=1)
    x[:, 3:5] = 0
    found = fitted(weight, x, x.round(), 0.01)
    torch.testing.assert_close(found[:, 3:5], weight[:, 3:5])
    assert torch.equal(fitted(weight, 0 * x, 0 * x, 0.01), weight)


def test_noise_of_4_bit_inputs_does_less_harm_on_rows_that_were_not_seen() -> None:
    weight, x, unseen = gaussian(48, 64), few_directions(4000, 1), few_directions(1000, 7)

    def quantized(rows: Tensor) -> Tensor:
        return qparams.fake_quant_group(rows.unsqueeze(1), 32).squeeze(1)

    def error(used: Tensor) -> float:
        return float((quantized(unseen) @ used.t() - unseen @ weight.t()).square().mean())

    # Noise of 64 directions, of which 8 carry the inputs; the damping keeps some of the others.
    assert error(fitted(weight, x, quantized(x), 0.01)) < 0.5 * error(weight)


def test_weights_of_convolutions_and_sets_of_channels_keep_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcomp.compress import moments

    conv, x = nn.Conv2d(6, 4, 3, padding=1), gaussian(6, 6, 7, 7, seed=1)
    z, weight = (4 * x).round() / 4, conv.weight.detach().permute(0, 2, 3, 1)
    for widest, sets in ((4608, 1), (20, 3)):
        monkeypatch.setattr(moments, "WIDEST", widest)
        c, h = cross_moments(conv, x, z), input_moments(conv, z)
        assert len(h.blocks) == sets
        found = fit_to_inputs(weight, c, h)
        assert found.shape == weight.shape
        # The noise is small, hence so is the change.
        assert 0 < float((found - weight).norm() / weight.norm()) < 0.1
