"""The picture of a checkpoint's errors over steps: the median layer of each role, and the worst layers by name."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dcomp import UsageError
from dcomp.recipes.inspect import Inspection
from dcomp.recipes.picture_file import check_picture_file, new_figure, save_figure

NAMED = 5  # worst layers that have a colour of their own
# Distinct by hue and by lightness, also for most colour-blind eyes (Okabe and Ito 2008), on light and on dark pages.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")

Layer = Mapping[str, Any]
"""Of a layer: `name`, `role`, `output_error` and `error_by_step`, as the manifest has them."""


def default_picture(output: Path) -> Path:
    """Return the file beside a checkpoint that its picture is written to when none is named."""
    return output.with_name(f"{output.name}-errors.png")


def has_curves(report: Inspection) -> bool:
    """Whether a checkpoint has errors by step: not where nothing was quantized, or in other packages' formats."""
    return any(layer.error_by_step for layer in report.layers)


def draw_error_curves(report: Inspection, file: Path) -> None:
    """Write the picture of a checkpoint's errors over steps.

    Args:
        report: of the checkpoint.
        file: ends in one of `picture_file.SUFFIXES`; its folder is made if needed.

    Raises:
        UsageError: the ending is unknown, or there are no errors by step.
        DcompError: the file cannot be written.
    """
    check_picture_file(file)
    layers = [layer for layer in map(vars, report.layers) if layer["error_by_step"]]
    if not layers:
        raise UsageError(
            "The checkpoint has no errors by step to draw",
            where=report.folder,
            remedy="Quantize with a preset that quantizes, in the format dcomp.",
        )
    figure = new_figure(12, 6)
    left, right = figure.subplots(1, 2)
    draw_roles(left, layers, report.timesteps)
    draw_worst(right, layers, report.timesteps)
    for axes, title in ((left, "Median layer of each role"), (right, f"Worst {min(NAMED, len(layers))} layers")):
        axes.set_title(title, fontsize=11)
        axes.grid(axis="y", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Errors of quantized layers over the steps: {Path(report.folder).name}", fontsize=12)
    save_figure(figure, file)


def draw_roles(axes: Any, layers: Sequence[Layer], timesteps: Sequence[float] = ()) -> None:
    """Draw a line for each role: the median error of its layers at each step.

    Args:
        axes: of matplotlib.
        layers: those with errors by step.
        timesteps: of the steps, for the labels; empty where they are not known.
    """
    roles: dict[str, list[Layer]] = {}
    for layer in layers:
        roles.setdefault(layer["role"], []).append(layer)
    for (role, members), colour in zip(sorted(roles.items(), key=_number_of_layers), _cycle(len(roles)), strict=True):
        steps = max(len(layer["error_by_step"]) for layer in members)
        curves = [layer["error_by_step"] for layer in members if len(layer["error_by_step"]) == steps]
        middle = [median(values) for values in zip(*curves, strict=True)]
        count = f"{len(members)} layers" if len(members) > 1 else "1 layer"
        _line(axes, middle, colour, f"{role}, {count}")
    _finish(axes, layers, timesteps)
    _logarithmic(axes, layers)  # roles lie powers of ten apart


def draw_worst(axes: Any, layers: Sequence[Layer], timesteps: Sequence[float] = ()) -> None:
    """Draw all layers in grey, and those with the largest output errors in colour and by name; see `draw_roles`."""
    ranked = sorted(layers, key=lambda layer: -(layer["output_error"] or 0))
    for layer in ranked[NAMED:]:
        axes.plot(
            _numbers(layer["error_by_step"]), _percents(layer["error_by_step"]), color="#888888", alpha=0.25, lw=0.6
        )
    for layer, colour in zip(ranked[:NAMED], COLOURS, strict=False):
        _line(axes, layer["error_by_step"], colour, f"{layer['name']}, {layer['output_error'] or 0:.1%}")
    axes.set_ylim(bottom=0)
    _finish(axes, layers, timesteps)


def _number_of_layers(item: tuple[str, list[Layer]]) -> tuple[int, str]:
    return -len(item[1]), item[0]


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _line(axes: Any, errors: Sequence[float], colour: str, label: str) -> None:
    # A name that begins with an underscore would be left out of the legend, and dollars would be formulas.
    text = label.replace("$", r"\$")
    axes.plot(_numbers(errors), _percents(errors), color=colour, lw=1.8, marker="o", ms=3, label=f"\u200b{text}")


def _numbers(errors: Sequence[float]) -> range:
    return range(1, len(errors) + 1)


def _percents(errors: Sequence[float]) -> list[float]:
    return [100 * error if error > 0 else math.nan for error in errors]


def _finish(axes: Any, layers: Sequence[Layer], timesteps: Sequence[float]) -> None:
    steps = max(len(layer["error_by_step"]) for layer in layers)
    axes.set_ylabel("relative error of the output, %")
    shown = sorted({round(1 + i * (steps - 1) / 5) for i in range(6)})
    known = len(timesteps) == steps
    axes.set_xticks(shown, [f"{step}\n{timesteps[step - 1]:.4g}" if known else str(step) for step in shown])
    axes.set_xlabel("step and timestep, noisiest first" if known else "step, noisiest first")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8, frameon=False)


def _logarithmic(axes: Any, layers: Sequence[Layer]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if any(error > 0 for layer in layers for error in layer["error_by_step"]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
