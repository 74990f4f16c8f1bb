"""Put what the benchmarks measured into docs/figures.md, and the heart of it into the README.

    python benchmarks/figures.py

Reads `benchmarks/results/*.json`; nothing is measured here.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # `python -P` leaves a script's own folder out

import cache_quality  # noqa: E402
import cache_speed  # noqa: E402
import kernel_speed  # noqa: E402
import precompute  # noqa: E402
import prune_quality  # noqa: E402
import ptq_quality  # noqa: E402
import ptq_tables  # noqa: E402
import speed  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
HEAD = """# Figures

All rows that the scripts in `benchmarks/` measured. `benchmarks/figures.py` writes this page from their JSON files.

`default` is what `dcomp quantize` does; `minmax` is rounding to nearest within the extremes, `nearest` within ranges of
least squared error. Methods that do the same with some bits share a row. Every row of a table has the same prompts and
noise, which no calibration and no search saw. Other packages have their own defaults, on the layers that they support.
Minutes include the recording of the calibration set; many were measured on a busy machine. The small DiT and U-Net are
what `small_models.py` trains.
"""


def main() -> None:
    """Write the page and the README's figures."""
    (ROOT / "docs" / "figures.md").write_text(page())
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + "\n\n".join([BEGIN, *heart()]) + "\n" + END + rest.partition(END)[2])


def heart() -> list[str]:
    """Return what the README shows: the default beside its peers."""
    measured = ptq_quality.Report.read(RESULTS / "ptq_quality.json")
    reports = [report for report in plans() if report["planning_seconds"].get("joint")]
    return [
        f"{ptq_tables.setup(measured)}. Of other packages the two with the least latent error for these bits, one of "
        "those that quantize all layers and one of those that quantize linear layers only:",
        ptq_tables.short_table(measured),
        *shape(),
        *both(),
        "Cache plans: PSNR in dB of pictures against those of calls that compute everything, at most as many products "
        "as stated; in brackets the best of the planners of the literature, of other packages and of fewer steps:",
        cache_quality.summary(reports),
        *(text for report in pruned()[:1] for text in (_errors_of_cuts(report), prune_quality.summary(report))),
    ]


def page() -> str:
    """Return all tables."""
    parts = [HEAD.rstrip(), "## Bits"]
    for file in sorted(RESULTS.glob("ptq_quality*.json"), key=_by_name):
        report = ptq_quality.Report.read(file)
        parts += [f"### {report.header['model']}", f"{ptq_tables.setup(report)}:", ptq_tables.matrix_table(report)]
        parts += [
            "Single options: latent error over that of the method that they are on top of, and the change in PSNR. One "
            "picture that becomes another one moves the mean a lot:",
            ptq_tables.options_table(report),
            *(ptq_tables.ladder_table(entry, report) for entry in report.ladders),
        ]
    parts += ["## Speed", *shape(), *operations(), "## Layers that run ahead", *ahead(), "## Cache plans", *both()]
    for report in plans():
        parts += [f"{cache_quality.setup(report)}, at most as many products as stated:", cache_quality.grid(report)]
    for report in pruned():
        parts += [f"## Pruning of {report['model']}", prune_quality.setup(report), prune_quality.table(report)]
    return "\n\n".join(parts) + "\n"


def _by_name(file: Path) -> str:
    return file.stem  # the plain name comes before those that go on


def _errors_of_cuts(report: dict[str, Any]) -> str:
    return (
        f"Pruning `{report['model']}`, {report['steps']} steps, guidance {report['guidance']:g}, without recovery: "
        "relative error of final latents by the part of the parameters that goes. `reconstruction` is the default:"
    )


def shape() -> list[str]:
    """Return the speed of quantized calls at a common shape, on each processor that was measured."""
    texts = []
    for file in sorted(RESULTS.glob("speed-*.json")):
        timed = json.loads(file.read_text())
        head = (
            f"Stable Diffusion 1.5's shape, {timed['latent']}x{timed['latent']} latents, batch {timed['batch']}, "
            f"{timed['repeats']} rounds in turn, {timed['threads']} threads, {timed['machine']}:"
        )
        texts += [head, speed.table(timed)]
    return texts


def operations() -> list[str]:
    """Return where the time of calls goes, and the speed of single operations beside other runtimes'."""
    texts = []
    for file in sorted(RESULTS.glob("speed-*.json")):
        timed = json.loads(file.read_text())
        if "split" in timed:
            texts += [f"Where the time of these calls goes, {timed['machine']}:", speed.split_table(timed)]
    for file in sorted(RESULTS.glob("kernel_speed-*.json")):
        report = json.loads(file.read_text())
        texts += [
            f"Single operations, {report['threads']} threads, {report['machine']}. Layers are timed from float inputs "
            "to float outputs; `product` is without their rounding. Without VNNI, sums of other runtimes saturate:",
            *(kernel_speed.table(report, name) for name in report["tables"]),
        ]
    return texts


def ahead() -> list[str]:
    """Return the table of layers that run ahead."""
    report = json.loads((RESULTS / "precompute.json").read_text())
    head = (
        f"Layers of timestep and conditions that run ahead ({report['preset']}, {report['steps']} steps a picture, "
        f"{report['repeats']} rounds in turn, {report['threads']} threads). It saves memory, not time: offloading, the "
        "part of the bytes that is shown is in memory for the first step and a moment of the second only:"
    )
    return [head, precompute.table(report)]


def both() -> list[str]:
    """Return the table of bits and a cache plan together."""
    report, *cut = (json.loads(file.read_text()) for file in sorted(RESULTS.glob("cache_speed*.json"), key=_by_name))
    head = (
        f"Bits and cache plans together, at Stable Diffusion 1.5's shape (random weights, {report['latent']}x"
        f"{report['latent']} latents, batch {report['batch']}, {report['threads']} threads, {report['machine']}). The "
        f"plans were made on the {report['preset'].upper()} checkpoint of the embedded pipeline, and PSNR is that of "
        "its pictures with and without them; products and time are those of calls that compute everything over those "
        "of the plan's, and the last column is the speed over fp32:"
    )
    return [
        head,
        cache_speed.table(report),
        *(text for each in cut for text in (_cut_first(each), cache_speed.table(each))),
    ]


def _cut_first(report: dict[str, Any]) -> str:
    """Return in words what was done before bits and plans."""
    alone = ", guidance learned, so that a call runs one context instead of two" if report["contexts"] == 1 else ""
    return (
        f"The same with {report['preset'].upper()} after cuts at the places where the embedded pipeline was cut: "
        f"{report['parameters']:.2f} of the parameters and {report['macs']:.2f} of the products are left{alone}:"
    )


def plans() -> list[dict[str, Any]]:
    """Return the reports of planners and other packages' caches."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("cache_quality*.json"))]


def pruned() -> list[dict[str, Any]]:
    """Return the reports of pruning."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("prune_quality*.json"), key=_by_name)]


if __name__ == "__main__":
    main()
