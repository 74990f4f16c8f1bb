"""A cache plan for what is run, even if it was made for something else: carried over, looked at, or left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcomp.cachequant.plan_set import MeasuredPlan, PlanSet
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.transfer import carry_over
from dcomp.cachequant.trials import Trials
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.compress.split import quantized_layers
from dcomp.compress.unrounded import unrounded_calls
from dcomp.recipes.bench import record_calls
from dcomp.recipes.follow import made_for, plan_file
from dcomp.recipes.plan_choice import PlanJudge
from dcomp.recipes.schedule import trajectory_of

PROBED = 2  # pictures that tell whether a plan does elsewhere what it did where it was made
ALLOWED_LOSS = 6.0  # dB below what the plan had there
_INDEX = 800_000  # of their noise


@dataclass(frozen=True)
class FittedPlan:
    """What was found.

    Attributes:
        plan: to follow, with the PSNR of the pictures that it was looked at by; None: compute every call.
        notes: what a person should know; empty for a plan that was made for exactly this.
    """

    plan: MeasuredPlan | None
    notes: tuple[str, ...] = ()


def fit_plan(
    name: str,
    folder: Path,
    pipeline: OpenPipeline,
    prompts: Sequence[str],
    settings: Generation,
    progress: Progress = silent,
) -> FittedPlan:
    """Return the plan of a name for the pictures that will be made.

    A plan that was made for other weights, another scheduler or another number of steps is carried over by noise level
    and looked at: `PROBED` pictures are made with it and without. If they are more than `ALLOWED_LOSS` worse than where
    it was made, the next slower plan is tried, and after the slowest none is followed.

    Args:
        name: of a plan of the folder, or `FILE.json:NAME`.
        folder: of the model.
        pipeline: that will follow it.
        prompts: of the pictures.
        settings: of the pictures.
        progress: called with a text, the count done and the total.

    Raises:
        PlanError: there is no such plan, or it was made for another class of denoiser.
    """
    file, last = plan_file(name, folder)
    plans = PlanSet.read(file)
    chosen = plans.choose(last)
    own = trajectory_of(folder, pipeline, settings.steps)
    difference = plans.trajectory.difference(own)
    if difference is None:
        return FittedPlan(chosen)
    if plans.trajectory.denoiser != own.denoiser:
        raise made_for(difference, file)
    slower = [plan for plan in plans.plans if plan.speedup < chosen.speedup]
    tried = [chosen, *sorted(slower, key=lambda plan: -plan.speedup)]
    looked_at, indices = prompts[:PROBED], range(_INDEX, _INDEX + len(prompts[:PROBED]))
    settings = replace(settings, batch_size=PROBED)
    trials = Trials(pipeline, (), looked_at, indices, settings)
    exact = unrounded_calls(pipeline.denoiser) if quantized_layers(pipeline.denoiser) else None
    judge = PlanJudge(pipeline, (), trials, looked_at, indices, settings, exact)
    notes = [f"The plan {chosen.name} was made for {difference}."]
    for number, each in enumerate(tried):
        progress("plans looked at", number, len(tried))
        same = trials.timesteps == each.plan.timesteps
        plan = each.plan if same else carry_over(each.plan, trials.timesteps, trials.places)
        psnr = judge.whole.compare(judge.follow(plan)).psnr
        seen = f"{psnr:.1f} dB on {judge.samples} pictures, {each.psnr:.1f} dB where it was made"
        if psnr >= each.psnr - ALLOWED_LOSS:
            progress("plans looked at", len(tried), len(tried))
            notes.append(f"{each.name} is followed: {seen}.")
            args, kwargs = record_calls(pipeline, looked_at[:1], settings)[0]
            speedup = 1 / CallPrices(pipeline.denoiser, args, kwargs, plan.zones).macs_of(plan)
            return FittedPlan(replace(each, plan=plan, speedup=speedup, psnr=psnr), tuple(notes))
        notes.append(f"{each.name} is not: {seen}.")
    progress("plans looked at", len(tried), len(tried))
    notes.append("Every call is computed. Search plans for what you run with `dcomp search-schedule`.")
    return FittedPlan(None, tuple(notes))
