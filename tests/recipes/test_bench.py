import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcomp import UsageError
from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.recipes import bench as module
from dcomp.recipes.bench import bench, fill_prompts, record_calls, tensor_bytes
from dcomp.recipes.peak_memory import PeakMemoryError, measure_peak
from tests.support.tiny import save_tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline("UNet2DConditionModel", tmp_path_factory.mktemp("bench") / "model")


def test_shared_memory_counts_once_and_buffers_count() -> None:
    layer = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    both = nn.Sequential(layer, tied)
    both.register_buffer("table", torch.zeros(10, dtype=torch.int8), persistent=False)
    both.register_buffer("none", torch.zeros(0))
    assert tensor_bytes(both) == 4 * (16 + 4 + 4) + 10


def test_recorded_calls_are_those_of_the_pipeline_and_repeat(model: Path) -> None:
    pipeline = open_pipeline(model)
    settings = Generation(steps=5, height=16, width=16)
    calls = record_calls(pipeline, ["a", "b"], settings)
    assert len(calls) == module.RECORDED_STEPS
    again = record_calls(pipeline, ["a", "b"], settings)
    for (args, kwargs), (args_again, kwargs_again) in zip(calls, again, strict=True):
        assert args[0].shape[0] == 4  # two samples, each with and without its prompt
        assert torch.equal(args[0], args_again[0])
        assert torch.equal(kwargs["encoder_hidden_states"], kwargs_again["encoder_hidden_states"])
    assert not torch.equal(calls[0][0][0], calls[1][0][0])


def test_pipeline_against_itself_has_ratios_of_one_where_nothing_is_timed(model: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = bench(
        model, model, repeats=3, generations=1, steps=2, peak=False, progress=lambda *report: seen.append(report)
    )
    assert result.macs_ratio == result.denoiser_bytes_ratio == 1.0
    assert result.macs > 0
    assert result.denoiser_bytes == sum(p.nbytes for p in open_pipeline(model).denoiser.parameters())
    assert result.speedup_min <= result.speedup <= result.speedup_max
    assert result.generation_speedup is not None
    assert (result.repeats, result.batch, result.threads, result.calls) == (3, 1, torch.get_num_threads(), 2)
    assert result.peak_bytes is result.peak_bytes_original is None
    assert all(0 <= done <= total for _, done, total in seen)
    assert type(result).model_validate(result.to_dict()) == result


def test_peak_of_a_process_does_not_include_its_parents() -> None:
    ballast = torch.ones(1 << 28)  # 1 GiB: exec() keeps the parent's peak in getrusage
    program = "from dcomp.recipes.peak_resident import peak_resident; print(peak_resident())"
    peak = int(subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, check=True).stdout)
    assert 1 << 22 < peak < ballast.nbytes


@pytest.mark.slow
def test_peak_memory_of_a_pipeline_is_above_that_of_the_imports(model: Path) -> None:
    peak = measure_peak(model, ["a"], Generation(steps=1, batch_size=1))
    assert 0 < peak.imports < peak.peak


def test_process_that_fails_is_reported_with_its_last_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback of' >&2\necho 'Error: no memory' >&2\nexit 1\n")
    python.chmod(0o700)
    monkeypatch.setattr("dcomp.recipes.peak_memory.sys.executable", str(python))
    with pytest.raises(PeakMemoryError, match="failed: Error: no memory"):
        measure_peak(model, ["a"], Generation(steps=1))


def test_single_shots_are_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="spread"):
        bench(model, model, repeats=1)


def test_prompts_go_round() -> None:
    assert fill_prompts(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
