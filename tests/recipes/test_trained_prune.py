"""Cuts of the embedded pipeline, which has been trained: there errors mean something."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dcomp.recipes.demo import embedded_model
from dcomp.recipes.load import parse_recipe
from dcomp.recipes.prune_stage import PruneResult
from dcomp.recipes.run import run_recipe
from tests.support.checkpoints import checked_in_a_fork

pytestmark = pytest.mark.slow
CALIBRATION: dict[str, Any] = {"samples": 3, "steps": 3, "guidance": 4.0}
STAGE: dict[str, Any] = {"kind": "prune", "parameters": 0.2, "rows": 2, "proposals": 2, "round_to": 1024}
STAGE |= {"pin": ["down_blocks"]}  # what is left takes half of the time to measure, and a fifth is easily found in it
Pruned = Callable[..., PruneResult]


@pytest.fixture(autouse=True, scope="module")
def quick_check() -> Iterator[None]:
    with checked_in_a_fork():
        yield


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """Prune the embedded pipeline, and return what became of it."""

    def run(**options: Any) -> PruneResult:
        output: Path = tmp_path_factory.mktemp("pruned") / "out"
        recipe = parse_recipe({"calibration": CALIBRATION, "stages": [STAGE | options]}, where="test")
        result = run_recipe(embedded_model(), recipe, output).pruned
        assert result is not None
        return result

    return run


def test_a_fifth_goes_with_half_the_error_of_plain_rules_and_single_cuts_tell_which(pruned: Pruned) -> None:
    ours = pruned()
    assert ours.after.parameters <= 0.8 * ours.before.parameters
    assert ours.additivity is not None
    assert ours.additivity.correlation is not None
    assert ours.additivity.correlation > 0.8
    for method in ("magnitude", "random"):
        theirs = pruned(method=method)
        assert theirs.after.parameters > 0.75 * theirs.before.parameters
        assert ours.error < theirs.error / 2


def test_what_is_left_learns_what_the_whole_knew(pruned: Pruned) -> None:
    result = pruned(method="magnitude", recover="full", recover_iterations=20, recover_features=False)
    assert result.recovery is not None
    assert result.recovery.after < 0.5 * result.recovery.before
    assert result.error < 0.85 * result.unrecovered
