"""Let a pipeline follow a cache plan: in `dcomp generate`, or in Python until it is told to stop."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from dcomp import UsageError
from dcomp.cachequant.executor import CacheExecutor, CacheStats
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import PlanError
from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.components import local_folder
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.recipes.schedule import trajectory_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FollowedPlan:
    """A plan that a pipeline follows; also a context manager, at whose end it stops.

    Attributes:
        plan: the plan and its worth.
        stats: what was done so far: zones that ran and that were predicted, calls that computed although the plan says
            otherwise, with the reason, and the most memory that kept tensors took.
    """

    def __init__(self, plan: MeasuredPlan, pipeline: OpenPipeline) -> None:
        self.plan = plan
        clock = StepClock()
        self._handle = clock.attach(pipeline.denoiser, pipeline.scheduler)
        try:
            self._executor = CacheExecutor(pipeline.denoiser, PlanGuide(plan.plan), clock)
        except BaseException:
            self._handle.remove()
            raise

    @property
    def stats(self) -> CacheStats:
        """What was done so far."""
        return self._executor.stats

    def stop(self) -> None:
        """Let the pipeline compute every call again; nothing of the plan is left on it. Harmless when called again."""
        self._executor.detach()
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def follow_plan(pipe: "DiffusionPipeline", name: str, folder: str | Path | None = None) -> FollowedPlan:
    """Let an open diffusers pipeline follow one of its cache plans until `stop()`.

    A run with another number of steps than the plan's computes all calls, and counts them as fallbacks.

    Args:
        pipe: opened from the folder that the plans were made for, with the same scheduler.
        name: of a plan, or a speed such as "2x", or `FILE.json:NAME` for plans that lie elsewhere.
        folder: of the pipeline; default: where it says that it was opened from.

    Raises:
        PlanError: there is no such plan, it was made for something else, or the pipeline follows another one.
        UsageError: the pipeline does not know its folder.
    """
    source = folder or getattr(pipe, "name_or_path", None)
    if not source:
        raise UsageError("This pipeline does not know its folder", where="folder", remedy="Give the folder.")
    opened = OpenPipeline(pipe, local_folder(source))
    return FollowedPlan(plan_for(name, opened.source, opened), opened)


def plan_for(name: str, folder: Path, pipeline: OpenPipeline) -> MeasuredPlan:
    """Return a plan by its name, if it was made for this pipeline.

    Args:
        name: of a plan of the folder, or `FILE.json:NAME`.
        folder: of the model.
        pipeline: that will follow it.

    Raises:
        PlanError: there is no such plan, or it was made for something else.
    """
    file, last = plan_file(name, folder)
    plans = PlanSet.read(file)
    own = trajectory_of(folder, pipeline, plans.trajectory.steps)
    difference = plans.trajectory.difference(own)
    if difference:
        raise made_for(difference, file)
    return plans.choose(last)


def made_for(difference: str, file: Path) -> PlanError:
    """Return the refusal of plans that were made for something else."""
    return PlanError(
        f"These plans were made for {difference}",
        where=str(file),
        remedy="Search plans for what you run with `dcomp search-schedule`, or leave the plan out.",
    )


def plan_file(name: str, folder: Path) -> tuple[Path, str]:
    """Return the file that a plan lies in and its name there, from `NAME` or `FILE.json:NAME`."""
    path, _, last = name.rpartition(":")
    return (Path(path) if path else folder / FILE), last
