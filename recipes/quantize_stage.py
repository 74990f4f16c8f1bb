"""The quantize stage: a float denoiser and its calibration set in, quantized layers and an account of them out.

The order of its passes is decided here: temporal features become tables while their layers are float, bits are
allocated under a budget, layers are quantized one after the other, what is left to learn is tuned, and the integers are
compared with the floats that they stand for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress
from dcomp.calibrate.replay import gather_rows
from dcomp.calibrate.step_bins import log_snr_bins, range_drift_bins, step_ranges
from dcomp.compress.allocation import Allocation, allocate
from dcomp.compress.block_pass import reconstruct_blocks, record_blocks
from dcomp.compress.coverage import coverage
from dcomp.compress.policy import Decision, choose_schemes
from dcomp.compress.quantize import LayerErrors, compare_executions, quantize_denoiser, rows_of_pass
from dcomp.compress.scheme import QScheme
from dcomp.compress.sensitivity import measure_sensitivity, options_of, proxy_correlation
from dcomp.compress.split import quantized_layers
from dcomp.compress.temporal import FeaturePlan, cache_features, choose_features, plan_features
from dcomp.compress.tuning import TuneResult, tune
from dcomp.recipes.plan import TUNE_ROWS, Plan, treatment_of
from dcomp.recipes.schema import QuantizeStage

SENSITIVITY_ROWS = 32
PROXY_CHANGES, PROXY_SAMPLES, PROXY_STEPS = 12, 4, 10  # of the check that sensitivities rank as final latents do


@dataclass(frozen=True)
class StageResult:
    """What became of a denoiser.

    Attributes:
        decisions: of every layer, as carried out.
        errors: of each quantized layer.
        notes: what a person should know.
    """

    decisions: dict[str, Decision]
    errors: dict[str, LayerErrors] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def quantize_stage(
    pipeline: OpenPipeline,
    recorded: CalibrationSet,
    plan: Plan,
    stage: QuantizeStage,
    prompts: Sequence[str],
    work: Path,
    report: Progress,
) -> StageResult:
    """Quantize the denoiser of a pipeline in place.

    Args:
        pipeline: in float.
        recorded: its calibration set.
        plan: what was decided before anything was measured.
        stage: of the recipe.
        prompts: of the recipe, for what must be seen in final latents.
        work: folder of resumable results, of this recipe, model and calibration set.
        report: called with a text, the count done and the total.
    """
    denoiser, seed = pipeline.denoiser, int(recorded.settings["seed"])
    guidance = pipeline.guidance(recorded.settings["guidance"])
    decisions, notes = dict(plan.decisions), list[str]()
    if stage.temporal != "layers":
        features = _cache_features(denoiser, plan, recorded, stage)
        decisions |= {name: Decision(None, _words(features, name)) for name in features.features}
        tables = len(features.named("table"))
        notes.append(f"{tables} layers became tables of {len(recorded.all_timesteps)} timesteps; others interpolate.")
    if stage.target_bits or stage.max_megabytes:
        decisions, found = _allocate(pipeline, recorded, plan, decisions, stage, prompts, guidance, work, report)
        notes += found
    schemes = {name: decision.scheme for name, decision in decisions.items() if decision.scheme is not None}
    bins = _step_bins(pipeline, recorded, schemes, stage, seed)
    learned = [name for name, scheme in schemes.items() if scheme.rounding == "adaround"]
    reference = None
    if learned:
        rows = rows_of_pass(denoiser, recorded, stage.rows, seed)
        reference = record_blocks(denoiser, rows, plan.structure.blocks, learned, work / "float-blocks")
    errors = quantize_denoiser(denoiser, recorded, schemes, bins, work, report, rows=stage.rows, seed=seed)
    if reference:
        blocks = reconstruct_blocks(
            denoiser,
            rows,
            reference,
            work / "blocks",
            iterations=stage.block_iterations,
            seed=seed,
            progress=report,
        )
        kept = sum(block.kept for block in blocks.values())
        notes.append(f"Reconstruction brought {kept} of {len(blocks)} blocks nearer to float; others kept their codes.")
    if stage.tune and schemes:
        notes += _tuning_notes(_tune(denoiser, recorded, stage, guidance, seed, work, report))
    for name, layer in quantized_layers(denoiser).items():
        planned = decisions[name]
        if planned.scheme is not None and planned.scheme.smooth and not layer.scheme.smooth:
            reason = planned.reason.replace(", smoothed", ", smoothing left out: it did not help")
            decisions[name] = Decision(layer.scheme, reason)
    differences = compare_executions(denoiser, recorded, report)
    errors = {name: replace(error, int_vs_fake=differences.get(name)) for name, error in errors.items()}
    return StageResult(decisions, errors, tuple(notes))


def _cache_features(denoiser: nn.Module, plan: Plan, recorded: CalibrationSet, stage: QuantizeStage) -> FeaturePlan:
    schemes = {name: d.scheme for name, d in plan.decisions.items() if d.scheme is not None}
    features = plan_features(denoiser, plan.structure, recorded, schemes=schemes)
    if stage.temporal == "choose":
        features, _ = choose_features(denoiser, features, schemes, recorded.all_timesteps)
    cache_features(denoiser, features, recorded.all_timesteps)
    return features


def _words(features: FeaturePlan, name: str) -> str:
    feature = features.features[name]
    if feature.form == "absent":
        return "depends on the timestep alone: nothing reads it but tables"
    return f"depends on the timestep alone: a table of {feature.rows} timesteps"


def _allocate(
    pipeline: OpenPipeline,
    recorded: CalibrationSet,
    plan: Plan,
    decisions: Mapping[str, Decision],
    stage: QuantizeStage,
    prompts: Sequence[str],
    guidance: float | None,
    work: Path,
    report: Progress,
) -> tuple[dict[str, Decision], list[str]]:
    """Choose 4 or 8 bits for the weight of each layer that the preset quantizes, under the stage's budget."""
    denoiser = pipeline.denoiser
    inputs = stage.preset.partition("a")[2]
    quick = stage.model_copy(update={"rounding": "nearest"})  # ranks alike, and is many times faster
    ways = {
        label: choose_schemes(denoiser, plan.structure, label.lower(), stage.keep, stage.overrides, treatment_of(quick))
        for label in (f"W4A{inputs}", f"W8A{inputs}")
    }
    candidates: dict[str, dict[str, QScheme]] = {}
    for name, decision in decisions.items():
        if decision.scheme is not None:
            found = {label: scheme for label, way in ways.items() if (scheme := way[name].scheme) is not None}
            candidates[name] = {scheme.label: scheme for scheme in found.values()}
    rows = gather_rows(recorded, SENSITIVITY_ROWS, int(recorded.settings["seed"]), denoiser=denoiser)
    sensitivity = measure_sensitivity(
        denoiser, rows, candidates, guidance=guidance, file=work / "sensitivity.json", progress=report
    )
    total = coverage(denoiser, {name: d for name, d in decisions.items() if name not in candidates})
    options = options_of(denoiser, candidates, sensitivity)
    layers = sum(p.nbytes for name in candidates for p in denoiser.get_submodule(name).parameters())
    chosen = allocate(
        options,
        parameters=plan.coverage.parameters,
        target_bits=stage.target_bits,
        max_bytes=None if stage.max_megabytes is None else int(stage.max_megabytes * 1e6),
        fixed_bytes=total.bytes_after - layers,
    )
    settings = Generation(PROXY_STEPS, recorded.settings["guidance"], int(recorded.settings["seed"]))
    correlation = proxy_correlation(
        pipeline,
        rows,
        candidates,
        sensitivity,
        prompts[:PROXY_SAMPLES],
        settings,
        count=PROXY_CHANGES,
        progress=report,
    )
    changed = {
        name: Decision(
            replace(candidates[name][option.label], rounding=stage.rounding),
            f"{option.label} under the budget: error {sensitivity.errors[name][option.label]:.2g}",
        )
        for name, option in chosen.chosen.items()
    }
    return {**decisions, **changed}, _allocation_notes(chosen, correlation.rho, correlation.count)


def _allocation_notes(chosen: Allocation, rho: float | None, count: int) -> list[str]:
    counts: dict[str, int] = {}
    for option in chosen.chosen.values():
        counts[option.label] = counts.get(option.label, 0) + 1
    layers = ", ".join(f"{label} {n}" for label, n in sorted(counts.items()))
    ranks = "unknown" if rho is None else f"{rho:.2f}"
    return [
        f"Bits by layer: {layers}; {chosen.bits:.2f} bits a parameter over all of them.",
        f"The errors that they were chosen by rank {count} changes like final latents with a correlation of {ranks}.",
    ]


def _step_bins(
    pipeline: OpenPipeline,
    recorded: CalibrationSet,
    schemes: Mapping[str, QScheme],
    stage: QuantizeStage,
    seed: int,
) -> StepBins | None:
    """Put timesteps into bins, for layers with static ranges."""
    static = [name for name, scheme in schemes.items() if scheme.input_granularity == "tensor"]
    if not static:
        return None
    scheduler, others = pipeline.scheduler, recorded.all_timesteps
    if stage.bins == "log_snr":
        return log_snr_bins(recorded.timesteps, stage.step_bins, scheduler, others=others)
    if stage.bins == "drift":
        rows = gather_rows(recorded, 8 * len(recorded.timesteps), seed, denoiser=pipeline.denoiser)
        timesteps, ranges = step_ranges(pipeline.denoiser, rows, static)
        return range_drift_bins(ranges, timesteps, stage.step_bins, scheduler, others=others)
    return StepBins.uniform(recorded.timesteps, stage.step_bins, scheduler, others=others)


def _tune(
    denoiser: nn.Module,
    recorded: CalibrationSet,
    stage: QuantizeStage,
    guidance: float | None,
    seed: int,
    work: Path,
    report: Progress,
) -> TuneResult:
    rows = gather_rows(recorded, stage.tune * TUNE_ROWS, seed, denoiser=denoiser)
    return tune(
        denoiser,
        rows,
        iterations=stage.tune,
        batch_rows=TUNE_ROWS,
        guidance=guidance,
        learn=("scales", "biases", "norms", *(("rounding",) if stage.tune_rounding else ())),
        seed=seed,
        snapshot=work / "tuning.safetensors",
        progress=report,
    )


def _tuning_notes(tuned: TuneResult) -> list[str]:
    if not tuned.kept:
        return ["Tuning did not lower the error on trajectories that it had not seen; its values were not taken."]
    ratio = (tuned.held_out_final / tuned.held_out_initial) ** 0.5 if tuned.held_out_initial else 1.0
    return [
        f"Tuning lowered the predictions' error to {ratio:.2f} of what it was, on trajectories that it had not seen."
    ]
