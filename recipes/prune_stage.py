"""The prune stage: a float denoiser in, a smaller one out, with an account of what was cut and what that did.

Errors of single cuts come from recorded calls, the verdict on the best choices from final latents of trajectories that
no cut was chosen on.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.calibrate.final_latents import FinalLatents
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress
from dcomp.calibrate.replay import gather_rows
from dcomp.calibrate.tree_file import replacing
from dcomp.compress.pruning.costs import Saving
from dcomp.compress.pruning.cut import cut
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.features import FeatureLoss
from dcomp.compress.pruning.importance import Subject
from dcomp.compress.pruning.masks import Latents
from dcomp.compress.pruning.prune import METHODS, Additivity, additivity, proposals, score
from dcomp.compress.pruning.recovery import BATCH_ROWS, RecoveryResult, guided_rows, recover
from dcomp.compress.pruning.units import Units
from dcomp.recipes.bench import fill_prompts
from dcomp.recipes.inputs import record_set
from dcomp.recipes.kept_results import KeptResults, digest
from dcomp.recipes.prune_outlook import Outlook, constraints_of
from dcomp.recipes.schema import PruneStage, Recipe
from dcomp.recipes.settings import UNGUIDED, generation_of

MASKED = 32  # trajectories that masks are learned on


@dataclass(frozen=True)
class Proposal:
    """A choice that was compared with others.

    Attributes:
        removed: parts that go.
        narrowed: groups that lose members.
        saving: of all of it.
        expected: sum of errors of single cuts.
        error: of final latents, relative, geometric mean.
    """

    removed: int
    narrowed: int
    saving: Saving
    expected: float
    error: float


@dataclass(frozen=True)
class PruneResult:
    """What became of a denoiser.

    Attributes:
        cuts: that were made.
        units: of the original.
        method: that chose them.
        before, after: parameters, and multiply-accumulates of a call for one prompt.
        error: of final latents, relative, geometric mean.
        recovery: what was learned again; None if nothing was to be.
        unrecovered: error before that.
        proposals: that were compared, the chosen one first.
        additivity: of errors of single cuts; None where they were not measured.
        notes: what a person should know.
        guidance: scale that the denoiser has learned; None: its pipeline guides it, also where learning it failed.
    """

    cuts: CutList
    units: Units
    method: str
    before: Saving
    after: Saving
    error: float
    recovery: RecoveryResult | None
    unrecovered: float
    proposals: tuple[Proposal, ...]
    additivity: Additivity | None
    notes: tuple[str, ...] = ()
    guidance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the account as JSON data."""
        found = self.additivity
        return {
            "method": self.method,
            "parameters_before": self.before.parameters,
            "parameters_after": self.after.parameters,
            "macs_before": self.before.macs,
            "macs_after": self.after.macs,
            "latent_error": self.error,
            "latent_error_unrecovered": self.unrecovered,
            "recovery": vars(self.recovery) if self.recovery else None,
            "learned_guidance": self.guidance,
            "removed": sorted(self.cuts.removed),
            "narrowed": {name: len(members) for name, members in sorted(self.cuts.kept.items())},
            "rank_correlation": found.correlation if found else None,
            "error_ratio": found.ratio if found else None,
            "cuts_sha256": self.cuts.hash,
        }


def prune_stage(
    pipeline: OpenPipeline,
    recorded: CalibrationSet,
    found: Outlook,
    recipe: Recipe,
    prompts: Sequence[str],
    judge: FinalLatents,
    work: Path,
    report: Progress,
) -> PruneResult:
    """Prune the denoiser of a pipeline: another one takes its place.

    Args:
        pipeline: in float.
        recorded: its calibration set.
        found: what can be cut.
        recipe: with the stage.
        prompts: of the recipe, for masks.
        judge: of final latents.
        work: folder of resumable results, of this recipe, model and calibration set.
        report: called with a text, the count done and the total.
    """
    stage = recipe.prune
    assert stage is not None
    finished = work / "pruned"
    if (kept := _read(finished, pipeline, found.units)) is not None:
        return kept
    denoiser, units, costs = pipeline.denoiser, found.units, found.costs
    rows = gather_rows(recorded, stage.rows, int(recorded.settings["seed"]), denoiser=denoiser)
    guidance = pipeline.guidance(recorded.settings["guidance"])
    if stage.recover_guidance:
        guided_rows(rows, guidance)  # refuses calls of one context before cuts are measured
    settings = generation_of(recipe.calibration)
    latents, seed = latents_of(pipeline, prompts, settings), int(recorded.settings["seed"])
    subject = Subject(denoiser, units, rows, guidance, seed, report, latents, min(len(prompts), MASKED))
    errors = KeptResults(work / "cuts", [stage.method, stage.rows, stage.round_to])
    scored = score(
        subject,
        costs,
        stage.method,
        constraints=constraints_of(stage, units),
        round_to=stage.round_to,
        keep=lambda name, measure: errors.get(digest(name), measure, lambda data: [float(value) for value in data]),
    )
    agreement = additivity(subject, scored) if scored.units is not None else None
    count = stage.proposals if METHODS[stage.method].measured else 1
    judged: list[tuple[float, Proposal, nn.Module, CutList]] = []
    for one in proposals(subject, scored.problem, found.needed, stage.method, count):
        setattr(pipeline.pipe, pipeline.denoiser_name, one.denoiser)
        try:
            error = judge.error()
        finally:
            setattr(pipeline.pipe, pipeline.denoiser_name, denoiser)
        cuts = one.chosen.cuts.simplified(units)
        about = Proposal(len(cuts.removed), len(cuts.kept), one.chosen.saving, one.chosen.error, error)
        judged.append((error, about, one.denoiser, cuts))
    judged.sort(key=lambda each: each[0])
    unrecovered, _, small, cuts = judged[0]
    setattr(pipeline.pipe, pipeline.denoiser_name, small.eval())
    error, recovery, learned = unrecovered, None, None
    if stage.recover != "none":
        if stage.recover_guidance:
            judge.deploy(replace(settings, guidance=UNGUIDED))
        before = judge.error() if stage.recover_guidance else unrecovered
        of_one = len(recorded.timesteps) * (1 if rows.pairs is None else 2)
        count = trajectories_to_learn_from(stage, of_one)
        many = recorded
        if count > len(recorded.prompts):
            setattr(pipeline.pipe, pipeline.denoiser_name, denoiser)
            many = record_set(
                pipeline,
                fill_prompts(prompts, count),
                recipe.calibration,
                work / "to-learn-from",
                lambda _, done, total: report("trajectories to learn from", done, total),
            )
            setattr(pipeline.pipe, pipeline.denoiser_name, small)
        recovery, error = _recover(pipeline, denoiser, units, many, stage, judge, before, work, report)
        learned = guidance if stage.recover_guidance and recovery.best else None
        if stage.recover_guidance and learned is None:  # it is what it was, and its pipeline guides it as before
            judge.deploy(settings)
            error = unrecovered
    saving = costs.of(cuts, units)
    result = PruneResult(
        cuts,
        units,
        stage.method,
        costs.whole,
        Saving(sum(p.numel() for p in small.parameters()), costs.whole.macs - saving.macs),
        error,
        recovery,
        unrecovered,
        tuple(each[1] for each in judged),
        agreement,
        tuple(f"{path} was left alone: {reason}." for path, reason in units.left.items()),
        learned,
    )
    _write(finished, small, result)
    return result


def latents_of(pipeline: OpenPipeline, prompts: Sequence[str], settings: Generation) -> Latents:
    """Return what runs the trajectory of a prompt, with its number as the noise, and returns its final latents.

    Args:
        pipeline: whose denoiser of then runs, with gradients where they are enabled.
        prompts: one for each trajectory.
        settings: of all.
    """

    def latents(number: int) -> Tensor:
        return pipeline.run([prompts[number]], [number], settings, gradients=torch.is_grad_enabled()).latents

    return latents


def trajectories_to_learn_from(stage: PruneStage, rows: int) -> int:
    """Return how many trajectories recovery learns from: so many that no row is met twice, if that is not too many.

    A row that is met again teaches little: what is left learns it by heart.

    Args:
        stage: of the recipe.
        rows: that a calibration set keeps of one trajectory.
    """
    return min(stage.recover_samples, math.ceil(stage.recover_iterations * BATCH_ROWS / rows))


def _recover(
    pipeline: OpenPipeline,
    original: nn.Module,
    units: Units,
    recorded: CalibrationSet,
    stage: PruneStage,
    judge: FinalLatents,
    before: float,
    work: Path,
    report: Progress,
) -> tuple[RecoveryResult, float]:
    """Let the pruned denoiser of a pipeline learn; return what came of it, and the error of final latents then.

    Predictions of single calls are what is learned; if final latents are not nearer for it, the denoiser stays as it
    was.
    """
    assert stage.recover != "none"
    student, seed = pipeline.denoiser, int(recorded.settings["seed"])
    guidance = pipeline.guidance(recorded.settings["guidance"])
    every = 2 * len(recorded.prompts) * len(recorded.timesteps)  # of two contexts, at most
    rows = gather_rows(recorded, every, seed, denoiser=student)
    if stage.recover_guidance:
        rows, guidance = guided_rows(rows, guidance), None
    kept = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result = recover(
        student,
        rows,
        features=FeatureLoss(original, student, units, rows)
        if stage.recover_features and not stage.recover_guidance
        else None,
        learned=stage.recover,
        iterations=stage.recover_iterations,
        guidance=guidance,
        seed=seed,
        snapshot=work / "recovery.safetensors",
        progress=report,
    )
    after = judge.error() if result.best else before
    if after < before:
        return result, after
    student.load_state_dict(kept)
    return replace(result, best=0), before


def _write(folder: Path, denoiser: nn.Module, result: PruneResult) -> None:
    """Keep a pruned denoiser for a run that goes on; the account comes last, and makes it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "weights.safetensors") as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}, unfinished)
    found = result.additivity
    account = {
        "cuts": result.cuts.to_dict(),
        "method": result.method,
        "before": vars(result.before),
        "after": vars(result.after),
        "error": result.error,
        "recovery": vars(result.recovery) if result.recovery else None,
        "unrecovered": result.unrecovered,
        "proposals": [vars(each) | {"saving": vars(each.saving)} for each in result.proposals],
        "additivity": vars(found) if found else None,
        "notes": [*result.notes],
        "guidance": result.guidance,
    }
    with replacing(folder / "account.json") as unfinished:
        unfinished.write_text(json.dumps(account))


def _read(folder: Path, pipeline: OpenPipeline, units: Units) -> PruneResult | None:
    """Put a pruned denoiser in its place that a run before has finished."""
    if not (folder / "account.json").is_file():
        return None
    data = json.loads((folder / "account.json").read_text())
    cuts = CutList.from_dict(data["cuts"])
    cut(pipeline.denoiser, cuts, units)
    pipeline.denoiser.load_state_dict(load_file(folder / "weights.safetensors"))
    made = (Proposal(**each | {"saving": Saving(**each["saving"])}) for each in data["proposals"])
    return PruneResult(
        cuts,
        units,
        data["method"],
        Saving(**data["before"]),
        Saving(**data["after"]),
        data["error"],
        RecoveryResult(**data["recovery"]) if data["recovery"] else None,
        data["unrecovered"],
        tuple(made),
        Additivity(**data["additivity"]) if data["additivity"] else None,
        tuple(data["notes"]),
        data["guidance"],
    )
