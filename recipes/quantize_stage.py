"""The quantize stage: a float denoiser and its calibration set in, quantized layers and an account of them out.

The order of its passes is decided here: temporal features become tables while their layers are float, bits are
allocated under a budget, layers are quantized one after the other, what is left to learn is tuned, outputs are
corrected by step, and the integers are compared with the floats that they stand for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.clock import StepBins
from dcomp.calibrate.final_latents import FinalLatents
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.calibrate.progress import Progress
from dcomp.calibrate.replay import gather_rows
from dcomp.calibrate.step_bins import log_snr_bins, range_drift_bins, step_ranges
from dcomp.compress.block_pass import reconstruct_blocks, record_blocks
from dcomp.compress.folding import Fold, find_folds, fold_smoothing
from dcomp.compress.policy import Decision
from dcomp.compress.precompute import Ahead, keep_plan, plan_precompute
from dcomp.compress.quantize import LayerErrors, compare_executions, quantize_denoiser, rows_of_pass
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import parts_of, quantized_layers
from dcomp.compress.step_correction import CorrectionResult, correct_steps, float_modules
from dcomp.compress.temporal import FeaturePlan, cache_features, choose_features, plan_features
from dcomp.compress.time_block import TimeBlockResult, reconstruct_time_block, time_weights
from dcomp.compress.tuning import Learnable, TuneResult, tune
from dcomp.recipes.bench import tensor_bytes
from dcomp.recipes.bit_budget import allocate_bits
from dcomp.recipes.console import bytes_text
from dcomp.recipes.plan import TUNE_ROWS, Plan
from dcomp.recipes.schema import QuantizeStage
from dcomp.recipes.settings import generation_of

MENTIONED = 0.05  # of the denoiser's bytes: layers that can run ahead are worth a note


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
    work.mkdir(parents=True, exist_ok=True)
    denoiser, seed = pipeline.denoiser, int(recorded.settings["seed"])
    guidance = pipeline.guidance(recorded.settings["guidance"])
    decisions, notes = dict(plan.decisions), list[str]()
    if stage.temporal != "layers":
        features = _cache_features(denoiser, plan, recorded, stage)
        decisions |= {name: Decision(None, _words(features, name)) for name in features.features}
        tables = len(features.named("table"))
        notes.append(f"{tables} layers became tables of {len(recorded.all_timesteps)} timesteps; others interpolate.")
    if stage.has_budget:
        decisions, found = allocate_bits(pipeline, recorded, plan, decisions, stage, prompts, work, report)
        notes += found
    schemes = {name: decision.scheme for name, decision in decisions.items() if decision.scheme is not None}
    judge = None
    if stage.tune and schemes:
        deployed = generation_of(plan.recipe.calibration)
        judge = FinalLatents(pipeline, prompts, deployed, work / "final-latents.safetensors", report)
    bins = _step_bins(pipeline, recorded, schemes, stage, seed)
    original = float_modules(denoiser, schemes) if stage.correct and bins else None
    learned = [name for name, scheme in schemes.items() if scheme.rounding == "adaround"]
    reference = None
    if learned:
        rows = rows_of_pass(denoiser, recorded, stage.rows, seed)
        timed = time_weights(denoiser, plan.structure, learned)
        others = [name for name in learned if name not in timed]
        reference = record_blocks(denoiser, rows, plan.structure.blocks, others, work / "float-blocks")
    folds = _folds(denoiser, recorded, schemes, stage, seed)
    errors = quantize_denoiser(denoiser, recorded, schemes, bins, work, report, rows=stage.rows, seed=seed, folds=folds)
    if reference:
        if timed:
            file = work / "time-block.safetensors"
            notes += _time_block_notes(reconstruct_time_block(denoiser, rows, timed, recorded.all_timesteps, file))
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
    # Before tuning, so that what is tuned and judged is what is deployed; after reconstruction, which compares weights
    # with those of the float model.
    folded = fold_smoothing(denoiser, folds)
    notes += _folding_notes(denoiser, folded)
    if judge:
        notes += _tune(denoiser, recorded, stage, guidance, seed, judge, work, report)
    decisions |= {
        name: _carried_out(decisions[name], layer.scheme, folded.get(name))
        for name, layer in quantized_layers(denoiser).items()
    }
    if original and bins:
        # Factors that were moved into a layer change the units of its output: the float model has no such output.
        corrected = correct_steps(
            denoiser,
            original,
            rows_of_pass(denoiser, recorded, stage.rows, seed, copies=2),
            bins,
            work / "corrections",
            skip=set(folded.values()),
            guidance=guidance,
            batch_rows=TUNE_ROWS,
            seed=seed,
            progress=report,
        )
        notes.append(_correction_note(denoiser, corrected))
        decisions |= {
            name: replace(decisions[name], scheme=layer.scheme) for name, layer in quantized_layers(denoiser).items()
        }
    notes += _plan_ahead(denoiser, plan, recorded, stage.ahead)
    differences = compare_executions(denoiser, recorded, report)
    errors = {name: replace(error, int_vs_fake=differences.get(name)) for name, error in errors.items()}
    return StageResult(decisions, errors, (*notes, *_remark_notes(errors)))


def _carried_out(planned: Decision, scheme: QScheme, fold: str | None) -> Decision:
    """Return a decision with the scheme that came out, and what became of transforms that are not in it."""
    findings = []
    if planned.scheme is not None and planned.scheme.smooth and not scheme.smooth:
        findings.append(f"smoothed by {fold}" if fold else "smoothing left out: it did not help")
    if planned.scheme is not None and planned.scheme.rotate and not scheme.rotate:
        findings.append("rotation left out: it did not help")
    return replace(planned, scheme=scheme, findings=(*planned.findings, *findings))


def _cache_features(denoiser: nn.Module, plan: Plan, recorded: CalibrationSet, stage: QuantizeStage) -> FeaturePlan:
    schemes = {name: d.scheme for name, d in plan.decisions.items() if d.scheme is not None}
    features = plan_features(denoiser, plan.structure, recorded, schemes=schemes)
    if stage.temporal == "choose":
        features, _ = choose_features(denoiser, features, schemes, recorded.all_timesteps)
    cache_features(denoiser, features, recorded.all_timesteps)
    return features


def _plan_ahead(denoiser: nn.Module, plan: Plan, recorded: CalibrationSet, asked: Ahead) -> list[str]:
    """Let the denoiser carry the plan of its layers that can run once a picture."""
    device = next(denoiser.parameters()).device
    ahead = plan_precompute(denoiser, plan.structure, next(recorded.calls(device)), recorded.all_timesteps)
    if not ahead.layers:
        return ["ahead: no layer depends on the timestep and conditions of the whole picture"] if asked != "off" else []
    keep_plan(denoiser, replace(ahead, ahead=asked))
    own = sum(tensor_bytes(denoiser.get_submodule(name)) for name in ahead.layers)
    part = own / tensor_bytes(denoiser)
    if part < MENTIONED:
        return []
    conditions = ", ".join(ahead.conditions)
    what = '`dcomp.load(folder, ahead="offload")`' if asked == "off" else "`dcomp.load`"
    where = "" if asked == "on" else f" and leaves their weights ({bytes_text(own)}) in the file between"
    return [
        f"{len(ahead.layers)} layers, {part:.0%} of the denoiser's bytes, depend on the timestep"
        f"{' and ' + conditions if conditions else ''} alone. {what} runs them twice a picture{where}."
    ]


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
    """Put timesteps into bins, for layers with static ranges and for corrections."""
    static = [name for name, scheme in schemes.items() if scheme.input_granularity == "tensor"]
    if not static and not (stage.correct and schemes):
        return None
    scheduler, others = pipeline.scheduler, recorded.all_timesteps
    if stage.bins == "log_snr":
        return log_snr_bins(recorded.timesteps, stage.step_bins, scheduler, others=others)
    if stage.bins == "drift":
        rows = gather_rows(recorded, 8 * len(recorded.timesteps), seed, denoiser=pipeline.denoiser)
        timesteps, ranges = step_ranges(pipeline.denoiser, rows, static or [*schemes])
        return range_drift_bins(ranges, timesteps, stage.step_bins, scheduler, others=others)
    return StepBins.uniform(recorded.timesteps, stage.step_bins, scheduler, others=others)


def _folds(
    denoiser: nn.Module, recorded: CalibrationSet, schemes: Mapping[str, QScheme], stage: QuantizeStage, seed: int
) -> tuple[Fold, ...]:
    if not stage.fold or not any(scheme.smooth for scheme in schemes.values()):
        return ()
    return find_folds(denoiser, schemes, gather_rows(recorded, 1, seed, denoiser=denoiser))


def _folding_notes(denoiser: nn.Module, folded: Mapping[str, str]) -> list[str]:
    if not folded:
        return []
    smoothed = len(folded) + sum(layer.scheme.smooth for layer in quantized_layers(denoiser).values())
    return [
        f"The smoothing of {len(folded)} of {smoothed} smoothed layers is part of what makes their input, in "
        f"{len(set(folded.values()))} norms and layers. Adapters for these layers must be fused first, with --lora."
    ]


def _tune(
    denoiser: nn.Module,
    recorded: CalibrationSet,
    stage: QuantizeStage,
    guidance: float | None,
    seed: int,
    judge: FinalLatents,
    work: Path,
    report: Progress,
) -> list[str]:
    """Tune scales, biases and norms, then codes as well if asked for, each kept if final latents are better for it."""
    rows = gather_rows(recorded, stage.tune * TUNE_ROWS, seed, denoiser=denoiser)
    rounds: dict[str, tuple[Learnable, ...]] = {"scales, biases and norms": ("scales", "biases", "norms")}
    if stage.tune_rounding:
        rounds["codes as well"] = ("scales", "biases", "norms", "rounding")
    notes = []
    for number, (text, learn) in enumerate(rounds.items()):
        tuned = tune(
            denoiser,
            rows,
            iterations=stage.tune,
            batch_rows=TUNE_ROWS,
            guidance=guidance,
            learn=learn,
            seed=seed,
            judge=judge.error,
            snapshot=work / f"tuning{number or ''}.safetensors",
            progress=report,
        )
        notes.append(_tuning_note(text, tuned))
    return notes


def _time_block_notes(result: TimeBlockResult) -> list[str]:
    if not result.kept:
        return [
            "Layers that depend on the timestep alone kept their codes: chosen together they were no nearer to float."
        ]
    before, after = (100 * error**0.5 for error in (result.initial, result.final))
    return [
        f"Layers that depend on the timestep alone were chosen together: at the deployed timesteps their "
        f"{len(result.features)} features are off by {after:.2g} %, before by {before:.2g} %."
    ]


def _remark_notes(errors: Mapping[str, LayerErrors]) -> list[str]:
    found = [f"{name} ({'; '.join(error.remarks)})" for name, error in errors.items() if error.remarks]
    if not found:
        return []
    more = f", and {len(found) - 3} more, which `dcomp inspect` names" if len(found) > 3 else ""
    head = "1 layer has" if len(found) == 1 else f"{len(found)} layers have"
    return [f"{head} channels or ranges that told nothing in calibration: {', '.join(found[:3])}{more}."]


def _correction_note(denoiser: nn.Module, result: CorrectionResult) -> str:
    if not result.kept:
        return "Corrections by step did not lower the error on trajectories that they had not seen; none was taken."
    gains = [layer.after / layer.before for layer in result.layers.values() if layer.kept]
    parts = [part for layer in quantized_layers(denoiser).values() for part in parts_of(layer)]
    size = sum(table.nbytes for part in parts for table in (part.step_scale, part.step_bias) if table is not None)
    return (
        f"{len(gains)} of {len(result.layers)} layers got corrections by step, which lowered the error of their outputs"
        f" to {sum(gains) / len(gains):.2f} of what it was on average, and that of the predictions to "
        f"{(result.held_out_final / result.held_out_initial) ** 0.5:.2f}, on trajectories that they had not seen. "
        f"Their tables take {bytes_text(size)}; a smaller `step_bins` makes them smaller."
    )


def _tuning_note(text: str, tuned: TuneResult) -> str:
    assert tuned.judged is not None
    before, after = tuned.judged
    predictions = (tuned.held_out_final / tuned.held_out_initial) ** 0.5 if tuned.held_out_initial else 1.0
    verdict = "" if tuned.kept else "; its values were not taken"
    return (
        f"Tuning {text} brought the error of final latents from {before:.3g} to {after:.3g}, and that of predictions "
        f"to {predictions:.2f} of what it was, on trajectories that it had not seen{verdict}."
    )
