"""How good pruned denoisers are: every method at every part of the parameters, before and after equal recovery.

    python benchmarks/prune_quality.py [--model MODEL] [--part 0.2] [--method magnitude] [--iterations 1000]
                                       [--keep UNFINISHED.json]

All methods cut the same denoiser to the same budgets; members, parts and widths are chosen by the method alone, and of
the default's few best choices the one with the least error of final latents on pictures that no row is judged by.
Figures are of pictures whose noise nobody else has seen, against those of the original: relative error of final latents
(geometric mean), PSNR, FID by random features, and beside it the FID of the original against itself with other noise.
`speed` is the time of the original's call by that of the pruned one, in turns in this process. Recovery learns from the
same trajectories, with the same steps for all; they are as many as a run would record.

The table is printed and written to `--out` as JSON.
"""

import json
import statistics
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PARTS = (0.1, 0.2, 0.3, 0.5)
FIRST_INDEX = 4_000_000  # of noise that nothing else starts from
BATCH = 8
EXTRACTOR = "random-conv"
ROUND_TO = 32
SETTINGS = ("model", "steps", "guidance", "samples", "iterations", "extractor")  # that rows of one file share


def main(
    model: Annotated[Path, typer.Option(help="Pipeline; default: the embedded one.")] = ROOT / "examples" / "emoji-sd",
    steps: int = 20,
    guidance: Annotated[float | None, typer.Option(help="Left out where the pipeline has none.")] = 4.0,
    samples: Annotated[int, typer.Option(help="Pictures of each row.")] = 32,
    part: Annotated[list[float] | None, typer.Option(help="Of the parameters that goes; default: 4 of them.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    iterations: Annotated[int, typer.Option(help="Steps of recovery; 0 for none.")] = 1000,
    prompts: Annotated[int, typer.Option(help="Trajectories that cuts are made from.")] = 64,
    keep: Annotated[Path | None, typer.Option(help="JSON file whose rows stay: same model and settings.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "prune_quality.json",
) -> None:
    """Measure, write the JSON, print the table."""
    from dcomp.calibrate.final_latents import FinalLatents
    from dcomp.calibrate.pipeline import Generation, open_pipeline
    from dcomp.calibrate.prompts import read_prompts
    from dcomp.calibrate.record import record_calibration_set
    from dcomp.calibrate.replay import gather_rows
    from dcomp.compress.pruning.costs import Saving, measure_costs
    from dcomp.compress.pruning.features import FeatureLoss
    from dcomp.compress.pruning.importance import Subject
    from dcomp.compress.pruning.prune import METHODS, PROPOSALS, additivity, proposals, score
    from dcomp.compress.pruning.recovery import recover
    from dcomp.compress.pruning.units import find_units
    from dcomp.recipes.bench import fill_prompts
    from dcomp.recipes.prune_stage import MASKED, latents_of, trajectories_to_learn_from
    from dcomp.recipes.schema import PruneStage

    torch.set_grad_enabled(False)
    pipeline = open_pipeline(model)
    guidance = guidance if pipeline.kind != "unconditional" else None
    settings = Generation(steps=steps, guidance=guidance, batch_size=BATCH)
    texts = read_prompts(None, prompts, pipeline.kind, model=pipeline.source, classes=pipeline.classes)
    original, name = pipeline.denoiser, pipeline.denoiser_name
    judge = Judge(pipeline, texts, samples, settings)
    report: dict[str, Any] = {
        "model": model.name,
        "steps": steps,
        "guidance": guidance,
        "samples": samples,
        "iterations": iterations,
        "extractor": EXTRACTOR,
        "parameters": sum(p.numel() for p in original.parameters()),
        "seed_to_seed_fid": judge.seed_to_seed(),
        "additivity": {},
        "torch": torch.__version__,
        "rows": [],
    }
    if keep:
        before = json.loads(keep.read_text())
        assert all(before[key] == report[key] for key in SETTINGS), f"{keep} was measured with other settings"
        report |= {"rows": before["rows"], "additivity": before["additivity"]}
    wanted = [(how, fewer) for how in method or METHODS for fewer in part or PARTS]
    measured = {(row["method"], row["part"]) for row in report["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        recorded = record_calibration_set(pipeline, texts, settings, Path(folder) / "set")
        rows = gather_rows(recorded, 32, denoiser=original)
        many = rows
        if iterations:
            stage = PruneStage(recover="full", recover_iterations=iterations)
            of_one = len(recorded.timesteps) * (1 if rows.pairs is None else 2)
            count = trajectories_to_learn_from(stage, of_one)
            more = record_calibration_set(pipeline, fill_prompts(texts, count), settings, Path(folder) / "more")
            many = gather_rows(more, count * of_one, denoiser=original)
        scale = pipeline.guidance(guidance)
        units = find_units(original)
        one = rows.take([0, 1])
        costs = measure_costs(original, units, one.args, one.kwargs)
        latents = FinalLatents(pipeline, texts, settings, Path(folder) / "latents.safetensors")

        for how, parts in groupby((pair for pair in wanted if pair not in measured), key=itemgetter(0)):
            runs = latents_of(pipeline, texts, settings)
            subject = Subject(original, units, rows, scale, latents=runs, trajectories=min(prompts, MASKED))
            scored = score(subject, costs, how, round_to=ROUND_TO)
            if scored.units is not None:
                found = additivity(subject, scored)
                report["additivity"] = {"correlation": found.correlation, "ratio": found.ratio, "count": found.count}
            for _, fewer in parts:
                needed = Saving(round(fewer * costs.whole.parameters), 0)
                best = None
                for each in proposals(subject, scored.problem, needed, how, PROPOSALS if METHODS[how].measured else 1):
                    setattr(pipeline.pipe, name, each.denoiser)
                    error = latents.error() if METHODS[how].measured else 0.0
                    if best is None or error < best[0]:
                        best = (error, each)
                assert best is not None
                student = best[1].denoiser
                setattr(pipeline.pipe, name, student)
                row = {"part": fewer, "method": how, **judge.figures(), **shape(original, student, one)}
                if iterations:
                    features = FeatureLoss(original, student, units, many)
                    done = recover(student, many, features=features, iterations=iterations, guidance=scale)
                    after = {f"recovered_{key}": value for key, value in judge.figures().items()}
                    row |= {**after, "recovery_steps": done.iterations, "recovery_best": done.best}
                setattr(pipeline.pipe, name, original)
                report["rows"].append(row)
                out.write_text(json.dumps(report, indent=1) + "\n")
                print(table({**report, "rows": report["rows"][-1:]}).splitlines()[-1], flush=True)
    print(f"\n{table(report)}\n\nWritten to {out}")


class Judge:
    """Makes pictures that nobody else sees, and compares them with the original's."""

    def __init__(self, pipeline: Any, texts: list[str], samples: int, settings: Any) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._prompts = [texts[-1 - i % len(texts)] for i in range(samples)]
        self._original = self._run(FIRST_INDEX)

    def seed_to_seed(self) -> float:
        """Return the FID of the original against itself, with other noise."""
        return self._fid(self._run(FIRST_INDEX + 100_000))

    def figures(self) -> dict[str, float]:
        """Return figures of the pipeline as it is now."""
        from dcomp.calibrate.quality import decibels, geometric_mean, mean_squared_errors, relative_errors

        made = self._run(FIRST_INDEX)
        error = geometric_mean(relative_errors(self._original.latents, made.latents))
        psnr = decibels(mean_squared_errors(self._original.images, made.images))
        return {"error": error, "psnr": float(psnr.mean()), "fid": self._fid(made)}

    def _run(self, first: int) -> Any:
        return self._pipeline.run(self._prompts, range(first, first + len(self._prompts)), self._settings)

    def _fid(self, made: Any) -> float:
        from dcomp.calibrate.quality import feature_distance, open_extractor

        extract = open_extractor(EXTRACTOR)
        return float(feature_distance(extract(self._original.images), extract(made.images), EXTRACTOR).fid)


def shape(original: Any, student: Any, rows: Any) -> dict[str, float]:
    """Return what is left of parameters, bytes and multiply-accumulates, and how much faster a call is."""
    from dcomp.calibrate.cost import count_macs
    from dcomp.calibrate.timing import time_in_turns

    def run(denoiser: Any) -> None:
        denoiser(*rows.args, **rows.kwargs)

    pairs = time_in_turns(lambda: run(original), lambda: run(student), 5)
    counts = [sum(p.numel() for p in each.parameters()) for each in (original, student)]
    macs = [count_macs(each, rows.args, rows.kwargs).total for each in (original, student)]
    return {
        "parameters": counts[1] / counts[0],
        "megabytes": counts[1] * 4 / 1e6,
        "macs": macs[1] / macs[0],
        "speed": statistics.median(whole / small for whole, small in pairs),
    }


def setup(report: dict[str, Any]) -> str:
    """Return in words what all rows share."""
    guidance = "no guidance" if report["guidance"] is None else f"guidance {report['guidance']:g}"
    recovery = f"{report['iterations']} steps of recovery at most" if report["iterations"] else "no recovery"
    found = report["additivity"]
    words = (
        f" Sums of errors of single cuts have a rank correlation of {found['correlation']:.2f} with errors of several."
        if found.get("correlation") is not None
        else ""
    )
    return (
        f"`{report['model']}`, {report['steps']} steps, {guidance}, {report['samples']} pictures, {recovery}; "
        f"the original against itself with other noise has a FID of {report['seed_to_seed_fid']:.2e}.{words}"
    )


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table."""
    columns = ["latent error", "PSNR dB", "FID"] + ["recovered: error", "PSNR dB", "FID"] * bool(report["iterations"])
    lines = [
        f"| parameters less | method | left | products | speed | {' | '.join(columns)} |",
        f"|---:|---|---:|---:|---:|{'---:|' * len(columns)}",
    ]
    for row in sorted(report["rows"], key=lambda row: (row["part"], row["error"])):
        values = [f"{row[key]:{form}}" for key, form in _FIGURES]
        if report["iterations"]:
            values += [f"{row[f'recovered_{key}']:{form}}" for key, form in _FIGURES]
        size = f"{row['parameters']:.3f} | {row['macs']:.3f} | {row['speed']:.2f}"
        lines.append(f"| {row['part']:.0%} | {row['method']} | {size} | {' | '.join(values)} |")
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """Return the latent errors of all methods as a small Markdown table, the least first."""
    parts = sorted({row["part"] for row in report["rows"]})
    errors: dict[str, dict[float, float]] = {}
    for row in report["rows"]:
        errors.setdefault(row["method"], {})[row["part"]] = row["error"]
    lines = ["| method | " + " | ".join(f"{part:.0%} less" for part in parts) + " |", "|---|" + "---:|" * len(parts)]
    for method, found in sorted(errors.items(), key=lambda item: min(item[1].values())):
        cells = [f"{found[part]:.4f}" if part in found else "" for part in parts]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


_FIGURES = (("error", ".4f"), ("psnr", ".1f"), ("fid", ".2e"))

if __name__ == "__main__":
    typer.run(main)
