"""The charts of the report: PNG pictures with a transparent ground, one for light pages and one for dark ones."""

import base64
import io
import math
from collections.abc import Callable
from typing import Any

from dcomp.recipes.error_curves import draw_roles, draw_worst
from dcomp.recipes.picture_file import new_figure
from dcomp.recipes.verdict import ValidationResult

LIGHT = {"ink": "#40464f", "line": "#2563b8"}
DARK = {"ink": "#aab3c0", "line": "#6aa5f0"}


def draw_charts(result: ValidationResult) -> list[dict[str, str]]:
    """Draw each chart; a chart has a title, a description, and PNGs `light` and `dark` as data URIs."""
    charts = []
    if result.error_by_step:
        charts.append(
            {
                "title": "Error over steps",
                "alt": "relative error of the latents after each scheduler step",
                "light": _step_chart(result, **LIGHT),
                "dark": _step_chart(result, **DARK),
            }
        )
    if len(result.per_prompt) > 1 and any(p.psnr_db is not None for p in result.per_prompt):
        charts.append(
            {
                "title": "PSNR of each picture",
                "alt": "PSNR of all pictures in ascending order",
                "light": _prompt_chart(result, **LIGHT),
                "dark": _prompt_chart(result, **DARK),
            }
        )
    curves = [
        {"name": "", "role": "", "output_error": None, **layer} for layer in result.layers if layer.get("error_by_step")
    ]
    for title, alt, draw in (
        ("Errors of layers over steps, by role", "median error of the layers of each role at each step", draw_roles),
        ("Worst layers over steps", "errors of all layers at each step, the worst ones by name", draw_worst),
    ):
        if curves:
            light, dark = (_layer_chart(draw, curves, colours["ink"]) for colours in (LIGHT, DARK))
            charts.append({"title": title, "alt": alt, "light": light, "dark": dark})
    return charts


def png_uri(png: bytes) -> str:
    """Return a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _step_chart(result: ValidationResult, ink: str, line: str) -> str:
    figure, axes = _axes(ink)
    steps = [point.step + 1 for point in result.error_by_step]

    def percents(key: str) -> list[float]:
        values = (getattr(point, key) for point in result.error_by_step)
        return [math.nan if value is None else 100 * value for value in values]

    axes.fill_between(steps, percents("low"), percents("high"), color=line, alpha=0.18, linewidth=0)
    axes.plot(steps, percents("mean"), color=line, linewidth=2, marker="o", markersize=3.5)
    axes.set_xlabel("scheduler step")
    axes.set_ylabel("relative error of the latents, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _figure_png(figure)


def _layer_chart(draw: Callable[..., None], layers: list[dict[str, Any]], ink: str) -> str:
    figure, axes = _axes(ink, height=4.6)
    draw(axes, layers)
    for text in axes.get_legend().get_texts():
        text.set_color(ink)
    return _figure_png(figure)


def _prompt_chart(result: ValidationResult, ink: str, line: str) -> str:
    figure, axes = _axes(ink)
    values = sorted(p.psnr_db for p in result.per_prompt if p.psnr_db is not None)
    places = range(1, len(values) + 1)
    axes.plot(places, values, color=line, linewidth=0, marker="o", markersize=5, alpha=0.85)
    for value, style, name in ((result.psnr_db, "-", "mean"), (_limit(result, "min_psnr"), "--", "min_psnr")):
        if value is not None:
            axes.axhline(value, color=ink, linewidth=1, linestyle=style)
            axes.annotate(
                f"{name} {value:.1f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", ha="right", color=ink, fontsize=9,
            )  # fmt: skip
    axes.set_xlabel("pictures, worst first")
    axes.set_ylabel("PSNR, dB")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _figure_png(figure)


def _axes(ink: str, height: float = 3.1) -> tuple[Any, Any]:
    figure = new_figure(6.2, height, dpi=160)
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink)
    axes.tick_params(colors=ink, labelsize=9)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    axes.grid(axis="y", color=ink, alpha=0.18, linewidth=0.8)
    return figure, axes


def _figure_png(figure: Any) -> str:
    buffer = io.BytesIO()
    # No version of matplotlib in the file: equal results give equal pages.
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return png_uri(buffer.getvalue())


def _limit(result: ValidationResult, name: str) -> float | None:
    return result.thresholds[name].limit if name in result.thresholds else None
