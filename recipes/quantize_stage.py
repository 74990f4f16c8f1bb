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
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.calibrate.progress import Progress
from dcomp.calibrate.replay import gather_rows
from dcomp.calibrate.step_bins import log_snr_bins, range_drift_bins, step_ranges
from dcomp.compress.block_pass import reconstruct_blocks, record_blocks
from dcomp.compress.policy import Decision
from dcomp.compress.quantize import LayerErrors, compare_executions, quantize_denoiser, rows_of_pass
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import quantized_layers
from dcomp.compress.temporal import FeaturePlan, cache_features, choose_features, plan_features
from dcomp.compress.tuning import TuneResult, tune
from dcomp.recipes.bit_budget import allocate_bits
from dcomp.recipes.plan import TUNE_ROWS, Plan
from dcomp.recipes.schema import QuantizeStage


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
        decisions, found = allocate_bits(pipeline, recorded, plan, decisions, stage, prompts, work, report)
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
