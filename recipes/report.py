"""A validation's result as files: JSON for programs, JUnit for CI servers, one HTML page for people, GitHub's summary.

Prompts, layer names and paths are hostile text: every writer escapes for its format. The page is a single file that
loads nothing: pictures are inside it, and its policy forbids every request and every script but its own.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import shlex
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from dcomp import DcompError, __version__
from dcomp.recipes import console
from dcomp.recipes.charts import draw_charts, png_uri
from dcomp.recipes.verdict import PicturePair, ValidationResult

PAGE = "index.html"
DIFFERENCE_QUANTILE = 0.995  # of all shown differences; it becomes full brightness, brighter ones are cut off
MAX_GAIN = 64
# What XML 1.0 cannot hold in any spelling.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_json(result: ValidationResult, file: Path) -> None:
    """Write the result as one JSON document with the keys of `ValidationResult`."""
    _write(file, json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_junit(result: ValidationResult, file: Path) -> None:
    """Write a JUnit file: a test case for each threshold and one for finite results; figures are properties."""
    cases: list[tuple[str, str | None]] = [
        (name, None if c.passed else f"measured {console.value_text(c.value)}, wanted {c.relation} {c.limit:g}")
        for name, c in result.thresholds.items()
    ]
    finite = result.non_finite_images == 0 and result.latent_rel_error is not None
    cases.append(("finite", None if finite else f"{result.non_finite_images} pictures, or latents, are not finite"))
    failures = sum(problem is not None for _, problem in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": "dcomp validate", **counts})
    properties = ET.SubElement(suite, "properties")
    facts: dict[str, Any] = {"compressed": result.compressed, "original": result.original}
    facts |= {key: value for key, value in result.to_dict().items() if isinstance(value, int | float)}
    for prompt in result.per_prompt:
        facts |= {f"prompt.{prompt.index}.{key}": v for key, v in prompt.model_dump(exclude={"index"}).items()}
    for name, value in facts.items():
        ET.SubElement(properties, "property", {"name": name, "value": _xml_text("" if value is None else value)})
    for name, problem in cases:
        case = ET.SubElement(suite, "testcase", {"classname": "dcomp.validate", "name": name, "time": "0"})
        if problem is not None:
            ET.SubElement(case, "failure", {"message": problem, "type": "threshold"}).text = problem
    ET.indent(root)
    _write(file, ET.tostring(root, encoding="unicode", xml_declaration=False), first='<?xml version="1.0"?>\n')


def write_html(result: ValidationResult, folder: Path) -> Path:
    """Write the page into a folder, which is made if needed, and return its path."""
    environment = Environment(
        loader=PackageLoader("dcomp.recipes"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": console.value_text, "bytes": console.bytes_text, "hash": _source_hash}
    page = environment.get_template("report.html").render(
        result=result,
        cards=_cards(result),
        sizes=_sizes(result),
        pictures=_pictures(result.pictures),
        gain=_gain(result.pictures),
        charts=draw_charts(result),
        layers=_layers(result),
        zones=sorted({label for plan in result.plans for call in plan.predicted for label in call}),
        command=reproduction(result),
        version=__version__,
    )
    file = folder / PAGE
    _write(file, page)
    return file


def write_github(result: ValidationResult, page: Path | None = None) -> bool:
    """Append Markdown to the summary of a GitHub Actions job and mark missed thresholds; False outside of one."""
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if not target:
        return False
    lines = [f"## dcomp validate: {'passed' if result.passed else 'not good enough'}", ""]
    lines += [f"{_markdown(result.compressed)} against {_markdown(result.original)}", ""]
    if result.thresholds:
        lines += ["| threshold | measured | wanted | |", "|---|---:|---:|---|"]
        for name, c in result.thresholds.items():
            mark = "ok" if c.passed else "**missed**"
            lines.append(f"| {name} | {console.value_text(c.value)} | {c.relation} {c.limit:g} | {mark} |")
        lines.append("")
    lines += ["| figure | value | |", "|---|---:|---|"]
    lines += [f"| {name} | {value} | {_markdown(note)} |" for name, value, note in result.figures()]
    lines += ["", *(f"> {_markdown(warning)}" for warning in result.warnings)]
    lines += [f"Report: {_markdown(str(page))}"] if page else []
    with Path(target).open("a", encoding="utf-8", errors="replace") as file:
        file.write("\n".join([*lines, ""]))
    for name, c in result.thresholds.items():
        if not c.passed:
            value = console.value_text(c.value)
            print(f"::error title=dcomp validate::{name}: {value}, wanted {c.relation} {c.limit:g}", file=sys.stderr)
    return True


def reproduction(result: ValidationResult) -> str:
    """Return the command line that measures the same again."""
    words = ["dcomp", "validate", result.compressed, "--against", result.original, "--samples", str(result.samples)]
    for key in ("prompts", "column", "steps", "guidance", "scheduler", "seed", "batch_size"):
        value = result.settings.get(key)
        if value is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    if result.extractor:
        words += ["--features", result.extractor.split("/")[0]]
    for name, c in result.thresholds.items():
        words += [f"--{name.replace('_', '-')}", f"{c.limit:g}"]
    if result.speedup is None:
        words.append("--no-bench")
    return shlex.join(words)


@dataclass(frozen=True)
class _Card:
    """A headline figure."""

    name: str
    value: str
    unit: str
    note: str


def _cards(result: ValidationResult) -> list[_Card]:
    number = console.value_text
    cards = [
        _Card("PSNR", _fixed(result.psnr_db, 1), "dB", f"mean of {result.samples} pictures"),
        _Card("Latent error", _percent(result.latent_rel_error), "%", "relative, last step"),
        _Card("SSIM", _fixed(result.ssim, 4), "", "mean"),
        _Card("Bits / parameter", _fixed(result.bits_per_param, 2), "", "the whole denoiser"),
        _Card("Denoiser size", _percent(result.denoiser_bytes_ratio), "%", "of the original, in memory"),
    ]
    if result.speedup is not None:
        spread = f"{_fixed(result.speedup_min, 2)} to {_fixed(result.speedup_max, 2)}"
        cards.append(_Card("Denoiser speed", _fixed(result.speedup, 2), "\u00d7", spread))
    if result.fid is not None:
        cards.append(_Card("FID change", number(result.fid), "", result.extractor or ""))
    return cards


def _sizes(result: ValidationResult) -> list[tuple[str, str, str, str]]:
    """Return rows of (name, original, compressed, compressed / original)."""
    size, number = console.bytes_text, console.value_text
    denoiser = result.denoiser_bytes_original, result.denoiser_bytes_compressed
    rows = [
        ("Denoiser in memory", size(denoiser[0]), size(denoiser[1]), _ratio(denoiser[1], denoiser[0])),
        (
            "Bits per parameter",
            _fixed(result.bits_per_param / result.denoiser_bytes_ratio, 2),
            _fixed(result.bits_per_param, 2),
            _ratio(result.denoiser_bytes_ratio, 1),
        ),
        (
            "Pipeline on disk",
            size(result.bytes_original),
            size(result.bytes_compressed),
            _ratio(result.bytes_compressed, result.bytes_original),
        ),
    ]
    speed = result.speed
    if speed:
        macs = speed["macs_original"], speed["macs"]
        texts = [_count(count / speed["calls"]) for count in macs]
        rows.append(("Multiply-accumulates of a call", texts[0], texts[1], _ratio(macs[1], macs[0])))
        times = speed["original_ms"], speed["compressed_ms"]
        rows.append(("Denoiser call", f"{number(times[0])} ms", f"{number(times[1])} ms", _ratio(times[1], times[0])))
    else:
        rows.append(("Multiply-accumulates", "", "", _fixed(result.macs_ratio, 3)))
    if result.peak_bytes is not None and result.peak_bytes_original is not None:
        peaks = result.peak_bytes_original, result.peak_bytes
        rows.append(("Peak memory of the process", size(peaks[0]), size(peaks[1]), _ratio(peaks[1], peaks[0])))
    return rows


def _pictures(pairs: Sequence[PicturePair]) -> list[dict[str, Any]]:
    gain = _gain(pairs)
    return [
        {
            "result": pair.result,
            "rank": pair.rank,
            "original": _png(pair.original),
            "compressed": _png(pair.compressed),
            "difference": _png(np.clip(_difference(pair) * gain, 0, 255).astype(np.uint8)),
            "small": max(pair.original.shape[:2]) <= 128,
        }
        for pair in pairs
    ]


def _gain(pairs: Sequence[PicturePair]) -> int:
    """Return one power of two for all pictures, so that their differences can be compared by eye."""
    if not pairs:
        return 1
    bright = float(np.quantile(np.concatenate([_difference(pair).ravel() for pair in pairs]), DIFFERENCE_QUANTILE))
    return int(2 ** math.floor(math.log2(min(MAX_GAIN, 255 / max(bright, 1)))))


def _difference(pair: PicturePair) -> NDArray[np.int16]:
    difference: NDArray[np.int16] = np.abs(pair.original.astype(np.int16) - pair.compressed.astype(np.int16))
    return difference


def _layers(result: ValidationResult) -> list[dict[str, Any]]:
    """Return the layers with each error also as a percentage of the largest, for the bars of the table."""
    layers = [{"weight_error": None, "output_error": None, **layer} for layer in result.layers]
    for name in ("weight", "output"):
        worst = max((layer[f"{name}_error"] or 0 for layer in layers), default=0) or 1
        for layer in layers:
            layer[f"{name}_part"] = round(100 * (layer[f"{name}_error"] or 0) / worst)
    return layers


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return png_uri(buffer.getvalue())


def _source_hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(source).encode()).digest()).decode()


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else console.value_text(float(f"{100 * value:.3g}"))


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} P"


def _xml_text(value: object) -> str:
    return _NOT_XML.sub("\ufffd", str(value))


def _markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$@-])", r"\\\1", html.escape(" ".join(text.split())))


def _write(file: Path, text: str, first: str = "") -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        # A prompt may hold half a surrogate pair, which UTF-8 cannot.
        temporary.write_bytes((first + text).encode("utf-8", errors="replace"))
        temporary.replace(file)
    except OSError as error:
        raise DcompError(
            f"The report cannot be written: {error.strerror or error}", where=str(file), remedy="Name another place."
        ) from error
