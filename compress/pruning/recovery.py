"""Recovery: a pruned denoiser learns again what the whole one predicts on its own trajectories.

Neither pictures nor noise are needed: a calibration set holds what the denoiser was told and what it predicted, which
is the teacher's cache. Beside the prediction, features of stages may be compared (`features.py`). U are the units of
`objective.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dcomp import DcompError
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.quality import geometric_mean
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.tree_file import tensor_sha256
from dcomp.compress.held_out import hold_out
from dcomp.compress.learning_run import CosineAdam, Snapshot, StratifiedOrder
from dcomp.compress.objective import Objective
from dcomp.compress.pruning.features import FeatureLoss

Learned = Literal["full", "lora", "norms"]
Ending = Literal["done", "no better", "diverged"]
RATES: dict[str, float] = {"full": 1e-4, "lora": 5e-4, "norms": 1e-3}
RANK = 16  # of the update of one layer
BATCH_ROWS = 16  # of a step
DECAY = 0.999  # of the mean of values over steps, which is what is kept
WARM_UP = 100  # steps at most, and a tenth of all
CHECKS = 20  # of the held-out error in a run
PATIENCE = 5  # checks without a new best, after which it ends; from half of its steps on, since large rates hide gains
DIVERGED = 4.0  # times the held-out error before, at which it ends
WORSE, SLOWER, RETRIES = 1.25, 1 / 3, 4  # times that error, at which it begins again at a third of the rate, so often
MEASURED_PER_STEP = 8


class RecoveryError(DcompError):
    """A denoiser that cannot be recovered as asked."""


@dataclass(frozen=True)
class RecoveryResult:
    """What recovery did. Errors are of a typical held-out trajectory, each step in units of its error before.

    Attributes:
        before: near 1.
        after: of what was kept.
        iterations: steps that were made since it began, or began again, for the last time.
        best: the step after which it was best, maybe before it began again; 0: nothing helped, and the denoiser is what
            it was.
        ending: why it ended.
    """

    before: float
    after: float
    iterations: int
    best: int
    ending: Ending


def recover(
    student: nn.Module,
    rows: RowBatch,
    *,
    features: FeatureLoss | None = None,
    learned: Learned = "full",
    iterations: int = 1000,
    batch_rows: int = BATCH_ROWS,
    lr: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    snapshot: Path | None = None,
    progress: Progress = silent,
) -> RecoveryResult:
    """Train a pruned denoiser in place, and leave it with the values that were best on held-out trajectories.

    What it shares with the whole one it has for itself from now on. A killed run goes on from its snapshot and ends
    with the same bits. The less was lost, the smaller the steps have to be: a run that makes it worse begins again with
    smaller ones.

    Args:
        student: in float32 and eval mode.
        rows: recorded calls with the whole model's predictions.
        features: what else is compared; None for the prediction alone.
        learned: all parameters; updates of low rank, merged at the end; or norms and biases.
        iterations: steps at most; the rate falls to 0 along a cosine.
        batch_rows: rows of a step.
        lr: of Adam; None: that of `RATES`, or as much less as it takes.
        guidance: scale that the pipeline guides with; None for the plain error, also of pairs.
        seed: decides which trajectories are held out, and the order of the others.
        snapshot: file of a resumable state, written every 20 s.
        progress: called with a text, the count done and the total.

    Raises:
        RecoveryError: there is nothing to learn, or a parameter is not float32.
        HeldOutError: all rows belong to one trajectory.

    Source:
        Zhang et al. 2024, LAPTOP-Diff, section 3.4, without the loss of the task; Golnari et al. 2023, LoRA-Enhanced
        Distillation, for "lora". Units by step, the mean over steps and the held-out verdict are ours.
    """
    _part_from_others(student)
    objective = Objective(student, rows, guidance, batch_rows)
    seen, held_out = hold_out(rows.trajectories[objective.units[:, 0]], seed)
    known, judges = (objective.sample(units, MEASURED_PER_STEP) for units in (seen, held_out))
    rate = RATES[learned] if lr is None else lr
    with _learning(student, learned) as leaves:
        options = [learned, iterations, batch_rows, rate, guidance, seed, features is not None]
        file = Snapshot(snapshot, f"{options} {objective.digest()} {' '.join(map(tensor_sha256, _detached(leaves)))}")
        state = file.read() or {}
        if state:
            course = _Course.read(state, len(leaves))
        else:
            course = _Course(objective.measure(torch.cat((known, judges)), silent), _detached(leaves))

        def begin() -> CosineAdam:
            return CosineAdam([(leaves, rate * SLOWER**course.retries)], iterations, min(WARM_UP, iterations // 10))

        optimizer = begin()
        if state:
            optimizer.load(state)
        weights = objective.weights(course.errors, known)
        whose = rows.trajectories[objective.units[judges, 0]]
        before = typical_error((course.errors * weights)[judges], whose)
        course.error = min(course.error, before)
        order, every = StratifiedOrder(objective.steps[seen], seed), max(1, iterations // CHECKS)
        ending: Ending = "done"

        def now() -> dict[str, Tensor]:
            return optimizer.state() | course.tensors()

        while (iteration := course.iteration) < iterations:
            progress("recovery", iteration, iterations)
            file.write(now)
            units = seen[order.draw(iteration * objective.batch, objective.batch)]
            optimizer.step(iteration, partial(_loss, objective, units, weights, features, course))
            course.follow(leaves)
            if course.iteration % every and course.iteration < iterations:
                continue
            with _values(leaves, course.mean):
                error = typical_error((objective.measure(judges, silent) * weights)[judges], whose)
            course.judge(error)
            again = lr is None and course.retries < RETRIES
            if not math.isfinite(error) or error > (WORSE if again else DIVERGED) * before:
                if again:
                    course.begin_again(leaves)
                    optimizer = begin()
                    continue
                ending = "diverged"
                break
            if course.iteration - max(course.best_iteration, iterations // 2) >= PATIENCE * every:
                ending = "no better"
                break
        progress("recovery", iterations, iterations)
        file.write(now, at_once=True)
        with torch.no_grad():
            for leaf, value in zip(leaves, course.best, strict=True):
                leaf.copy_(value)
    return RecoveryResult(before, course.error, course.iteration, course.best_iteration, ending)


def guided_rows(rows: RowBatch, guidance: float | None) -> RowBatch:
    """Return the rows with a condition, each with the guided prediction to learn: its pair is not needed any more.

    Args:
        rows: of recorded calls.
        guidance: scale that they were guided with.

    Raises:
        RecoveryError: calls have no two contexts, or were not guided.

    Source: Meng et al. 2023, On Distillation of Guided Diffusion Models, section 3.1, for one scale; Golnari et al.
    2023, LoRA-Enhanced Distillation, section 3.
    """
    if rows.pairs is None or guidance is None or guidance <= 1:
        raise RecoveryError(
            "There is no guidance to learn: calls have one context",
            where="recover_guidance",
            remedy="Leave it out, or ask for a guidance above 1.",
        )
    without, with_condition = rows.pairs.unbind(1)
    guided = rows.outputs[without].lerp(rows.outputs[with_condition], guidance)
    return replace(rows.take(with_condition), outputs=guided, pairs=None)


def typical_error(errors: Tensor, trajectories: Tensor) -> float:
    """Return the geometric mean over trajectories of the mean error of each.

    Args:
        errors: fp64 `[N]`.
        trajectories: which one each is of, int64 `[N]`.
    """
    return geometric_mean(torch.stack([errors[trajectories == one].mean() for one in trajectories.unique()]))


class _Course:
    """How far a run has come.

    Attributes:
        errors: fp64 `[U]`, before the first step; NaN for units that were not measured.
        mean: of the leaves over steps.
        best: mean with the least held-out error.
        error: that error.
        best_iteration: when that was.
        iteration: steps made since it began for the last time.
        retries: how often it began again.
        unit: of the loss of features: what it was in the first step; 0 before.
    """

    def __init__(self, errors: Tensor, leaves: Sequence[Tensor]) -> None:
        self.errors, self.error = errors, math.inf
        self.mean, self.best = ([leaf.clone() for leaf in leaves] for _ in range(2))
        self.best_iteration = self.iteration = self.retries = 0
        self.unit = 0.0

    def follow(self, leaves: Sequence[Tensor]) -> None:
        """Take the leaves after a step into the mean."""
        decay = min(DECAY, (1 + self.iteration) / (10 + self.iteration))
        for mean, leaf in zip(self.mean, leaves, strict=True):
            mean.lerp_(leaf.detach(), 1 - decay)
        self.iteration += 1

    def begin_again(self, leaves: Sequence[Tensor]) -> None:
        """Go back to what was best so far."""
        self.iteration, self.retries = 0, self.retries + 1
        with torch.no_grad():
            for mean, best, leaf in zip(self.mean, self.best, leaves, strict=True):
                mean.copy_(best)
                leaf.copy_(best)

    def judge(self, error: float) -> None:
        """Keep the mean if its held-out error is the least so far."""
        if error < self.error:
            self.error, self.best_iteration = error, self.iteration
            for best, mean in zip(self.best, self.mean, strict=True):
                best.copy_(mean)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it by name."""
        numbers = torch.tensor(
            [self.error, self.best_iteration, self.iteration, self.unit, self.retries], dtype=torch.float64
        )
        lists = {f"{name}.{i}": value for name in ("mean", "best") for i, value in enumerate(getattr(self, name))}
        return lists | {"course": numbers, "errors": self.errors}

    @classmethod
    def read(cls, state: dict[str, Tensor], leaves: int) -> Self:
        """Take what `tensors` returned out of a state."""
        error, best, iteration, unit, retries = state.pop("course").tolist()
        own = {name: [state.pop(f"{name}.{i}") for i in range(leaves)] for name in ("mean", "best")}
        course = cls(state.pop("errors"), own["mean"])
        course.best, course.error, course.unit = own["best"], error, unit
        course.best_iteration, course.iteration, course.retries = int(best), int(iteration), int(retries)
        return course


def _loss(
    objective: Objective, units: Tensor, weights: Tensor, features: FeatureLoss | None, course: _Course
) -> Tensor:
    if features is None:
        return objective.loss(units, weights)
    with features.listening() as found:
        loss = objective.loss(units, weights)
    other = features.loss(found, objective.units[units].flatten())
    course.unit = course.unit or max(float(other.detach()), 1e-12)
    return loss + other / course.unit


@contextmanager
def _learning(student: nn.Module, learned: Learned) -> Iterator[list[Tensor]]:
    """Within a `with` block, let parameters have gradients; yield the leaves that are learned."""
    changed: list[Any] = []
    asked = {parameter: parameter.requires_grad for parameter in student.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        leaves: list[Tensor] = [*student.parameters()] if learned == "full" else []
        if learned == "norms":
            leaves += [parameter for parameter in student.parameters() if parameter.dim() == 1]  # of biases too
        elif learned == "lora":
            generator = torch.Generator().manual_seed(0)
            for layer in [module for module in student.modules() if type(module) is nn.Linear]:
                if min(layer.weight.shape) > RANK:
                    update = _LowRank(layer.weight, generator)
                    parametrize.register_parametrization(layer, "weight", update)
                    changed.append(layer)
                    leaves += update.parameters()
        if not leaves:
            raise RecoveryError(
                "The denoiser has nothing that could be learned",
                where=learned,
                remedy="Recover all parameters, with --recover full.",
            )
        other = {str(leaf.dtype) for leaf in leaves} - {"torch.float32"}
        if other:
            raise RecoveryError(
                f"Only float32 parameters can be recovered, not {', '.join(sorted(other))}",
                where=type(student).__name__,
                remedy="Open the model in float32.",
            )
        for leaf in leaves:
            leaf.requires_grad_(True)
        yield leaves
    finally:
        for layer in changed:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            layer._parameters["bias"] = layer._parameters.pop("bias")  # after the weight, as before
        for parameter in student.parameters():
            parameter.requires_grad_(asked.get(parameter, False))
            parameter.grad = None


def _part_from_others(student: nn.Module) -> None:
    """Give a model parameters of its own: one that was cut shares those that are whole."""
    own: dict[nn.Parameter, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            copied = own.setdefault(parameter, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            module._parameters[name] = copied


class _LowRank(nn.Module):
    """A weight with an update of low rank, zero at first."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        self.up, self.down = nn.Parameter(torch.zeros(len(weight), RANK)), nn.Parameter(down)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def _detached(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.detach() for leaf in leaves]


@contextmanager
def _values(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Within a `with` block, give leaves other values."""
    before = [leaf.detach().clone() for leaf in leaves]
    try:
        with torch.no_grad():
            for leaf, value in zip(leaves, values, strict=True):
                leaf.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)
