"""Rows of the benchmark of quantization as Markdown: the matrix, what options change, and the ladder."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
from ptq_methods import BITS, methods, options

if TYPE_CHECKING:
    from ptq_quality import Report


def tables(report: "Report") -> str:
    """Return rows and ladders as Markdown."""
    parts = [setup(report), matrix_table(report), options_table(report)]
    parts += [ladder_table(entry, report) for entry in report.ladders]
    return "\n\n".join(parts)


def setup(report: "Report") -> str:
    """Return what all rows share, in words."""
    header = report.header
    guidance = "no guidance" if header["guidance"] is None else f"guidance {header['guidance']:g}"
    figures = f"FID by features of {header['extractor']}"
    return f"`{header['model']}`, {header['samples']} pictures, {header['steps']} steps, {guidance}; {figures}"


def matrix_table(report: "Report") -> str:
    """Return the rows of methods and peers, by bits."""
    known = [*methods()]
    rows = [
        row for row in report.rows.values() if row["group"] == "peer" or (row["name"] in known and row["seed"] == 0)
    ]
    return _rows_table(rows)


def short_table(report: "Report") -> str:
    """Return for each bits naive rounding, the best packages of those that quantize all layers and not, and ours."""
    shown: list[dict[str, Any]] = []
    for bits in BITS:
        rows = [row for row in report.rows.values() if row["bits"] == bits and row.get("latent_error") is not None]
        shown += [row for row in rows if {"minmax", "default"} & {*_names(row)} and row.get("seed") == 0]
        peers = [row for row in rows if row["group"] == "peer"]
        for part in (True, False):
            able = [row for row in peers if ("linear layers only" in (row.get("note") or "")) == part]
            shown += [min(able, key=lambda row: row["latent_error"])] if able else []
    return _rows_table(shown)


def _rows_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| bits | method | latent error | median | PSNR dB | SSIM | FID | bits a parameter | bytes / fp32 | minutes |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    known = [*methods()]

    def place(row: dict[str, Any]) -> tuple[int, int]:
        return BITS.index(row["bits"]), len(known) if row["group"] == "peer" else known.index(row["name"])

    for row in sorted(rows, key=place):
        note = f" ({row['note']})" if row.get("note") else ""
        names = ", ".join(name for name in _names(row) if name in known or row["group"] == "peer")
        start = f"| {row['bits'].upper()} | {names}{note} |"
        if "not_run" in row:
            lines.append(f"{start} not run: {row['not_run'].replace('|', '/')} |" + " |" * 7)
            continue
        formats = {"latent_error": ".4f", "latent_error_median": ".4f", "psnr_db": ".1f", "ssim": ".4f"}
        formats |= {"fid": ".2e", "bits_per_param": ".2f", "bytes_ratio": ".3f", "minutes": ".1f"}
        values = ("-" if row[key] is None else format(row[key], form) for key, form in formats.items())
        lines.append(f"{start} {' | '.join(values)} |")
    return "\n".join(lines)


def options_table(report: "Report") -> str:
    """Return what each option makes of its base: latent error over the base's, by bits."""
    rows = {(row["bits"], name): row for row in report.rows.values() for name in _names(row) if row.get("seed") == 0}
    shown = [bits for bits in BITS if any((bits, name) in rows for name in options())]
    lines = [
        f"| option | on top of | {' | '.join(bits.upper() for bits in shown)} |",
        f"|---|---|{'---:|' * len(shown)}",
    ]
    for name, option in options().items():
        cells = [_change(rows.get((bits, name)), rows.get((bits, option.base))) for bits in shown]
        if any(cells):
            lines.append(f"| {name} | {option.base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(row: dict[str, Any]) -> list[str]:
    return [row["name"], *row.get("same", ())]


def _change(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Return one cell: error over the base's error, the gain in PSNR, and bits a parameter if they differ."""
    if row is None or base is None:
        return ""
    if "not_run" in row or "not_run" in base:
        return "not run"
    if row.get("latent_error") is None or base.get("latent_error") is None:
        return "not finite"
    bits = row["bits_per_param"] - base["bits_per_param"]
    more = f", {bits:+.2f} bits" if abs(bits) >= 0.01 else ""
    return f"{row['latent_error'] / base['latent_error']:.2f} ({row['psnr_db'] - base['psnr_db']:+.1f} dB{more})"


def ladder_table(entry: dict[str, Any], report: "Report") -> str:
    """Return one ladder: the error of each rung and what it gains over the one before, seed by seed."""
    lines = [
        f"Ladder of {entry['bits'].upper()}, {len(entry['seeds'])} calibration seeds",
        "",
        "| step | latent error | error / error before | its spread over seeds | pictures nearer | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    before: list[dict[str, Any]] | None = None
    against: list[str] = []
    for rung in entry["rungs"]:
        rows = [report.rows.get(key, {"not_run": "measured again since"}) for key in rung["rows"]]
        reasons = [row["not_run"] for row in rows if "not_run" in row]
        errors = [row.get("latent_error") for row in rows]
        if reasons or None in errors:
            lines.append(f"| {rung['name']} | not run: {(reasons or ['not finite'])[0]} | | | | |")
            continue
        mean = f"{statistics.mean(errors):.4f}"
        if before is None:
            lines.append(f"| {rung['name']} | {mean} | | | | |")
        else:
            ratios = [now / then["latent_error"] for now, then in zip(errors, before, strict=True)]
            pairs = [
                (now, then)
                for row, other in zip(rows, before, strict=True)
                for now, then in zip(row["latent_errors"], other["latent_errors"], strict=True)
            ]
            nearer = f"{sum(now < then for now, then in pairs) / len(pairs):.0%}"
            verdict = judge(ratios)
            if verdict != "helps":
                against.append(rung["name"])
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else "one seed"
            lines.append(
                f"| {rung['name']} | {mean} | {statistics.mean(ratios):.3f} | {spread} | {nearer} | {verdict} |"
            )
        before = rows
    verdict = f"Not monotone: {', '.join(against)}." if against else "Monotone: every step helps."
    return "\n".join([*lines, "", verdict])


def judge(ratios: Sequence[float]) -> str:
    """Say whether a step helps: all seeds below 1, none, or some."""
    if all(ratio < 1 for ratio in ratios):
        return "helps"
    if all(ratio == 1 for ratio in ratios):
        return "changes nothing"
    return "does not help" if all(ratio >= 1 for ratio in ratios) else "helps with some seeds only"
