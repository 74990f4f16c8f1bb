"""Follow a cache plan while a pipeline runs: hooks that skip, predict, keep what will be read, and count what they did.

The executor is told where the trajectory is by a clock that listens to the scheduler, and by the timestep of each call.
Whatever it did not expect (a timestep that the plan does not know, another batch or size, a tensor that is not there,
gradients) makes it forget what it kept, compute, and count it: it never reads a tensor that belongs to something else.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Self

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dcomp.cachequant.guide import CallOrder, Guide
from dcomp.cachequant.plan import PlanError, Prediction
from dcomp.cachequant.tensors import leaves, like, map_tensors, own_memory, parts_of, placeholder, with_leaves
from dcomp.cachequant.zones import Zone, parameter_position
from dcomp.calibrate.clock import StepClock

HOOK = "dcomp_cache"  # name in diffusers' registries
_NO_HOOKS = SimpleNamespace(hooks={})


@contextmanager
def following(denoiser: nn.Module, scheduler: Any, guide: Guide) -> Iterator["CacheExecutor"]:
    """Let a denoiser follow a guide on a scheduler's trajectories until the context ends."""
    clock = StepClock()
    with clock.attach(denoiser, scheduler), CacheExecutor(denoiser, guide, clock) as executor:
        yield executor


@dataclass
class CacheStats:
    """What was done since the executor was attached.

    Attributes:
        ran: (call, zone, context) -> how often the zone ran.
        predicted: the same for predictions.
        fallbacks: reason -> calls that computed although the plan has predictions for them, or that it does not know.
        peak_bytes: most memory that kept tensors took at a time.
    """

    ran: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    predicted: Counter[tuple[int, str, int]] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0


@dataclass
class _Context:
    """What is kept for one of the denoiser calls that guidance makes at a time.

    Attributes:
        shape: of the call's arguments; tensors of another shape are of no use.
        call: the last one; None before the first of a trajectory.
        kept: zone -> call -> tensors, one list for each predicted module.
        forms: module -> what it returned, as placeholders.
        entered: residual zone -> streams that entered it in the running call.
    """

    shape: Any = None
    call: int | None = None
    kept: dict[str, dict[int, list[list[Tensor]]]] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    entered: dict[str, dict[str, Tensor]] = field(default_factory=dict)

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

    Raises:
        PlanError: the denoiser lacks a module that a zone names, or diffusers' own cache is enabled on it.
    """

    def __init__(self, denoiser: nn.Module, guide: Guide, clock: StepClock) -> None:
        self.stats = CacheStats()
        self.clock = clock
        self.denoiser, self._guide = denoiser, guide
        self._contexts: dict[int, _Context] = {}
        self._running: _Context | None = None
        self._order = CallOrder()
        self._call: int | None = None
        self._context = 0
        self._moment: tuple[int, int] | None = None
        self._undo: list[Callable[[], None]] = []
        self._attach(denoiser)

    def detach(self) -> None:
        """Take every hook away and drop every tensor; harmless when called again."""
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

    def _attach(self, denoiser: nn.Module) -> None:
        if getattr(denoiser, "is_cache_enabled", False):
            raise PlanError("Another cache is enabled on this denoiser", remedy="Call its disable_cache() first.")
        if any(HOOK in getattr(module, "_diffusers_hook", _NO_HOOKS).hooks for module in denoiser.modules()):
            raise PlanError("This denoiser follows a plan already", remedy="Detach that plan first.")
        zones = sorted(self._guide.zones, key=lambda zone: sum(zone.encloses(other) for other in self._guide.zones))
        roles: dict[str, list[tuple[Zone, int]]] = {}
        for zone in reversed(zones):  # the widest first
            for number, name in enumerate(zone.modules):
                roles.setdefault(name, []).append((zone, number))
        modules = {name: _module_of(denoiser, name, own[0][0]) for name, own in roles.items()}  # all before a hook
        for name, module in modules.items():
            self._undo.append(_hook(module, _ZoneHook(self, name, tuple(roles[name]))))
        begin = denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = denoiser.register_forward_hook(self._end, always_call=True)
        self._undo += [begin.remove, end.remove]

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        else:
            self._order = self._possible(order, context)

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

    def _end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = self._running
        if context is not None and output is None:  # it failed half-way
            context.forget()
        elif context is not None and self._call is not None:
            self.stats.peak_bytes = max(self.stats.peak_bytes, self.kept_bytes)
            for zone, call in self._order.forget:
                context.kept.get(zone, {}).pop(call, None)
        self._running, self._order = None, CallOrder()

    def prediction(self, zone: Zone) -> Prediction | None:
        """Return what replaces a zone in the running call; None where it runs."""
        return self._order.predictions.get(zone.name) if self._running is not None else None

    def keeps(self, zone: Zone) -> bool:
        """Whether what a zone computes in the running call will be read."""
        return self._running is not None and self._call is not None and zone.name in self._order.keep

    def predict(self, zone: Zone, prediction: Prediction, module: int) -> list[Tensor]:
        """Return the predicted tensors of one of a zone's modules."""
        assert self._running is not None
        kept = self._running.kept[zone.name]
        nodes = [kept[call][module] for call in prediction.calls]
        return [_weighted(tensors, prediction.weights) for tensors in zip(*nodes, strict=True)]

    def keep(self, zone: Zone, module: int, tensors: list[Tensor]) -> None:
        """Keep what one of a zone's modules computed in the running call."""
        assert self._running is not None
        assert self._call is not None
        calls = self._running.kept.setdefault(zone.name, {})
        modules = calls.setdefault(self._call, [[] for _ in zone.predicted])
        modules[module] = [own_memory(tensor.detach()) for tensor in tensors]

    def enter(self, zone: Zone, streams: dict[str, Tensor]) -> None:
        """Remember the streams that enter a residual zone until they leave it."""
        assert self._running is not None
        self._running.entered[zone.name] = streams

    def leave(self, zone: Zone, streams: dict[str, Tensor | None]) -> None:
        """Keep what a residual zone added to the streams that entered it; one that ends within it has added nothing."""
        assert self._running is not None
        entered = self._running.entered.pop(zone.name)
        changes = []
        for name, before in entered.items():
            after = streams[name]
            changes.append(before.new_zeros(()) if after is None else after - before)
        self.keep(zone, 0, changes)

    def form(self, name: str) -> Any:
        """Return a placeholder for what a module returns."""
        assert self._running is not None
        return self._running.forms[name]

    def note(self, name: str, output: Any, zone: Zone, number: int) -> None:
        """Take note of what a module returned, and that its zone ran."""
        if self._running is None:
            return
        if name not in self._running.forms:
            self._running.forms[name] = map_tensors(placeholder, output)
        if number == 0 and self._call is not None:
            self.stats.ran[self._call, zone.name, self._context] += 1

    def count(self, zone: Zone) -> None:
        """Count a prediction."""
        assert self._call is not None
        self.stats.predicted[self._call, zone.name, self._context] += 1


class _ZoneHook(ModelHook):
    """Runs a module, or puts what is predicted for it, or a placeholder, in its place.

    Args:
        executor: knows what is to be done.
        name: of the module.
        roles: zones that the module is a part of, the widest first, and its number among each one's modules.
    """

    def __init__(self, executor: CacheExecutor, name: str, roles: tuple[tuple[Zone, int], ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._executor, self._name, self._roles = executor, name, roles
        self._positions: dict[str, int] = {}

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find out where the module's forward takes the streams of residual zones."""
        names = {name for zone, number in self._roles if zone.streams for name, _ in zone.streams[number]}
        self._positions = {name: parameter_position(module, name) for name in names}
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the module's forward."""
        executor = self._executor
        for zone, number in self._roles:
            prediction = executor.prediction(zone)
            if prediction is not None:
                if number == 0:
                    executor.count(zone)
                form = executor.form(self._name)
                if zone.kind == "residual":
                    return self._passed_on(form, zone, number, prediction, args, kwargs)
                if number >= len(zone.predicted):
                    return form
                tensors = executor.predict(zone, prediction, number)
                # Whoever called the denoiser may change what it returned.
                return with_leaves(form, [t.clone() for t in tensors] if module is executor.denoiser else tensors)
        entering = [(zone, number) for zone, number in self._roles if zone.kind == "residual" and executor.keeps(zone)]
        for zone, number in entering:
            if number == 0:
                executor.enter(zone, self._streams(zone, number, args, kwargs))
        forward: Any = self.fn_ref.original_forward
        output = forward(*args, **kwargs)
        for zone, number in self._roles:
            executor.note(self._name, output, zone, number)
            if zone.kind == "output" and number < len(zone.predicted) and executor.keeps(zone):
                executor.keep(zone, number, leaves(output))
        for zone, number in entering:
            if number == len(zone.predicted) - 1:
                executor.leave(zone, {name: parts_of(output)[place] for name, place in zone.streams[number]})
        return output

    def _streams(self, zone: Zone, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return {
            name: kwargs[name] if name in kwargs else args[self._positions[name]] for name, _ in zone.streams[number]
        }

    def _passed_on(
        self,
        form: Any,
        zone: Zone,
        number: int,
        prediction: Prediction,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Return a block's streams as they came; the first block of the zone adds what the zone would have added."""
        streams = self._streams(zone, number, args, kwargs)
        if number == 0:
            added = self._executor.predict(zone, prediction, 0)
            streams = {name: stream + change for (name, stream), change in zip(streams.items(), added, strict=True)}
        parts = parts_of(form)
        for name, place in zone.streams[number]:
            parts[place] = None if parts[place] is None else streams[name]
        return like(form, parts)


def _module_of(denoiser: nn.Module, name: str, zone: Zone) -> nn.Module:
    try:
        return denoiser.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"The plan is for another denoiser: this {type(denoiser).__name__} has no module {name[:80]!r}",
            where=zone.name,
            remedy="Make a plan for this model with `dcomp search-schedule`.",
        ) from error


def _weighted(tensors: tuple[Tensor, ...], weights: tuple[float, ...]) -> Tensor:
    """Return the weighted sum, in float32 where the tensors are shorter; one tensor of weight 1 is itself."""
    if weights == (1.0,):
        return tensors[0]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = tensors[0].to(wide) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def _hook(module: nn.Module, hook: ModelHook) -> Callable[[], None]:
    """Register a hook; return what takes it away without a trace."""
    own_forward = "forward" in vars(module)
    had_registry = "_diffusers_hook" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, HOOK)

    def remove() -> None:
        registry.remove_hook(HOOK, recurse=False)
        if not own_forward and not registry.hooks:
            vars(module).pop("forward", None)
        if not had_registry and not registry.hooks:
            vars(module).pop("_diffusers_hook", None)

    return remove
