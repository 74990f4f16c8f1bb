"""The benchmark for GPUs, on a machine without one: it says so, and all that it would time runs."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcomp.kernels.cuda import loaded

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        yield runpy.run_path(str(SCRIPT))


@pytest.mark.skipif(loaded.defect(0) is None, reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-P", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    assert str(loaded.defect(0)) in done.stdout
    assert len(done.stdout.splitlines()) < 10


@pytest.mark.parametrize(("works", "shape"), [("linear_works", (20, 64, 40)), ("conv_works", (32, 8, 6))])
def test_all_that_is_compared_runs_and_gives_one_shape(gpu: dict[str, Any], works: str, shape: Any) -> None:
    made = gpu[works](shape, CPU) if works == "linear_works" else gpu[works](shape, 2, CPU)
    results = {name: work() for name, work in made.items()}
    assert next(iter(results)) == "bf16"
    whole = {name: y for name, y in results.items() if "alone" not in name}
    assert {y.shape for y in whole.values()} == {results["bf16"].shape}
    assert {y.dtype for y in whole.values()} == {torch.bfloat16}
    assert torch.equal(results["W8A8, product"], results["W8A8, all"])
    assert len(whole) >= 5


def test_attentions_that_are_compared_run_and_give_one_shape(gpu: dict[str, Any]) -> None:
    works = gpu["attention_works"]((2, 20, 30, 40), 2, CPU)
    theirs, ours = (work() for work in works.values())
    assert next(iter(works)) == "bf16"
    assert theirs.dtype == ours.dtype == torch.bfloat16
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02)


def test_the_ratio_of_a_round_counts(gpu: dict[str, Any]) -> None:
    times = iter([4.0, 1.0, 2.0, 2.0, 9.0, 3.0])

    class Told(gpu["Stopwatch"]):  # type: ignore[misc]
        def seconds(self, prepared: Any) -> float:
            return next(times)

    found = gpu["ratios"]({"bf16": int, "ours": int}, Told(CPU), 3)
    assert found["ours"] == {"speedup": 3.0, "speedup_min": 1.0, "speedup_max": 4.0}
    assert found["bf16"]["speedup"] == 1.0
    assert gpu["table"]("t", {"a shape": found}).splitlines() == [
        "| t: speed / bf16 | ours |",
        "|---|---:|",
        "| a shape | 3.00 |",
    ]
