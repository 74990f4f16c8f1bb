"""Attention in the emulator: exact scores, values to the roundings that there are, and what is no number.

Scores cannot be read, but where a score that is larger by one makes its key 2^16 times as probable, attention returns
the mean of the values of the highest scores, and any other integer would show.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.kernels import dispatch, ops, qparams, reference
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import packing, rows, self_test
from dcomp.kernels.cuda.self_test import UnusableError
from tests.support.attention import LOG2_E, attend, key_value_tiles, width_of
from tests.support.emulated import SEEDS, emulator
from tests.support.emulated_gpu import emulated_gpu, layers_on_the_emulated_gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [8, 40, 64, 72, 80, 128, 160]
UNIT = 2.0**-11  # half a unit in the last place of float16
sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 140), st.sampled_from([1, 2, 63, 64, 65, 77, 150])
)


@pytest.fixture(autouse=True)
def needs_emulator() -> None:
    try:
        emulator()
    except BuildError as error:
        pytest.skip(str(error))


def codes(generator: torch.Generator, largest: int, *shape: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(torch.int8)


@settings(max_examples=20, deadline=None)
@given(sizes, st.sampled_from(HEADS), st.sampled_from([1, 3, 127]), st.sampled_from(SEEDS))
def test_scores_are_exact(size: tuple[int, ...], channels: int, largest: int, seed: int) -> None:
    samples, heads, queries, keys = size
    emulator().seed(seed)
    generator = torch.Generator().manual_seed(seed)
    q, k = (codes(generator, largest, samples, heads, tokens, channels) for tokens in (queries, keys))
    k[:, :, -1], q[:, :, 0] = largest, largest  # the largest score there is
    v = torch.randint(-9, 10, k.shape, generator=generator).float()
    q_scale, k_scale = torch.ones(q.shape[:-1]), torch.randint(1, 3, k.shape[:-1], generator=generator).float()
    y = attend(emulator(), q, q_scale, k, k_scale, v, 16 / LOG2_E)
    expected = reference.attention(q.double(), k.double() * k_scale.unsqueeze(-1), v.double(), 16 / LOG2_E)
    assert (y - expected).abs().max() <= 9 * 2 * UNIT


@settings(max_examples=20, deadline=None)
@given(sizes, st.sampled_from(HEADS), st.sampled_from(DTYPES), st.sampled_from([0.02, 1.0, 30.0]))
def test_with_exact_scores_values_are_off_by_roundings_alone(
    size: tuple[int, ...], channels: int, dtype: torch.dtype, spread: float
) -> None:
    """Probabilities and values are rounded to float16, all sums to fp32, scores and powers of two to a few ulp."""
    samples, heads, queries, keys = size
    generator = torch.Generator().manual_seed(keys)
    q, k = (codes(generator, 127, samples, heads, tokens, channels) for tokens in (queries, keys))
    q_scale, k_scale = (torch.rand(x.shape[:-1], generator=generator) + 0.1 for x in (q, k))
    k_scale = (k_scale.view(torch.int32) & -4).view(torch.float32)
    v = (torch.randn(k.shape, generator=generator) * 10).to(dtype)
    scale = spread / (73 * 73 * math.sqrt(channels))
    y = attend(emulator(), q, q_scale, k, k_scale, v, scale, dtype)
    asked, keyed = (x.double() * s.double().unsqueeze(-1) for x, s in ((q, q_scale), (k, k_scale)))
    expected = reference.attention(asked, keyed, v.double(), scale)
    largest = (asked @ keyed.mT * scale).abs().max() * LOG2_E
    relative = 2 * UNIT + keys * 2.0**-23 + largest * 2.0**-22
    bound = v.double().abs().amax(-2, keepdim=True) * relative + expected.abs() * torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= bound).all()


@settings(max_examples=15, deadline=None)
@given(sizes, st.sampled_from(HEADS), st.sampled_from(DTYPES), st.integers(1, 3))
def test_tiles_are_the_definition(size: tuple[int, ...], channels: int, dtype: torch.dtype, parts: int) -> None:
    samples, heads, _, keys = size
    generator = torch.Generator().manual_seed(keys)
    k, v = ((torch.randn(samples, heads, keys, channels, generator=generator) + 2).to(dtype) for _ in range(2))
    k[:, :, keys // 2] = 0
    v[..., 0] *= 1e-3
    v[..., -1] = 0
    width = width_of(channels)
    tiles, v_scale, mean = key_value_tiles(emulator(), k, v, width, parts)
    torch.testing.assert_close(mean, k.float().mean(2, keepdim=True), rtol=1e-5, atol=1e-5)
    expected = packing.pack_tiles(*packing.quantize_keys(k, mean), v, packing.value_scale(v), width)
    assert torch.equal(tiles, expected[0])
    assert torch.equal(v_scale, expected[1])


@pytest.fixture
def gpu() -> Iterator[None]:
    with emulated_gpu():
        yield


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    queries: int, keys: int, channels: int, dtype: torch.dtype = torch.float32, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(1, heads, tokens, channels) for tokens in (queries, keys, keys)]
    q, k, v = (drawn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return q, k, v


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "channels"), [(130, 77, 40), (5, 200, 64), (20, 20, 160), (1, 1, 72)])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_attention_of_floats(dtype: torch.dtype, queries: int, keys: int, channels: int, offset: float) -> None:
    """Codes move a score by sums of independent errors, each equally probable within half a step of its token.

    So the score of key m is off by a normal number of standard deviation s_m, and a result by
    sum_m p_m d_m (v_m - y), which is normal too: it is no more than six of its own standard deviations, of which
    s * 2 max|v| * sqrt(sum p^2) is an upper bound. An offset of all keys, removed first, adds nothing to it.
    """
    q, k, v = inputs(queries, keys, channels, dtype)
    k, scale = (k.float() + offset).to(dtype), channels**-0.5
    y = rows.attention(q, k, v, scale)
    assert y.dtype == dtype
    q, k, v = (x.double() for x in (q, k, v))
    expected = reference.attention(q, k, v, scale)
    centred = k - k.mean(-2, keepdim=True)
    steps_q, steps_k = (qparams.token_scale(x).double() / math.sqrt(12) for x in (q, centred))
    of_queries = (q.norm(dim=-1).unsqueeze(-1) * steps_k.unsqueeze(-2)) ** 2
    of_keys = (steps_q.unsqueeze(-1) * centred.norm(dim=-1).unsqueeze(-2)) ** 2
    deviation = scale * (of_queries + of_keys).sqrt().amax(-1)
    p = (q @ k.mT * scale).softmax(-1)
    spread = 6 * deviation * 2 * p.square().sum(-1).sqrt()
    bound = v.abs().amax((-2, -1), keepdim=True) * (spread.unsqueeze(-1) + 2 * UNIT + torch.finfo(dtype).eps)
    error = (y.double() - expected).abs()
    assert (error <= bound).all()
    assert error.max() <= v.abs().max() * 2**-6


@pytest.mark.usefixtures("gpu")
def test_layouts_and_dtypes_of_one_value_give_one_result() -> None:
    q, k, v = inputs(70, 90, 24)
    expected = rows.attention(q, k, v, 0.2)
    apart = [torch.stack([x, -x], -1)[..., 0] for x in (q, k, v)]
    together = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(rows.attention(*apart, 0.2), expected)
    assert torch.equal(rows.attention(*together, 0.2), expected)
    assert expected.transpose(1, 2).is_contiguous()
    narrow = v.bfloat16()
    assert torch.equal(rows.attention(q, k, narrow, 0.2), rows.attention(q, k, narrow.float(), 0.2))


@pytest.mark.usefixtures("gpu")
def test_sizes_of_inputs_scale_the_result() -> None:
    q, k, v = inputs(20, 70, 40)
    expected = rows.attention(q, k, v, 0.3)
    for size in (2.0**-60, 2.0**-10, 2.0**60):
        assert torch.equal(rows.attention(q * size, k / size, v * size, 0.3), expected * size)
    mean = v.mean(2, keepdim=True).expand_as(q)
    for pair in ((q * 0, k), (q, k * 0), (q, k * 0 + 3.0)):
        torch.testing.assert_close(rows.attention(*pair, v, 0.3), mean, rtol=0, atol=3e-3)
    assert not rows.attention(q, k, v * 0, 0.3).any()
    assert rows.attention(q[:, :, :0], k, v, 0.3).shape == (1, 2, 0, 40)


@pytest.mark.usefixtures("gpu")
def test_a_large_range_of_probabilities_loses_nothing() -> None:
    """Many small probabilities beside a large one: each is far below what float16 holds of 1."""
    q, k = torch.ones(1, 1, 3, 16), torch.zeros(1, 1, 1025, 16)
    k[:, :, 0] = 12.0  # 2^17.3 times as probable as each of the others
    v = torch.ones(1, 1, 1025, 16)
    v[:, :, 0] = 0.0
    expected = reference.attention(q, k, v, 1 / 16)
    assert 5e-3 < float(expected[0, 0, 0, 0]) < 7e-3
    torch.testing.assert_close(rows.attention(q, k, v, 1 / 16), expected, rtol=2e-2, atol=0)


@pytest.mark.usefixtures("gpu")
def test_scores_of_2_to_the_25_leave_one_key() -> None:
    k = torch.eye(40).expand(1, 1, -1, -1) * 2.0**10
    v, order = drawn(1, 1, 40, 40), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    y = rows.attention(k[:, :, order], k, v, 2.0**5)
    torch.testing.assert_close(y, v[:, :, order], rtol=2**-10, atol=2**-12)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_spoils_what_it_meets(bad: float) -> None:
    q, k, v = inputs(40, 70, 40)
    expected = rows.attention(q, k, v, 0.2)

    def differs(where: int, *place: int) -> Tensor:
        changed = [q.clone(), k.clone(), v.clone()]
        changed[where][place] = bad
        y = rows.attention(*changed, 0.2)
        assert torch.equal(y[~y.isnan()], expected[~y.isnan()])
        return y.isnan()

    of_query, of_key, of_value = differs(0, 0, 1, 17, 3), differs(1, 0, 1, 69, 3), differs(2, 0, 1, 69, 3)
    assert of_query[0, 1, 17].all()
    assert of_query.sum() == 40
    assert of_key[0, 1].all()
    assert of_key.sum() == 40 * 40
    assert of_value[0, 1, :, 3].all()
    assert of_value.sum() == 40


@pytest.mark.usefixtures("gpu")
def test_a_wider_kernel_stands_in_for_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, used = self_test.kernels, []

    def without_narrow(name: str, index: int) -> tuple[self_test.Kernel, ...]:
        if name in ("attention_48", "attention_64"):
            raise UnusableError("it is not right")
        used.append(name)
        return kernels(name, index)

    q, k, v = inputs(5, 66, 40)
    expected = rows.attention(q, k, v, 0.2)
    monkeypatch.setattr(self_test, "kernels", without_narrow)
    torch.testing.assert_close(rows.attention(q, k, v, 0.2), expected, rtol=0, atol=1e-6)
    assert used[0] == "attention_80"


def test_the_table_gives_attention_to_torch_until_ours_is_demanded() -> None:
    q, k, v = inputs(20, 30, 40)
    with layers_on_the_emulated_gpu() as chosen:
        auto = ops.attention(q, k, v, 0.2)
        reason = dispatch._choose(dispatch._Request("attention", "cuda", 0, 8, 1, 1, None), "auto").reason
        with dispatch.use_backend("cuda"):
            ours = ops.attention(q, k, v, 0.2)
            assert dispatch.choose("attention", device="cuda").reason.endswith("(sm_86)")
    assert [row for _, row in chosen] == ["torch", "cuda", "cuda"]
    assert "not measured" in reason
    assert reason.endswith("torch's own function")
    torch.testing.assert_close(auto, reference.attention(q, k, v, 0.2))
    assert not torch.equal(auto, ours)
    torch.testing.assert_close(auto, ours, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, k, v: (q.double(), k, v, 1.0), "float32, bfloat16 and float16"),
        (lambda q, k, v: (q, k, v, -1.0), "positive scales"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0], 1.0), "keys with elements"),
        (lambda q, k, v: (*(x.repeat(1, 1, 1, 5) for x in (q, k, v)), 1.0), "up to 160 channels"),
        (lambda q, k, v: (q, k, v[..., :20], 1.0), "as many in each"),
        (lambda q, k, v: (*(x.expand(40000, -1, -1, -1) for x in (q, k, v)), 1.0), "80000 heads are too many"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_a_reason(change, why) -> None:  # type: ignore[no-untyped-def]
    arguments = change(*inputs(4, 5, 40))
    assert why in str(rows.attention_excess(*arguments))
    with (
        layers_on_the_emulated_gpu(),
        dispatch.use_backend("cuda"),
        pytest.raises(dispatch.KernelError, match="cannot run attention"),
    ):
        ops.attention(*arguments)


def test_common_attentions_are_taken() -> None:
    for channels in HEADS:
        assert rows.attention_excess(*inputs(64, 77, channels, torch.float16), channels**-0.5) is None
