"""Layers that read the timestep and conditions of the whole picture run once a picture, for all timesteps at once.

Such a layer (the modulation of a DiT, SD3 or Flux) has one output for each timestep and each
class or pooled text, so that tables of it cannot be stored, but all of a picture's are known when its second step
begins. They are computed then, in one product: the weights are read twice a picture instead of once a step, and need
not stay in memory between.

Whatever is unexpected is computed as if this file were not there: other conditions than those known, timesteps that
were not foreseen, one call alone, gradients, compiled blocks.

Letters: N rows of a call, U distinct conditions among them, W timesteps that are computed at once, O output features.

Source: design of dcomp. Huang et al. 2025, Temporal Feature Matters, store features of the timestep alone.
"""

import logging
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import MethodType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.calibration_set import RecordedCall
from dcomp.calibrate.clock import clock_of
from dcomp.calibrate.safetensors_file import Header
from dcomp.calibrate.structure import Role, Structure
from dcomp.compress.altered_calls import at_timestep, outputs_of
from dcomp.compress.form_tensor import FormMemory
from dcomp.compress.layer_files import LayerFiles
from dcomp.compress.manifest import CheckpointError
from dcomp.compress.quantized import Quantized
from dcomp.compress.run_ahead import Arguments, run_ahead

Ahead = Literal["off", "on", "offload"]

LIMIT = 256 << 20  # bytes of features that are held at once; more timesteps wait for their turn
MAX_LAYERS, MAX_CONDITIONS, MAX_TIMESTEPS = 100_000, 100, 10_000
_CONTEXTS = 16  # sets of conditions that are told apart in one picture: guidance has two, if they come one by one
_TOLERANCE = 1e-3  # of the largest output: rows of a larger product may be summed in another order
_REMEDY = "Download the checkpoint again or compress the model again"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precomputed:
    """Which layers are computed ahead.

    Attributes:
        layers: their names.
        conditions: arguments of the denoiser that they may depend on beside the timestep, such as
            `added_cond_kwargs.text_embeds`.
        timesteps: those that are deployed, descending, in the units that the denoiser is told.
        ahead: whether that is done where nobody says otherwise, and whether their weights leave the memory.
    """

    layers: tuple[str, ...]
    conditions: tuple[str, ...]
    timesteps: tuple[float, ...]
    ahead: Ahead = "off"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        return {
            "layers": list(self.layers),
            "conditions": list(self.conditions),
            "timesteps": list(self.timesteps),
            "ahead": self.ahead,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: a field is missing, unknown or impossible.
        """
        bounds = {"layers": MAX_LAYERS, "conditions": MAX_CONDITIONS, "timesteps": MAX_TIMESTEPS}
        if not isinstance(data, Mapping) or set(data) - {"ahead"} != set(bounds):
            raise _broken(f"needs exactly the keys {', '.join(bounds)} and ahead")
        ahead = data.get("ahead", "off")  # older checkpoints have no such key
        if ahead not in get_args(Ahead):
            raise _broken(f"needs one of {', '.join(get_args(Ahead))} as ahead")
        for key, most in bounds.items():
            kind: Any = (int, float) if key == "timesteps" else str
            values = data[key]
            if not isinstance(values, list) or len(values) > most or not all(isinstance(v, kind) for v in values):
                raise _broken(f"needs a list of at most {most} {key}")
        times = [float(t) for t in data["timesteps"]]
        if not all(math.isfinite(t) for t in times) or any(a <= b for a, b in pairwise(times)):
            raise _broken("needs timesteps that descend")
        return cls(tuple(data["layers"]), tuple(data["conditions"]), tuple(times), ahead)


@torch.no_grad()
def plan_precompute(
    denoiser: nn.Module, structure: Structure, call: RecordedCall, timesteps: Iterable[float]
) -> Precomputed:
    """Find out which layers can be computed ahead; changes nothing.

    They are those that depend on timestep or conditions alone, as far as a trial run on a recorded call gives what the
    layers give when the denoiser is run as ever. There are none where all of them depend on the timestep alone: such
    layers can be tables (`temporal.py`), which takes them out of memory and of the file.

    Args:
        denoiser: in eval mode, float or quantized; tables stay tables.
        structure: what probing it found.
        call: a recorded call.
        timesteps: those that will be deployed.
    """
    roles = structure.named(Role.TIME, Role.MODULATION)
    names = [name for name in structure.layers if name in roles and _is_usable(denoiser.get_submodule(name))]
    times = tuple(sorted({_fp32(t) for t in timesteps}, reverse=True))
    arguments = Arguments.of(denoiser, call.args, call.kwargs)
    plan = Precomputed(tuple(names), tuple(sorted(arguments.conditions)), times)
    if not structure.named(Role.MODULATION).intersection(names) or len(times) < 2:
        return Precomputed((), plan.conditions, times)

    def compute(name: str, x: Tensor) -> Tensor:
        layer: Any = denoiser.get_submodule(name)
        output: Tensor = type(layer).forward(layer, x)
        return output

    tried = times[:: max(1, len(times) - 1)][:2]
    try:
        found = run_ahead(denoiser, names, arguments, tried, clock_of(denoiser), FormMemory(), compute)
    except Exception as error:  # whatever a model's own code raises on tensors without values
        logger.info("No layer can be computed ahead: %s: %s", type(error).__name__, error)
        return Precomputed((), plan.conditions, times)
    good = set(names)
    for number, t in enumerate(tried):
        args, kwargs = at_timestep(denoiser, call.args, call.kwargs, t)
        rows = [number * len(arguments.distinct) + row for row in arguments.row_of]
        seen = outputs_of(denoiser, names, args, kwargs)
        good -= {name for name in good if not _agree(found.get(name, []), seen[name], rows)}
    return Precomputed(tuple(name for name in names if name in good), plan.conditions, times)


def precompute(denoiser: nn.Module, headers: Iterable[Header] | None = None) -> "Precomputer":
    """Compute the layers of the plan that a denoiser carries ahead from now on.

    Args:
        denoiser: opened from a checkpoint, or quantized in this process.
        headers: of the checkpoint's weight files: the layers' tensors are then taken out of memory, and are there only
            while they are used. They must stay as they are.

    Raises:
        UsageError: it carries no plan.
        CheckpointError: the files are not those that it was opened from.
    """
    plan = plan_of(denoiser)
    if plan is None:
        raise UsageError(
            "No layer of this denoiser can be computed ahead",
            where="ahead",
            remedy="Run them at each step, or compress the model again if an older version of dcomp did.",
        )
    return Precomputer(denoiser, plan, LayerFiles(denoiser, plan.layers, headers) if headers else None)


def keep_plan(denoiser: nn.Module, plan: Precomputed) -> None:
    """Let a denoiser carry a plan as `dcomp_precomputed`, into its checkpoint and out of it.

    Raises:
        CheckpointError: a layer of the plan is not there, or is none that can be computed ahead.
    """
    for name in plan.layers:
        _layer_of(denoiser, name)
    denoiser.dcomp_precomputed = plan  # type: ignore[assignment]


def plan_of(denoiser: nn.Module) -> Precomputed | None:
    """Return the plan that a denoiser carries, if it has one with layers in it."""
    plan = vars(denoiser).get("dcomp_precomputed")
    return plan if isinstance(plan, Precomputed) and plan.layers else None


class Precomputer:
    """Computes layers ahead, and lets them answer with what was computed, from now on until it is detached.

    Args:
        denoiser: quantized or float; one at a time may do this to it.
        plan: of this very denoiser.
        files: has the layers' tensors where they are not in memory.

    Attributes:
        plan: which layers, for what.
        computed: how often layers were computed ahead so far.
        served: calls of the denoiser so far whose layers answered with what had been computed.
        limit: bytes of features that are held at once.
        failure: why no more layers are computed ahead, or None.
    """

    def __init__(self, denoiser: nn.Module, plan: Precomputed, files: LayerFiles | None = None) -> None:
        self.plan = plan
        self.computed = 0
        self.served = 0
        self.limit = LIMIT
        self.failure: str | None = None
        self._clock = clock_of(denoiser)
        self._files = files
        self._layers = {name: _layer_of(denoiser, name) for name in plan.layers}
        self._denoiser = denoiser
        self._memory = FormMemory()
        self._picture: _Picture = _Picture(())
        self._serving: _Serving | None = None
        # Bound methods, not closures: a deep copy of the denoiser then serves itself.
        self._hooks = (
            denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True),
            denoiser.register_forward_hook(self._after_call, always_call=True),
        )
        for name, layer in self._layers.items():
            vars(layer)["_dcomp_precomputed"] = (self, name)
            vars(layer)["forward"] = MethodType(_answer, layer)

    def detach(self) -> None:
        """Let all layers compute as ever, with their tensors in memory; harmless when called again."""
        for hook in self._hooks:
            hook.remove()
        if self._files:
            self._files.restore()
        for layer in self._layers.values():
            vars(layer).pop("_dcomp_precomputed", None)
            vars(layer).pop("forward", None)

    def answer(self, name: str, x: Tensor) -> Tensor:
        """Return a layer's output: what was computed ahead for the call that is running, if it fits the input."""
        compiling = torch.compiler.is_compiling()
        found = None if self._serving is None or compiling else self._serving.take(name, x)
        return self._compute(name, x) if found is None else found

    def _compute(self, name: str, x: Tensor) -> Tensor:
        layer: Any = self._layers[name]
        with self._files.present(name) if self._files else nullcontext():
            output: Tensor = type(layer).forward(layer, x)
            return output

    def _before_call(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._serving = None
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.failure is not None:
            return
        if math.isnan(self._clock.timestep) or self._clock.row_timesteps is not None:
            return
        t = _fp32(self._clock.timestep)
        if self._picture.ends_before(t, self._clock.trajectory):
            self._picture = _Picture(self._picture.told, self._clock.trajectory)
        arguments = Arguments.of(denoiser, args, kwargs)
        if set(arguments.conditions) != set(self.plan.conditions):
            return
        again = self._picture.tell(t, arguments.key)
        window = self._picture.windows.get(arguments.key)
        if again and (window is None or t not in window.timesteps):
            window = self._next_window(denoiser, arguments, t)
        if window is not None and t in window.timesteps:
            self._serving = window.at(t, arguments)
            self.served += 1

    def _after_call(self, *_: Any) -> None:
        self._serving = None

    def _next_window(self, denoiser: nn.Module, arguments: Arguments, t: float) -> "_Window | None":
        """Compute all layers for this timestep and those that are still to come, as many as are held at once."""
        row = sum(layer.out_features for layer in self._layers.values()) * torch.float32.itemsize
        most = self.limit // (row * max(1, len(arguments.distinct)))
        times = tuple(known for known in self._picture.expected(t, self.plan.timesteps) if known <= t)[:most]
        if len(times) < 2 or any(_is_compiled(module) for module in denoiser.modules()):
            return None
        try:
            outputs = run_ahead(denoiser, self.plan.layers, arguments, times, self._clock, self._memory, self._compute)
        except Exception as error:  # of a model's own code; the layers can still run as ever
            self.failure = f"{type(error).__name__}: {str(error)[:300]}"
            logger.warning("Layers are not computed ahead any more, each step runs them: %s", self.failure)
            return None
        self.computed += 1
        window = _Window(times, {name: runs[0] for name, runs in outputs.items() if runs})
        self._picture.windows[arguments.key] = window
        return window


def _answer(layer: Any, x: Tensor) -> Tensor:
    """Stand in the place of a layer's `forward`."""
    precomputer, name = vars(layer)["_dcomp_precomputed"]
    output: Tensor = precomputer.answer(name, x)
    return output


@dataclass
class _Picture:
    """What is known of the trajectory that is running.

    Attributes:
        before: timesteps of the trajectory before.
        trajectory: the clock's number of it.
        told: timesteps so far, descending.
        windows: conditions -> what was computed for them.
    """

    before: tuple[float, ...]
    trajectory: int = -1
    told: tuple[float, ...] = ()
    windows: "dict[bytes, _Window]" = field(default_factory=dict)
    _first_told: dict[bytes, float] = field(default_factory=dict)

    def ends_before(self, t: float, trajectory: int) -> bool:
        """Whether a call at a timestep is of another picture: time runs from noise to picture."""
        return trajectory != self.trajectory or bool(self.told and t > self.told[-1])

    def tell(self, t: float, key: bytes) -> bool:
        """Take note of a call; return whether the same conditions were met at an earlier step."""
        if not self.told or t < self.told[-1]:
            self.told = (*self.told, t)
        if len(self._first_told) > _CONTEXTS:  # conditions that change with every step
            self._first_told.clear()
            self.windows.clear()
        return self._first_told.setdefault(key, t) > t

    def expected(self, t: float, deployed: tuple[float, ...]) -> tuple[float, ...]:
        """Return the timesteps to come: the deployed ones, or those of the picture before, whichever has this one."""
        return next((times for times in (deployed, self.before) if t in times), ())


@dataclass(frozen=True)
class _Window:
    """Outputs of layers at some timesteps.

    Attributes:
        timesteps: W, descending.
        outputs: layer name -> `[W * U, ..., O]`, timesteps outermost.
    """

    timesteps: tuple[float, ...]
    outputs: Mapping[str, Tensor]

    def at(self, t: float, arguments: Arguments) -> "_Serving":
        """Return what serves a call at one of the timesteps."""
        first = self.timesteps.index(t) * len(arguments.distinct)
        rows = torch.tensor([first + row for row in arguments.row_of], device=arguments.device)
        return _Serving(self.outputs, rows)


@dataclass(frozen=True)
class _Serving:
    """One call of the denoiser, whose layers take their rows."""

    outputs: Mapping[str, Tensor]
    rows: Tensor

    def take(self, name: str, x: Tensor) -> Tensor | None:
        """Return a layer's output for an input `[N, ..., I]`; None if it is not of the kind that was foreseen."""
        held = self.outputs.get(name)
        if held is None or (x.dtype, x.device) != (held.dtype, held.device):
            return None
        return held.index_select(0, self.rows) if x.shape[:-1] == (len(self.rows), *held.shape[1:-1]) else None


def _is_usable(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or (isinstance(layer, Quantized) and isinstance(layer, nn.Linear))


def _layer_of(denoiser: nn.Module, name: str) -> nn.Linear:
    try:
        layer = denoiser.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear) or not _is_usable(layer):
        raise _broken(f"names {name[:80]!r}, which is no linear layer of the model")
    return layer


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def _agree(found: Sequence[Tensor], seen: Sequence[Tensor], rows: Sequence[int]) -> bool:
    """Whether outputs that were computed ahead are those of a call, the same each time that the call runs the layer."""
    if len(found) != len(seen) or not all(torch.equal(found[0], other) for other in found[1:]):
        return False
    for ahead, output in zip(found, seen, strict=True):
        picked = ahead[list(rows)]
        if picked.shape != output.shape or picked.dtype != output.dtype:
            return False
        if not bool((picked - output).abs().max() <= _TOLERANCE * output.abs().max()):
            return False
    return bool(seen)


def _fp32(t: float) -> float:
    """Round as a checkpoint does."""
    return float(struct.unpack("f", struct.pack("f", t))[0])


def _broken(problem: str) -> CheckpointError:
    return CheckpointError(f"What is computed ahead {problem}", where="precomputed", remedy=_REMEDY)
