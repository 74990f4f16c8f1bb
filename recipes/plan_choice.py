"""Follow proposed plans to the end, on pictures that no search saw, and keep those that are worth having.

A plan is worth having if its pictures are nearer to those of the whole trajectory than those of fewer scheduler steps
that take the same time here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from scipy.stats import spearmanr
from torch import Tensor

from dcomp.cachequant.budget import Budget, Measure
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.executor import following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import MeasuredPlan
from dcomp.cachequant.planners import PLANNERS, PlanningTask
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import Zone
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.quality import decibels, mean_squared_errors, relative_errors

FIRST_ROUND, FINALISTS = 3, 2  # pictures that all proposals are followed on, and how many go on to all pictures


@dataclass(frozen=True)
class Pictures:
    """What a pipeline made: final latents and pictures, `[N, ...]`."""

    latents: Tensor
    images: Tensor

    def compare(self, other: "Pictures") -> tuple[float, float]:
        """Return the relative error of another one's latents and the PSNR of its pictures in dB, means over those."""
        count = len(other.latents)
        error = relative_errors(self.latents[:count], other.latents).mean()
        return float(error), float(decibels(mean_squared_errors(self.images[:count], other.images)).mean())


@dataclass(frozen=True)
class Additivity:
    """Whether errors that a planner adds up are those of the plans that it makes of them.

    Attributes:
        plans: that were followed to the end.
        rank_correlation: Spearman's, of expected and measured errors; None for fewer than three plans.
        median_ratio: of measured by expected errors.
    """

    plans: int
    rank_correlation: float | None
    median_ratio: float


class PlanJudge:
    """Follows plans on pictures that no search saw.

    Args:
        pipeline: the model that will run.
        zones: that plans may predict.
        trials: of the trajectory that plans are for.
        prompts: of the pictures.
        indices: of their noise.
        settings: as deployed.

    Attributes:
        whole: the pictures when everything is computed.
    """

    def __init__(
        self,
        pipeline: OpenPipeline,
        zones: Sequence[Zone],
        trials: Trials,
        prompts: Sequence[str],
        indices: Sequence[int],
        settings: Generation,
    ) -> None:
        self._pipeline, self._zones, self._trials = pipeline, tuple(zones), trials
        self._prompts, self._indices, self._settings = prompts, indices, settings
        self.whole = self._run(settings, len(prompts))
        self.of_steps = cache(self._of_steps)

    @property
    def steps(self) -> int:
        """Scheduler steps of the trajectory."""
        return self._settings.steps

    @property
    def calls(self) -> int:
        """Denoiser calls of the trajectory."""
        return len(self._trials.timesteps)

    @property
    def samples(self) -> int:
        """Pictures."""
        return len(self._prompts)

    def plan(self, schedule: Schedule) -> CachePlan:
        """Return the plan of a schedule."""
        return self._trials.plan(schedule.rows, self._zones)

    def follow(self, plan: CachePlan, samples: int | None = None) -> Pictures:
        """Make the pictures, or the first of them, with a plan."""
        with following(self._pipeline.denoiser, self._pipeline.scheduler, PlanGuide(plan)):
            return self._run(self._settings, samples or self.samples)

    def _of_steps(self, steps: int) -> tuple[float, float]:
        """Compare the pictures of as many scheduler steps without a plan."""
        return self.whole.compare(self._run(replace(self._settings, steps=steps), self.samples))

    def _run(self, settings: Generation, samples: int) -> Pictures:
        made = self._pipeline.run(self._prompts[:samples], self._indices[:samples], settings)
        assert made.images is not None
        return Pictures(made.latents, made.images)


class PlanChoice:
    """Follows what a planner proposes for each budget, and keeps the best that beats fewer steps.

    Attributes:
        plans: that were kept.
        fewer_steps: name of a plan -> scheduler steps that take as long as its calls do here, and their PSNR in dB on
            the same pictures.
        faster: name of a plan -> time of calls that compute everything by that of its calls, here.
        notes: why a budget has no plan.
    """

    def __init__(self, task: PlanningTask, prices: CallPrices, judge: PlanJudge) -> None:
        self._task, self._prices, self._judge = task, prices, judge
        self._expected: list[tuple[float, float]] = []
        self.plans: list[MeasuredPlan] = []
        self.fewer_steps: dict[str, tuple[int, float]] = {}
        self.faster: dict[str, float] = {}
        self.notes: list[str] = []

    @property
    def additivity(self) -> Additivity | None:
        """How far expected errors were right; None if no planner said what it expects."""
        if not self._expected:
            return None
        ratios = sorted(measured / max(expected, 1e-12) for expected, measured in self._expected)
        several = len({expected for expected, _ in self._expected}) > 1 and len(self._expected) > 2
        rank = float(spearmanr(*zip(*self._expected, strict=True)).statistic) if several else None
        return Additivity(len(ratios), rank, ratios[len(ratios) // 2])

    def add(self, budget: Budget, planner: str) -> None:
        """Choose a plan for a budget."""
        task, prices = self._task, {zone: self._price(zone, budget.measure) for zone in self._task.zones}
        about = task.calls, self._prices.macs(), self._prices.whole_seconds if budget.measure == "seconds" else 1.0
        proposed = PLANNERS[planner](task, prices, budget.limit(*about))
        if not proposed:
            why = ""
            if planner == "joint":
                front = task.front(prices)
                nearest = budget.at(front[0].cost, *about)
                why = f": with gaps of {task.costs.longest} calls {nearest.amount:.3g}{nearest.unit} is the nearest"
            self.notes.append(f"No plan keeps {budget.name}{why}.")
            return
        best = self._best(budget.name, proposed)
        part = self._prices.seconds_of(best.plan)
        steps = max(1, math.ceil(self._judge.steps * part))
        if steps >= self._judge.steps:
            self.notes.append(f"At {budget.name} nothing is saved: its calls take {part:.2f} of the time, here.")
            return
        _, psnr = self._judge.of_steps(steps)
        if best.psnr <= psnr:
            beaten = f"the best plan {best.psnr:.1f} dB"
            self.notes.append(f"At {budget.name} {steps} steps are better ({psnr:.1f} dB, {beaten}).")
            return
        self.plans.append(best)
        self.fewer_steps[best.name], self.faster[best.name] = (steps, psnr), 1 / part

    def _price(self, zone: str, measure: Measure) -> float:
        if measure == "calls":
            return 0.0
        return self._prices.seconds([zone]) if measure == "seconds" else self._prices.macs([zone]) / self._prices.macs()

    def _best(self, name: str, proposed: Sequence[Schedule]) -> MeasuredPlan:
        """Return the proposal with the best pictures; all but a few are out after some of them."""
        if len(proposed) > FINALISTS and self._judge.samples > FIRST_ROUND:
            first = [self._measured(name, schedule, FIRST_ROUND).psnr for schedule in proposed]
            order = sorted(range(len(proposed)), key=lambda i: -first[i])
            proposed = [proposed[i] for i in order[:FINALISTS]]
        tried = [self._measured(name, schedule, self._judge.samples) for schedule in proposed]
        self._expected += [(one.expected_error, one.error) for one in tried if one.expected_error is not None]
        return max(tried, key=lambda one: one.psnr)  # errors of latents would be those of the one worst picture

    def _measured(self, name: str, schedule: Schedule, samples: int) -> MeasuredPlan:
        plan = self._judge.plan(schedule)
        error, psnr = self._judge.whole.compare(self._judge.follow(plan, samples))
        return MeasuredPlan(name, plan, 1 / self._prices.macs_of(plan), schedule.error, error, psnr)
