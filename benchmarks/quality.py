"""How good the embedded pipeline stays: every preset and optimum-quanto's 4-bit weights, same prompts and seeds.

    python benchmarks/quality.py [--preset w8a8 ...] [--samples 64] [--steps 20] [--guidance 4]

Each row is one compressed pipeline against the original, measured by `dcomp validate`. The quanto row has the same
layers at the same bits and group size as our W4A16: only the way of choosing codes differs (quanto: asymmetric,
min-max). Prints a table and writes `benchmarks/results/quality.json`.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

PRESETS = ["w8a8", "w4a8", "w4a16", "w8a16"]
COLUMNS = ("denoiser_bytes_ratio", "bits_per_param", "latent_rel_error", "psnr_db", "ssim", "speedup")
RESULTS = Path(__file__).parent / "results"


def main(
    preset: Annotated[list[str] | None, typer.Option(help="Presets to measure; default: all.")] = None,
    model: Annotated[Path | None, typer.Option(help="Pipeline; default: the embedded one.")] = None,
    samples: int = 64,
    steps: int = 20,
    guidance: float = 4.0,
    quanto: Annotated[bool, typer.Option(help="Measure optimum-quanto's weights too.")] = True,
) -> None:
    """Measure, print the table, write the JSON."""
    from dcomp.recipes.demo import embedded_model
    from dcomp.recipes.load import load_recipe
    from dcomp.recipes.run import run_recipe
    from dcomp.recipes.validate import validate

    source = model or embedded_model()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def measure(name: str, compressed: Path, minutes: float) -> None:
            result = validate(
                compressed, source, samples=samples, steps=steps, guidance=guidance, seed=0, work=work / "samples"
            )
            data = result.to_dict()
            row = {"name": name, "minutes": round(minutes, 1), **{key: data[key] for key in COLUMNS}}
            row |= {"speedup_min": data["speedup_min"], "speedup_max": data["speedup_max"]}
            rows.append(row)
            print(json.dumps(row), flush=True)

        for name in preset or PRESETS:
            recipe = load_recipe(name, (), {"calibration.steps": steps, "calibration.guidance": guidance})
            started = time.perf_counter()
            run_recipe(source, recipe, work / name)
            measure(name.upper(), work / name, (time.perf_counter() - started) / 60)
        if quanto:
            started = time.perf_counter()
            write_quanto(source, work / "quanto", steps, guidance)
            measure("quanto qint4, group 64", work / "quanto", (time.perf_counter() - started) / 60)
    report = {
        "model": source.name,
        "samples": samples,
        "steps": steps,
        "guidance": guidance,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(report))


def table(report: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| | bytes / fp32 | bits a parameter | latent error | PSNR dB | SSIM | denoiser speed / fp32 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        speed = f"{row['speedup']:.2f} ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"
        # quanto's codes are held as floats here: only their values are compared, not their size or speed.
        ours = not row["name"].startswith("quanto")
        sizes = f"{row['denoiser_bytes_ratio']:.3f} | {row['bits_per_param']:.2f}" if ours else "- | -"
        figures = f"{row['latent_rel_error']:.4f} | {row['psnr_db']:.1f} | {row['ssim']:.4f}"
        lines.append(f"| {row['name']} | {sizes} | {figures} | {speed if ours else '-'} |")
    return "\n".join(lines)


def write_quanto(source: Path, output: Path, steps: int, guidance: float) -> None:
    """Save the pipeline with the values of quanto's codes as weights, wherever our W4A16 quantizes."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight

    from dcomp.calibrate.pipeline import open_pipeline
    from dcomp.recipes.load import load_recipe
    from dcomp.recipes.run import plan_recipe

    recipe = load_recipe("w4a16", (), {"calibration.steps": steps, "calibration.guidance": guidance})
    plan = plan_recipe(source, recipe)
    pipeline = open_pipeline(source)
    for name, decision in plan.decisions.items():
        if decision.scheme is None:
            continue
        weight = pipeline.denoiser.get_submodule(name).weight.data
        group = decision.scheme.group_size
        if group is None:
            scale = AbsmaxOptimizer()(weight, qint8, 0)
            codes = quantize_weight(weight, qint8, 0, scale)
        else:
            scale, shift = MaxOptimizer()(weight, qint4, 0, group)
            codes = quantize_weight(weight, qint4, 0, scale, shift, group)
        weight.copy_(codes.dequantize().view_as(weight))
    pipeline.pipe.save_pretrained(output)


if __name__ == "__main__":
    typer.run(main)
