"""Speed of one denoiser call at Stable Diffusion 1.5's shape: integers against fp32, interleaved, as ratios.

    python benchmarks/speed.py [--preset w8a8 --preset w4a8] [--peer "OpenVINO int8"] [--keep FOLDER] [--repeats 7]

Weights are random, see `stable_diffusion_shape.py`. Each round times the fp32 call and every quantized call once, in
turn, so that a drift of the machine's speed hits all of them; the ratio of a round is what counts, its median is what
is quoted; what is ten times as slow as fp32 has one round. Peers of `denoiser_peers.py` are timed in the same rounds.
One more call of each of ours is profiled, and its time split by kinds of operations. Prints tables and writes
`benchmarks/results/speed-<instruction set>.json`.
"""

import copy
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))
from denoiser_peers import PEERS, prepared
from stable_diffusion_shape import random_arguments, random_unet

HOPELESS = 10  # times as slow as fp32: one round is enough
RESULTS = Path(__file__).parent / "results"
KINDS = {  # of operations, by what their names in the profile contain; the first that fits counts
    "attention": ("scaled_dot_product", "dcomp_native::attention", "dcomp::attention"),
    "convolutions": ("conv2d", "convolution", "onednn::qconv"),
    "linear layers": ("linear", "addmm", "aten::mm", "_int_mm", "dcomp_native::rescale", "unpack_int4"),
    "rounding": ("quantize", "dcomp_native::range", "normal_"),
    "norms": ("norm",),
}


class Calls:
    """A calibration set of one call that is never written to disk."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from dcomp.calibrate.record import RecordedCall

        place = {"trajectory": 0, "call": 0, "step": 0, "timestep": 500.0, "contexts": ("cond",)}
        self._call = RecordedCall(args, kwargs, next(iter((*args, *kwargs.values()))), **place)

    def __len__(self) -> int:
        return 1

    def calls(self) -> Iterator[Any]:
        """Yield the call."""
        yield self._call


def quantized(denoiser: Any, preset: str, args: tuple[Any, ...], kwargs: dict[str, Any], bins: Any = None) -> Any:
    """Quantize a model in place by a preset, with ranges that take no search, and return what probing it found."""
    from dcomp.calibrate.structure import probe_structure
    from dcomp.compress.policy import choose_schemes
    from dcomp.compress.quantize import quantize_denoiser

    structure = probe_structure(denoiser, args, kwargs)
    schemes = {n: d.scheme for n, d in choose_schemes(denoiser, structure, preset).items() if d.scheme is not None}
    schemes = {n: dataclasses.replace(s, weight_range="minmax", input_range="minmax") for n, s in schemes.items()}
    with tempfile.TemporaryDirectory() as work:
        quantize_denoiser(denoiser, Calls(args, kwargs), schemes, bins, Path(work))
    return structure


def machine() -> str:
    """Return the kind of processor, and the best instruction set that our kernels have for it."""
    return f"{platform.machine()} with {instruction_set()}"


def instruction_set() -> str:
    """Return the best instruction set that our kernels have for this processor."""
    from dcomp.kernels.native import rows

    return "no kernels of our own" if rows.defect() else rows.instruction_set()


def main(
    preset: Annotated[list[str] | None, typer.Option(help="Presets to time.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Of denoiser_peers.py; default: those that are there.")] = None,
    batch: int = 2,
    latent: Annotated[int, typer.Option(help="Latent height and width.")] = 64,
    repeats: int = 7,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for what peers quantize, used again if it is there.")
    ] = None,
) -> None:
    """Measure, print the table, write the JSON."""
    from dcomp.calibrate.clock import StepBins

    torch.set_grad_enabled(False)
    reference = random_unet()
    args = random_arguments(batch, latent)
    small = (args[0][:, :, :16, :16], args[1], args[2])
    models = {"fp32": reference}
    calls: dict[str, Any] = {"fp32": lambda: reference(*args).sample}
    for name in preset or ["w8a8", "w4a8"]:
        started = time.perf_counter()
        model = copy.deepcopy(reference)
        quantized(model, name, small, {}, StepBins((500.0,), (0,), ()))
        models[name] = model
        calls[name] = lambda model=model: model(*args).sample
        print(f"{name}: quantized in {time.perf_counter() - started:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        calls |= peers(reference, args, peer, keep or Path(folder))

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    predictions = {name: torch.as_tensor(call()) for name, call in calls.items()}  # packs weights and fills caches
    expected = predictions["fp32"]
    for turn in range(repeats):
        for name, call in calls.items():
            if turn and seconds[name][0] > HOPELESS * seconds["fp32"][0]:
                continue
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, times in seconds.items():
        ratios = [fp32 / own for fp32, own in zip(seconds["fp32"], times, strict=False)]
        rows.append(
            {
                "model": name,
                "speedup": round(statistics.median(ratios), 2),
                "speedup_min": round(min(ratios), 2),
                "speedup_max": round(max(ratios), 2),
                "error": round(((predictions[name] - expected).norm() / expected.norm()).item(), 4),
                "bytes": size(models[name]) if name in models else None,
            }
        )
    report = {
        "batch": batch,
        "latent": latent,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": torch.__version__,
        "rows": rows,
        "split": {name: split(model, args) for name, model in models.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"speed-{instruction_set()}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{table(report)}\n\n{split_table(report)}")


def peers(denoiser: Any, args: tuple[Any, ...], wanted: list[str] | None, folder: Path) -> dict[str, Any]:
    """Return calls of the denoiser in other runtimes, of all that can be imported if none is named."""
    calls = {}
    for name in PEERS if wanted is None else wanted:
        started = time.perf_counter()
        try:
            calls[name] = prepared(name, denoiser, args, folder)
        except (ImportError, RuntimeError) as error:
            print(f"{name}: left out, {error}", flush=True)
        else:
            print(f"{name}: quantized in {time.perf_counter() - started:.0f} s", flush=True)
    return calls


def size(model: Any) -> int:
    """Return the bytes of a model's tensors."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def split(model: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """Return the part of a call's time that each kind of operations takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*args)
    parts = dict.fromkeys((*KINDS, "others"), 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "others")
        parts[kind] += event.self_cpu_time_total
    return {kind: round(part / sum(parts.values()), 3) for kind, part in parts.items()}


def split_table(report: dict[str, Any]) -> str:
    """Return where the time of a call goes as Markdown."""
    kinds = list(next(iter(report["split"].values())))
    lines = [f"| part of a call's time | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for name, parts in report["split"].items():
        lines.append(f"| {name} | {' | '.join(f'{parts[kind]:.0%}' for kind in kinds)} |")
    return "\n".join(lines)


def table(report: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    fp32 = report["rows"][0]["bytes"]
    with_error = all("error" in row for row in report["rows"])
    lines = [
        "| | speed / fp32 (range over rounds) | bytes in memory / fp32 |" + " error of the prediction |" * with_error,
        "|---|---:|---:|" + "---:|" * with_error,
    ]
    for row in report["rows"]:
        speed = f"{row['speedup']:.2f} ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"
        part = "" if row["bytes"] is None else f"{row['bytes'] / fp32:.3f}"
        lines.append(f"| {row['model']} | {speed} | {part} |" + (f" {row['error']:.4f} |" if with_error else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
