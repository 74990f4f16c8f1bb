"""The picture of cache plans: how good each is at its speed, beside fewer steps, and what it does in each call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcomp.cachequant.plan import Action, CachePlan
from dcomp.cachequant.plan_set import MeasuredPlan
from dcomp.recipes.error_curves import COLOURS
from dcomp.recipes.picture_file import check_picture_file, new_figure, save_figure
from dcomp.recipes.plan_summary import label_of
from dcomp.recipes.schedule import ScheduleResult

_COMPUTED, _UNROUNDED = "#40464f", "#b3862b"
_REUSE, _FORECAST = "", "////"  # hatches


def draw_plans(result: ScheduleResult, file: Path) -> None:
    """Write the picture of what a search found.

    On the left, PSNR over the measured speed of the calls, of plans and of as many fewer steps as take the same time.
    On the right, a strip for each plan: dark where a call computes everything, brown where it rounds no inputs either,
    else in the colour of the zone that is predicted, hatched where more than one earlier call is read.

    Args:
        result: with at least one plan.
        file: ends in one of `picture_file.SUFFIXES`.
    """
    check_picture_file(file)
    figure = new_figure(14, 2.6 + 0.42 * max(4, len(result.plans)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    _draw_front(left, result)
    _draw_timelines(right, result.plans)
    save_figure(figure, file)


def kind_of(action: Action) -> str:
    """Say whether what replaces a zone is "reuse" of one call or a "forecast" from several."""
    if isinstance(action, str):
        return "reuse" if action == "reuse" else "forecast"
    return "forecast" if len(action) > 1 else "reuse"


def _draw_front(axes: Any, result: ScheduleResult) -> None:
    speeds = [result.measured_speedups[plan.name] for plan in result.plans]
    fewer = [result.fewer_steps[plan.name][1] for plan in result.plans]
    order = sorted(range(len(speeds)), key=lambda i: speeds[i])
    for values, label, colour, marker in (
        ([plan.psnr for plan in result.plans], "plans", COLOURS[0], "o"),
        (fewer, "fewer steps in the same time", COLOURS[1], "s"),
    ):
        axes.plot([speeds[i] for i in order], [values[i] for i in order], marker=marker, color=colour, label=label)
    for plan, speed in zip(result.plans, speeds, strict=True):
        axes.annotate(plan.name, (speed, plan.psnr), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("times as fast, all calls of a picture, on this machine")
    axes.set_ylabel("PSNR, dB")
    axes.set_title("On pictures that the search did not see", fontsize=11)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_timelines(axes: Any, plans: Sequence[MeasuredPlan]) -> None:
    from matplotlib.patches import Patch

    labels = sorted({label_of(zone) for each in plans for row in each.plan.actions for zone in row})
    colours = {label: COLOURS[number % len(COLOURS)] for number, label in enumerate(labels)}
    for number, each in enumerate(plans):
        for call in range(each.plan.calls):
            for part, height, colour, hatch in _cells(each.plan, call, colours):
                axes.barh(
                    number - 0.4 + part, 1, height, call, align="edge", color=colour, hatch=hatch,
                    edgecolor="white", linewidth=0.6,
                )  # fmt: skip
    axes.set_yticks(range(len(plans)), [f"{each.name}  {each.psnr:.1f} dB" for each in plans])
    axes.set_ylim(len(plans) - 0.5, -0.5)
    axes.set_xlim(0, max(each.plan.calls for each in plans))
    axes.set_xlabel("denoiser call, from noise to picture")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    patches = [Patch(color=_COMPUTED, label="computed"), *(Patch(color=c, label=z) for z, c in colours.items())]
    if any(each.plan.unrounded for each in plans):
        patches.insert(1, Patch(color=_UNROUNDED, label="computed, inputs unrounded"))
    patches.append(Patch(facecolor="white", edgecolor=_COMPUTED, hatch=_FORECAST, label="forecast"))
    axes.legend(handles=patches, ncols=min(5, len(patches)), frameon=False, loc="lower left", bbox_to_anchor=(0, 1))


def _cells(plan: CachePlan, call: int, colours: dict[str, str]) -> list[tuple[float, float, str, str]]:
    """Return offset, height, colour and hatch of the parts of a call's cell, one for each zone that is predicted.

    Args:
        plan: what all calls do.
        call: which of them.
        colours: label of a zone -> colour.
    """
    actions = plan.actions[call]
    if not actions:
        return [(0.0, 0.8, _UNROUNDED if call in plan.unrounded else _COMPUTED, _REUSE)]
    height = 0.8 / len(actions)
    return [
        (number * height, height, colours[label_of(zone)], _FORECAST if kind_of(action) == "forecast" else _REUSE)
        for number, (zone, action) in enumerate(sorted(actions.items()))
    ]
