"""Put the figures that the benchmarks wrote into the README.

    python benchmarks/readme_figures.py

Reads `benchmarks/results/*.json` and writes between the README's figures markers; nothing is measured here.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # `python -P` leaves a script's own folder out

import cache_quality  # noqa: E402
import cache_speed  # noqa: E402
import precompute  # noqa: E402
import ptq_quality  # noqa: E402
import ptq_tables  # noqa: E402
import speed  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def main() -> None:
    """Write the README's figures."""
    measured = ptq_quality.Report.read(RESULTS / "ptq_quality.json")
    timed = json.loads((RESULTS / "speed.json").read_text())
    text = "\n".join(
        [
            BEGIN,
            f"{ptq_tables.setup(measured)}. Every row has the same prompts and noise, which no calibration saw. Other "
            "packages have their own defaults, on the layers that they support.",
            "",
            ptq_tables.matrix_table(measured),
            "",
            "Single options: latent error over that of the method that they are on top of, and the change in PSNR. One "
            "picture that becomes another one moves the mean a lot; what a calibration seed changes is in the ladder:",
            "",
            ptq_tables.options_table(measured),
            "",
            *(line for entry in measured.ladders for line in (ptq_tables.ladder_table(entry, measured), "")),
            *small_models(),
            f"Stable Diffusion 1.5's shape, {timed['latent']}x{timed['latent']} latents, batch {timed['batch']}, "
            f"{timed['repeats']} rounds in turn, {timed['threads']} threads:",
            "",
            speed.table(timed),
            "",
            *ahead(),
            "",
            *cached(),
            *plans(),
            END,
        ]
    )
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + text + rest.partition(END)[2])


def small_models() -> list[str]:
    """Return the tables of other models that were measured."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("ptq_quality-*.json")):
        report = ptq_quality.Report.read(file)
        lines += [f"{ptq_tables.setup(report)}:", "", ptq_tables.matrix_table(report), ""]
        lines += [ptq_tables.options_table(report), ""]
    return lines


def ahead() -> list[str]:
    """Return the table of layers that run ahead."""
    report = json.loads((RESULTS / "precompute.json").read_text())
    head = (
        f"Layers of timestep and conditions that run ahead ({report['preset']}, {report['steps']} steps a picture, "
        f"{report['repeats']} rounds in turn, {report['threads']} threads). It saves memory, not time: offloading, the "
        "part of the bytes that is shown is in memory for the first step and a moment of the second only:"
    )
    return [head, "", precompute.table(report)]


def cached() -> list[str]:
    """Return the table of bits and a cache plan together."""
    report = json.loads((RESULTS / "cache_speed.json").read_text())
    plan = report["plan"]
    head = (
        f"Bits and a cache plan together, at Stable Diffusion 1.5's shape (random weights, {report['latent']}x"
        f"{report['latent']} latents, batch {report['batch']}, {report['threads']} threads). The plan was made on the "
        f"{report['preset'].upper()} checkpoint of the embedded pipeline, {plan['calls']} calls of which "
        f"{plan['whole_calls']} compute everything, and its pictures are {plan['psnr']} dB from those of that "
        "checkpoint without a plan; products and time are those of calls that compute everything over those of the "
        "plan's:"
    )
    return [head, "", cache_speed.table(report)]


def plans() -> list[str]:
    """Return the tables of planners and other packages' caches."""
    lines: list[str] = []
    for file in sorted(RESULTS.glob("cache_quality*.json")):
        report = json.loads(file.read_text())
        lines += [
            "",
            f"{cache_quality.setup(report)}, at most as many products as stated:",
            "",
            cache_quality.grid(report),
        ]
    return lines


if __name__ == "__main__":
    main()
