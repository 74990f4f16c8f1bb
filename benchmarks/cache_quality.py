"""How good cache plans are: ours, the schedules of the literature, and fewer sampler steps, at equal products.

    python benchmarks/cache_quality.py [--model MODEL] [--steps 50] [--scheduler DDIMScheduler] [--samples 32]

All plans run through the same executor on the same model, prompts and noise, which no search saw. A schedule of the
literature is placed by its own rule with as many computing calls as the budget allows, on every zone that it can use;
of these the row has the best one on a few of the pictures, so that it is never judged by a badly chosen branch.
`speedup` is the measured time of the plan's calls against calls that compute everything, in turns in this process.

The table is printed and written to `--out` as JSON.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BUDGETS = (1.5, 2.0, 2.5, 4.0, 6.0)
FIRST_INDEX = 3_000_000  # of noise that nothing else starts from
BATCH = 8
SCOUTED = 4  # pictures that a schedule's zone is chosen on
WINDOW = 24  # calls that the drift of schedules looks back
FORECASTS = {"TaylorSeer interval": "taylor1", "HiCache interval": "hermite1"}
NAMES = {"uniform": "DeepCache uniform", "power": "DeepCache power", "partition": "CacheQuant", "cosine": "DDT"}

Rows = tuple[dict[str, str], ...]


def main(
    model: Annotated[Path, typer.Option(help="Pipeline or checkpoint; default: the embedded one.")] = ROOT
    / "examples"
    / "emoji-sd",
    steps: int = 50,
    scheduler: Annotated[str | None, typer.Option(help="diffusers class; default: the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Left out where the pipeline has none.")] = 4.0,
    samples: int = 32,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "cache_quality.json",
) -> None:
    """Measure, write the JSON, print the table."""
    from dcomp.cachequant.drift import record_reference
    from dcomp.cachequant.plan_set import PlanSet
    from dcomp.cachequant.prices import CallPrices
    from dcomp.cachequant.zones import find_zones
    from dcomp.calibrate.pipeline import Generation, num_classes, open_pipeline
    from dcomp.calibrate.prompts import read_prompts
    from dcomp.recipes.bench import fill_prompts, record_calls
    from dcomp.recipes.schedule import search_schedule

    pipeline = open_pipeline(model, scheduler=scheduler)
    guidance = guidance if pipeline.kind != "unconditional" else None
    settings = Generation(steps=steps, guidance=guidance, batch_size=BATCH)
    found = read_prompts(None, 64, pipeline.kind, model=pipeline.source, classes=num_classes(pipeline.denoiser))
    prompts = fill_prompts(found[::-1], samples)  # the search takes the first ones
    args, kwargs = record_calls(pipeline, prompts[:1], settings)[0]
    zones = find_zones(pipeline.denoiser, args, kwargs)
    prices = CallPrices(pipeline.denoiser, args, kwargs, zones)
    share = {zone.name: prices.macs([zone.name]) / prices.macs() for zone in zones}
    useful = [zone for zone in zones if share[zone.name] < 1 / min(BUDGETS)]
    indices = range(FIRST_INDEX, FIRST_INDEX + 4)
    reference = record_reference(pipeline, useful, prompts[:4], indices, settings, window=WINDOW)
    calls = len(reference.timesteps)
    judge = Judge(pipeline, zones, reference.timesteps, prompts, settings)
    scout = Judge(pipeline, zones, reference.timesteps, prompts[-SCOUTED:], settings)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plans.json"
        options = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
        result = search_schedule(model, budgets=BUDGETS, output=file, **options)  # type: ignore[arg-type]
        ours = {each.name: each.plan for each in PlanSet.read(file).plans} if result.file else {}

    table: list[dict[str, Any]] = []
    for budget in BUDGETS:
        best: dict[str, tuple[float, str, Rows]] = {}
        for planner, zone, rows in literature(calls, budget, share, reference):
            seen = scout.rows(rows)["psnr"]
            if planner not in best or seen > best[planner][0]:
                best[planner] = seen, zone, rows
        for planner, (_, zone, rows) in best.items():
            row = {"budget": budget, "planner": planner, "zone": zone, **judge.rows(rows)}
            table.append(row | {"macs": calls / cost(rows, share), "speedup": speedup(prices, rows)})
        plan = ours.get(f"{budget:g}x")
        if plan:
            rows = tuple(dict(row) for row in plan.actions)
            row = {"budget": budget, "planner": "dcomp", "zone": "chosen", **judge.rows(rows)}
            table.append(row | {"macs": calls / cost(rows, share), "speedup": speedup(prices, rows)})
        fewer = max(1, round(steps / budget))
        row = {"budget": budget, "planner": "fewer steps", "zone": f"{fewer} steps", **judge.steps(fewer)}
        table.append(row | {"macs": steps / fewer, "speedup": steps / fewer})
        print(show([row for row in table if row["budget"] == budget]), flush=True)
    header = {
        "model": model.name,
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": steps,
        "guidance": guidance,
        "samples": samples,
        "search_seconds": round(result.seconds, 1),
        "torch": torch.__version__,
    }
    out.write_text(json.dumps({**header, "rows": table}, indent=1) + "\n")
    print(f"Search: {result.seconds:.0f} s. Written to {out}")


class Judge:
    """Follows plans on pictures that nobody else sees."""

    def __init__(self, pipeline: Any, zones: Sequence[Any], timesteps: Sequence[float], prompts: Any, settings: Any):
        self.pipeline, self.zones, self.timesteps = pipeline, tuple(zones), tuple(timesteps)
        self.prompts, self.settings = prompts, settings
        self.original = self._run(settings)

    def rows(self, rows: Rows) -> dict[str, float]:
        """Return what a plan does to latents and pictures."""
        from dcomp.cachequant.executor import following
        from dcomp.cachequant.guide import PlanGuide
        from dcomp.cachequant.plan import CachePlan
        from dcomp.cachequant.trials import places_of

        places = places_of(self.pipeline.scheduler, self.timesteps)
        plan = CachePlan(self.zones, self.timesteps, places, rows)
        with following(self.pipeline.denoiser, self.pipeline.scheduler, PlanGuide(plan)) as executor:
            made = self._run(self.settings)
        assert not executor.stats.fallbacks, executor.stats.fallbacks
        return self._compare(made)

    def steps(self, steps: int) -> dict[str, float]:
        """Return the same of fewer scheduler steps."""
        return self._compare(self._run(replace(self.settings, steps=steps)))

    def _run(self, settings: Any) -> Any:
        return self.pipeline.run(self.prompts, range(FIRST_INDEX, FIRST_INDEX + len(self.prompts)), settings)

    def _compare(self, made: Any) -> dict[str, float]:
        from dcomp.calibrate.quality import decibels, mean_squared_errors, relative_errors

        errors = relative_errors(self.original.latents, made.latents)
        psnr = decibels(mean_squared_errors(self.original.images, made.images))
        return {
            "error": float(errors.mean()),
            "median_error": float(errors.median()),
            "psnr": float(psnr.mean()),
        }


def literature(calls: int, budget: float, share: dict[str, float], reference: Any) -> Iterator[tuple[str, str, Rows]]:
    """Yield planner, zone and rows of all schedules that keep a budget."""
    from dcomp.cachequant.schedules import SCHEDULES, ScheduleError, ScheduleTask

    for zone, drift in reference.drifts.items():
        count = int((calls / budget - calls * share[zone]) / (1 - share[zone]) + 1e-9)
        if count < 1:
            continue
        for name, rule in SCHEDULES.items():
            try:
                computing = rule(ScheduleTask(calls, count, drift))
            except ScheduleError:
                continue
            yield NAMES[name], zone, placed(calls, computing, zone, "reuse")
        if zone == "all":
            computing = SCHEDULES["uniform"](ScheduleTask(calls, count, drift))
            for name, predictor in FORECASTS.items():
                yield name, zone, placed(calls, computing, zone, predictor)


def placed(calls: int, computing: Sequence[int], zone: str, predictor: str) -> Rows:
    """Return rows in which all calls but some predict a zone; the first gap of a forecast reuses."""
    rows = []
    for call in range(calls):
        before = sum(other < call for other in computing)
        name = predictor if before > 1 else "reuse"
        rows.append({} if call in computing else {zone: name})
    return tuple(rows)


def cost(rows: Rows, share: dict[str, float]) -> float:
    """Return the products of a plan, in calls that compute everything."""
    return sum(1.0 if not row else min(share[zone] for zone in row) for row in rows)


def speedup(prices: Any, rows: Rows) -> float:
    """Return the measured time of calls that compute everything by that of a plan's calls."""
    return len(rows) / sum(prices.seconds(list(row)) for row in rows)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, best first."""
    lines = ["| budget | planner | zone | fewer products | speedup | latent error | median | PSNR dB |"]
    lines.append("|---:|---|---|---:|---:|---:|---:|---:|")
    lines += [
        f"| {row['budget']:g}x | {row['planner']} | {row['zone']} | {row['macs']:.2f} | {row['speedup']:.2f} | "
        f"{row['error']:.4f} | {row['median_error']:.4f} | {row['psnr']:.1f} |"
        for row in sorted(rows, key=lambda row: -row["psnr"])
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
