"""Calibrate along the trajectory that a cache plan makes: at its latents, in the calls that it computes.

Source: Q&C 2025 (calibration samples of calls that a cache skips are of no use).
"""

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import PlanSet
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.recipes.follow import made_for, plan_file
from dcomp.recipes.schedule import trajectory_of


@dataclass(frozen=True)
class AlongPlan:
    """A pipeline whose trajectories a plan shortens.

    Attributes:
        pipeline: in float.
        plan: for as many steps of its scheduler.
    """

    pipeline: OpenPipeline
    plan: CachePlan

    @property
    def hash(self) -> str:
        """Hash of the plan."""
        return hashlib.sha256(self.plan.to_json().encode()).hexdigest()

    @property
    def calls(self) -> list[int]:
        """Calls that predict nothing."""
        return [call for call, row in enumerate(self.plan.actions) if not row]

    def attached(self) -> AbstractContextManager[object]:
        """Let the denoiser follow the plan."""
        return following(self.pipeline.denoiser, self.pipeline.scheduler, PlanGuide(self.plan))


def along_plan(name: str, pipeline: OpenPipeline, steps: int) -> AlongPlan:
    """Open a plan to calibrate along.

    Args:
        name: `FILE.json:NAME`, or the name of one in the model's own folder.
        pipeline: with the scheduler that will be deployed. The plan may be that of a quantized form of the model.
        steps: of the scheduler.

    Raises:
        PlanError: there is no such plan, or it was made for another class of denoiser, scheduler or number of steps.
    """
    file, last = plan_file(name, pipeline.source)
    plans = PlanSet.read(file)
    own = trajectory_of(pipeline.source, pipeline, steps)
    difference = plans.trajectory.difference(replace(own, model=plans.trajectory.model))
    if difference:
        raise made_for(difference, file)
    return AlongPlan(pipeline, plans.choose(last).plan)
