"""A cache plan for what is run, even if it was made for something else: carried over, looked at, or left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan, PlanError
from dcomp.cachequant.plan_set import MeasuredPlan, PlanSet
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.transfer import carry_over
from dcomp.cachequant.trials import places_of
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.recipes.bench import record_calls
from dcomp.recipes.follow import plan_file
from dcomp.recipes.plan_choice import Pictures
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
        raise PlanError(
            f"These plans were made for {difference}",
            where=str(file),
            remedy="Search plans for what you run with `dcomp search-schedule`, or leave the plan out.",
        )
    slower = [plan for plan in plans.plans if plan.speedup < chosen.speedup]
    tried = [chosen, *sorted(slower, key=lambda plan: -plan.speedup)]
    probe = _Probe(pipeline, prompts, settings)
    notes = [f"The plan {chosen.name} was made for {difference}."]
    for number, each in enumerate(tried):
        progress("plans looked at", number, len(tried))
        carried = probe.carried(each.plan)
        psnr = probe.psnr(carried)
        seen = f"{psnr:.1f} dB on {probe.samples} pictures, {each.psnr:.1f} dB where it was made"
        if psnr >= each.psnr - ALLOWED_LOSS:
            progress("plans looked at", len(tried), len(tried))
            notes.append(f"{each.name} is followed: {seen}.")
            return FittedPlan(replace(each, plan=carried, speedup=probe.speedup(carried), psnr=psnr), tuple(notes))
        notes.append(f"{each.name} is not: {seen}.")
    progress("plans looked at", len(tried), len(tried))
    notes.append("Every call is computed. Search plans for what you run with `dcomp search-schedule`.")
    return FittedPlan(None, tuple(notes))


class _Probe:
    """Makes a few pictures with plans and without."""

    def __init__(self, pipeline: OpenPipeline, prompts: Sequence[str], settings: Generation) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._prompts = prompts[:PROBED]
        self.samples = len(self._prompts)
        self._told: dict[int, float] = {}
        clock = StepClock()

        def listen(*_: object) -> None:
            self._told[clock.call] = clock.timestep

        hook = pipeline.denoiser.register_forward_pre_hook(listen)
        try:
            self._whole = self._run(clock)
        finally:
            hook.remove()

    def carried(self, plan: CachePlan) -> CachePlan:
        """Return a plan for the calls of this trajectory."""
        timesteps = tuple(self._told[call] for call in range(len(self._told)))
        if timesteps == plan.timesteps:
            return plan
        return carry_over(plan, timesteps, places_of(self._pipeline.scheduler, timesteps))

    def psnr(self, plan: CachePlan) -> float:
        """Return the PSNR in dB of pictures with a plan, mean over pictures."""
        with following(self._pipeline.denoiser, self._pipeline.scheduler, PlanGuide(plan)):
            return self._whole.compare(self._run(None))[1]

    def speedup(self, plan: CachePlan) -> float:
        """Return the multiply-accumulates of all calls by those that a plan leaves."""
        args, kwargs = record_calls(self._pipeline, self._prompts[:1], self._settings)[0]
        return 1 / CallPrices(self._pipeline.denoiser, args, kwargs, plan.zones).macs_of(plan)

    def _run(self, clock: StepClock | None) -> Pictures:
        indices = range(_INDEX, _INDEX + self.samples)
        settings = replace(self._settings, batch_size=max(1, self.samples))
        made = self._pipeline.run(self._prompts, indices, settings, clock=clock)
        assert made.images is not None
        return Pictures(made.latents, made.images)
