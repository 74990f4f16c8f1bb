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
    from dcomp.recipes.run import run_recipe
    from tests.support.checkpoints import checked_in_a_fork, short_recipe

    @cache
    def make(name: str) -> Path:
        with checked_in_a_fork():
            folder = tmp_path_factory.mktemp("checkpoints") / f"{name}-w4a8"
            return run_recipe(tiny_model(name), short_recipe(name), folder).output

    return make
