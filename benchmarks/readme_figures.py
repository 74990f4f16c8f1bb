"""Put the figures that the benchmarks wrote into the README.

    python benchmarks/readme_figures.py

Reads `benchmarks/results/*.json` and writes between the README's figures markers; nothing is measured here.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # `python -P` leaves a script's own folder out

import quality  # noqa: E402
import speed  # noqa: E402

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def main() -> None:
    """Write the README's figures."""
    measured = json.loads((quality.RESULTS / "quality.json").read_text())
    timed = json.loads((speed.RESULTS / "speed.json").read_text())
    text = "\n".join(
        [
            BEGIN,
            f"`{measured['model']}`, {measured['samples']} prompts, {measured['steps']} steps, guidance "
            f"{measured['guidance']:g}, the same seeds through both, {measured['threads']} threads, "
            f"torch {measured['torch']}. Bytes and speed are the denoiser's, speed with one sample: that is too little "
            "work for integers to pay.",
            "",
            quality.table(measured),
            "",
            f"Stable Diffusion 1.5's shape, {timed['latent']}x{timed['latent']} latents, batch {timed['batch']}, "
            f"{timed['repeats']} rounds in turn, {timed['threads']} threads:",
            "",
            speed.table(timed),
            END,
        ]
    )
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + text + rest.partition(END)[2])


if __name__ == "__main__":
    main()
