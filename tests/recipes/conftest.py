from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


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
    return cache(lambda name: _made(tiny_model(name), name, tmp_path_factory.mktemp("checkpoints"), "dynamic"))


@pytest.fixture(scope="session")
def static_checkpoint(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same with tables of static ranges for the inputs of convolutions."""
    return cache(lambda name: _made(tiny_model(name), name, tmp_path_factory.mktemp("static"), "static"))


def _made(model: Path, name: str, folder: Path, inputs: str) -> Path:
    from dcomp.recipes.run import run_recipe
    from tests.support.checkpoints import checked_in_a_fork, short_recipe, with_stage

    with checked_in_a_fork():
        return run_recipe(model, with_stage(short_recipe(name), inputs=inputs), folder / f"{name}-w4a8").output
