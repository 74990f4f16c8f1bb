"""Speed of cache plans with quantization at Stable Diffusion 1.5's shape, and what following a plan costs itself.

    python benchmarks/cache_speed.py PLANS.json [--min-psnr 30] [--preset w8a8] [--pruned OUT] [--batch 2] [--repeats 5]

`PLANS.json` comes from `dcomp search-schedule` on a quantized checkpoint of the embedded pipeline; the plans whose
pictures were within `--min-psnr` are taken. Their calls are timed at the other shape, with random weights: fp32 and
quantized calls in turns, and quantized calls that predict each of the plans' zones in turns with whole ones. A call's
time depends on its zones alone, so that the sum over a plan is the time of all calls. With `--pruned` what was cut out
of a checkpoint of the embedded pipeline is cut out of the other shape first, at the same relative places
(`relative_cuts.py`); if that checkpoint has learned its guidance, its calls run half the rows of the original's. Prints
a table and writes `--out`.
"""

import copy
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
from speed import machine, quantized
from stable_diffusion_shape import random_arguments, random_unet

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main(
    plans: Annotated[Path, typer.Argument(help="Of `dcomp search-schedule`.")],
    min_psnr: float = 30.0,
    preset: str = "w8a8",
    batch: int = 2,
    latent: Annotated[int, typer.Option(help="Latent height and width.")] = 64,
    repeats: int = 5,
    pruned: Annotated[Path | None, typer.Option(help="Checkpoint with cuts.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "cache_speed.json",
) -> None:
    """Measure, print the table, write the JSON."""
    from dcomp.cachequant.plan_set import PlanSet
    from dcomp.cachequant.prices import CallPrices
    from dcomp.cachequant.zones import find_zones
    from dcomp.calibrate.cost import count_macs
    from dcomp.calibrate.timing import time_in_turns
    from dcomp.compress.manifest import read_manifest

    torch.set_grad_enabled(False)
    chosen = sorted((p for p in PlanSet.read(plans).plans if p.psnr >= min_psnr), key=lambda plan: plan.speedup)
    original = random_unet()
    small = copy.deepcopy(original)
    args = random_arguments(batch, latent)
    own = args
    if pruned:
        cut_alike(small, pruned)
        if read_manifest(pruned).guidance is not None:  # one context
            own = (args[0][: batch // 2], args[1], args[2][: batch // 2])
    counts = [sum(p.numel() for p in each.parameters()) for each in (original, small)]
    quantized(small, preset, (args[0][:, :, :16, :16], *args[1:]), {})
    names = {zone.name for plan in chosen for zone in plan.plan.zones}
    zones = [zone for zone in find_zones(small, own, {}) if zone.name in names]
    assert {zone.name for zone in zones} == names, f"this shape has no zones {names - {z.name for z in zones}}"
    prices = CallPrices(small, own, {}, zones)
    pairs = time_in_turns(lambda: original(*args), lambda: small(*own), repeats)
    bits = [fp32 / quick for fp32, quick in pairs]
    report: dict[str, Any] = {
        "preset": preset,
        "batch": batch,
        "latent": latent,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "torch": torch.__version__,
        "parameters": round(counts[1] / counts[0], 3),
        "contexts": 2 * len(own[0]) // batch,
        "macs": round(prices.macs() / count_macs(original, args, {}).total, 3),
        "bits": [round(number, 2) for number in (statistics.median(bits), min(bits), max(bits))],
        "plans": [timed(plan, prices, statistics.median(bits)) for plan in chosen],
        "overhead": round(overhead(), 4),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + table(report))


def cut_alike(denoiser: Any, checkpoint: Path) -> None:
    """Cut out of a denoiser what was cut out of a checkpoint of the embedded pipeline."""
    from relative_cuts import carried_over

    from dcomp.calibrate.pipeline import open_pipeline
    from dcomp.compress.pruning.cut import cut, cuts_of
    from dcomp.compress.pruning.units import find_units

    small = open_pipeline(ROOT / "examples" / "emoji-sd").denoiser
    units = find_units(denoiser)
    cut(denoiser, carried_over(cuts_of(open_pipeline(checkpoint).denoiser), find_units(small), units), units)


def timed(chosen: Any, prices: Any, bits: float) -> dict[str, Any]:
    """Return what a plan saves at this shape, in products and in time, and with the speed of the quantized calls."""
    rows = Counter(frozenset(row) for row in chosen.plan.actions)
    time = sum(count * prices.seconds(row) for row, count in rows.items()) / chosen.plan.calls
    products = sum(count * prices.macs(row) for row, count in rows.items()) / (chosen.plan.calls * prices.macs())
    return {
        "name": chosen.name,
        "psnr": round(chosen.psnr, 1),
        "calls": chosen.plan.calls,
        "whole_calls": rows[frozenset()],
        "partial_calls": sum(count for row, count in rows.items() if prices.macs(row)) - rows[frozenset()],
        "macs": round(1 / products, 2),
        "time": round(1 / time, 2),
        "time_of_macs": round(products / time, 3),
        "together": round(bits / time, 2),
    }


def overhead(repeats: int = 25) -> float:
    """Return the time of a call of the embedded pipeline that a plan lets compute, by that of one without a plan."""
    from dcomp.cachequant.executor import CacheExecutor
    from dcomp.cachequant.guide import CallOrder
    from dcomp.cachequant.zones import find_zones
    from dcomp.calibrate.clock import StepClock
    from dcomp.calibrate.pipeline import Generation, open_pipeline
    from dcomp.calibrate.timing import time_in_turns
    from dcomp.recipes.bench import record_calls

    pipeline = open_pipeline(ROOT / "examples" / "emoji-sd")
    denoiser = pipeline.denoiser
    args, kwargs = record_calls(pipeline, ["a cat"], Generation(steps=2, guidance=4.0))[0]
    zones = tuple(find_zones(denoiser, args, kwargs))

    class Computing:
        """A guide that lets every call compute and keep all zones."""

        def __init__(self) -> None:
            self.zones = zones

        def place(self, timestep: float, before: int | None) -> int:
            return 0 if before is None else before + 1

        def order(self, call: int) -> CallOrder:
            return CallOrder(keep=frozenset(zone.name for zone in zones))

    def following() -> None:
        denoiser(*args, **kwargs)

    plain = copy.deepcopy(denoiser)
    clock = StepClock()
    with clock.attach(denoiser), CacheExecutor(denoiser, Computing(), clock):
        pairs = time_in_turns(lambda: plain(*args, **kwargs), following, repeats)
    return statistics.median(own / without for without, own in pairs)


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    bits = "{:.2f} ({:.2f} to {:.2f})".format(*report["bits"])
    return "\n".join(
        [
            "| plan | PSNR dB | calls that compute all, a part | products | time | time by products | with "
            f"{report['preset'].upper()} |",
            "|---|---:|---:|---:|---:|---:|---:|",
            f"| none | | all | 1.00 | 1.00 | 1.00 | {bits} |",
            *map(_row, report["plans"]),
            "",
            f"A call of the embedded pipeline that a plan with all zones lets compute takes {report['overhead']:.3f} "
            "of one without a plan.",
        ]
    )


def _row(plan: dict[str, Any]) -> str:
    calls = f"{plan['whole_calls']}, {plan['partial_calls']} of {plan['calls']}"
    ratios = f"{plan['macs']:.2f} | {plan['time']:.2f} | {plan['time_of_macs']:.2f} | **{plan['together']:.2f}**"
    return f"| {plan['name']} | {plan['psnr']} | {calls} | {ratios} |"


if __name__ == "__main__":
    typer.run(main)
