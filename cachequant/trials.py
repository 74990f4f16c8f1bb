"""Try out what a call may do, for many histories at once, on the real pipeline with its real scheduler.

A pipeline is a function of what its denoiser returned so far. So a history of predictions can be given to it again at
the price of the scheduler's steps alone, and no scheduler, guidance or pipeline has to be known here: every history is
a few more pictures in one large batch, all calls but the last are answered from memory, and only the last one computes.
Letters: N pictures of each history, C contexts that guidance puts into one call of the denoiser.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from dcomp.cachequant.correction import Correction
from dcomp.cachequant.plan import Actions, CachePlan, Prediction
from dcomp.cachequant.predict import PREDICTORS
from dcomp.cachequant.rows import count_rows, halves_apart, joined_halves, second_half, take_rows
from dcomp.cachequant.tensors import leaves, map_tensors, with_leaves
from dcomp.cachequant.zone_hooks import ZoneCall, ZoneHooks, hook_module
from dcomp.cachequant.zones import GUIDANCE, WHOLE, Zone
from dcomp.calibrate.clock import StepClock, log_snr_function
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.quality import relative_errors

_ROWS = 32  # of one forward of the denoiser: more of them gain nothing on a CPU, and take memory
_HOOK = "dcomp_trials"
_PAIR = 2  # contexts of classifier-free guidance


@dataclass(frozen=True)
class Branch:
    """A history of calls.

    Attributes:
        rows: what each call did.
        errors: relative error of each picture's latents after the last one's scheduler step.
    """

    rows: tuple[Actions, ...] = ()
    errors: tuple[float, ...] = ()
    _answers: tuple[list[list[Tensor]], ...] = field(default=(), repr=False)  # of each call: for each context, leaves
    _kept: Mapping[str, Mapping[int, list[list[list[Tensor]]]]] = field(default_factory=dict, repr=False)

    def nodes(self, zone: str) -> list[int]:
        """Return the last calls that computed a zone, ascending."""
        return sorted(self._kept.get(zone, {}))

    def tensors(self, zone: str, call: int) -> list[list[Tensor]]:
        """Return what a zone computed in a call: for each guidance context, its tensors."""
        return [[tensor for module in modules for tensor in module] for modules in self._kept[zone][call]]


class Trials:
    """Runs pictures of a pipeline under many histories.

    Attributes:
        timesteps: of the T calls, as the denoiser is told them.
        places: of the T calls: their log-SNR, or their number where that does not rise from call to call.

    Args:
        pipeline: the model that will run, float or quantized.
        zones: that calls may predict.
        prompts: of the N pictures.
        indices: of their noise.
        settings: of the trajectories, as deployed.
        reference: latents after each of the T calls of the original, `[N, ...]` each; None: of this model.
        window: computing calls whose zones are kept for predictions.

    A context manager: hooks are on the denoiser from its beginning to its end.
    """

    def __init__(
        self,
        pipeline: OpenPipeline,
        zones: Sequence[Zone],
        prompts: Sequence[str],
        indices: Sequence[int],
        settings: Generation,
        reference: Sequence[Tensor] | None = None,
        *,
        window: int = 8,
    ) -> None:
        self._window = window
        self._pipeline, self._prompts, self._indices = pipeline, list(prompts), list(indices)
        self._settings, self.zones = settings, tuple(zones)
        self._guidance = pipeline.guidance(settings.guidance)
        self.timesteps, own = _reference(pipeline, self._prompts, self._indices, settings)
        self._reference = own if reference is None else list(reference)
        self.places = places_of(pipeline.scheduler, self.timesteps)

    def plan(
        self, rows: Sequence[Actions], zones: Sequence[Zone], unrounded: frozenset[int] = frozenset()
    ) -> CachePlan:
        """Return the plan for this trajectory in which each call does what its row says.

        Args:
            rows: of the T calls.
            zones: that rows may name.
            unrounded: calls in which quantized layers multiply their inputs as they are.
        """
        named = {zone for row in rows for zone in row}
        used = tuple(zone for zone in zones if zone.name in named)
        return CachePlan(used, self.timesteps, self.places, tuple(rows), unrounded=unrounded)

    def __enter__(self) -> "Trials":
        within = [zone for zone in self.zones if zone.name not in (WHOLE, GUIDANCE)]  # `_Answer` itself does these
        self._hooks = ZoneHooks(self._pipeline.denoiser, within)
        self._answer = _Answer(self._hooks, self.zones, len(self._prompts), self.places, self._window)
        self._unhook = hook_module(self._pipeline.denoiser, self._answer, _HOOK)
        return self

    def __exit__(self, *_: object) -> None:
        self._unhook()
        self._hooks.detach()

    def difference(self, skipped: Branch, computed: Branch) -> Tensor:
        """Return how far the last call of a history is from that of another one, after guidance: fp64 `[N, D]`.

        The norm of a row is a picture's relative error. Before that call both histories are the same.
        """
        one, other = (self._guided(branch).flatten(1).double() for branch in (skipped, computed))
        difference: Tensor = (one - other) / other.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return difference

    def _guided(self, branch: Branch) -> Tensor:
        """Return the predictions of the last call, `[N, ...]`."""
        contexts = torch.cat([tensors[0] for tensors in branch._answers[-1]]).unflatten(0, (-1, len(self._prompts)))
        if len(contexts) == _PAIR and self._guidance is not None:
            contexts = (contexts[0] + self._guidance * (contexts[1] - contexts[0]))[None]
        guided: Tensor = contexts.mean(0)
        return guided

    def extend(
        self, tries: Sequence[tuple[Branch, Actions]], corrections: Mapping[str, Correction] | None = None
    ) -> list[Branch]:
        """Let the next call of each history do something, and return the histories that come of it.

        Args:
            tries: histories of the same number of calls, each with what its next call predicts.
            corrections: zone -> what is done to what is predicted for it.
        """
        call = len(tries[0][0].rows)
        clock = StepClock()
        self._answer.begin(clock, call, tries, corrections or {})
        count = len(tries)
        latents: list[Tensor] = []

        def stop(done: int, total: int, sample: Tensor) -> None:
            if clock.call > call:
                latents.append(sample.detach())
                raise _Enough

        with contextlib.suppress(_Enough):
            self._pipeline.run(
                self._prompts * count,
                self._indices * count,
                replace(self._settings, batch_size=count * len(self._prompts)),
                decode=False,
                clock=clock,
                on_step=stop,
            )
        pictures = latents[0].cpu().unflatten(0, (count, len(self._prompts)))
        return [
            replace(branch, errors=tuple(relative_errors(self._reference[call], made).tolist()))
            for branch, made in zip(self._answer.branches(), pictures, strict=True)
        ]


class _Enough(Exception):  # noqa: N818 - no error: it ends a pipeline after the call that was tried
    pass


class _Answer(ModelHook):
    """The denoiser's forward while trials run: memory for all calls but one."""

    def __init__(
        self, hooks: ZoneHooks, zones: Sequence[Zone], pictures: int, places: Sequence[float], window: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window = window
        self._hooks, self._zones, self._pictures, self._places = hooks, tuple(zones), pictures, places
        # A residual zone keeps one change, whatever the number of its blocks.
        self._modules = {zone.name: 1 if zone.streams else len(zone.predicted) for zone in zones}
        self._halves = any(zone.kind == "guidance" for zone in zones)
        self._forms: dict[str, Any] = {}  # of a forward with so many rows:
        self._form_rows = 0

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Learn the names of the denoiser's arguments."""
        self._names = list(inspect.signature(module.forward).parameters)
        return module

    def begin(
        self,
        clock: StepClock,
        call: int,
        tries: Sequence[tuple[Branch, Actions]],
        corrections: Mapping[str, Correction],
    ) -> None:
        """Get ready for a run in which call `call` is tried."""
        self._corrections = corrections
        self._clock, self._call, self._tries = clock, call, tries
        self._moment, self._context = -1, 0
        self._answers: list[list[list[Tensor]]] = [[] for _ in tries]
        self._computed: list[list[dict[str, list[list[Tensor]]]]] = [[] for _ in tries]

    def branches(self) -> list[Branch]:
        """Return the histories with the tried call."""
        return [
            self._longer(branch, actions, answers, computed)
            for (branch, actions), answers, computed in zip(self._tries, self._answers, self._computed, strict=True)
        ]

    def _longer(
        self,
        branch: Branch,
        actions: Actions,
        answers: list[list[Tensor]],
        computed: list[dict[str, list[list[Tensor]]]],
    ) -> Branch:
        kept = {zone: dict(calls) for zone, calls in branch._kept.items()}
        for zone in computed[0]:
            calls = kept.setdefault(zone, {})
            calls[self._call] = [context[zone] for context in computed]
            for old in sorted(calls)[: -self._window]:
                del calls[old]
        return Branch((*branch.rows, dict(actions)), (), (*branch._answers, answers), kept)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the denoiser."""
        now = self._clock.call
        self._context = self._context + 1 if now == self._moment else 0
        self._moment = now
        if now < self._call:
            answers = [branch._answers[now][self._context] for branch, _ in self._tries]
        else:
            answers = self._tried(args, kwargs)
        contexts = len(answers[0][0]) // self._pictures
        joined = [
            torch.stack([tensor.unflatten(0, (contexts, self._pictures)) for tensor in tensors], 1).flatten(0, 2)
            for tensors in zip(*answers, strict=True)
        ]
        return with_leaves(self._form, joined)

    def _tried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[Tensor]]:
        count = len(self._tries)
        same: dict[tuple[str, ...], list[int]] = {}
        for number, (_, actions) in enumerate(self._tries):
            same.setdefault(tuple(sorted(actions)), []).append(number)
        batch = count_rows(args, kwargs)
        rows = batch // count
        answers: list[list[Tensor]] = [[] for _ in self._tries]
        for numbers in same.values():
            if WHOLE in self._tries[numbers[0]][1]:
                for number in numbers:
                    answers[number] = self._predicted(number, WHOLE)(0)
                    self._computed[number].append({})
                continue
            step = max(1, _ROWS // rows)
            for first in range(0, len(numbers), step):
                self._compute(numbers[first : first + step], args, kwargs, batch, answers)
        for number, answer in enumerate(answers):
            self._answers[number].append(answer)
        return answers

    def _compute(
        self,
        numbers: Sequence[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int,
        answers: list[list[Tensor]],
    ) -> None:
        """Run the denoiser on the rows of some tries that do the same."""
        rows = batch // len(self._tries)
        places = torch.arange(batch).view(rows // self._pictures, len(self._tries), self._pictures)
        # Contexts first within a try; where only one of them will run, tries first within contexts.
        parts = [places[:, number] for number in numbers]
        own = torch.cat(parts, 1).flatten() if GUIDANCE in self._tries[numbers[0]][1] else torch.cat(parts).flatten()
        own_args, own_kwargs = take_rows(self._names, args, kwargs, own)
        actions = self._tries[numbers[0]][1]
        if GUIDANCE in actions:
            self._compute_half(numbers, own_args, own_kwargs, answers)
            return
        given = {zone: _joined([self._predicted(number, zone) for number in numbers], rows) for zone in actions}
        call = ZoneCall(given, frozenset(zone.name for zone in self._zones), self._forms_for(len(own)))
        self._hooks.running = call
        try:
            forward: Any = self.fn_ref.original_forward
            output = forward(*own_args, **own_kwargs)
        finally:
            self._hooks.running = None
        if not actions:
            self._forms, self._form_rows = call.forms, len(own)
        self._form = output
        # A zone of which a part was replaced is of no use later.
        kept = {zone: modules for zone, modules in call.kept.items() if all(modules[: self._modules[zone]])}
        kept[WHOLE] = [leaves(output)]
        for place, number in enumerate(numbers):
            block = slice(place * rows, (place + 1) * rows)

            def part(tensor: Tensor, block: slice = block) -> Tensor:
                return tensor[block].clone() if tensor.ndim and len(tensor) == len(own) else tensor

            answers[number] = [part(tensor) for tensor in leaves(output)]
            own_kept = {zone: [[part(t) for t in module] for module in modules] for zone, modules in kept.items()}
            self._computed[number].append(
                own_kept | ({GUIDANCE: [halves_apart(answers[number])]} if self._halves else {})
            )

    def _compute_half(
        self, numbers: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any], answers: list[list[Tensor]]
    ) -> None:
        """Run the denoiser on the second guidance context of some tries, and predict how far the first is from it."""
        forward: Any = self.fn_ref.original_forward
        found = leaves(second_half(self._names, forward, args, kwargs))
        for place, number in enumerate(numbers):
            block = slice(place * self._pictures, (place + 1) * self._pictures)
            apart = self._predicted(number, GUIDANCE)(0)
            answers[number] = joined_halves([tensor[block] for tensor in found], apart)
            self._computed[number].append({})

    def _predicted(self, number: int, zone: str) -> Callable[[int], list[Tensor]]:
        """Return what a try predicts for a zone."""
        branch, actions = self._tries[number]
        action, context = actions[zone], self._context
        if isinstance(action, str):
            rule = PREDICTORS[action]
            nodes = branch.nodes(zone)[-rule.nodes :]
            axis: Sequence[float] = range(len(self._places)) if rule.by_call else self._places
            weights = rule.weights([axis[node] for node in nodes], axis[self._call])
        else:
            nodes, weights = [node for node, _ in action], tuple(weight for _, weight in action)
        prediction = Prediction(tuple(nodes), weights, self._corrections.get(zone))

        def tensors(module: int) -> list[Tensor]:
            kept = [branch._kept[zone][node][context][module] for node in nodes]
            return [prediction.of(each) for each in zip(*kept, strict=True)]

        return tensors

    def _forms_for(self, rows: int) -> dict[str, Any]:
        def resized(form: Tensor) -> Tensor:
            has_rows = form.ndim and len(form) == self._form_rows
            return form[:1].expand(rows, *form.shape[1:]) if has_rows else form

        return {name: map_tensors(resized, form) for name, form in self._forms.items()}


def _joined(given: Sequence[Callable[[int], list[Tensor]]], rows: int) -> Callable[[int], list[Tensor]]:
    """Join what several tries are given, in their order."""

    def tensors(module: int) -> list[Tensor]:
        return [
            torch.cat(each) if each[0].ndim and len(each[0]) == rows else each[0]
            for each in zip(*(tensors_of(module) for tensors_of in given), strict=True)
        ]

    return tensors


def _reference(
    pipeline: OpenPipeline, prompts: list[str], indices: list[int], settings: Generation
) -> tuple[tuple[float, ...], list[Tensor]]:
    """Return the timestep of each call of a trajectory that computes everything, and the latents after it."""
    clock = StepClock()
    told: dict[int, float] = {}
    hook = pipeline.denoiser.register_forward_pre_hook(lambda *_: told.__setitem__(clock.call, clock.timestep))
    whole = replace(settings, batch_size=len(prompts))
    try:
        made = pipeline.run(prompts, indices, whole, decode=False, clock=clock, keep_steps=True)
    finally:
        hook.remove()
    assert made.step_latents is not None
    return tuple(told[call] for call in range(len(told))), made.step_latents


def places_of(scheduler: Any, timesteps: Sequence[float]) -> tuple[float, ...]:
    """Return where calls lie on the axis of extrapolation: their log-SNR, or their number where that does not rise."""
    log_snr = log_snr_function(scheduler, max(timesteps))
    places = tuple(log_snr(timestep) for timestep in timesteps)
    rises = all(after > before for before, after in itertools.pairwise(places))
    return places if rises else tuple(map(float, range(len(timesteps))))
