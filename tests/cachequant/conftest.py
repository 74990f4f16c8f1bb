"""Tiny pipelines, made once, and a call of each one's denoiser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.recipes.bench import record_calls
from tests.support.tiny import save_tiny_pipeline

SIZES = {"height": 16, "width": 16}


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny_pipeline(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder


def settings_of(pipeline: OpenPipeline, steps: int = 6, **options: Any) -> Generation:
    """How pictures of a tiny pipeline are made."""
    sizes = SIZES if pipeline.kind == "text" else {}
    return Generation(steps=steps, **(sizes | options))


def prompts_of(pipeline: OpenPipeline, count: int = 2) -> list[str]:
    return ["1", "2", "3"][:count] if pipeline.kind == "class" else ["a cat", "a dog", "a bee"][:count]


@pytest.fixture(scope="session")
def recorded_call(folder_of: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any, Any]]:
    made: dict[str, tuple[Any, Any, Any]] = {}

    def call(name: str) -> tuple[Any, Any, Any]:
        if name not in made:
            pipeline = open_pipeline(folder_of(name))
            made[name] = (pipeline.denoiser, *record_calls(pipeline, prompts_of(pipeline), settings_of(pipeline, 2))[0])
        return made[name]

    return call
