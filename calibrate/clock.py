"""Which trajectory, denoiser call, scheduler step and timestep bin is running.

The clock listens to two parties: the scheduler (`set_timesteps` starts a trajectory, `step` ends a call) and the
denoiser (a pre-hook reads its `timestep` argument). It never counts denoiser calls: guidance may run its contexts as
one batch or one after the other, and a caller may use the denoiser alone.

Notation: t timestep in the units that the denoiser is told (0..999, or a fraction of 1), B number of step bins,
c call index, i step index, log-SNR = log(alpha^2 / sigma^2). The clock changes no tensor and refuses no timestep.
"""

import bisect
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dcomp import UsageError

_TAP = "_dcomp_tap"
_STORED_ROUNDING = 1e-6  # relative; what is stored as fp32 may be told as a double
_SIGMA_EDGE = 1e-4  # pure noise and pure signal have an infinite log-SNR; this caps it at about 18.4


class StepBinsError(UsageError):
    """Step bins that contradict themselves, usually from a file that was edited."""


@dataclass(frozen=True)
class StepBins:
    """Timesteps of a schedule in groups that share their activation ranges.

    Attributes:
        timesteps: the schedule's timesteps, strictly descending, in the units that the denoiser is told.
        bin_of: the bin of each of them; starts at 0 (noisiest) and grows by at most 1.
        boundaries: B - 1 descending thresholds; a timestep above `boundaries[b]` belongs to bin b or an earlier one.
            They lie where the log-SNR is half-way between two neighbouring bins, so that `lookup` of any other
            timestep gives the nearest bin in log-SNR.
    """

    timesteps: tuple[float, ...]
    bin_of: tuple[int, ...]
    boundaries: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (*self.timesteps, *self.boundaries)
        steps_up = [after - before for before, after in itertools.pairwise(self.bin_of)]
        if not (
            self.timesteps
            and len(self.timesteps) == len(self.bin_of)
            and all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
            and _descending(self.timesteps)
            and _descending(self.boundaries)
            and self.bin_of[0] == 0
            and set(steps_up) <= {0, 1}
            and self.bin_of[-1] == len(self.boundaries)
            and all(self.lookup(t) == b for t, b in zip(self.timesteps, self.bin_of, strict=True))
        ):
            raise StepBinsError(
                "The step bins contradict themselves",
                where=f"{len(self.timesteps)} timesteps, {len(self.bin_of)} bin numbers, "
                f"{len(self.boundaries)} boundaries",
                remedy="Make them with StepBins.uniform, or compress the model again.",
            )

    @property
    def count(self) -> int:
        """B, the number of bins."""
        return len(self.boundaries) + 1

    def lookup(self, timestep: float) -> int:
        """Return the bin of any timestep, calibrated or not."""
        return _bin(self.boundaries, timestep)

    def distance(self, timestep: float) -> float:
        """Return how far the nearest calibrated timestep is, in timestep units."""
        return min(abs(timestep - known) for known in self.timesteps)

    def to_dict(self) -> dict[str, list[float] | list[int]]:
        """Return a JSON-able form; floats survive JSON bit for bit."""
        return {"timesteps": [*self.timesteps], "bin_of": [*self.bin_of], "boundaries": [*self.boundaries]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            StepBinsError: a field is missing, unknown, of the wrong type, or contradicts another one.
        """
        fields = ("timesteps", "bin_of", "boundaries")
        if sorted(data) != sorted(fields) or not all(isinstance(data[field], list | tuple) for field in fields):
            raise StepBinsError(
                "The step bins need exactly the lists timesteps, bin_of and boundaries",
                where=f"found {', '.join(map(str, data)) or 'nothing'}",
                remedy="Compress the model again.",
            )
        if not all(type(number) is int for number in data["bin_of"]):
            raise StepBinsError("The bin numbers are not integers", where="bin_of", remedy="Compress the model again.")
        return cls(*(tuple(data[field]) for field in fields))

    @classmethod
    def uniform(
        cls, timesteps: Iterable[float], count: int, scheduler: Any = None, *, others: Iterable[float] = ()
    ) -> Self:
        """Put a schedule's timesteps into `count` bins of nearly equal size.

        Args:
            timesteps: the observed ones, in any order, repeats allowed; every bin gets at least one of them.
            count: wanted number of bins; fewer when there are fewer distinct timesteps.
            scheduler: gives the log-SNR of a timestep; without one the timestep is taken for a flow time.
            others: timesteps of the same schedule that were not observed; they join the nearest bin.

        Raises:
            StepBinsError: no timestep, or `count` below 1.
        """
        observed = sorted({float(t) for t in timesteps}, reverse=True)
        if not observed or count < 1:
            raise StepBinsError(
                "Step bins need at least one timestep and one bin",
                where=f"{len(observed)} timesteps, {count} bins",
                remedy="Record a calibration set with at least one call and ask for one bin or more.",
            )
        count = min(count, len(observed))
        firsts = [-(-b * len(observed) // count) for b in range(1, count)]
        return cls.beginning_at(firsts, observed, scheduler, others=others)

    @classmethod
    def beginning_at(
        cls, firsts: Iterable[int], timesteps: Sequence[float], scheduler: Any = None, *, others: Iterable[float] = ()
    ) -> Self:
        """Divide a schedule's timesteps where bins begin.

        Args:
            firsts: position of the first timestep of each bin but the first, ascending.
            timesteps: the observed ones, descending.
            scheduler: gives the log-SNR of a timestep; without one the timestep is taken for a flow time.
            others: timesteps of the same schedule that were not observed; they join the nearest bin.
        """
        everything = sorted({float(t) for t in (*timesteps, *others)}, reverse=True)
        log_snr = log_snr_function(scheduler, everything[0])
        boundaries = tuple(_halfway(log_snr, timesteps[first - 1], timesteps[first]) for first in firsts)
        return cls(tuple(everything), tuple(_bin(boundaries, t) for t in everything), boundaries)


class StepClock:
    """The position in the trajectory that is running, kept right by hooks on a scheduler and a denoiser.

    Attributes:
        bins: the step bins that `bin` refers to, or None: then `bin` stays 0.
        table_timesteps: those that tables of temporal features hold; empty without tables.
        trajectory: number of trajectories started so far minus 1; -1 before the first.
        call: index of the denoiser call of this trajectory, 0 first; contexts run one by one share it.
        step: index of the scheduler step; a second-order scheduler makes two calls in one step.
        timestep: what the denoiser was told last; the first row's of a batch with mixed timesteps.
        bin: the bin of `timestep`.
        row_bins: the bin of every row, int64 `[N]` on the timestep's device, if the timesteps differ; else None.
        row_timesteps: the timestep of every row if they differ, with or without bins; else None.
        last_sample: the latents that the last scheduler step returned (not a copy).
        unseen: how many timesteps `bins` or `table_timesteps` lack (several calls in a row at one count once); 0
            without both.
        max_distance: the largest distance of such a timestep from the nearest that is there, in timestep units.

    Without a scheduler or `trajectory_by_hand`, `trajectory`, `call`, `step` and `last_sample` keep their first values;
    `timestep`, `bin`, `row_bins` and `row_timesteps` are right all the same.
    """

    def __init__(self, bins: StepBins | None = None) -> None:
        self.bins = bins
        self.table_timesteps: tuple[float, ...] = ()
        self.trajectory = -1
        self.call = 0
        self.step = 0
        self.timestep = math.nan
        self.bin = 0
        self.row_bins: Tensor | None = None
        self.row_timesteps: tuple[float, ...] | None = None
        self.last_sample: Tensor | None = None
        self.unseen = 0
        self.max_distance = 0.0
        self._parameter: tuple[int, str] | None = None
        self._order = 1

    def attach(self, denoiser: nn.Module, scheduler: Any = None) -> "ClockHandle":
        """Listen to a denoiser and, if there is one, its scheduler, until the handle is removed.

        A clock may be attached twice to the same parties, several clocks may share them, and handles may be removed
        in any order; after the last one neither object differs from before.

        Raises:
            UsageError: the denoiser's `forward` takes no `timestep`.
        """
        parameters = list(inspect.signature(denoiser.forward).parameters)
        if "timestep" not in parameters:  # somebody may have put a function of any arguments in its place
            parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        if "timestep" not in parameters:
            raise UsageError(
                f"{type(denoiser).__name__} is no denoiser: its forward takes no argument `timestep`",
                where=", ".join(parameters),
                remedy="Pass the pipeline's unet or transformer.",
            )
        self._parameter = (parameters.index("timestep"), "timestep")
        hook = denoiser.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)
        return ClockHandle(hook.remove, None if scheduler is None else _listen(scheduler, self))

    @contextmanager
    def trajectory_by_hand(self) -> Iterator[Callable[[], None]]:
        """Start a trajectory where there is no scheduler to listen to.

        Yields:
            What ends a step: to be called after its last call of the denoiser.
        """
        self._trajectory_started(None)
        yield lambda: self._stepped(None)

    def read(self, timestep: Any) -> None:
        """Take the timestep of the next call: a number, or a tensor with one value or one per row."""
        if isinstance(timestep, Tensor):
            values = [float(value) for value in timestep.reshape(-1).tolist()]  # the only transfer of a call
            rounding = 2 * torch.finfo(timestep.dtype).eps if timestep.dtype.is_floating_point else 0.0
        else:
            values, rounding = [float(timestep)], 0.0
        distinct = dict.fromkeys(values)
        self.row_bins = None
        self.row_timesteps = tuple(values) if len(distinct) > 1 else None
        for value in distinct if distinct != {self.timestep: None} else ():
            self._note_distance(value, max(rounding, _STORED_ROUNDING))
        if self.bins is not None and values:
            self.bin = self.bins.lookup(values[0])
            if len(distinct) > 1:
                rows = [self.bins.lookup(value) for value in values]
                self.row_bins = torch.tensor(rows, device=timestep.device)
        self.timestep = values[0] if values else self.timestep

    def _note_distance(self, timestep: float, tolerance: float) -> None:
        distance = self.bins.distance(timestep) if self.bins else 0.0
        distance = max(distance, min((abs(timestep - known) for known in self.table_timesteps), default=0.0))
        if distance > tolerance * abs(timestep):
            self.unseen += 1
            self.max_distance = max(self.max_distance, distance)

    def _before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position, name = self._parameter or (0, "timestep")
        if name in kwargs:
            self.read(kwargs[name])
        elif position < len(args):
            self.read(args[position])

    def _trajectory_started(self, scheduler: Any) -> None:
        self.trajectory += 1
        self.call = 0
        self.step = 0
        self.last_sample = None
        self._order = int(getattr(scheduler, "order", 1))

    def _stepped(self, sample: Tensor | None) -> None:
        self.last_sample = sample
        self.call += 1
        self.step = self.call // self._order


def clock_of(denoiser: nn.Module) -> StepClock:
    """Return the clock that a denoiser keeps as `dcomp_clock`; one without gets a clock that follows its calls."""
    clock = getattr(denoiser, "dcomp_clock", None)
    if not isinstance(clock, StepClock):
        clock = StepClock()
        clock.attach(denoiser)
        denoiser.dcomp_clock = clock  # type: ignore[assignment]
    return clock


class ClockHandle:
    """Ends a `StepClock.attach`; also a context manager."""

    def __init__(self, *undo: Callable[[], None] | None) -> None:
        self._undo = [action for action in undo if action is not None]

    def remove(self) -> None:
        """Take the hooks away; harmless when called again."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def log_snr_function(scheduler: Any, largest: float) -> Callable[[float], float]:
    """Return the map from timestep to log-SNR that a scheduler implies.

    Args:
        scheduler: one with `alphas_cumprod` (interpolated between whole timesteps), or a flow-matching one; None
            stands for the latter.
        largest: the largest timestep in use; at most 1 means that the denoiser is told a fraction of the schedule.
    """
    length = int(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))
    alphas = getattr(scheduler, "alphas_cumprod", None)
    unit = length if largest <= 1 else 1
    if alphas is None:
        return lambda t: _log_snr_of_sigma(t * unit / length)
    table = torch.logit(alphas.detach().double().cpu(), eps=_SIGMA_EDGE**2).tolist()

    def interpolated(t: float) -> float:
        position = min(max(t * unit, 0.0), len(table) - 1.0)
        below = min(int(position), len(table) - 2)
        return float(table[below] + (position - below) * (table[below + 1] - table[below]))

    return interpolated if len(table) > 1 else lambda t: -t


def _log_snr_of_sigma(sigma: float) -> float:
    sigma = min(max(sigma, _SIGMA_EDGE), 1 - _SIGMA_EDGE)
    return 2 * math.log((1 - sigma) / sigma)


def _halfway(log_snr: Callable[[float], float], above: float, below: float) -> float:
    """Return the timestep between two whose log-SNR is half-way; their mean where the log-SNR is flat."""
    target = (log_snr(above) + log_snr(below)) / 2
    if not log_snr(above) < target < log_snr(below):
        return (above + below) / 2
    for _ in range(60):
        middle = (above + below) / 2
        if log_snr(middle) < target:
            above = middle
        else:
            below = middle
    return (above + below) / 2


def _bin(boundaries: Sequence[float], timestep: float) -> int:
    return bisect.bisect_left(boundaries, -timestep, key=lambda boundary: -boundary)


def _descending(values: Sequence[float]) -> bool:
    return all(before > after for before, after in itertools.pairwise(values))


@dataclass
class _Tap:
    """What a listened-to scheduler carries: its listeners, and the instance attributes that the tap covers."""

    listeners: list[StepClock]
    covered: dict[str, Any]
    methods: dict[str, MethodType]


def _listen(scheduler: Any, clock: StepClock) -> Callable[[], None]:
    state = vars(scheduler)
    if _TAP not in state:
        # Bound methods, not closures over the scheduler: a deep copy then drives itself and copies of the clocks.
        methods = {name: MethodType(_tapped(type(scheduler), name), scheduler) for name in ("set_timesteps", "step")}
        state[_TAP] = _Tap([], {name: state[name] for name in methods if name in state}, methods)
        state.update(methods)
    tap: _Tap = state[_TAP]
    tap.listeners.append(clock)

    def stop() -> None:
        del tap.listeners[next(index for index, listener in enumerate(tap.listeners) if listener is clock)]
        if tap.listeners:
            return
        for name, method in tap.methods.items():
            if state.get(name) is method:  # else somebody wrapped it in turn, and it goes on as a plain relay
                del state[name]
                state.update({key: value for key, value in tap.covered.items() if key == name})
        del state[_TAP]

    return stop


def _tapped(scheduler_class: type, name: str) -> Callable[..., Any]:
    original = getattr(scheduler_class, name)

    @functools.wraps(original)  # pipelines ask for the signature to see what a scheduler supports
    def method(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        tap: _Tap | None = vars(scheduler).get(_TAP)
        run = tap.covered.get(name) if tap else None
        result = run(*args, **kwargs) if run else original(scheduler, *args, **kwargs)
        for clock in {id(clock): clock for clock in tap.listeners}.values() if tap else ():
            if name == "step":
                clock._stepped(result[0])
            else:
                clock._trajectory_started(scheduler)
        return result

    return method
