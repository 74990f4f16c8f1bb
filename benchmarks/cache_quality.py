"""How good cache plans are: ours, the schedules of the literature, and fewer sampler steps, at equal products.

    python benchmarks/cache_quality.py [--model MODEL] [--steps 50] [--scheduler DDIMScheduler] [--samples 32]
    python benchmarks/cache_quality.py --planner joint --no-peers --keep FILE --out FILE

All plans run through the same executor on the same model, prompts and noise, which no planner saw. A schedule of the
literature is placed by its own rule with as many computing calls as the budget allows, on every zone that it can use;
of these the row has the one that a search would keep, so that no rule is judged by a badly chosen branch. `joint` is
ours, and proposes two plans a budget and some plain ones. Other packages (`cache_peers.py`) are measured on all
settings of a grid on a few of the pictures, and the best one that saves enough goes on; what they multiply is counted
while they run. Pictures of a quantized model are compared with those that it makes when nothing is skipped and
no input is rounded. `speedup` is the measured time of the plan's calls against calls that compute everything, in turns
in this process; of another package, of whole trajectories.

The table is printed and written to `--out` as JSON.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
from cache_peers import PEERS, CachePeer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
BUDGETS = (1.5, 2.0, 2.5, 4.0, 6.0)
FIRST_INDEX = 3_000_000  # of noise that nothing else starts from
BATCH = 8
EXTRACTOR = "random-conv"
SCOUTED = 4  # pictures that the best setting of another package is chosen on
SEARCHED = 8  # pictures that planners measure on; of their proposals one is chosen on as many others

SETTINGS = ("model", "scheduler", "steps", "guidance", "samples", "extractor")  # that rows of one file share
Rows = tuple[Any, ...]


def main(
    model: Annotated[Path, typer.Option(help="Pipeline or checkpoint; default: the embedded one.")] = ROOT
    / "examples"
    / "emoji-sd",
    steps: int = 50,
    scheduler: Annotated[str | None, typer.Option(help="diffusers class; default: the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Left out where the pipeline has none.")] = 4.0,
    samples: int = 32,
    budget: Annotated[list[float] | None, typer.Option(help="Times fewer products; default: 5 of them.")] = None,
    planner: Annotated[list[str] | None, typer.Option(help="Planners to measure; default: all.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure other packages too.")] = True,
    keep: Annotated[Path | None, typer.Option(help="JSON file whose other rows stay: same model and pictures.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "cache_quality.json",
) -> None:
    """Measure, write the JSON, print the table."""
    from dcomp.cachequant.planners import PLANNERS
    from dcomp.cachequant.prices import CallPrices
    from dcomp.cachequant.zones import find_zones, single_modules
    from dcomp.calibrate.pipeline import Generation, open_pipeline
    from dcomp.calibrate.prompts import read_prompts
    from dcomp.compress.split import quantized_layers
    from dcomp.compress.unrounded import unrounded_calls
    from dcomp.recipes.bench import fill_prompts, record_calls
    from dcomp.recipes.plan_choice import PlanChoice, PlanJudge
    from dcomp.recipes.planning import planning_task

    pipeline = open_pipeline(model, scheduler=scheduler)
    guidance = guidance if pipeline.kind != "unconditional" else None
    settings = Generation(steps=steps, guidance=guidance, batch_size=BATCH)
    found = read_prompts(None, 64, pipeline.kind, model=pipeline.source, classes=pipeline.classes)
    prompts = fill_prompts(found[::-1], samples)  # the search takes the first ones
    args, kwargs = record_calls(pipeline, prompts[:1], settings)[0]
    zones = find_zones(pipeline.denoiser, args, kwargs)
    every = (*zones, *single_modules(zones))
    prices = CallPrices(pipeline.denoiser, args, kwargs, every)
    searched = range(FIRST_INDEX - SEARCHED, FIRST_INDEX)
    task, trials = planning_task(pipeline, zones, prices, found[:SEARCHED], searched, settings)
    before = json.loads(keep.read_text()) if keep else {"rows": [], "not_run": {}, "planning_seconds": {}}
    seconds: dict[str, float] = {}
    judge = Judge(pipeline, every, trials.timesteps, prompts, settings)
    scout = Judge(pipeline, every, trials.timesteps, prompts[-SCOUTED:], settings)
    between = range(FIRST_INDEX - 2 * SEARCHED, FIRST_INDEX - SEARCHED)
    others = fill_prompts(found, 2 * SEARCHED)[SEARCHED:]
    exact = unrounded_calls(pipeline.denoiser) if quantized_layers(pipeline.denoiser) else None
    choosing = PlanJudge(pipeline, every, trials, others, between, settings, exact)
    choice = PlanChoice(task, prices, choosing)
    tried, not_run = try_peers(pipeline, scout) if peers else ([], {})
    wanted = budget or BUDGETS
    table: list[dict[str, Any]] = [row for row in before["rows"] if row["budget"] not in wanted]
    for budget in wanted:
        for name in planner or PLANNERS:
            started = time.perf_counter()
            shares = {zone: prices.macs([zone]) / prices.macs() for zone in task.zones_for(name)}
            proposed = PLANNERS[name](task, shares, task.calls / budget)
            if not proposed:
                continue
            rows = choice.best(f"{budget:g}x", proposed)[0].plan.actions if len(proposed) > 1 else proposed[0].rows
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            zone = " ".join(sorted({name.rpartition(".")[2] for row in rows for name in row}))
            row = {"budget": budget, "planner": name, "zone": zone, **judge.rows(rows)}
            cost = sum(prices.macs(list(row)) for row in rows) / prices.macs()
            table.append(row | {"macs": task.calls / cost, "speedup": speedup(prices, rows)})
        for each in best_of(tried, budget):
            with each.attached(pipeline):
                found_there = judge.made()
            row = {"budget": budget, "planner": each.peer.name, "zone": each.label, **found_there}
            table.append(row | {"macs": each.fewer, "speedup": wall_speedup(pipeline, prompts[:1], settings, each)})
        fewer = max(1, round(steps / budget))
        row = {"budget": budget, "planner": "fewer steps", "zone": f"{fewer} steps", **judge.steps(fewer)}
        table.append(row | {"macs": steps / fewer, "speedup": steps / fewer})
        measured = {row["planner"] for row in table if row["budget"] == budget}
        table += [r for r in before["rows"] if r["budget"] == budget and r["planner"] not in measured]
        print(show([row for row in table if row["budget"] == budget]), flush=True)
        header = {
            "model": label_of(model),
            "scheduler": type(pipeline.scheduler).__name__,
            "steps": steps,
            "guidance": guidance,
            "samples": samples,
            "extractor": EXTRACTOR,
            "not_run": before["not_run"] | not_run,
            "planning_seconds": before["planning_seconds"] | {name: round(value, 1) for name, value in seconds.items()},
            "torch": torch.__version__,
        }
        same = all(before.get(key, header[key]) == header[key] for key in SETTINGS)
        assert same, f"{keep} was measured with other settings"
        out.write_text(json.dumps({**header, "rows": table}, indent=1) + "\n")
    print(f"Written to {out}")


def label_of(model: Path) -> str:
    """Return the name of a model: of a checkpoint, that of its original and its bits."""
    from dcomp.compress.manifest import MANIFEST, read_manifest
    from dcomp.recipes.load import parse_recipe

    if not (model / MANIFEST).is_file():
        return model.name
    manifest = read_manifest(model)
    stage = parse_recipe(manifest.recipe, where=str(model)).quantize
    return f"{manifest.source.name} {stage.preset.upper()}" if stage else manifest.source.name


@dataclass(frozen=True)
class Tried:
    """A setting of another package's cache.

    Attributes:
        fewer: multiply-accumulates of calls that compute everything by those that it made.
        psnr: of the scout's pictures in dB.
    """

    peer: CachePeer
    setting: dict[str, Any]
    fewer: float
    psnr: float

    @property
    def label(self) -> str:
        """The setting in words."""
        return " ".join(f"{key} {value}" for key, value in self.setting.items() if key != "steps")

    def attached(self, pipeline: Any) -> AbstractContextManager[None]:
        """Return a `with` block in which the pipeline caches with it."""
        return self.peer.attached(pipeline, self.setting)


def try_peers(pipeline: Any, scout: "Judge") -> tuple[list[Tried], dict[str, str]]:
    """Return all settings of all packages that fit and run, and why others do not."""
    from dcomp.calibrate.cost import counting_macs

    tried: list[Tried] = []
    reasons: dict[str, str] = {}
    with counting_macs(pipeline.denoiser) as counted:
        scout.made()
        whole = counted().total
    for peer in PEERS:
        if not peer.fits(pipeline.denoiser):
            continue
        if importlib.util.find_spec(peer.package) is None:
            reasons[peer.name] = f"{peer.package} is not installed"
            continue
        for setting in peer.settings(pipeline.denoiser):
            setting = {**setting, "steps": scout.settings.steps}
            try:
                with peer.attached(pipeline, setting), counting_macs(pipeline.denoiser) as counted:
                    psnr = scout.made()["psnr"]
                tried.append(Tried(peer, setting, whole / counted().total, psnr))
            except Exception as error:  # a setting that a package cannot run must not end the others
                reasons[f"{peer.name} {setting}"] = f"{type(error).__name__}: {str(error)[:200]}"
    return tried, reasons


def best_of(tried: Sequence[Tried], budget: float) -> list[Tried]:
    """Return of each package the setting with the best pictures of those that save enough."""
    found = []
    for peer in PEERS:
        able = [one for one in tried if one.peer is peer and one.fewer >= budget * 0.98]
        found += [max(able, key=lambda one: one.psnr)] if able else []
    return found


def wall_speedup(pipeline: Any, prompts: Any, settings: Any, tried: Tried) -> float:
    """Return the time of whole trajectories of one picture by that of trajectories with a package's cache."""
    from dcomp.calibrate.timing import time_in_turns

    def run() -> None:
        pipeline.run(prompts, range(FIRST_INDEX, FIRST_INDEX + 1), settings, decode=False)

    def cached() -> None:
        with tried.attached(pipeline):
            run()

    return statistics.median(whole / fast for whole, fast in time_in_turns(run, cached, 3, min_seconds=0))


class Judge:
    """Follows plans on pictures that nobody else sees."""

    def __init__(self, pipeline: Any, zones: Sequence[Any], timesteps: Sequence[float], prompts: Any, settings: Any):
        from dcomp.compress.unrounded import unrounded

        self.pipeline, self.zones, self.timesteps = pipeline, tuple(zones), tuple(timesteps)
        self.prompts, self.settings = prompts, settings
        with unrounded(pipeline.denoiser):  # as searches do
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

    def made(self) -> dict[str, float]:
        """Return what the pipeline does as it is."""
        return self._compare(self._run(self.settings))

    def steps(self, steps: int) -> dict[str, float]:
        """Return the same of fewer scheduler steps."""
        return self._compare(self._run(replace(self.settings, steps=steps)))

    def _run(self, settings: Any) -> Any:
        return self.pipeline.run(self.prompts, range(FIRST_INDEX, FIRST_INDEX + len(self.prompts)), settings)

    def _compare(self, made: Any) -> dict[str, float]:
        from dcomp.calibrate.quality import (
            decibels,
            feature_distance,
            mean_squared_errors,
            open_extractor,
            relative_errors,
        )

        errors = relative_errors(self.original.latents, made.latents)
        psnr = decibels(mean_squared_errors(self.original.images, made.images))
        figures = {
            "error": float(errors.mean()),
            "median_error": float(errors.median()),
            "psnr": float(psnr.mean()),
        }
        if len(errors) > SCOUTED:
            extract = open_extractor(EXTRACTOR)
            features = [extract(images) for images in (self.original.images, made.images)]
            figures["fid"] = feature_distance(*features, EXTRACTOR).fid
        return figures


def speedup(prices: Any, rows: Rows) -> float:
    """Return the measured time of calls that compute everything by that of a plan's calls."""
    return len(rows) / sum(prices.seconds(list(row)) for row in rows)


def setup(report: dict[str, Any]) -> str:
    """Return in words what all rows of a file share."""
    guidance = "no guidance" if report["guidance"] is None else f"guidance {report['guidance']:g}"
    return (
        f"`{report['model']}`, {report['scheduler']}, {report['steps']} steps, {guidance}, {report['samples']} pictures"
    )


def grid(report: dict[str, Any]) -> str:
    """Return a Markdown table of PSNR: a row for each planner or package, a column for each budget."""
    budgets = sorted({row["budget"] for row in report["rows"]})
    cells = {(row["planner"], row["budget"]): row["psnr"] for row in report["rows"]}
    names = sorted({name for name, _ in cells}, key=lambda name: -sum(v for (n, _), v in cells.items() if n == name))
    best = {budget: max(v for (_, b), v in cells.items() if b == budget) for budget in budgets}

    def cell(name: str, budget: float) -> str:
        value = cells.get((name, budget))
        if value is None:
            return "-"
        return f"**{value:.1f}**" if value == best[budget] else f"{value:.1f}"

    lines = [f"| PSNR in dB | {' | '.join(f'{budget:g}x' for budget in budgets)} |", f"|---|{'---:|' * len(budgets)}"]
    lines += [f"| {name} | {' | '.join(cell(name, budget) for budget in budgets)} |" for name in names]
    return "\n".join(lines)


def summary(reports: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of our PSNR and the best of all others: a row for each report, a column a budget."""
    budgets = sorted({row["budget"] for report in reports for row in report["rows"]})
    lines = [f"| | {' | '.join(f'{budget:g}x' for budget in budgets)} |", f"|---|{'---:|' * len(budgets)}"]
    for report in reports:
        cells = []
        for budget in budgets:
            found = {row["planner"]: row["psnr"] for row in report["rows"] if row["budget"] == budget}
            ours = found.pop("joint", None)
            cells.append("-" if ours is None else f"{ours:.1f} ({max(found.values()):.1f})")
        lines.append(f"| {setup(report)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, best first."""
    lines = ["| budget | planner | zone | fewer products | speedup | latent error | median | PSNR dB | FID |"]
    lines.append("|---:|---|---|---:|---:|---:|---:|---:|---:|")
    lines += [
        f"| {row['budget']:g}x | {row['planner']} | {row['zone']} | {row['macs']:.2f} | {row['speedup']:.2f} | "
        f"{row['error']:.4f} | {row['median_error']:.4f} | {row['psnr']:.1f} | {row['fid']:.2e} |"
        for row in sorted(rows, key=lambda row: -row["psnr"])
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
