"""Let a pipeline follow a cache plan: in `dcomp generate`, or in Python until it is told to stop."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from dcomp import UsageError
from dcomp.cachequant.executor import CacheExecutor, CacheStats
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import PlanError
from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet, Trajectory
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.components import local_folder
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.compress.unrounded import unrounded_calls
from dcomp.recipes.schedule import trajectory_of, weights_hash

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FollowedPlan:
    """A plan that a pipeline follows; also a context manager, at whose end it stops.

    Attributes:
        plan: the plan and its worth.
        stats: what was done so far: zones that ran and that were predicted, calls that computed although the plan says
            otherwise, with the reason, and the most memory that kept tensors took.
    """

    def __init__(self, plan: MeasuredPlan, denoiser: nn.Module, scheduler: Any = None) -> None:
        self.plan = plan
        self._clock = StepClock()
        self._handle = self._clock.attach(denoiser, scheduler)
        try:
            unrounded = unrounded_calls(denoiser) if plan.plan.unrounded else None
            self._executor = CacheExecutor(denoiser, PlanGuide(plan.plan), self._clock, unrounded)
        except BaseException:
            self._handle.remove()
            raise

    @property
    def stats(self) -> CacheStats:
        """What was done so far."""
        return self._executor.stats

    def trajectory(self) -> AbstractContextManager[Callable[[], None]]:
        """Begin a trajectory of a denoiser that no scheduler of diffusers drives.

        The `with` block gets a function to call after the last call of the denoiser of each step, so that several of
        them, as guidance makes them one after the other, are known to belong together. The timesteps must be those of
        the plan; calls at others compute.
        """
        return self._clock.trajectory_by_hand()

    def stop(self) -> None:
        """Let the pipeline compute every call again; nothing of the plan is left on it. Harmless when called again."""
        self._executor.detach()
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def follow_plan(pipe: "DiffusionPipeline | nn.Module", name: str, folder: str | Path | None = None) -> FollowedPlan:
    """Let an open diffusers pipeline, or a denoiser alone, follow one of its cache plans until `stop()`.

    A run with another number of steps than the plan's computes all calls, and counts them as fallbacks. Warns of
    adapters, which plans do not know.

    Args:
        pipe: opened from the folder that the plans were made for, with the same scheduler; or its denoiser, whose
            caller then says by `FollowedPlan.trajectory` when a picture begins and a step ends.
        name: of a plan, or a speed such as "2x", or `FILE.json:NAME` for plans that lie elsewhere.
        folder: of the pipeline; default: where it says that it was opened from. A denoiser needs it.

    Raises:
        PlanError: there is no such plan, it was made for something else, or the pipeline follows another one.
        UsageError: the pipeline has no scheduler, or there is no folder.
    """
    alone = isinstance(pipe, nn.Module)
    source = folder or (None if alone else getattr(pipe, "name_or_path", None))
    if not source:
        kind = "denoiser" if alone else "pipeline"
        raise UsageError(f"This {kind} does not know its folder", where="folder", remedy="Give the folder.")
    place = local_folder(source)
    file, last = plan_file(name, place)
    plans = PlanSet.read(file)
    denoiser, scheduler, own = _parties(pipe, place, plans.trajectory)
    difference = plans.trajectory.difference(own)
    if difference:
        raise made_for(difference, file)
    adapters: Any = getattr(denoiser, "peft_config", None)
    if adapters:
        warnings.warn(
            f"The denoiser has adapters ({', '.join(adapters)}), and {file.name} was made without. "
            "Compare some pictures with and without the plan, or fuse the adapters and search plans again.",
            stacklevel=2,
        )
    return FollowedPlan(plans.choose(last), denoiser, scheduler)


def _parties(pipe: Any, folder: Path, planned: Trajectory) -> tuple[nn.Module, Any, Trajectory]:
    """Return the denoiser, its scheduler if it has one, and what plans for both are made for.

    Args:
        pipe: a pipeline, or a denoiser; nothing is known of the scheduler of one that is alone.
        folder: that it was opened from.
        planned: what the plans at hand were made for.
    """
    if isinstance(pipe, nn.Module):
        weights = weights_hash(folder, check_model_folder(folder).denoiser_name)
        return pipe, None, replace(planned, denoiser=type(pipe).__name__, model=weights)
    if getattr(pipe, "scheduler", None) is None:
        raise UsageError(
            "This pipeline has no scheduler to tell steps by",
            where=type(pipe).__name__,
            remedy="Give its denoiser instead, and say by `with plan.trajectory() as end_step:` where steps end.",
        )
    opened = OpenPipeline(pipe, folder)
    return opened.denoiser, opened.scheduler, trajectory_of(folder, opened, planned.steps)


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
