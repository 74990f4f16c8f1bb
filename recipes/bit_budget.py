"""Bits for the weight of each layer under budgets: candidates, their measured errors, the choice, and its proof.

Inputs keep the precision of the preset. Under a budget of time a layer may also stay float, for integers do not pay for
every shape. That errors of the prediction rank changes as final latents do is an assumption of the choice; it is
checked on a few changes, and the correlation is reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress
from dcomp.calibrate.replay import gather_rows
from dcomp.compress.allocation import Allocation, AllocationError, Option, allocate
from dcomp.compress.coverage import coverage
from dcomp.compress.layer_times import LayerTimes, measure_layer_times, measure_speedup
from dcomp.compress.policy import PRESETS, Decision, Preset, choose_schemes
from dcomp.compress.scheme import QScheme
from dcomp.compress.sensitivity import (
    ProxyCorrelation,
    Sensitivity,
    measure_sensitivity,
    options_of,
    proxy_correlation,
)
from dcomp.recipes.plan import Plan, treatment_of
from dcomp.recipes.schema import QuantizeStage

SENSITIVITY_ROWS = 32
TIME_ROUNDS = 6  # choices that are timed as a whole until one is fast enough
TIME_MARGIN = 0.02  # of the float call: what the next choice is to save beyond what is asked, for times scatter
PROXY_CHANGES, PROXY_SAMPLES, PROXY_STEPS = 12, 4, 10
HEADER_BYTES, ENTRY_BYTES = 128, 96  # of a safetensors header, and of a tensor in it beside its name
_TENSORS = ("qweight", "scale", "multiplier", "bias", "input_scale", "smooth_inv")

Candidates = dict[str, dict[str, QScheme]]


def allocate_bits(
    pipeline: OpenPipeline,
    recorded: CalibrationSet,
    plan: Plan,
    decisions: Mapping[str, Decision],
    stage: QuantizeStage,
    prompts: Sequence[str],
    work: Path,
    report: Progress,
) -> tuple[dict[str, Decision], list[str]]:
    """Choose 4 or 8 bits for the weight of each layer that the preset quantizes.

    Args:
        pipeline: in float, but for tables of temporal features.
        recorded: its calibration set.
        plan: of the recipe.
        decisions: of every layer; those without a scheme stay what they are.
        stage: with a budget.
        prompts: for the short trajectories that check the errors.
        work: folder of resumable results.
        report: called with a text, the count done and the total.

    Returns:
        Decisions for every layer, and notes for people.

    Raises:
        AllocationError: the budget cannot be met; the smallest that can is named.
    """
    denoiser, seed = pipeline.denoiser, int(recorded.settings["seed"])
    candidates = _candidates(denoiser, plan, decisions, stage)
    rows = gather_rows(recorded, SENSITIVITY_ROWS, seed, denoiser=denoiser)
    one = rows.take(torch.arange(1 if rows.pairs is None else 2))
    times = None
    if stage.max_milliseconds or stage.min_speedup:
        times = measure_layer_times(denoiser, one, candidates, file=work / "layer-times.json", progress=report)
        _seconds_allowed(times, stage)  # refuses what cannot be met before errors are measured, which takes longer
    sensitivity = measure_sensitivity(
        denoiser,
        rows,
        candidates,
        guidance=pipeline.guidance(recorded.settings["guidance"]),
        file=work / "sensitivity.json",
        progress=report,
    )

    def choose(seconds: Mapping[str, Mapping[str, float]] | None = None, limit: float | None = None) -> Allocation:
        return _within_budget(denoiser, plan, stage, decisions, candidates, sensitivity, seconds, limit)

    notes: list[str] = []
    if times is None:
        chosen = choose()
    else:
        file = work / "speedups.json"
        chosen, notes = _within_time(
            times,
            _seconds_allowed(times, stage),
            choose,
            lambda labels: measure_speedup(denoiser, one, candidates, labels, file=file),
        )
    correlation = proxy_correlation(
        pipeline,
        rows,
        candidates,
        sensitivity,
        prompts[:PROXY_SAMPLES],
        Generation(PROXY_STEPS, recorded.settings["guidance"], seed),
        count=PROXY_CHANGES,
        progress=report,
    )
    changed = {
        name: _decision(option, candidates[name].get(option.label), stage) for name, option in chosen.chosen.items()
    }
    return {**decisions, **changed}, [*_notes(chosen, correlation), *notes]


def _decision(option: Option, scheme: QScheme | None, stage: QuantizeStage) -> Decision:
    if scheme is None:
        return Decision(None, "float under the budget of time")
    cause = f"{option.label} under the budget, alone an error of {option.error:.2g}"
    return Decision(replace(scheme, rounding=stage.rounding), cause)


def check_budget(denoiser: nn.Module, plan: Plan) -> None:
    """Refuse a budget that not even the smallest choice meets, before anything is measured.

    Where layers may become tables their sizes are not known yet: `allocate_bits` finds out.

    Raises:
        AllocationError: the smallest budget that can be met is named.
    """
    stage = plan.recipe.quantize
    if stage and (stage.target_bits or stage.max_megabytes) and stage.temporal == "layers":
        candidates = _candidates(denoiser, plan, plan.decisions, stage)
        alike = Sensitivity((), {name: dict.fromkeys(schemes, ()) for name, schemes in candidates.items()})
        _within_budget(denoiser, plan, stage, plan.decisions, candidates, alike)


def _candidates(denoiser: nn.Module, plan: Plan, decisions: Mapping[str, Decision], stage: QuantizeStage) -> Candidates:
    """Return layer -> label -> scheme: with 4-bit and with 8-bit weights, where the layer may have both."""
    small: Preset = PRESETS[f"w4{stage.preset[2:]}"]
    large = {role: scheme and replace(scheme, weight_bits=8, group_size=None) for role, scheme in small.items()}
    quick = treatment_of(stage.model_copy(update={"rounding": "nearest"}))  # ranks alike, and is many times faster
    ways = [choose_schemes(denoiser, plan.structure, way, stage.keep, stage.overrides, quick) for way in (small, large)]
    found: Candidates = {}
    for name, decision in decisions.items():
        if decision.scheme is not None:
            schemes = [scheme for way in ways if (scheme := way[name].scheme) is not None]
            found[name] = {scheme.label: scheme for scheme in schemes}
    return found


def _within_budget(
    denoiser: nn.Module,
    plan: Plan,
    stage: QuantizeStage,
    decisions: Mapping[str, Decision],
    candidates: Candidates,
    sensitivity: Sensitivity,
    seconds: Mapping[str, Mapping[str, float]] | None = None,
    max_seconds: float | None = None,
) -> Allocation:
    others = coverage(denoiser, {name: decision for name, decision in decisions.items() if name not in candidates})
    float_bytes = sum(p.nbytes for name in candidates for p in denoiser.get_submodule(name).parameters())
    # A budget of bytes is one of the file; bits a parameter are those of what is in memory.
    header = 0 if stage.max_megabytes is None else header_bytes(denoiser, candidates)
    return allocate(
        options_of(denoiser, candidates, sensitivity, seconds=seconds, step_bins=stage.step_bins),
        parameters=plan.coverage.parameters,
        target_bits=stage.target_bits,
        max_bytes=None if stage.max_megabytes is None else int(stage.max_megabytes * 1e6),
        max_cost=max_seconds,
        fixed_bytes=others.bytes_after - float_bytes + header,
    )


def header_bytes(denoiser: nn.Module, candidates: Candidates) -> int:
    """Return no less than what the names and shapes of all tensors take in the denoiser's file.

    Args:
        denoiser: in float.
        candidates: what each layer may become.
    """
    names = [name for name in denoiser.state_dict() if name.rpartition(".")[0] not in candidates]
    for name, schemes in candidates.items():
        parts = 1 + max(len(scheme.boundaries) for scheme in schemes.values())
        names += [f"{name}.parts.{part}.{tensor}" for part in range(parts) for tensor in _TENSORS]
    return HEADER_BYTES + sum(len(name) + ENTRY_BYTES for name in names)


def _seconds_allowed(times: LayerTimes, stage: QuantizeStage) -> float:
    """Return what a call of the denoiser may take.

    Raises:
        AllocationError: not even the fastest form of each layer is fast enough.
    """
    asked = [
        stage.max_milliseconds and stage.max_milliseconds / 1e3,
        stage.min_speedup and times.total / stage.min_speedup,
    ]
    limit = min(seconds for seconds in asked if seconds)
    if limit < times.least:
        raise _too_slow("A call of the denoiser is not expected to take less than", times.least, times.total, limit)
    return limit


def _within_time(
    times: LayerTimes,
    allowed: float,
    choose: Callable[[Mapping[str, Mapping[str, float]], float], Allocation],
    measure: Callable[[Mapping[str, str]], float],
) -> tuple[Allocation, list[str]]:
    """Choose by the times of single layers, time the choice as a whole, and ask for more while it is too slow.

    Args:
        times: of single layers.
        allowed: seconds of a call.
        choose: returns the choice whose layers are expected to take no more than some seconds together.
        measure: returns how many times as fast as float a call is with a choice.

    Returns:
        The choice, and a note for people.

    Raises:
        AllocationError: none of the choices was fast enough.
    """
    expected, found = allowed, []
    for _ in range(TIME_ROUNDS):
        chosen = choose(times.seconds, expected - times.rest)
        labels = {name: option.label for name, option in chosen.chosen.items()}
        taken = times.total / measure(labels)
        found.append(taken)
        if taken <= allowed:
            text = (
                f"A call of the denoiser takes {1e3 * taken:.3g} ms, {times.total / taken:.2f} times as fast as float, "
                f"measured in turns with it; the times of single layers add up to "
                f"{1e3 * (times.rest + chosen.cost):.3g} ms."
            )
            return chosen, [text]
        if expected <= times.least:
            break
        # As much more has to be saved on paper as was saved too little in fact.
        saved, asked = times.total - taken, times.total - allowed + TIME_MARGIN * times.total
        planned = (times.total - expected) * asked / saved if saved > 0 else times.total
        expected = max(times.least, times.total - planned)
    raise _too_slow("A call of the denoiser was not measured to take less than", min(found), times.total, allowed)


def _too_slow(what: str, least: float, total: float, allowed: float) -> AllocationError:
    faster = total / least
    compared = f"{faster:.3g} times as fast as float" if faster > 1.005 else "no faster than float"
    return AllocationError(
        f"{what} {1e3 * least:.3g} ms, which is {compared}",
        where=f"a budget of {1e3 * allowed:.3g} ms",
        remedy="Allow more time, or take another preset; fewer steps save more than integers can.",
    )


def _notes(chosen: Allocation, correlation: ProxyCorrelation) -> list[str]:
    counts: dict[str, int] = {}
    for option in chosen.chosen.values():
        counts[option.label] = counts.get(option.label, 0) + 1
    layers = ", ".join(f"{label} {n}" for label, n in sorted(counts.items()))
    ranks = "unknown" if correlation.rho is None else f"{correlation.rho:.2f}"
    return [
        f"Bits by layer: {layers}; {chosen.bits:.2f} bits a parameter over all of them.",
        f"The errors that they were chosen by rank {correlation.count} changes like final latents with a correlation "
        f"of {ranks}.",
    ]
