import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of `tiny_pipeline(name)`, saved once; nobody may change it."""
    from tests.support.tiny import save_tiny_pipeline

    return cache(lambda name: save_tiny_pipeline(name, tmp_path_factory.mktemp("models") / name))


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of the short W4A8 run of a tiny pipeline, made once; nobody may change it."""
    return cache(lambda name: _made(tiny_model(name), name, _shared(tmp_path_factory), "dynamic"))


@pytest.fixture(scope="session")
def static_checkpoint(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same with tables of static ranges for the inputs of convolutions."""
    return cache(lambda name: _made(tiny_model(name), name, _shared(tmp_path_factory), "static"))


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of a run see: each has its own below the run's."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _made(model: Path, name: str, shared: Path, inputs: str) -> Path:
    from dcomp.recipes.run import run_recipe
    from tests.support.checkpoints import checked_in_a_fork, short_recipe, with_stage

    recipe = with_stage(short_recipe(name), inputs=inputs, rounding="gptq")
    folder = shared / inputs / f"{name}-w4a8"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.made.lock"), checked_in_a_fork():
        return folder if folder.exists() else run_recipe(model, recipe, folder).output


@pytest.fixture(scope="module")
def time_goes_by_products() -> Iterator[pytest.MonkeyPatch]:
    """Which plans are worth having depends on time; on a busy machine, tiny models have none that two runs agree on."""
    from dcomp.cachequant.prices import CallPrices

    def seconds(prices: CallPrices, predicted: Iterable[str]) -> float:
        return prices.macs(predicted) / prices.macs()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CallPrices, "seconds", seconds)
        patch.setattr(CallPrices, "whole_seconds", 0.01)
        yield patch
