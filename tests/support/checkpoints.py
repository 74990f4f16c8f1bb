"""Whole runs on tiny pipelines, as short as they can be, and adapters for them."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dcomp.compress import verify
from dcomp.recipes.load import load_recipe
from dcomp.recipes.schema import Recipe
from tests.support.tiny import tiny_pipeline

SHORT: dict[str, Any] = {
    "calibration.samples": 2,
    "calibration.steps": 3,
    "calibration.batch_size": 2,
    "stages.0.rounding": "nearest",
    "stages.0.tune": 0,
}


def short_recipe(name: str, preset: str = "w4a8", **values: Any) -> Recipe:
    """A built-in recipe: two pictures of three steps, nearest codes, no tuning; `values` are keys of calibration."""
    # Flux has no size of its own: its default would be 4096 tokens.
    size = {"calibration.height": 16, "calibration.width": 16} if name == "FluxTransformer2DModel" else {}
    return load_recipe(preset, (), SHORT | size | {f"calibration.{key}": value for key, value in values.items()})


def with_stage(recipe: Recipe, **values: Any) -> Recipe:
    """A recipe with other values in its stage."""
    return recipe.model_copy(update={"stages": (recipe.stages[0].model_copy(update=values),)})


@contextmanager
def checked_in_a_fork() -> Iterator[None]:
    """Let the check of a written folder run in a fork, which need not import everything again as a fresh process."""

    def run_child(folder: Path, probe: Path, timeout: float) -> Any:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writer, 1)
            verify.sys.stdout = os.fdopen(1, "w", closefd=False)  # type: ignore[attr-defined]
            try:
                verify._main(str(folder), str(probe))
                verify.sys.stdout.flush()  # type: ignore[attr-defined]
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        return verify.json.loads(text.splitlines()[-1])  # type: ignore[attr-defined]

    before = verify._run_child
    verify._run_child = run_child
    try:
        yield
    finally:
        verify._run_child = before


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def save_lora(name: str, folder: Path, component: str, targets: list[str]) -> Path:
    """Write a random adapter for one component of `tiny_pipeline(name)`, as a training script would."""
    pipe = tiny_pipeline(name)
    model = copy.deepcopy(getattr(pipe, component))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(config)
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(model)}
    metadata = {f"{component}_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"
