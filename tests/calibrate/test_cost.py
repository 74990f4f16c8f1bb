from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.calibrate.cost import count_macs, counting_macs, layer_bytes
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.layers import QuantConv2d, QuantLinear
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import empty_layer
from tests.support.schemes import schemes
from tests.support.tiny import NAMES, denoiser_inputs, tiny_denoiser

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(100, 7),
    "linear without bias": nn.Linear(64, 3, bias=False),
    "half": nn.Linear(5, 6).half(),
    "conv": nn.Conv2d(70, 5, 3, padding=1),
    "patches": nn.Conv2d(4, 16, (2, 4), stride=2, bias=False),
    "grouped": nn.Conv2d(12, 8, 3, groups=4),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 64), (4, 32)])
@pytest.mark.parametrize("bins", [1, 25])
@pytest.mark.parametrize("input_bits", [8, 16])
def test_bytes_are_those_of_the_real_layer(
    kind: str, bits: int, group_size: int | None, bins: int, input_bits: int
) -> None:
    layer = LAYERS[kind]
    is_conv = isinstance(layer, nn.Conv2d)
    granularity = None if input_bits == 16 else "tensor" if is_conv else "token"
    scheme = QScheme(bits, group_size, input_bits=input_bits, input_granularity=granularity)
    weight = layer.weight.detach().float()
    packed = search_weight(weight.permute(0, 2, 3, 1) if is_conv else weight, bits, group_size)
    static = granularity == "tensor"
    quantized = (QuantConv2d if is_conv else QuantLinear).from_float(
        layer,
        packed,
        scheme,
        input_scale=torch.ones(bins) if static else None,
        input_zero=torch.zeros(bins, dtype=torch.uint8) if static else None,
    )
    assert layer_bytes(layer, scheme, bins) == sum(tensor.nbytes for tensor in quantized.state_dict().values())
    assert layer_bytes(layer, None) == sum(tensor.nbytes for tensor in layer.state_dict().values())


@given(st.data(), st.sampled_from(["linear", "linear without bias", "half", "conv", "patches"]), st.integers(1, 30))
def test_bytes_are_those_of_the_buffers_of_every_scheme(data: st.DataObject, kind: str, bins: int) -> None:
    layer = LAYERS[kind]
    if isinstance(layer, nn.Conv2d):
        scheme = data.draw(schemes(layer.in_channels, layer.out_channels, ("tensor", "sample")))
    else:
        scheme = data.draw(schemes(layer.in_features, layer.out_features, ("token",)))
    with torch.device("meta"):
        empty = empty_layer(layer, scheme, bins)
    assert layer_bytes(layer, scheme, bins) == sum(tensor.nbytes for tensor in empty.state_dict().values())


def test_bytes_of_a_split_layer_by_hand() -> None:
    layer = nn.Conv2d(96, 10, 3)
    scheme = QScheme(4, 64, boundaries=(40,), smooth=True, rank=4, rotate=True, directions=3)
    codes, multipliers = 10 * 9 * (64 + 64) // 2, 10 * 9 * 2
    branch = 2 * (4 * 9 * 96 + 2 * 10 * 4)
    directions = 2 * 3 * 96 + 2 * (9 * 10 * 3 + 4 * 3)
    assert layer_bytes(layer, scheme) == codes + multipliers + 2 * 4 * 10 + 4 * 10 + 4 * 96 + branch + directions


def test_bytes_need_no_weights() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(1280, 1280, 3)
    assert layer_bytes(layer, QScheme(4, 64)) == 1280 * (9 * (640 + 20) + 4 + 4)


class Attending(nn.Module):
    """One convolution and every way to multiply activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.spare = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Linear(3, 3)
        self.twice = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, how: str) -> Tensor:
        y = self.twice(self.twice(self.conv(x).flatten(2)))  # [N, 6, 16]
        q = y.reshape(-1, 2, 3, 16)
        k = torch.cat([q, q], 2)
        if how == "sdpa":
            return nn.functional.scaled_dot_product_attention(q, k, value=k[..., :8])
        if how == "keywords":
            return nn.functional.scaled_dot_product_attention(value=k[..., :8], key=k, query=q)
        if how == "matmul":
            return torch.matmul((q @ k.transpose(2, 3)).softmax(-1), k[..., :8])
        scores = torch.baddbmm(torch.zeros(1, 3, 6), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0)
        return torch.bmm(scores.softmax(-1), k[..., :8].flatten(0, 1))


@pytest.mark.parametrize("how", ["sdpa", "keywords", "matmul", "bmm"])
def test_macs_are_those_counted_by_hand(how: str) -> None:
    macs = count_macs(Attending(), (torch.randn(5, 4, 8, 8),), {"how": how})
    assert macs.layers == {"conv": 5 * 6 * 16 * (2 * 9), "twice": 2 * (5 * 6) * 16 * 16}
    assert macs.attention == 5 * 2 * 3 * 6 * (16 + 8)
    assert macs.total == sum(macs.layers.values()) + macs.attention


@pytest.mark.parametrize("name", NAMES)
def test_macs_grow_with_the_batch_and_need_no_memory(name: str) -> None:
    denoiser = tiny_denoiser(name)
    one, three = (count_macs(denoiser, *denoiser_inputs(name, batch)) for batch in (1, 3))
    # Time embeddings of a U-Net are computed once for a batch with one timestep.
    time_only = {n for n, macs in three.layers.items() if macs == one.layers[n]}
    assert all(three.layers[n] == 3 * one.layers[n] for n in one.layers if n not in time_only)
    assert time_only <= {n for n in one.layers if "time_emb" in n}
    assert three.attention == 3 * one.attention > 0
    assert set(one.layers) == {n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def test_all_calls_of_the_denoiser_are_counted_and_nothing_beside_them() -> None:
    net, x = Attending(), torch.randn(5, 4, 8, 8)
    one = count_macs(net, (x,), {"how": "matmul"})
    with counting_macs(net) as counted:
        assert counted().total == 0
        for _ in range(2):
            torch.matmul(net(x, how="matmul"), torch.randn(8, 3))
        with pytest.raises(RuntimeError):
            net(torch.randn(5, 3, 8, 8), how="matmul")
        torch.matmul(torch.randn(7, 5), torch.randn(5, 3))
    net(x, how="matmul")
    assert counted().attention == 2 * one.attention
    assert counted().layers == {name: 2 * macs for name, macs in one.layers.items()}


def test_macs_of_a_model_without_memory() -> None:
    name = "UNet2DConditionModel"
    args, kwargs = denoiser_inputs(name)
    real = count_macs(tiny_denoiser(name), args, kwargs)
    hollow = tiny_denoiser(name).to("meta")
    kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].to("meta")
    assert count_macs(hollow, tuple(a.to("meta") for a in args), kwargs) == real


@pytest.mark.parametrize(("batch", "tokens", "width"), [*product([1, 2], [1, 9], [3, 8])])
def test_linear_macs_count_every_row(batch: int, tokens: int, width: int) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    assert count_macs(One(), (torch.randn(batch, tokens, width),), {}).total == batch * tokens * width * 5
