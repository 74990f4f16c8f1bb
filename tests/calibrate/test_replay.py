import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp.calibrate.calibration_set import CalibrationError, CalibrationSet, RecordedCall
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.replay import RowBatch, _spreading, gather_rows, predict
from tests.support import tiny

PROMPTS = {"text": ["a cat", "a dog", "a tree"], "class": ["1", "207", "7"], "unconditional": [""] * 3}
CONTEXTS = {"UNet2DModel": 1, "FluxTransformer2DModel": 1}  # the others have two
Recorded = Callable[[str], tuple[nn.Module, CalibrationSet]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A tiny pipeline's denoiser and a set of 3 prompts in batches of 2 and 1, 4 calls each."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, tuple[nn.Module, CalibrationSet]] = {}

    def record(name: str) -> tuple[nn.Module, CalibrationSet]:
        if name not in made:
            pipeline = open_pipeline(tiny.save_tiny_pipeline(name, folder / name))
            size = {"height": 16, "width": 16} if name in tiny.TEXT_NAMES else {}
            options = Generation(steps=4, batch_size=2, **size)
            calls = record_calibration_set(pipeline, PROMPTS[pipeline.kind], options, folder / f"{name}-calls")
            made[name] = (pipeline.denoiser, calls)
        return made[name]

    return record


def identities(calls: "CalibrationSet | FakeSet", rows: RowBatch) -> list[tuple[int, str, int, int]]:
    """Return (call, context, trajectory, sample) of each row, found by the prediction that was recorded."""
    known = {}
    for call in calls.calls():
        samples = len(call.output) // len(call.contexts)
        for row, output in enumerate(call.output):
            key = output.numpy().tobytes()
            assert key not in known
            known[key] = (call.call, call.contexts[row // samples], call.trajectory, row % samples)
    return [known[output.contiguous().numpy().tobytes()] for output in rows.outputs]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_model_answers_the_joined_rows_as_it_did_when_they_were_recorded(name: str, recorded: Recorded) -> None:
    denoiser, calls = recorded(name)
    rows = gather_rows(calls, 1000, denoiser=denoiser)
    assert len(rows) == 12 * CONTEXTS.get(name, 2)  # all there are
    torch.testing.assert_close(predict(denoiser, rows), rows.outputs, rtol=1e-5, atol=1e-5)
    parts = list(rows.chunks(5))
    assert [len(part) for part in parts] == ([5, 5, 2] if rows.pairs is None else [4] * 6)
    torch.testing.assert_close(
        torch.cat([predict(denoiser, part) for part in parts]), rows.outputs, rtol=1e-5, atol=1e-5
    )
    some = rows.take([7, 2, 2])
    torch.testing.assert_close(predict(denoiser, some), rows.outputs[[7, 2, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("count", [5, 8, 1000])
def test_calls_contexts_and_samples_are_covered_equally(name: str, count: int, recorded: Recorded) -> None:
    denoiser, calls = recorded(name)
    contexts = CONTEXTS.get(name, 2)
    rows = gather_rows(calls, count, denoiser=denoiser)
    found = identities(calls, rows)
    assert len(found) == len(set(found)) == min(count // contexts, 12) * contexts
    by_call = Counter(call for call, *_ in found)
    assert max(by_call.values()) - min(by_call.get(call, 0) for call in range(4)) <= contexts
    by_context = Counter(context for _, context, *_ in found)
    assert len(by_context) == contexts
    assert len(set(by_context.values())) == 1
    by_sample = Counter(found[i][2:] for i in range(0, len(found), contexts))
    assert max(by_sample.values()) - min(by_sample.get(s, 0) for s in [(0, 0), (0, 1), (1, 0)]) <= 1
    told = {call.call: call.timestep for call in calls.calls()}
    assert rows.timesteps.dtype == torch.float32
    assert rows.timesteps.tolist() == [told[call] for call, *_ in found]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_pairs_are_adjacent_and_of_the_same_latents(name: str, recorded: Recorded) -> None:
    denoiser, calls = recorded(name)
    rows = gather_rows(calls, 10, denoiser=denoiser)
    if name in CONTEXTS:
        assert rows.pairs is None
        return
    assert rows.pairs.tolist() == [[2 * i, 2 * i + 1] for i in range(5)]
    found = identities(calls, rows)
    for uncond, cond in rows.pairs.tolist():
        assert (found[uncond][1], found[cond][1]) == ("uncond", "cond")
        assert found[uncond][0] == found[cond][0]
        assert found[uncond][2:] == found[cond][2:]
    latents = rows.args[0] if rows.args else rows.kwargs["hidden_states"]
    assert torch.equal(latents[0::2], latents[1::2])
    assert rows.take([3, 4, 9, 2]).pairs.tolist() == [[3, 0]]
    assert rows.take([1, 3]).pairs.shape == (0, 2)


def test_equal_seeds_give_equal_rows_and_another_seed_others(recorded: Recorded) -> None:
    denoiser, calls = recorded("UNet2DConditionModel")
    one, two = (gather_rows(calls, 8, 5, denoiser=denoiser) for _ in range(2))
    assert torch.equal(one.outputs, two.outputs)
    assert torch.equal(one.args[0], two.args[0])
    assert len({gather_rows(calls, 8, seed, denoiser=denoiser).outputs.numpy().tobytes() for seed in range(6)}) > 1


def test_what_has_no_row_axis_stays_as_it_is(recorded: Recorded) -> None:
    denoiser, calls = recorded("FluxTransformer2DModel")
    first = next(calls.calls())
    rows = gather_rows(calls, 6, denoiser=denoiser).take([0, 1])
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(rows.kwargs[name], first.kwargs[name])
    assert rows.kwargs["joint_attention_kwargs"] == first.kwargs["joint_attention_kwargs"]
    assert rows.kwargs["timestep"].shape == rows.kwargs["guidance"].shape == (2,)


class FakeSet:
    """Calls of `fake_denoiser` that were never recorded."""

    def __init__(self, calls: list[RecordedCall]) -> None:
        self._calls = calls

    def calls(self) -> Any:
        return iter(self._calls)


class FakeDenoiser(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, extra: Any = None) -> Tensor:
        raise AssertionError("is not to be run")


def fake_set(
    sizes: list[int], calls: int, contexts: Callable[[int], list[tuple[str, ...]]], **changes: Callable[[int], Any]
) -> FakeSet:
    """Trajectories of the given sizes; `contexts(call)` tells the denoiser's calls of each step, by contexts."""
    number = itertools.count(1)
    found = []
    for trajectory, size in enumerate(sizes):
        for call in range(calls):
            for names in contexts(call):
                batch = size * len(names)
                sample = torch.tensor([[float(next(number))] for _ in range(batch)])
                kwargs = {name: make(len(found)) for name, make in changes.items()}
                found.append(
                    RecordedCall(
                        (sample, 900 - call), kwargs, sample.clone(), trajectory, call, call, 900.0 - call, names
                    )
                )
    return FakeSet(found)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from([[("uncond", "cond")], [("cond",), ("uncond",)], [("cond",)], [("cond", "uncond", "context2")]]),
    st.integers(1, 90),
    st.integers(0, 3),
)
def test_any_set_is_covered_equally(
    sizes: list[int], calls: int, contexts: list[tuple[str, ...]], count: int, seed: int
) -> None:
    chosen = fake_set(sizes, calls, lambda _: contexts)
    rows = gather_rows(chosen, count, seed, denoiser=FakeDenoiser())
    names = sorted(set().union(*contexts), key=["uncond", "cond", "context2"].index)
    items = min(max(1, count // len(names)), calls * sum(sizes))
    found = identities(chosen, rows)
    assert len(found) == len(set(found)) == items * len(names)
    assert [context for _, context, *_ in found] == names * items
    assert (rows.pairs is not None) == (names == ["uncond", "cond"])
    for part in (lambda row: row[0], lambda row: row[2:]):
        times = Counter(part(found[i]) for i in range(0, len(found), len(names)))
        every = calls if isinstance(part(found[0]), int) else sum(sizes)
        assert max(times.values()) - (min(times.values()) if len(times) == every else 0) <= 1
    assert rows.args[1].tolist() == [900 - call for call, *_ in found] == rows.timesteps.tolist()


def test_calls_without_guidance_among_others_are_rows_without_pairs() -> None:
    chosen = fake_set([2, 2], 4, lambda call: [("uncond", "cond")] if call < 2 else [("cond",)])
    rows = gather_rows(chosen, 100, denoiser=FakeDenoiser())
    assert rows.pairs is None
    assert len(rows) == 2 * 2 * 4 + 2 * 4


def test_a_smaller_batch_shows_what_has_no_batch_axis() -> None:
    table = torch.arange(6.0).view(3, 2)
    fixed = fake_set([3, 2], 2, lambda _: [("cond",)], extra=lambda _: {"list": [table]})
    rows = gather_rows(fixed, 4, denoiser=FakeDenoiser())
    assert torch.equal(rows.kwargs["extra"]["list"][0], table)
    assert rows.batched == {(0,), (1,)}


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda index: torch.zeros(2, 3 + index % 2), "shape or type"),
        (lambda index: torch.zeros(2, dtype=[torch.float32, torch.float64][index % 2]), "shape or type"),
        (lambda index: torch.full((5,), float(index)), "value"),
        (lambda index: 0.5 + index, "value"),
        (lambda index: [1, True][index % 2], "value"),
        (lambda index: {f"key{index % 2}": 1}, "form"),
    ],
)
def test_calls_that_cannot_be_joined_are_refused_by_name(make: Callable[[int], Any], what: str) -> None:
    with pytest.raises(CalibrationError, match=f"`extra` differs in {what}"):
        gather_rows(fake_set([2, 2], 2, lambda _: [("cond",)], extra=make), 8, denoiser=FakeDenoiser())


def test_less_than_one_row_is_refused() -> None:
    with pytest.raises(CalibrationError, match="0 rows"):
        gather_rows(fake_set([1], 1, lambda _: [("cond",)]), 0, denoiser=FakeDenoiser())


@pytest.mark.parametrize("count", [1, 2, 7, 20, 25, 64])
def test_every_beginning_of_the_order_of_calls_is_spread_over_them(count: int) -> None:
    order = _spreading(count)
    assert sorted(order) == list(range(count))
    for length in range(1, count + 1):
        edges = [-1, *sorted(order[:length]), count]
        assert max(after - before for before, after in itertools.pairwise(edges)) <= 4 * count / length + 1


class _Elsewhere(nn.Module):
    """A denoiser on a device without values, that answers from memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))
        self.seen: list[str] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, extra: dict[str, Any]) -> tuple[torch.Tensor]:
        self.seen += [tensor.device.type for tensor in (sample, timestep, extra["text"])]
        return (torch.full(sample.shape, 2.0),)


def test_rows_go_to_where_the_denoiser_is_and_predictions_come_back() -> None:
    ones = torch.ones(3, 2)
    rows = RowBatch((ones, ones[:, 0]), {"extra": {"text": ones}}, ones, ones[:, 0], torch.zeros(3), None, frozenset())
    denoiser = _Elsewhere()
    found = predict(denoiser, rows)
    assert denoiser.seen == ["meta"] * 3
    assert found.device.type == "cpu"
    assert torch.equal(found, 2 * ones)
    assert rows.args[0].device.type == "cpu"
