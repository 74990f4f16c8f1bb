"""Layers of timestep and conditions that run ahead, with and without their weights in memory, against a run each step.

    python benchmarks/precompute.py [--model dit --model sd3] [--steps 20] [--repeats 5] [--preset w4a8]

Shapes are those of published models with a quarter of their blocks, weights are random: speed does not depend on them.
A round runs all steps of one picture in all three ways, in turn, so that a drift of the machine's speed hits all of
them; the ratio of a round is what counts, its median is what is quoted. Offloaded weights come from a file that the
system has read before. Prints a table and writes `benchmarks/results/precompute.json`.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
from speed import Calls, quantized

RESULTS = Path(__file__).parent / "results"


def dit() -> tuple[nn.Module, dict[str, Any]]:
    """DiT-XL/2 at 256 pixels, 7 of 28 blocks, one picture with guidance."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_layers=7, out_channels=8)
    return model, {"hidden_states": torch.randn(2, 4, 32, 32), "class_labels": torch.tensor([207, 1000])}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """SD3-medium at 512 pixels, 6 of 24 blocks, one picture with guidance."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(num_layers=6, num_attention_heads=24, caption_projection_dim=1536)
    return model, {
        "hidden_states": torch.randn(2, 16, 64, 64),
        "encoder_hidden_states": torch.randn(2, 333, 4096),
        "pooled_projections": torch.randn(2, 2048),
    }


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {"dit": dit, "sd3": sd3}


def main(
    model: Annotated[list[str] | None, typer.Option(help="Shapes to time.")] = None,
    steps: int = 20,
    repeats: int = 5,
    preset: str = "w4a8",
) -> None:
    """Measure, print the table, write the JSON."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rows = [measure(name, steps, repeats, preset) for name in model or MODELS]
    report = {
        "preset": preset,
        "steps": steps,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "precompute.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(report))


def measure(name: str, steps: int, repeats: int, preset: str) -> dict[str, Any]:
    """Quantize a model of a shape and time pictures in both ways."""
    from safetensors.torch import save_file

    from dcomp.calibrate.safetensors_file import read_safetensors_header
    from dcomp.compress.precompute import keep_plan, plan_precompute, precompute
    from dcomp.recipes.bench import tensor_bytes

    denoiser, inputs = MODELS[name]()
    denoiser.eval()
    batch = len(next(iter(inputs.values())))
    timesteps = [float(t) for t in torch.linspace(999, 1, steps).round()]
    kwargs = {**inputs, "timestep": torch.full((batch,), 500)}
    structure = quantized(denoiser, preset, (), kwargs)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_precompute(denoiser, structure, next(Calls((), kwargs).calls()), timesteps)
        keep_plan(denoiser, plan)
        own = sum(tensor_bytes(denoiser.get_submodule(layer)) for layer in plan.layers)
        part = own / tensor_bytes(denoiser)
        file = Path(folder) / "weights.safetensors"
        save_file({key: tensor.clone() for key, tensor in denoiser.state_dict().items()}, file)

        def picture(way: str) -> float:
            made = precompute(denoiser, [read_safetensors_header(file)] if way == "offload" else None) if way else None
            for t in timesteps[:2]:  # what parts of the model return has a known form from here on
                denoiser(**inputs, timestep=torch.full((batch,), int(t)))
            started = time.perf_counter()
            for t in timesteps:
                denoiser(**inputs, timestep=torch.full((batch,), int(t)))
            seconds = time.perf_counter() - started
            if made is not None:
                assert (made.computed, made.failure) == (2, None)
                made.detach()
            return seconds

        rounds = [{way: picture(way) for way in ("", "on", "offload")} for _ in range(repeats + 1)]
    row: dict[str, Any] = {"model": name, "layers": len(plan.layers), "part_of_bytes": round(part, 3)}
    for way in ("on", "offload"):
        ratios = [times[""] / times[way] for times in rounds[1:]]  # the first round packs weights and fills caches
        row[way] = [round(number, 3) for number in (statistics.median(ratios), min(ratios), max(ratios))]
    print(row, flush=True)
    return row


def table(report: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| | layers | part of the bytes | speed / each step (range over rounds) | with offload |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        speeds = ["{:.2f} ({:.2f} to {:.2f})".format(*row[way]) for way in ("on", "offload")]
        lines.append(f"| {row['model']} | {row['layers']} | {row['part_of_bytes']:.1%} | {' | '.join(speeds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
