"""What `quantize` and `inspect` show: the plan before the work, the result after it, a checkpoint explained."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml

from dcomp.compress.coverage import FloatPart
from dcomp.compress.pruning.costs import Saving
from dcomp.recipes.console import bytes_text, print_table, say, time_text, visible
from dcomp.recipes.error_curves import draw_error_curves, has_curves
from dcomp.recipes.inspect import InspectedLayer, Inspection
from dcomp.recipes.ladder import Rung
from dcomp.recipes.plan import Plan
from dcomp.recipes.prune_outlook import Outlook
from dcomp.recipes.prune_stage import PruneResult
from dcomp.recipes.run import RunResult
from dcomp.recipes.schedule import ScheduleResult

WORST = 10  # layers that are shown where not all are asked for


def print_plan(plan: Plan, *, full: bool = False) -> None:
    """Print size, memory, time and coverage of a plan; `full` adds the resolved recipe and every layer."""
    on: Literal["stdout", "stderr"] = "stdout" if full else "stderr"
    if full:
        print(yaml.safe_dump(plan.recipe.to_dict(), sort_keys=False).rstrip() + "\n")
    precisions = plan.recipe.quantize is not None or plan.outlook is None  # pruning alone changes none
    if precisions and full:
        layers = [
            (name, _role(plan, name), decision.scheme.label if decision.scheme else "float", decision.reason)
            for name, decision in plan.decisions.items()
        ]
        print_table("Layers", ("layer", "role", "scheme", "reason"), layers, on=on)
    elif precisions:
        groups: dict[tuple[str, str, str], int] = defaultdict(int)
        for name, decision in plan.decisions.items():
            groups[_role(plan, name), decision.scheme.label if decision.scheme else "float", decision.reason] += 1
        rows = [(role, count, label, reason) for (role, label, reason), count in groups.items()]
        print_table("Plan", ("role", "layers", "scheme", "reason"), rows, right=(1,), on=on)
    sizes = plan.coverage
    whole = ", before it is pruned" if plan.outlook else ""
    facts = [
        ("denoiser", f"{plan.denoiser}, {plan.macs / 1e9:.3g} GMAC a call and sample{whole}"),
        ("size", f"{bytes_text(sizes.bytes_after)}, {sizes.ratio:.3f} of fp32{whole}"),
        ("bits per parameter", f"{sizes.bits_per_param:.2f}, all parameters counted"),
        ("this run", f"about {time_text(plan.seconds)} and {bytes_text(plan.memory_bytes)} of memory"),
    ]
    if precisions:
        facts.append(("left in float", _left_in_float(sizes.left_in_float)))
    print_table("", ("", ""), facts, on=on)
    if plan.outlook:
        print_table("What can be cut", *_outlook(plan.outlook, full=full), right=(1, 2, 3, 4), on=on)
    for note in plan.notes:
        say(f"Note: {note}")


def print_result(result: RunResult) -> None:
    """Print what was written; the line that loads it comes last."""
    totals = result.manifest.totals
    measured = [(name, errors.output) for name, errors in result.errors.items() if errors.output is not None]
    worst = sorted(measured, key=lambda item: -item[1])[:3]
    facts = [
        ("folder", str(result.output)),
        (
            "denoiser",
            f"{totals.denoiser_bytes_ratio:.3f} of its fp32 bytes, {totals.bits_per_param:.2f} bits per parameter",
        ),
        ("pipeline", f"{bytes_text(totals.bytes_compressed)} of {bytes_text(totals.bytes_original)} on disk"),
        ("checked", "reopened by a fresh process: same bytes, same output"),
        ("time", time_text(result.seconds)),
    ]
    if worst:
        facts.insert(3, ("largest layer errors", ", ".join(f"{name} {error:.1%}" for name, error in worst)))
    for note in result.notes:
        say(f"Note: {note}")
    if result.pruned:
        print_pruned(result.pruned)
    if len(result.stages) > 1:
        stages = [
            (row.name, f"{row.latent_error:.4f}", bytes_text(row.nbytes), f"{row.macs:.3f}") for row in result.stages
        ]
        columns = ("after", "error of final latents", "denoiser", "multiply-accumulates")
        print_table("Stages, each on those before, against the original", columns, stages, right=(1, 2, 3))
    print_table("Written", ("", ""), facts)
    if result.schedules:
        print_schedules(result.schedules)
    print(f"\n{result.load_line}")


def print_pruned(result: PruneResult) -> None:
    """Print what was cut, what that saves, and what it does to final latents."""
    rows = [(name, result.units.parts[name].kind.replace("_", " "), _bar(0, 1), "gone") for name in result.cuts.removed]
    for name, members in result.cuts.kept.items():
        group = result.units.groups[name]
        words = f"{len(members)} of {group.members} {group.kind.replace('_', ' ')} stay"
        rows.append((group.path, "", _bar(len(members), group.members), words))
    order = {path: place for place, path in enumerate([*result.units.parts, *result.units.groups])}
    rows.sort(key=lambda row: order.get(row[0], len(order)))
    print_table("Cut", ("module", "", "", ""), rows)
    before, after = result.before, result.after
    facts = [
        ("parameters", f"{after.parameters:,} of {before.parameters:,}, {_less(after.parameters, before.parameters)}"),
        ("multiply-accumulates", f"{after.macs:,} of {before.macs:,} a call, {_less(after.macs, before.macs)}"),
        ("error of final latents", f"{result.error:.4f}"),
    ]
    if result.recovery:
        found = result.recovery
        learned = f"{found.iterations} steps" + {"done": "", "no better": ", then it got no better"}.get(
            found.ending, ", then it diverged"
        )
        facts.append(
            ("before recovery", f"{result.unrecovered:.4f}; {learned}" if found.best else f"{learned}: no gain")
        )
    if result.guidance is not None:
        facts.append(("guidance", f"{result.guidance:g} is learned: call the pipeline with guidance_scale=1"))
    if len(result.proposals) > 1:
        others = ", ".join(f"{each.error:.4f}" for each in result.proposals[1:])
        facts.append(("other choices", f"{others}: the best was taken"))
    if result.additivity and result.additivity.correlation is not None:
        words = f"rank correlation {result.additivity.correlation:.2f} with errors of several cuts, "
        facts.append(("sums of errors", f"{words}which are {result.additivity.ratio:.2f} of them"))
    print_table("", ("", ""), facts)


def _bar(part: int, whole: int, width: int = 12) -> str:
    """Return a bar of what stays."""
    full = round(width * part / whole)
    return "█" * full + "░" * (width - full)


def _less(after: int, before: int) -> str:
    return f"{1 - after / max(1, before):.1%} less"


def _outlook(found: Outlook, *, full: bool) -> tuple[tuple[str, ...], list[tuple[str, str, str, str, str]]]:
    """Return what can be cut as a table: each by itself, or all of a kind together."""
    whole, lines = found.costs.whole, list[tuple[str, str, int, int, Saving]]()
    for name, part in found.units.parts.items():
        lines.append((name, part.kind, 1, 1, found.costs.parts[name]))
    for name, group in found.units.groups.items():
        lines.append((name, group.kind, 1, group.members, found.costs.members[name].times(group.members - 1)))
    if not full:
        kinds = dict.fromkeys(kind for _, kind, *_ in lines)
        of_kind = {kind: [line for line in lines if line[1] == kind] for kind in kinds}
        lines = [
            (kind.replace("_", " "), kind, len(same), sum(line[3] for line in same), _sum(line[4] for line in same))
            for kind, same in of_kind.items()
        ]
    rows = [
        (
            name,
            "" if full else str(count),
            str(members),
            f"{saving.parameters / whole.parameters:.1%}",
            f"{saving.macs / max(1, whole.macs):.1%}",
        )
        for name, _, count, members, saving in lines
    ]
    most = found.most
    rows.append(
        (
            "at most, together",
            "",
            "",
            f"{most.parameters / whole.parameters:.1%}",
            f"{most.macs / max(1, whole.macs):.1%}",
        )
    )
    return ("", "", "members", "parameters", "multiply-accumulates"), rows


def _sum(savings: Iterable[Saving]) -> Saving:
    total = Saving(0, 0)
    for saving in savings:
        total += saving
    return total


def print_schedules(result: ScheduleResult) -> None:
    """Print the plans beside fewer steps at the same cost; the line that follows one comes last."""
    for note in result.notes:
        say(f"Note: {note}")
    rows = [
        (
            each.name,
            f"{each.speedup:.2f}x",
            f"{result.measured_speedups[each.name]:.2f}x",
            f"{sum(not row for row in each.plan.actions)} of {result.calls}"
            + (f", {len(each.plan.unrounded)} unrounded" if each.plan.unrounded else "")
            + (f", {len(each.plan.corrections)} corrected" if each.plan.corrections else ""),
            bytes_text(result.cache_bytes[each.name]),
            "" if each.expected_error is None else f"{each.expected_error:.4f}",
            f"{each.error:.4f}",
            f"{each.psnr:.1f} dB",
            "{1:.1f} dB ({0} steps)".format(*result.fewer_steps[each.name]),
        )
        for each in result.plans
    ]
    columns = (
        "plan",
        "fewer MACs",
        "faster here",
        "whole calls",
        "cache",
        "expected error",
        "error",
        "PSNR",
        "same time",
    )
    if not rows:
        say(f"No plan is better than fewer steps; nothing was written ({time_text(result.seconds)}).")
        return
    print_table("Plans, on pictures that the search did not see", columns, rows, right=range(1, 9))
    if result.ladder:
        print_table("PSNR in dB against the original's pictures", *_ladder(result.ladder), right=range(1, 5))
    if result.additivity and result.additivity.rank_correlation is not None:
        say(
            f"Note: over {result.additivity.plans} plans, expected and measured errors have a rank correlation of "
            f"{result.additivity.rank_correlation:.2f}, and a ratio of {result.additivity.median_ratio:.2f}."
        )
    if result.time_ratios:
        least, most = min(result.time_ratios.values()), max(result.time_ratios.values())
        say(f"Note: these pictures took {least:.2f} to {most:.2f} of the time that was expected of their calls.")
    print(f"\nWritten to {result.file} in {time_text(result.seconds)}. Follow one with --plan {result.plans[-1].name}")


def _ladder(rungs: Sequence[Rung]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a ladder."""
    columns = ("plan", "plan alone", "bits alone", "both, planned in float", "both, planned together")
    rows = [
        (
            each.name,
            *(
                f"{x:.1f}" if x is not None else "-"
                for x in (each.cache_alone, each.bits_alone, each.naive, each.joint)
            ),
        )
        for each in rungs
    ]
    return columns, rows


def print_inspection(report: Inspection, layers: bool | None = None, worst: int = WORST) -> None:
    """Print the worst layers, the tree of all layers, or a line for each role and scheme; then facts of the whole.

    Args:
        report: of a checkpoint.
        layers: True for every layer, False for roles, None for the worst layers.
        worst: how many of them.
    """
    print(
        f"{visible(report.folder)}: {report.denoiser}, recipe {report.recipe['name']}, dcomp {report.dcomp_version}\n"
    )
    if layers:
        lines = [
            (label,)
            if entry is None
            else (
                label,
                entry.role,
                entry.scheme or "float",
                bytes_text(entry.bytes_after),
                _percent(entry.weight_error),
                _percent(entry.output_error),
                "; ".join([entry.reason or "", *entry.remarks]),
            )
            for label, entry in _tree(report.layers)
        ]
        columns = ("layer", "role", "scheme", "bytes", "weight error", "output error", "why")
        print_table("Layers", columns, lines, right=(3, 4, 5))
    elif layers is None:
        print_worst(report, worst)
    else:
        groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for entry in report.layers:
            groups[entry.role, entry.scheme or "float"].append(entry)
        rows = [
            (
                role,
                scheme,
                len(members),
                bytes_text(sum(m.bytes_after for m in members)),
                _percent(max((m.output_error for m in members if m.output_error is not None), default=None)),
            )
            for (role, scheme), members in groups.items()
        ]
        print_table("Roles", ("role", "scheme", "layers", "bytes", "largest output error"), rows, right=(2, 3, 4))
    print_table("", ("", ""), list(report.facts()))


def explain(report: Inspection, picture: Path, *, table: bool) -> None:
    """Write the picture of the errors over steps, and print where it is; `table` prints the worst layers before it."""
    if table:
        print_worst(report)
    if not has_curves(report):
        say("Note: There is no picture: no layer has errors by step.")
        return
    draw_error_curves(report, picture)
    words = f"Picture: {visible(str(picture))}"
    print(words) if table else say(words)


def print_worst(report: Inspection, count: int = WORST) -> None:
    """Print the layers with the largest output errors, what was done to them and why, and remarks on any layer."""
    measured = report.worst
    rows = [
        (
            layer.name,
            layer.scheme or "float",
            layer.rounding or "-",
            _percent(layer.weight_error),
            _percent(layer.output_error),
            _worst_step(report, layer),
            layer.reason or "",
        )
        for layer in measured[:count]
    ]
    columns = ("layer", "scheme", "rounding", "weight error", "output error", "worst at step", "why")
    print_table(f"Worst {len(rows)} of {len(measured)} quantized layers", columns, rows, right=(3, 4))
    odd = [(layer.name, remark) for layer in report.layers for remark in layer.remarks]
    if odd:
        more = f", the first {count} of {len(odd)}" if len(odd) > count else ""
        print_table(f"\nRemarks{more}", ("layer", "in calibration"), odd[:count])
    print()


def _worst_step(report: Inspection, layer: InspectedLayer) -> str:
    step, steps = layer.worst_step, len(layer.error_by_step)
    if step is None:
        return "-"
    known = f", t {report.timesteps[step]:.4g}" if len(report.timesteps) == steps else ""
    return f"{step + 1} of {steps}{known}: {layer.error_by_step[step]:.2%}"


def _tree(layers: Sequence[InspectedLayer]) -> Iterator[tuple[str, InspectedLayer | None]]:
    """Yield each layer under a line for every module around it, in the order of their first layers, indented."""
    first: dict[str, int] = {}
    for place, layer in enumerate(layers):
        for module in accumulate(layer.name.split("."), "{}.{}".format):
            first.setdefault(module, place)

    def order(layer: InspectedLayer) -> list[int]:
        return [first[module] for module in accumulate(layer.name.split("."), "{}.{}".format)]

    above: list[str] = []
    for layer in sorted(layers, key=order):
        *around, own = layer.name.split(".")
        known = next((i for i, (a, b) in enumerate(zip(above, around, strict=False)) if a != b), len(above))
        for depth in range(min(known, len(around)), len(around)):
            yield "  " * depth + around[depth], None
        above = around
        yield "  " * len(around) + own, layer


def _role(plan: Plan, name: str) -> str:
    return str(plan.structure.layers[name].role)


def _left_in_float(parts: Iterable[FloatPart]) -> str:
    groups: dict[tuple[str, str], list[FloatPart]] = defaultdict(list)
    for part in parts:
        groups[part.kind, part.reason].append(part)
    texts = [
        f"{len(members)} {kind} with {sum(m.parameters for m in members):,} parameters ({reason})"
        for (kind, reason), members in groups.items()
    ]
    return "; ".join(texts) or "nothing"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
