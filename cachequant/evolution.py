"""Plans by evolution: what each call predicts is bred, and judged by the final latents of whole trajectories.

Nothing is assumed of how errors add up, and every plan costs a trajectory. Letters: T calls.

Source: Aggarwal et al. 2025, Evolutionary Caching to Accelerate Your Off-the-Shelf Diffusion Model (ECAD): NSGA-II over
what is reused in each step, with a reward of the pictures and multiply-accumulates as objectives. Here the reward is
the error of the final latents, which needs neither a decoder nor a reward network.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from dcomp import UsageError
from dcomp.cachequant.dynamic import Schedule
from dcomp.cachequant.plan import Actions
from dcomp.calibrate.progress import Progress, silent

EVALUATIONS, POPULATION = 240, 24
_COMPUTE = "compute"
_SPOILT = 1e9  # error of latents that are not finite


def evolve(
    calls: int,
    prices: Mapping[str, float],
    follow: Callable[[Sequence[Actions]], float],
    seeds: Iterable[Sequence[Actions]] = (),
    *,
    evaluations: int = EVALUATIONS,
    population: int = POPULATION,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Schedule]:
    """Return the schedules that no other one beats in cost and error among those that were tried, cheapest first.

    The first call computes; each other one does so too or reuses a zone.

    Args:
        calls: T.
        prices: zone -> part of a call that is left where it is predicted.
        follow: returns the relative error of the final latents of a schedule.
        seeds: schedules of the first generation; forecasts among them become reuse.
        evaluations: schedules that are tried, the seeds among them.
        population: of a generation.
        seed: of all that is random.
        progress: called with a text, the schedules tried and their total.

    Raises:
        UsageError: optuna is not installed.
    """
    _check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for rows in list(seeds)[:evaluations]:
        study.enqueue_trial({str(call): next(iter(rows[call]), _COMPUTE) for call in range(1, calls)})
    choices = (_COMPUTE, *prices)
    tried: dict[tuple[str, ...], Schedule] = {}
    for done in range(evaluations):
        progress("plans bred", done, evaluations)
        trial = study.ask()
        genes = tuple(str(trial.suggest_categorical(str(call), choices)) for call in range(1, calls))
        if genes not in tried:
            child: tuple[Actions, ...] = ({}, *({} if gene == _COMPUTE else {gene: "reuse"} for gene in genes))
            cost = 1 + sum(1.0 if gene == _COMPUTE else prices[gene] for gene in genes)
            error = follow(child)
            tried[genes] = Schedule(child, cost, error if math.isfinite(error) else _SPOILT)
        study.tell(trial, (tried[genes].cost, tried[genes].error or 0.0))
    progress("plans bred", evaluations, evaluations)
    return _front(tried.values())


def _check_optuna() -> None:
    """Refuse to go on without the package that breeds.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UsageError(
            "The package optuna is not installed", where="evolve", remedy="Run `pip install 'dcomp[evolve]'`."
        )


def _front(schedules: Iterable[Schedule]) -> list[Schedule]:
    front: list[Schedule] = []
    for one in sorted(schedules, key=lambda one: (one.cost, one.error)):
        if not front or (one.error or 0.0) < (front[-1].error or 0.0):
            front.append(one)
    return front
