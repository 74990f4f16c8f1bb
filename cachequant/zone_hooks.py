"""Hooks on the modules of zones: each runs its module, or puts what is given for it, or a placeholder, in its place.

What is to be done in a call of the denoiser is a `ZoneCall`, which whoever drives the hooks makes before the call and
reads after it. The hooks themselves decide nothing and remember nothing from call to call.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dcomp.cachequant.plan import PlanError
from dcomp.cachequant.rows import halves_apart, joined_halves, second_half
from dcomp.cachequant.tensors import leaves, like, map_tensors, own_memory, parts_of, placeholder, with_leaves
from dcomp.cachequant.zones import Zone, parameter_position

HOOK = "dcomp_cache"  # name in diffusers' registries
_NO_HOOKS = SimpleNamespace(hooks={})

Given = Callable[[int], list[Tensor]]
"""Number of one of a zone's predicted modules -> its tensors; a residual zone has number 0 alone."""


@dataclass
class ZoneCall:
    """One call of the denoiser.

    Attributes:
        given: zone -> what replaces it; all others run.
        keep: zones whose tensors are wanted.
        forms: module -> what it returned in a call before, as placeholders; filled where a module runs.
        kept: zone -> for each predicted module its tensors; filled for those of `keep` that run, as far as they run.
        ran: zones that ran.
        replaced: zones that did not.
    """

    given: Mapping[str, Given]
    keep: frozenset[str]
    forms: dict[str, Any]
    kept: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    _entered: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def store(self, zone: Zone, module: int, tensors: list[Tensor]) -> None:
        """Keep what one of a zone's modules returned."""
        modules = self.kept.setdefault(zone.name, [[] for _ in zone.predicted])
        modules[module] = [own_memory(tensor.detach()) for tensor in tensors]

    def enter(self, zone: Zone, streams: dict[str, Tensor]) -> None:
        """Remember the streams that enter a residual zone until they leave it."""
        self._entered[zone.name] = streams

    def leave(self, zone: Zone, streams: Mapping[str, Tensor | None]) -> None:
        """Keep what a residual zone added to the streams that entered it; one that ends within it has added nothing."""
        changes = []
        for name, before in self._entered.pop(zone.name, {}).items():
            after = streams[name]
            changes.append(before.new_zeros(()) if after is None else after - before)
        if changes:  # else the zone's first block was replaced, and this is not all of it
            self.store(zone, 0, changes)


class ZoneHooks:
    """Hooks on all modules of some zones of one denoiser.

    Attributes:
        running: the call that the hooks serve; with None every module runs and nothing is kept.

    Args:
        denoiser: float or quantized; a block may be compiled, or adapted, or offloaded.
        zones: one may lie within another.

    Raises:
        PlanError: the denoiser lacks a module that a zone names, or another cache is enabled on it.
    """

    def __init__(self, denoiser: nn.Module, zones: Sequence[Zone]) -> None:
        self.denoiser = denoiser
        self.running: ZoneCall | None = None
        self._undo: list[Callable[[], None]] = []
        if getattr(denoiser, "is_cache_enabled", False):
            raise PlanError("Another cache is enabled on this denoiser", remedy="Call its disable_cache() first.")
        if any(HOOK in getattr(module, "_diffusers_hook", _NO_HOOKS).hooks for module in denoiser.modules()):
            raise PlanError("This denoiser follows a plan already", remedy="Detach that plan first.")
        narrow_first = sorted(zones, key=lambda zone: sum(zone.encloses(other) for other in zones))
        roles: dict[str, list[tuple[Zone, int]]] = {}
        for zone in reversed(narrow_first):
            for number, name in enumerate(zone.modules):
                roles.setdefault(name, []).append((zone, number))
        modules = {name: _module_of(denoiser, name, own[0][0]) for name, own in roles.items()}  # all before a hook
        for name, module in modules.items():
            self._undo.append(hook_module(module, _ZoneHook(self, name, tuple(roles[name])), HOOK))

    def detach(self) -> None:
        """Take every hook away; harmless when called again."""
        self.running = None
        while self._undo:
            self._undo.pop()()


def hook_module(module: nn.Module, hook: ModelHook, name: str) -> Callable[[], None]:
    """Register a hook with diffusers under a name; return what takes it away without a trace."""
    own_forward = "forward" in vars(module)
    had_registry = "_diffusers_hook" in vars(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)

    def remove() -> None:
        registry.remove_hook(name, recurse=False)
        if not own_forward and not registry.hooks:
            vars(module).pop("forward", None)
        if not had_registry and not registry.hooks:
            vars(module).pop("_diffusers_hook", None)

    return remove


class _ZoneHook(ModelHook):
    """The hook of one module.

    Args:
        hooks: whose call is served.
        name: of the module.
        roles: zones that the module is a part of, the widest first, and its number among each one's modules.
    """

    def __init__(self, hooks: ZoneHooks, name: str, roles: tuple[tuple[Zone, int], ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hooks, self._name, self._roles = hooks, name, roles
        self._positions: dict[str, int] = {}

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Find out where the module's forward takes the streams of residual zones."""
        names = {name for zone, number in self._roles if zone.streams for name, _ in zone.streams[number]}
        self._positions = {name: parameter_position(module, name) for name in names}
        self._parameters = [*inspect.signature(module.forward).parameters]
        return module

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator] # the module itself may be compiled
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the module's forward."""
        call = self._hooks.running
        forward: Any = self.fn_ref.original_forward
        if call is None:
            return forward(*args, **kwargs)
        for zone, number in self._roles:
            if zone.name in call.given and zone.kind == "guidance":
                return self._half(call, zone, forward, args, kwargs)
            if zone.name in call.given:
                return self._replacement(call, module, zone, number, args, kwargs)
        self._before(call, args, kwargs)
        output = forward(*args, **kwargs)
        self._after(call, output)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, call: ZoneCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for zone, number in self._roles:
            if number == 0 and zone.streams and zone.name in call.keep:
                call.enter(zone, self._streams(zone, number, args, kwargs))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, call: ZoneCall, output: Any) -> None:
        if self._name not in call.forms:
            call.forms[self._name] = map_tensors(placeholder, output)
        for zone, number in self._roles:
            if number == 0:
                call.ran.append(zone.name)
            if zone.name not in call.keep:
                continue
            if zone.kind == "guidance":
                call.store(zone, 0, halves_apart(output))
            if zone.kind == "output" and number < len(zone.predicted):
                call.store(zone, number, leaves(output))
            if zone.streams and number == len(zone.predicted) - 1:
                call.leave(zone, {name: parts_of(output)[place] for name, place in zone.streams[number]})

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _replacement(
        self, call: ZoneCall, module: nn.Module, zone: Zone, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        form = call.forms[self._name]
        if number == 0:
            call.replaced.append(zone.name)
        if zone.kind == "residual":
            return self._passed_on(call, form, zone, number, args, kwargs)
        if number >= len(zone.predicted):
            return form
        tensors = call.given[zone.name](number)
        # Whoever called the denoiser may change what it returned.
        return with_leaves(form, [t.clone() for t in tensors] if module is self._hooks.denoiser else tensors)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _half(
        self, call: ZoneCall, zone: Zone, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the denoiser makes of the second half of its rows, and what is given for how far the first is."""
        call.replaced.append(zone.name)
        self._hooks.running = None  # nothing of half a batch is kept
        try:
            second = leaves(second_half(self._parameters, forward, args, kwargs))
        finally:
            self._hooks.running = call
        return with_leaves(call.forms[self._name], joined_halves(second, call.given[zone.name](0)))

    def _streams(self, zone: Zone, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return {
            name: kwargs[name] if name in kwargs else args[self._positions[name]] for name, _ in zone.streams[number]
        }

    def _passed_on(
        self, call: ZoneCall, form: Any, zone: Zone, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return a block's streams as they came; the first block of the zone adds what the zone would have added."""
        streams = self._streams(zone, number, args, kwargs)
        if number == 0:
            added = call.given[zone.name](0)
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
