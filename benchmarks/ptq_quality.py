"""How good post-training quantization is: methods, the ladder of their parts, and other packages, all alike.

    python benchmarks/ptq_quality.py [--bits w4a8 ...] [--method default ...] [--seeds 3] [--no-peers] [--resume]

Every row is one quantized denoiser against the original: same prompts, seeds, scheduler and steps, noise that no
calibration saw. Options are single choices on top of a method, shown by what they change about it. The ladder adds one
part of a method after the other and prints what each one gains, with its spread over calibration seeds; a part that
does not help is called that. Peers are other packages with their own defaults on the layers that they support (see
`peers.py`).

A row is written to the JSON as soon as it is measured, and `--resume` goes on from there. The original's pictures and
the calibration sets lie in `--work` and are made once. `--show` prints the tables of a JSON and measures nothing.
"""

import hashlib
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
from peers import PEERS, Context, Peer
from ptq_methods import BITS, ladder, methods, options
from ptq_tables import tables

EXTRACTOR = "random-conv"
SEED = 0  # of the pictures; calibration seeds vary, this does not
BATCH = 8
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """What all rows of a file share."""

    model: Path
    fingerprint: str
    samples: int
    steps: int
    guidance: float | None

    def header(self) -> dict[str, Any]:
        """Return what decides whether two rows can be compared."""
        numbers = {"samples": self.samples, "steps": self.steps, "guidance": self.guidance, "seed": SEED}
        return {
            "model": self.model.name,
            "model_sha256": self.fingerprint,
            **numbers,
            "extractor": EXTRACTOR,
            "torch": torch.__version__,
        }


@dataclass(frozen=True)
class Job:
    """A recipe to measure; two with equal keys are one row."""

    name: str
    bits: str
    seed: int
    changes: dict[str, Any]
    recipe: Any

    @property
    def key(self) -> str:
        """Names the row by what is done, not by what it is called."""
        data = {key: value for key, value in self.recipe.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Report:
    """The JSON file: a header, and rows by key.

    Attributes:
        rows: key -> figures, or `not_run` with the reason.
        ladders: for each preset its calibration seeds, and its rungs with the keys of their rows.
    """

    file: Path
    header: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    ladders: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Report":
        """Read what `write` wrote."""
        data = json.loads(file.read_text())
        rows = {row.pop("key"): row for row in data.pop("rows")}
        return cls(file, header=data, ladders=data.pop("ladders"), rows=rows)

    def write(self) -> None:
        """Write the file in one step."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"key": key, **row} for key, row in self.rows.items()]
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({**self.header, "ladders": self.ladders, "rows": rows}, indent=1) + "\n")
        partial.replace(self.file)

    def done(self, key: str) -> bool:
        """Return whether a row was measured; one that did not run is tried again."""
        return key in self.rows and "not_run" not in self.rows[key]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Take a row in place of an older one of that name, which another version's recipe made, and write the file."""
        name = ("group", "bits", "name", "seed")
        same = [old for old, other in self.rows.items() if all(other.get(k) == row.get(k) for k in name)]
        for old in same:
            del self.rows[old]
        self.rows[key] = row
        self.write()
        shown = {name: value for name, value in row.items() if name not in _HIDDEN}
        print(json.dumps(shown), flush=True)

    def name(self, key: str, method: str) -> None:
        """Make a row that was measured under another name one of the matrix.

        It was a rung of the ladder, or a method that does the same with these bits: that one keeps its name.
        """
        row, known = self.rows[key], methods() | options()
        if row["name"] not in known:
            row["name"] = method
        elif row["name"] != method:
            row["same"] = sorted({*row.get("same", ()), method})


def main(
    bits: Annotated[list[str] | None, typer.Option(help="w8a8, w4a8, w4a16, w4a4; default: all.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods and options; default: all.")] = None,
    model: Annotated[Path | None, typer.Option(help="Pipeline; default: the embedded one.")] = None,
    samples: int = 64,
    steps: int = 20,
    guidance: Annotated[float, typer.Option(help="Left out where the pipeline has none.")] = 4.0,
    climb: Annotated[list[str] | None, typer.Option(help="Presets with a ladder; default: those of --bits.")] = None,
    seeds: Annotated[int, typer.Option(help="Calibration seeds of the ladder; 0 for no ladder.")] = 3,
    peers: Annotated[bool, typer.Option(help="Measure other packages too.")] = True,
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "ptq_quality.json",
    work: Annotated[Path | None, typer.Option(help="Folder of pictures and calibration sets, kept.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows of --out.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the tables of --out and measure nothing.")] = False,
) -> None:
    """Measure, write the JSON, print the tables."""
    if show:
        print(tables(Report.read(out)))
        return
    from dcomp.calibrate.pipeline import open_pipeline
    from dcomp.recipes.demo import embedded_model

    chosen = tuple(bits or BITS)
    source = (model or embedded_model()).resolve()
    opened = open_pipeline(source)
    scale = None if opened.guidance(None) is None else guidance
    settings = Settings(source, opened.fingerprint(), samples, steps, scale)
    del opened
    report = Report(out, settings.header())
    if resume and out.is_file():
        report = Report.read(out)
        if report.header != settings.header():
            raise typer.BadParameter(f"{out} was measured with {report.header}, not {settings.header()}")
    runner = Runner(settings, work or Path(tempfile.gettempdir()) / "dcomp-ptq-quality", report)

    known = methods() | options()
    names = method or list(known)
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"unknown methods {sorted(unknown)}; there are {', '.join(known)}")
    for preset in chosen:
        for name in names:
            if not known[name].only or preset in known[name].only:
                runner.measure_recipe(preset, name, known[name].changes, seed=0)
    if peers:
        for peer in PEERS:
            if bits is None or peer.bits in chosen:
                runner.measure_peer(peer)
    climbed = (tuple(climb) if climb else chosen) if seeds else ()
    report.ladders = [entry for entry in report.ladders if entry["bits"] not in climbed]
    for preset in climbed:
        report.ladders.append(runner.climb(preset, range(seeds)))
        report.write()
    report.write()
    print("\n" + tables(report))


class Runner:
    """Measures rows of one report.

    Args:
        settings: of all rows.
        work: folder that keeps pictures of the original and calibration sets, for any number of models and settings.
        report: where rows go.
    """

    def __init__(self, settings: Settings, work: Path, report: Report) -> None:
        self.settings, self.work, self.report = settings, work, report
        work.mkdir(parents=True, exist_ok=True)

    def measure_recipe(self, preset: str, name: str, changes: dict[str, Any], seed: int) -> str | None:
        """Run a recipe and validate it; return the row's key, or None for keys that this version does not know."""
        from dcomp.recipes.load import RecipeError

        try:
            job = Job(name, preset, seed, changes, self._recipe(preset, changes, seed))
        except RecipeError as error:
            print(f"{preset} {name}: left out, {error}", flush=True)
            return None
        if not self.report.done(job.key):
            self.report.add(job.key, self._attempt(lambda: self._recipe_row(job), self._labels(job)))
        elif name in methods() | options():
            self.report.name(job.key, name)
        return job.key

    def measure_peer(self, peer: Peer) -> None:
        """Apply a peer to an open pipeline and measure it by the same figures."""
        key = f"peer {peer.name}"
        labels = {"group": "peer", "bits": peer.bits, "name": peer.name, "note": peer.note}
        if self.report.done(key):
            return
        module = {"optimum-quanto": "optimum"}.get(peer.package, peer.package)
        if importlib.util.find_spec(module) is None:
            self.report.add(key, {**labels, "not_run": f"{peer.package} is not installed"})
            return
        self.report.add(key, self._attempt(lambda: self._peer_row(peer), labels))

    def climb(self, preset: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Measure the ladder of a preset with every calibration seed; return its rungs with their rows' keys."""
        rungs: list[dict[str, Any]] = []
        for seed in seeds:
            changes: dict[str, Any] = {}
            for step in ladder():
                if step.only and preset not in step.only:
                    continue
                asked = {**changes, **step.changes}
                key = self.measure_recipe(preset, step.name, asked, seed)
                if key is None:
                    continue
                changes = asked
                found = next((rung for rung in rungs if rung["name"] == step.name), None)
                if found is None:
                    rungs.append(found := {"name": step.name, "rows": []})
                found["rows"].append(key)
        return {"bits": preset, "seeds": list(seeds), "rungs": rungs}

    def _recipe(self, preset: str, changes: dict[str, Any], seed: int) -> Any:
        from dcomp.recipes.load import load_recipe

        calibration = {"steps": self.settings.steps, "guidance": self.settings.guidance, "seed": seed}
        # A tiny trial of this script does not want the full calibration either.
        calibration |= {"samples": min(64, self.settings.samples), "batch_size": BATCH}
        values = {f"calibration.{key}": value for key, value in calibration.items()}
        values |= {key: value for key, value in changes.items() if key.startswith("calibration.")}
        recipe = load_recipe(preset, (), values)
        # None is a value of some keys, and `load_recipe` takes it for "not given".
        (stage,) = recipe.stages
        changed = {k: v for k, v in changes.items() if k not in values and v != getattr(stage, k, ())}
        text = [f"stages.0.{key}={json.dumps(value)}" for key, value in changed.items()]
        return load_recipe(preset, text, values)

    def _labels(self, job: Job) -> dict[str, Any]:
        return {"group": "dcomp", "bits": job.bits, "name": job.name, "seed": job.seed, "changes": job.changes}

    def _attempt(self, measure: Callable[[], dict[str, Any]], labels: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**labels, **measure()}
        except Exception as error:  # a row that cannot run must not end the others
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
            return {**labels, "not_run": f"{type(error).__name__}: {reason}"}

    def _calibration(self, recipe: Any) -> tuple[Path, float]:
        """Return the recipe's calibration set and the minutes that recording it took, now or earlier."""
        from dcomp.recipes.run import record_calibration

        facts = [self.settings.fingerprint, recipe.calibration.model_dump(mode="json")]
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        folder, note = self.work / "calibration" / name, self.work / "calibration" / f"{name}.json"
        if not note.is_file():
            started = time.perf_counter()
            record_calibration(self.settings.model, recipe, folder)
            note.write_text(json.dumps({"minutes": (time.perf_counter() - started) / 60}))
        return folder, json.loads(note.read_text())["minutes"]

    def _recipe_row(self, job: Job) -> dict[str, Any]:
        from dcomp.recipes.run import run_recipe
        from dcomp.recipes.validate import validate

        calibration, recording = self._calibration(job.recipe)
        output = self.work / "compressed" / job.key
        started = time.perf_counter()
        made = run_recipe(self.settings.model, job.recipe, output, calibration=calibration, overwrite=True)
        minutes = recording + (time.perf_counter() - started) / 60
        # Without learning a calibration seed may change nothing: the same files make the same pictures.
        denoiser = _denoiser_sha256(made.manifest.files)
        for row in self.report.rows.values():
            if row.get("denoiser_sha256") == denoiser:
                shutil.rmtree(output)
                return {key: row[key] for key in row if key in _FIGURES} | {"minutes": round(minutes, 2)}
        with tempfile.TemporaryDirectory(dir=self.work) as other:
            # `validate` keeps the original's pictures beside the compressed ones; only the former are worth keeping.
            (Path(other) / "original").symlink_to(self._originals(), target_is_directory=True)
            result = validate(
                output,
                self.settings.model,
                samples=self.settings.samples,
                steps=self.settings.steps,
                guidance=self.settings.guidance,
                seed=SEED,
                batch_size=BATCH,
                features=EXTRACTOR,
                bench=False,
                work=Path(other),
            )
        shutil.rmtree(output)
        figures = {key: getattr(result, key) for key in ("latent_rel_error", "psnr_db", "ssim")}
        distance = {key: getattr(result, key) for key in ("fid", "kid", "kid_std")}
        errors = [p.latent_rel_error for p in result.per_prompt]
        row = _row(figures, distance, errors, result.bits_per_param, result.denoiser_bytes_ratio, minutes)
        return row | {"denoiser_sha256": denoiser}

    def _peer_row(self, peer: Peer) -> dict[str, Any]:
        from dcomp.calibrate import quality
        from dcomp.calibrate.pipeline import Generation, open_pipeline
        from dcomp.calibrate.prompts import read_prompts
        from dcomp.recipes.bench import fill_prompts, tensor_bytes
        from dcomp.recipes.compare import compare
        from dcomp.recipes.run import plan_recipe
        from dcomp.recipes.trajectories import SampleFolder
        from dcomp.recipes.validate import FIRST_INDEX

        asked = self.settings
        pipeline = open_pipeline(asked.model)
        made = Generation(asked.steps, asked.guidance, SEED, batch_size=BATCH)
        prompts = read_prompts(None, asked.samples, pipeline.kind, model=pipeline.source, classes=pipeline.classes)
        prompts = fill_prompts(prompts, asked.samples)
        originals = SampleFolder(self._originals(), pipeline, prompts, made, FIRST_INDEX)
        originals.make(pipeline, lambda done, total: None)
        parameters = sum(p.numel() for p in pipeline.denoiser.parameters())
        before = tensor_bytes(pipeline.denoiser)

        def decide(preset: str) -> dict[str, Any]:
            decisions = plan_recipe(asked.model, self._recipe(preset, {}, 0)).decisions
            return {name: decision.scheme for name, decision in decisions.items() if decision.scheme is not None}

        def calibrate(count: int) -> None:
            pipeline.run(fill_prompts(prompts, count), range(count), made, decode=False)

        started = time.perf_counter()
        after = peer.apply(Context(pipeline, decide, calibrate))
        minutes = (time.perf_counter() - started) / 60
        found = compare(originals, _Samples(pipeline, originals), quality.open_extractor(EXTRACTOR), _quiet)
        assert found.distance is not None
        distance = {key: quality.finite_or_none(getattr(found.distance, key)) for key in ("fid", "kid", "kid_std")}
        errors = [p.latent_rel_error for p in found.per_prompt]
        return _row(found.figures, distance, errors, 8 * after / parameters, after / before, minutes)

    def _originals(self) -> Path:
        folder = self.work / "originals"
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()


class _Samples:
    """The pictures of a pipeline in memory, a chunk at a time, in the form that `compare` reads.

    A `SampleFolder` names its files by the weights' hash, which other packages' tensor classes cannot be asked for.
    """

    def __init__(self, pipeline: Any, like: Any) -> None:
        self._pipeline, self._like = pipeline, like

    def read(self, number: int) -> Any:
        """Make the chunk of that number."""
        from dcomp.recipes.trajectories import Chunk

        like = self._like
        indices = like.ranges[number]
        made = self._pipeline.run(
            [like.prompts[i] for i in indices], [like.first_index + i for i in indices], like.settings
        )
        blanked = torch.tensor([place in made.blanked for place in range(len(indices))])
        return Chunk(made.latents.float(), made.images.float(), blanked, unseen=0, step_latents=None)


_FIGURES = (
    *("latent_error", "latent_error_median", "psnr_db", "ssim", "fid", "kid", "kid_std"),
    *("bits_per_param", "bytes_ratio", "latent_errors", "denoiser_sha256"),
)
_HIDDEN = ("changes", "latent_errors", "denoiser_sha256")


def _denoiser_sha256(files: dict[str, str]) -> str:
    """Return a hash over the files of the denoiser; `files` are path -> sha256."""
    own = {name: sha256 for name, sha256 in files.items() if name.startswith(("unet/", "transformer/"))}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _row(
    figures: dict[str, Any],
    distance: dict[str, Any],
    errors: Sequence[float | None],
    bits_per_param: float,
    bytes_ratio: float,
    minutes: float,
) -> dict[str, Any]:
    finite = [error for error in errors if error is not None]
    return {
        "latent_error": figures["latent_rel_error"],
        "latent_error_median": statistics.median(finite) if len(finite) == len(errors) else None,
        "psnr_db": figures["psnr_db"],
        "ssim": figures["ssim"],
        **distance,
        "bits_per_param": bits_per_param,
        "bytes_ratio": bytes_ratio,
        "minutes": round(minutes, 2),
        "latent_errors": [None if error is None else round(error, 6) for error in errors],
    }


def _quiet(text: str, done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    typer.run(main)
