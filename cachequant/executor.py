"""Follow a cache plan while a pipeline runs: hooks that skip, predict, keep what will be read, and count what they did.

The executor is told where the trajectory is by a clock that listens to the scheduler, and by the timestep of each call.
Whatever it did not expect (a timestep that the plan does not know, another batch or size, a tensor that is not there,
gradients) makes it forget what it kept, compute, and count it: it never reads a tensor that belongs to something else.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from dcomp.cachequant.guide import CallOrder, Guide
from dcomp.cachequant.plan import Prediction
from dcomp.cachequant.rows import count_rows
from dcomp.cachequant.tensors import leaves
from dcomp.cachequant.zone_hooks import Given, ZoneCall, ZoneHooks
from dcomp.cachequant.zones import Zone
from dcomp.calibrate.clock import StepClock

Unrounded = Callable[[], AbstractContextManager[object]]
"""Makes a `with` block in which quantized layers multiply their inputs as they are."""


@contextmanager
def following(
    denoiser: nn.Module, scheduler: Any, guide: Guide, unrounded: Unrounded | None = None
) -> Iterator["CacheExecutor"]:
    """Let a denoiser follow a guide on a scheduler's trajectories until the context ends."""
    clock = StepClock()
    with clock.attach(denoiser, scheduler), CacheExecutor(denoiser, guide, clock, unrounded) as executor:
        yield executor


@dataclass
class CacheStats:
    """What was done since the executor was attached.

    Attributes:
        ran: (call, zone, context) -> how often the zone ran.
        predicted: the same for predictions.
        fallbacks: reason -> calls that computed although the plan has predictions for them, or that it does not know.
        unrounded: call -> how often it ran without rounding of inputs.
        peak_bytes: most memory that kept tensors took at a time.
    """

    ran: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    predicted: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    unrounded: Counter[int] = field(default_factory=Counter)
    peak_bytes: int = 0


@dataclass
class _Context:
    """What is kept for one of the denoiser calls that guidance makes at a time.

    Attributes:
        shape: of the call's arguments; tensors of another shape are of no use.
        call: the last one; None before the first of a trajectory.
        kept: zone -> call -> tensors, one list for each predicted module.
        forms: module -> what it returned, as placeholders.
    """

    shape: Any = None
    call: int | None = None
    kept: dict[str, dict[int, list[list[Tensor]]]] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop all tensors; the place in the trajectory stays."""
        self.kept.clear()
        self.forms.clear()


class CacheExecutor:
    """Follows a guide on one denoiser.

    Attributes:
        denoiser: that it was attached to.
        stats: what was done.
        clock: the place in the trajectory.

    Args:
        denoiser: float or quantized; a block may be compiled, or adapted, or offloaded.
        guide: decides.
        clock: one that listens to the pipeline's scheduler. Without a scheduler, as when a caller drives the denoiser
            alone, a timestep that rises begins a new trajectory.
        unrounded: for calls whose inputs the guide wants as they are; None for a float denoiser, which rounds none.

    Raises:
        PlanError: the denoiser lacks a module that a zone names, or diffusers' own cache is enabled on it.
    """

    def __init__(self, denoiser: nn.Module, guide: Guide, clock: StepClock, unrounded: Unrounded | None = None) -> None:
        self.stats = CacheStats()
        self.clock = clock
        self.denoiser, self._guide = denoiser, guide
        self._contexts: dict[int, _Context] = {}
        self._running: _Context | None = None
        self._unrounded, self._during = unrounded, ExitStack()
        self._order = CallOrder()
        self._call: int | None = None
        self._context = 0
        self._moment: tuple[int, int] | None = None
        self._hooks = ZoneHooks(denoiser, guide.zones)
        begin = denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = denoiser.register_forward_hook(self._end, always_call=True)
        self._undo = [self._hooks.detach, begin.remove, end.remove]

    def detach(self) -> None:
        """Take every hook away and drop every tensor; harmless when called again."""
        self._during.close()
        while self._undo:
            self._undo.pop()()
        self._contexts.clear()
        self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def kept(self, zone: Zone, context: int = 0) -> Mapping[int, list[list[Tensor]]]:
        """Return what is kept of a zone now: call -> for each predicted module its tensors. They are not copies."""
        held = self._contexts.get(context)
        return held.kept.get(zone.name, {}) if held else {}

    @property
    def kept_bytes(self) -> int:
        """Memory of the tensors that are kept now; those that several modules returned count once."""
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for context in self._contexts.values()
            for calls in context.kept.values()
            for modules in calls.values()
            for tensors in modules
            for tensor in tensors
        }
        return sum(sizes.values())

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._find_out(args, kwargs)
        context = self._running
        if context is not None and self._call is not None:
            given = {zone: self._given(zone, each, context) for zone, each in self._order.predictions.items()}
            self._hooks.running = ZoneCall(given, self._order.keep, context.forms)
            if self._order.unrounded and self._unrounded is not None:
                self._during.enter_context(self._unrounded())
                self.stats.unrounded[self._call] += 1

    def _find_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out which call this is and what is to be done in it."""
        moment = (self.clock.trajectory, self.clock.call)
        first = self._contexts.get(0)
        rises = self.clock.trajectory < 0 and first is not None and self._rises(first)
        if self._moment is None or moment[0] != self._moment[0] or rises:
            self._contexts.clear()
        self._context = 0 if moment != self._moment or self.clock.trajectory < 0 else self._context + 1
        self._moment = moment
        context = self._running = self._contexts.setdefault(self._context, _Context())
        before, context.call = context.call, self._guide.place(self.clock.timestep, context.call)
        self._call = context.call
        if self._call is None:
            context.call = before
            context.forget()
            self._order = CallOrder()
            self.stats.fallbacks["a timestep that the plan does not know"] += 1
            return
        if before is not None and self._call != before + 1:
            context.forget()
        order = self._guide.order(self._call)
        shape = [(tuple(t.shape), t.dtype, t.device) for t in leaves((args, kwargs))]
        known, context.shape = context.shape, shape
        if shape != known:
            context.forget()
            self._order = self._without(order, "other shapes than in the call before" if known else "")
        elif order.predictions and self._needs_gradients(args, kwargs):
            self._order = self._without(order, "gradients are asked for")
        elif self._needs_pairs(order) and not self._has_pairs(args, kwargs):
            self._order = self._without(order, "no batch of two guidance contexts")
        else:
            self._order = self._possible(order, context)

    def _needs_pairs(self, order: CallOrder) -> bool:
        return any(zone.kind == "guidance" and zone.name in order.predictions for zone in self._guide.zones)

    def _has_pairs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the denoiser gets two rows for each one that the scheduler got: both contexts of guidance."""
        last = self.clock.last_sample
        return last is not None and count_rows(args, kwargs) == 2 * len(last)

    def _rises(self, context: _Context) -> bool:
        # Without a scheduler: a timestep that the plan has earlier than the last call begins anew.
        return context.call is not None and self._guide.place(self.clock.timestep, context.call) is None

    def _needs_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (*leaves((args, kwargs)), *self.denoiser.parameters())
        )

    def _possible(self, order: CallOrder, context: _Context) -> CallOrder:
        """Leave out all predictions if the tensors of one are not there."""
        there = all(
            call in context.kept.get(zone, {})
            for zone, prediction in order.predictions.items()
            for call in prediction.calls
        )
        return order if there else self._without(order, "no tensors to predict from")

    def _without(self, order: CallOrder, reason: str) -> CallOrder:
        """Return the order with nothing predicted, and count it if something was to be."""
        if order.predictions:
            self.stats.fallbacks[reason or "the first call of a trajectory"] += 1
        return replace(order, predictions={})

    def _given(self, zone: str, prediction: Prediction, context: _Context) -> Given:
        def tensors(module: int) -> list[Tensor]:
            nodes = [context.kept[zone][call][module] for call in prediction.calls]
            return [prediction.of(each) for each in zip(*nodes, strict=True)]

        return tensors

    def _end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._during.close()
        context, done = self._running, self._hooks.running
        if context is not None and output is None:  # it failed half-way
            context.forget()
        elif context is not None and done is not None and self._call is not None:
            for zone, tensors in done.kept.items():
                context.kept.setdefault(zone, {})[self._call] = tensors
            self.stats.ran.update((self._call, zone, self._context) for zone in done.ran)
            self.stats.predicted.update((self._call, zone, self._context) for zone in done.replaced)
            self.stats.peak_bytes = max(self.stats.peak_bytes, self.kept_bytes)
            for zone, call in self._order.forget:
                context.kept.get(zone, {}).pop(call, None)
        self._running, self._hooks.running, self._order = None, None, CallOrder()
