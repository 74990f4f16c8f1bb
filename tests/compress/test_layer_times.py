"""Times of layers: they add up to a call, and a run that goes on has those that it had."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.replay import RowBatch
from dcomp.compress import layer_times as module
from dcomp.compress.candidates import CandidateError
from dcomp.compress.layer_times import LayerTimes, measure_layer_times, measure_speedup
from dcomp.compress.scheme import QScheme

SCHEMES = {"W8A8": QScheme(8, input_bits=8, input_granularity="token"), "W4A16": QScheme(4, 64)}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.idle = nn.Linear(256, 512), nn.Linear(512, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.large(self.large(x)[..., :256]).sin())


@pytest.fixture
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture
def rows() -> RowBatch:
    x = torch.randn(2, 128, 256)
    return RowBatch((x,), {}, torch.zeros(2, 128, 64), torch.tensor([1, 1]), torch.tensor([0, 1]), None, frozenset())


def test_times_of_layers_and_the_rest_are_the_call(denoiser: nn.Module, rows: RowBatch, tmp_path: Path) -> None:
    times = measure_layer_times(denoiser, rows, {"large": SCHEMES, "small": SCHEMES}, file=tmp_path / "times.json")
    assert {name: [*forms] for name, forms in times.seconds.items()} == {
        name: ["float", *SCHEMES] for name in ("large", "small")
    }
    assert all(seconds > 0 for forms in times.seconds.values() for seconds in forms.values())
    # 8 times the products, and called twice.
    assert times.seconds["large"]["float"] > times.seconds["small"]["float"]
    assert times.total >= sum(forms["float"] for forms in times.seconds.values())
    assert times.least <= times.total


def test_totals_are_sums_of_the_float_and_of_the_fastest_forms() -> None:
    times = LayerTimes({"a": {"float": 3.0, "W8A8": 1.0}, "b": {"float": 2.0, "W8A8": 4.0}}, rest=5.0)
    assert times.total == 10.0
    assert times.least == 8.0


def test_a_run_that_goes_on_has_the_times_that_it_had(
    denoiser: nn.Module, rows: RowBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "times.json"
    times = measure_layer_times(denoiser, rows, {"small": SCHEMES}, file=file)
    monkeypatch.setattr(module, "_float_times", None)  # nothing is timed again
    assert measure_layer_times(denoiser, rows, {"small": SCHEMES}, file=file) == times
    with pytest.raises(TypeError):
        measure_layer_times(denoiser, rows, {"large": SCHEMES}, file=file)


def test_a_layer_that_is_never_called_is_refused(denoiser: nn.Module, rows: RowBatch, tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match=r"not called \(idle\)"):
        measure_layer_times(denoiser, rows, {"idle": SCHEMES}, file=tmp_path / "times.json")
    assert not (tmp_path / "times.json").exists()


def test_a_choice_is_timed_as_a_whole_and_once(
    denoiser: nn.Module, rows: RowBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, chosen = tmp_path / "speedups.json", {"large": "W8A8", "small": "float"}
    layers, called = dict(denoiser.named_modules()), []

    def turns(original, compressed, repeats):
        hook = denoiser.large.register_forward_pre_hook(lambda layer, _: called.append(type(layer)))
        original()
        called.append("then")
        compressed()
        hook.remove()
        return [(3.0, 2.0), (4.0, 2.0), (1.0, 2.0)]

    candidates = {"large": SCHEMES, "small": SCHEMES}
    monkeypatch.setattr(module, "time_in_turns", turns)
    assert measure_speedup(denoiser, rows, candidates, chosen, file=file) == 1.5
    assert called == [nn.Linear, nn.Linear, "then"]  # the quantized layer was in its place in the second call
    assert dict(denoiser.named_modules()) == layers
    monkeypatch.setattr(module, "time_in_turns", lambda *_: pytest.fail("measured again"))
    assert measure_speedup(denoiser, rows, candidates, chosen, file=file) == 1.5
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        measure_speedup(denoiser, rows, candidates, {"large": "W4A16", "small": "float"}, file=file)
