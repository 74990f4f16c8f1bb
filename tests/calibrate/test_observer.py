import math
from random import Random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dcomp.calibrate.observer import BINS, SMALLEST_SCALE, HistogramObserver, ObserverError
from dcomp.kernels.qparams import dequantize_static, fake_quant_static, quantize_static

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def observe(*tensors: Tensor) -> HistogramObserver:
    observer = HistogramObserver()
    for tensor in tensors:
        observer.update(tensor)
    return observer


def same(a: HistogramObserver, b: HistogramObserver) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def squared_error(x: Tensor, scale: Tensor, zero: int) -> float:
    return (fake_quant_static(x, scale, torch.tensor(zero, dtype=torch.uint8)) - x).double().square().sum().item()


def samples(name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "shifted": normal + 3,
        "negative": -normal.abs() - 1,
        "silu": torch.nn.functional.silu(2 * normal),
        "relu": normal.relu(),
        "heavy tails": normal / (torch.rand(count, generator=generator) + 0.02),
        "one-sided outlier": torch.cat([normal[1:], torch.tensor([14.0])]),
        "few values": torch.randint(0, 4, (count,), generator=generator) * 1.7 - 1.1,
    }[name]


NAMES = [
    "normal", "shifted", "negative", "silu", "relu", "heavy tails", "one-sided outlier", "few values",
]  # fmt: skip


@example([[0.0], [0.25]], Random(0))
@given(st.lists(st.lists(FLOATS, max_size=6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_any_split_and_merge_order_gives_the_same_state(parts: list[list[float]], random: Random) -> None:
    tensors = [torch.tensor(part) for part in parts]
    whole = observe(torch.cat(tensors))
    in_turn = observe(*tensors)
    observers = [observe(tensor) for tensor in tensors]
    random.shuffle(observers)
    while len(observers) > 1:
        other = observers.pop(random.randrange(len(observers)))
        observers[random.randrange(len(observers))].merge(other)
    assert same(whole, in_turn)
    assert same(whole, observers[0])


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_counts_are_those_of_exact_arithmetic(values: list[float]) -> None:
    observer = observe(torch.tensor(values))
    state = observer.state_dict()
    width = math.ldexp(1, int(state["exponent"])) / (BINS // 2)
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in values:
        expected[BINS // 2 + math.trunc(value / width)] += 1
    assert torch.equal(state["counts"], expected)
    assert (observer.minimum, observer.maximum, observer.count) == (min(values), max(values), len(values))


def test_layout_and_dtype_do_not_matter() -> None:
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert same(observe(x), observe(x.float().contiguous(memory_format=torch.channels_last)))
    assert same(observe(x), observe(x.double().transpose(1, 3)))
    assert same(observe(torch.tensor([1 - 1e-12], dtype=torch.float64)), observe(torch.tensor([1.0])))
    assert same(observe(torch.tensor([3, -4])), observe(torch.tensor([3.0, -4.0])))


def test_state_survives_a_round_trip() -> None:
    observer, restored = observe(torch.tensor([1.5, -7.0])), HistogramObserver()
    restored.load_state_dict(observer.state_dict())
    assert same(observer, restored)
    restored.update(torch.tensor([100.0]))
    assert observer.maximum == 1.5
    empty = HistogramObserver()
    empty.load_state_dict(HistogramObserver().state_dict())
    assert same(empty, HistogramObserver())


@pytest.mark.parametrize("key", ["counts", "extremes", "exponent"])
def test_damaged_state_is_refused(key: str) -> None:
    state = observe(torch.ones(3)).state_dict()
    for damaged in ({**state, key: torch.zeros(5)}, {k: v for k, v in state.items() if k != key}):
        with pytest.raises(ObserverError, match="damaged"):
            HistogramObserver().load_state_dict(damaged)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_values_that_float32_cannot_hold_are_refused_and_not_counted(bad: float) -> None:
    observer = observe(torch.tensor([1.0, 2.0]))
    with pytest.raises(ObserverError, match=r"\(1, 2\) holds NaN or infinite"):
        observer.update(torch.tensor([[0.5, bad]], dtype=torch.float64))
    assert same(observer, observe(torch.tensor([1.0, 2.0])))


def test_nothing_seen_is_an_error_and_an_empty_tensor_is_nothing() -> None:
    with pytest.raises(ObserverError, match="never observed"):
        observe(torch.empty(0, 4)).qparams()


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_zeros_have_scale_one(method: str) -> None:
    assert observe(torch.zeros(9)).qparams(method) == (torch.tensor(1.0), 0)


@pytest.mark.parametrize("method", ["mse", "minmax"])
@given(value=FLOATS.filter(lambda v: abs(v) > 255 * SMALLEST_SCALE))
def test_a_constant_is_met_to_float_precision(method: str, value: float) -> None:
    scale, zero = observe(torch.full((50,), value)).qparams(method)
    x = torch.tensor([value])
    assert torch.allclose(fake_quant_static(x, scale, torch.tensor(zero, dtype=torch.uint8)), x, rtol=3e-7, atol=0)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.sampled_from(["mse", "minmax"]))
def test_scales_can_be_inverted_and_real_zero_is_exact(values: list[float], method: str) -> None:
    scale, zero = observe(torch.tensor(values)).qparams(method)
    assert scale.dtype == torch.float32
    assert scale.ndim == 0
    assert torch.isfinite(scale)
    assert torch.isfinite(1 / scale)
    assert type(zero) is int
    code = quantize_static(torch.zeros(1), scale, torch.tensor(zero, dtype=torch.uint8))
    assert code.item() == zero
    assert dequantize_static(code, scale, torch.tensor(zero, dtype=torch.uint8)).item() == 0


def test_minmax_clips_nothing_by_more_than_half_a_step() -> None:
    for name in NAMES:
        x = samples(name, 2000)
        scale, zero = observe(x).qparams("minmax")
        # The zero is rounded, which moves both ends by up to half a step, and rounding moves a value by another half.
        assert (fake_quant_static(x, scale, torch.tensor(zero, dtype=torch.uint8)) - x).abs().max() <= 1.001 * scale


@pytest.mark.parametrize("name", NAMES)
def test_mse_is_never_worse_than_minmax_on_the_data(name: str) -> None:
    for count in (1000, 10_000):
        x = samples(name, count)
        observer = observe(x)
        assert squared_error(x, *observer.qparams("mse")) <= squared_error(x, *observer.qparams("minmax"))


@pytest.mark.parametrize("name", NAMES)
def test_mse_is_within_two_per_cent_of_an_exact_search(name: str) -> None:
    x = samples(name, 6000)
    best = math.inf
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    for f in torch.linspace(1, 0.1, 37).tolist() if low else [1.0]:
        for g in torch.linspace(1, 0.1, 37).tolist() if high else [1.0]:
            scale = torch.tensor((high * g - low * f) / 255)
            best = min(best, squared_error(x, scale, min(255, round(-low * f / scale.item()))))
    assert squared_error(x, *observe(x).qparams("mse")) <= 1.02 * best + 1e-9


def test_mse_gives_up_one_outlier_for_the_others_and_moves_one_end_only() -> None:
    x = torch.cat([torch.rand(200_000, generator=torch.Generator().manual_seed(1)) - 0.5, torch.tensor([3.0])])
    observer = observe(x)
    scale, zero = observer.qparams("mse")
    assert squared_error(x, scale, zero) < 0.9 * squared_error(x, *observer.qparams("minmax"))
    assert -zero * scale == pytest.approx(-0.5, abs=0.02)
    assert (255 - zero) * scale < 2.9


def test_many_observers_at_once_get_what_each_gets_alone() -> None:
    observers = [observe(samples(name, 500) * 10.0**i) for i in range(-4, 6) for name in NAMES]
    scales, zeros = HistogramObserver.tables(observers, "mse")
    assert (scales.dtype, zeros.dtype, scales.shape, zeros.shape) == (torch.float32, torch.uint8, (80,), (80,))
    for observer, scale, zero in zip(observers, scales, zeros, strict=True):
        assert observer.qparams("mse") == (scale, int(zero))
