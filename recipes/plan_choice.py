"""Follow proposed plans to the end, on pictures that no search saw, and keep those that are worth having.

A plan is worth having if its pictures are nearer to those of the whole trajectory than those of fewer scheduler steps
that take the same time here.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor

from dcomp.cachequant.budget import Budget, Measure
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.executor import Unrounded, following
from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import CachePlan
from dcomp.cachequant.plan_set import MeasuredPlan
from dcomp.cachequant.planners import PLANNERS, PlanningTask
from dcomp.cachequant.prices import CallPrices
from dcomp.cachequant.trials import Trials
from dcomp.cachequant.zones import Zone
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.quality import decibels, mean_squared_errors, relative_errors
from dcomp.recipes.kept_results import KeptResults, digest

Correct = Callable[[CachePlan], CachePlan]

ROUND, SEMIFINALISTS, FINALISTS = 2, 4, 2  # pictures that all, then those many more follow; the last two follow all
CLEAR = 3.0  # dB behind the best: such a proposal is followed no further
SLOW = 0.1  # of a call: a zone that takes so much longer than its products costs its time
TRUSTED = 2.0  # times the expected error: a plan that is no further off was planned with costs that hold


@dataclass(frozen=True)
class Pictures:
    """What a pipeline made.

    Attributes:
        latents: final ones, `[N, ...]`.
        images: `[N, ...]`.
        seconds: that one picture took, without its first call and without decoding.
        cache_bytes: most that tensors which a plan keeps took for one picture.
    """

    latents: Tensor
    images: Tensor
    seconds: float
    cache_bytes: int = 0

    def part(self, places: range) -> "Pictures":
        """Return some of them."""
        chosen = slice(places.start, places.stop)
        return replace(self, latents=self.latents[chosen], images=self.images[chosen])

    def compare(self, other: "Pictures") -> "Distance":
        """Return how far another one's pictures are from these."""
        errors = relative_errors(self.latents, other.latents)
        psnr = decibels(mean_squared_errors(self.images, other.images))
        return Distance(tuple(errors.tolist()), tuple(psnr.tolist()), other.seconds, other.cache_bytes)


@dataclass(frozen=True)
class Distance:
    """How far pictures are from those of the whole trajectory.

    Attributes:
        errors: relative errors of final latents, one a picture.
        decibels: PSNR of pictures in dB.
        seconds, cache_bytes: as in `Pictures`.
    """

    errors: tuple[float, ...]
    decibels: tuple[float, ...]
    seconds: float = 0.0
    cache_bytes: int = 0

    @property
    def error(self) -> float:
        """Mean of the errors."""
        return fmean(self.errors)

    @property
    def typical_error(self) -> float:
        """Geometric mean of the errors, which is what planners expect: one picture that became another counts less."""
        return math.exp(fmean(math.log(max(error, 1e-12)) for error in self.errors))

    @property
    def psnr(self) -> float:
        """Mean of the decibels."""
        return fmean(self.decibels)

    def __add__(self, other: "Distance") -> "Distance":
        """Return that of the pictures of both."""
        counts = len(self.errors), len(other.errors)
        seconds = (counts[0] * self.seconds + counts[1] * other.seconds) / sum(counts)
        both = max(self.cache_bytes, other.cache_bytes)
        return Distance(self.errors + other.errors, self.decibels + other.decibels, seconds, both)


@dataclass(frozen=True)
class Additivity:
    """Whether errors that a planner adds up are those of the plans that it makes of them.

    Attributes:
        plans: that were followed to the end.
        rank_correlation: Spearman's, of expected and measured errors; None for fewer than three plans.
        median_ratio: of measured by expected errors, the measured ones as geometric means over pictures.
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
        unrounded: makes a `with` block without rounding of inputs. All pictures are compared with those of such a
            trajectory: rounding makes other pictures of any small difference. None for a float model.
        kept: distances that an interrupted run has found.

    Attributes:
        whole: the pictures when everything is computed, and no input is rounded.
    """

    def __init__(
        self,
        pipeline: OpenPipeline,
        zones: Sequence[Zone],
        trials: Trials,
        prompts: Sequence[str],
        indices: Sequence[int],
        settings: Generation,
        unrounded: Unrounded | None = None,
        kept: KeptResults | None = None,
    ) -> None:
        self._unrounded, self._kept = unrounded, kept or KeptResults()
        self._pipeline, self._zones, self._trials = pipeline, tuple(zones), trials
        self._prompts, self._indices, self._settings = prompts, indices, settings
        with unrounded() if unrounded else nullcontext():
            self.whole = self._run(settings, range(len(prompts)))
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
        return self._trials.plan(schedule.rows, self._zones, schedule.unrounded)

    def follow(self, plan: CachePlan, places: range | None = None) -> Pictures:
        """Make the pictures, or some of them, with a plan."""
        places = places or range(self.samples)
        together = min(self._settings.batch_size, len(places))
        about = self._pipeline.denoiser, self._pipeline.scheduler, PlanGuide(plan), self._unrounded
        with following(*about) as executor:
            made = self._run(self._settings, places)
        return replace(made, cache_bytes=math.ceil(executor.stats.peak_bytes / together))

    def computed(self) -> Pictures:
        """Make the pictures with everything computed, as the model runs."""
        return self.whole if self._unrounded is None else self._run(self._settings, range(self.samples))

    def judge(self, plan: CachePlan, places: range) -> Distance:
        """Make some of the pictures with a plan and compare them with those of the whole trajectory."""
        name = f"plan-{digest(plan.to_dict())}-{places.start}-{places.stop}"
        compare = self.whole.part(places).compare
        return self._kept.get(name, lambda: asdict(compare(self.follow(plan, places))), _distance)

    def _of_steps(self, steps: int) -> Distance:
        """Compare the pictures of as many scheduler steps without a plan."""
        settings, places = replace(self._settings, steps=steps), range(self.samples)
        compare, run = self.whole.compare, self._run
        return self._kept.get(f"steps-{steps}", lambda: asdict(compare(run(settings, places))), _distance)

    def _run(self, settings: Generation, places: range) -> Pictures:
        chosen = slice(places.start, places.stop)
        times: list[float] = []
        made = self._pipeline.run(
            self._prompts[chosen], self._indices[chosen], settings, on_step=lambda *_: times.append(time.perf_counter())
        )
        assert made.images is not None
        batches = math.ceil(len(places) / settings.batch_size)
        calls = len(times) // batches
        seconds = sum(times[(batch + 1) * calls - 1] - times[batch * calls] for batch in range(batches))
        return Pictures(made.latents, made.images, seconds / len(places))


def _distance(data: Mapping[str, Any]) -> Distance:
    """Return what `asdict` made of a distance."""
    errors, decibels = (tuple(float(value) for value in data[key]) for key in ("errors", "decibels"))
    return Distance(errors, decibels, float(data["seconds"]), int(data["cache_bytes"]))


@dataclass(frozen=True)
class _Followed:
    """A proposal, and how far the pictures are that it made so far."""

    schedule: Schedule
    plan: CachePlan
    found: Distance

    @property
    def as_expected(self) -> bool:
        """Whether the error is not much larger than the planner said."""
        return self.schedule.error is not None and self.found.typical_error <= TRUSTED * self.schedule.error


class PlanChoice:
    """Follows what a planner proposes for each budget, and keeps the best that beats fewer steps.

    Args:
        task: what planners may look at.
        prices: of calls.
        judge: follows plans.
        correct: returns a plan with corrections; it is followed too, and kept if its pictures are better.

    Attributes:
        plans: that were kept.
        fewer_steps: name of a plan -> scheduler steps that take as long as its calls do here, and their PSNR in dB on
            the same pictures.
        faster: name of a plan -> time of calls that compute everything by that of its calls, here.
        time_ratios: name of a plan -> time that its pictures took by what was expected, from calls of fewer steps.
        cache_bytes: name of a plan -> the most that its kept tensors took for one picture.
        notes: why a budget has no plan.
    """

    def __init__(
        self, task: PlanningTask, prices: CallPrices, judge: PlanJudge, correct: Correct | None = None
    ) -> None:
        self._task, self._prices, self._judge, self._correct = task, prices, judge, correct
        self._expected: list[tuple[float, float]] = []
        self.plans: list[MeasuredPlan] = []
        self.fewer_steps: dict[str, tuple[int, float]] = {}
        self.faster: dict[str, float] = {}
        self.time_ratios: dict[str, float] = {}
        self.cache_bytes: dict[str, int] = {}
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
        task = self._task
        prices = {zone: self._price(zone, budget.measure) for zone in task.zones_for(planner)}
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
        best, found = self.best(budget.name, proposed)
        if self._correct is not None:
            best, found = self._corrected(self._correct, best, found)
        part = self._prices.seconds_of(best.plan)
        steps = max(1, math.ceil(self._judge.steps * part))
        if steps >= self._judge.steps:
            self.notes.append(f"At {budget.name} nothing is saved: its calls take {part:.2f} of the time, here.")
            return
        fewer = self._judge.of_steps(steps)
        psnr = fewer.psnr
        if best.psnr <= psnr:
            beaten = f"the best plan {best.psnr:.1f} dB"
            self.notes.append(f"At {budget.name} {steps} steps are better ({psnr:.1f} dB, {beaten}).")
            return
        self.plans.append(best)
        self.fewer_steps[best.name], self.faster[best.name] = (steps, psnr), 1 / part
        self.cache_bytes[best.name] = found.cache_bytes
        calls = self._judge.calls
        of_one_call = fewer.seconds / max(1.0, calls * steps / self._judge.steps - 1)
        if of_one_call and part * calls > 1:
            self.time_ratios[best.name] = found.seconds / (of_one_call * (part * calls - 1))

    def best(self, name: str, proposed: Sequence[Schedule]) -> tuple[MeasuredPlan, Distance]:
        """Return the proposal with the best pictures, and how far these are.

        All are followed on a few pictures, the better ones on a few more, and two on the rest (sequential halving:
        Karnin, Koren & Somekh 2013), as far as they are near the best. Those that expect no error are
        left out where the error of the best of the others is about what it expected: there is no need to guess.
        """
        every = range(self._judge.samples)
        first, second, rest = every[:ROUND], every[ROUND : 2 * ROUND], every[2 * ROUND :]
        alive = _best_first(self._begin(one, first) for one in proposed if one.error is not None)
        if not alive or not alive[0].as_expected:
            alive = _best_first([*alive, *(self._begin(one, first) for one in proposed if one.error is None)])
        alive = _best_first(self._go_on(each, second) for each in _near(alive[:SEMIFINALISTS]))
        one, *others = _best_first(self._go_on(each, rest) for each in _near(alive[:FINALISTS]))
        self._expected += [
            (each.schedule.error, each.found.typical_error)
            for each in (one, *others)
            if each.schedule.error is not None
        ]
        speedup, found = 1 / self._prices.macs_of(one.plan), one.found
        return MeasuredPlan(name, one.plan, speedup, one.schedule.error, found.error, found.psnr), found

    def leave_out_beaten(self) -> None:
        """Leave out plans than which another one of these is better and saves no less: speeds find that one."""
        for one in [*self.plans]:

            def beats(other: MeasuredPlan, one: MeasuredPlan = one) -> bool:
                as_fast = self.faster[other.name] >= self.faster[one.name] and other.speedup >= one.speedup
                return as_fast and other.psnr > one.psnr

            best = max(filter(beats, self.plans), key=lambda other: other.psnr, default=None)
            if best is not None:
                self.plans.remove(one)
                for known in (self.fewer_steps, self.faster, self.time_ratios, self.cache_bytes):
                    known.pop(one.name, None)
                compared = f"{best.psnr:.1f} dB, {one.psnr:.1f} dB"
                self.notes.append(f"At {one.name} the plan of {best.name} is better, and saves more ({compared}).")

    def _corrected(self, correct: Correct, plain: MeasuredPlan, seen: Distance) -> tuple[MeasuredPlan, Distance]:
        """Return the plan with corrections if its pictures are better, else as it is."""
        plan = correct(plain.plan)
        found = self._judge.judge(plan, range(self._judge.samples))
        if found.psnr > plain.psnr:
            return replace(plain, plan=plan, error=found.error, psnr=found.psnr), found
        compared = f"{found.psnr:.1f} dB, {plain.psnr:.1f} dB without them"
        self.notes.append(f"At {plain.name} corrections make pictures no better ({compared}), and are left out.")
        return plain, seen

    def _price(self, zone: str, measure: Measure) -> float:
        """Return what is left of a call where a zone is predicted.

        Of products too, unless it takes clearly longer than its products here: many small tensors that are predicted
        cost little arithmetic and much time.
        """
        if measure == "calls":
            return 0.0
        products = self._prices.macs([zone]) / self._prices.macs()
        if measure == "macs" and zone in self._task.modules:  # of which there are hundreds
            return products
        seconds = self._prices.seconds([zone])
        return seconds if measure == "seconds" or seconds > products + SLOW else products

    def _begin(self, schedule: Schedule, places: range) -> _Followed:
        plan = self._judge.plan(schedule)
        return _Followed(schedule, plan, self._judge.judge(plan, places))

    def _go_on(self, one: _Followed, places: range) -> _Followed:
        """Follow a proposal on more pictures, if there are more."""
        return replace(one, found=one.found + self._judge.judge(one.plan, places)) if places else one


def _near(best_first: Sequence[_Followed]) -> list[_Followed]:
    return [each for each in best_first if each.found.psnr >= best_first[0].found.psnr - CLEAR]


def _best_first(followed: Iterable[_Followed]) -> list[_Followed]:
    # Errors of latents would be those of the one worst picture.
    return sorted(followed, key=lambda each: -each.found.psnr)
