"""Tuning: a few values of a quantized denoiser, learned end to end from the float model's recorded answers.

Neither pictures nor the float model are needed: a calibration set holds what the denoiser was told and what it
predicted. What may be learned is what a deployed model has anyway: scales of weights, biases, norms, codes and static
input scales. N is the number of rows.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dcomp import DcompError
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.tree_file import tensor_sha256
from dcomp.compress.code_grid import CodeGrid
from dcomp.compress.held_out import hold_out
from dcomp.compress.layers import QuantConv2d, QuantLayer
from dcomp.compress.learned_range import ranges_replaced
from dcomp.compress.learning_run import CosineAdam, Snapshot, StratifiedOrder
from dcomp.compress.objective import Objective
from dcomp.compress.soft_rounding import executed, fake_execution, round_through, store, weights_replaced
from dcomp.kernels.packing import PackedWeight

Learnable = Literal["scales", "biases", "norms", "rounding", "input_scales"]
MEASURED_PER_STEP = 8  # rows, or pairs, by which errors before and after are known, of both kinds of trajectories

_SLOWEST, _FASTEST = -0.9, 9.0  # bounds of a scale's growth: it keeps its sign and never vanishes


class TuningError(DcompError):
    """A denoiser that cannot be tuned as asked."""


@dataclass(frozen=True)
class TuneResult:
    """What tuning did.

    The four losses are mean squared errors, each step in units of its error before on the rows that were learned from;
    `MEASURED_PER_STEP` rows of a step stand for all.

    Attributes:
        initial: on the rows that were learned from: 1 if no step is without error.
        final: likewise after tuning.
        held_out_initial: on the rows of other trajectories.
        held_out_final: likewise after tuning, with the values as they are deployed.
        kept: whether the denoiser has the learned values; otherwise it is what it was, bit for bit, because the judge,
            or held-out rows, found it no better.
        judged: what the judge found before and after; None without one.
        by_step: timestep -> mean squared error on the held-out rows before and after, noisiest first.
    """

    initial: float
    final: float
    held_out_initial: float
    held_out_final: float
    kept: bool
    judged: tuple[float, float] | None
    by_step: dict[float, tuple[float, float]]


def tune(
    denoiser: nn.Module,
    rows: RowBatch,
    *,
    trajectories: Tensor | None = None,
    iterations: int = 200,
    batch_rows: int = 16,
    guidance: float | None = None,
    learn: Collection[Learnable] = ("scales", "biases", "norms"),
    lr: float = 1e-3,
    rounding_lr: float = 0.02,
    seed: int = 0,
    judge: Callable[[], float] | None = None,
    progress: Progress = silent,
    snapshot: Path | None = None,
) -> TuneResult:
    """Learn values of a quantized denoiser, in place, and keep them if the denoiser is better for it.

    A killed run goes on from its snapshot and ends with the same bits. Whatever is raised, the denoiser is then as it
    was. Learning codes takes 16 bytes for each of them.

    Args:
        denoiser: with quantized layers, in eval mode.
        rows: recorded calls with the float model's predictions.
        trajectories: integers `[N]`, groups of rows of which a tenth is held out; None: those of the rows.
        iterations: optimizer steps; the learning rates fall to 0 along a cosine.
        batch_rows: rows of a step, and of a forward pass that measures.
        guidance: scale that the pipeline guides with; None for the plain error, also of pairs.
        learn: what may change. "biases" are those of linear layers and convolutions, "norms" weight and bias of norms.
        lr: of Adam, for all but codes; scales change by this part of themselves.
        rounding_lr: for codes, in units of a code.
        seed: decides which trajectories are held out, and the order of the others.
        judge: returns the error of the denoiser as it is; asked before and after. Without one the rows that were held
            out are what decides.
        progress: called with a text, the count done and the total.
        snapshot: file of a resumable state, written every 20 s. That of another run is overwritten.

    Raises:
        TuningError: there is nothing to learn, or a parameter to learn is not float32.
        HeldOutError: all rows belong to one trajectory.
        TreeError: the snapshot cannot be written.

    Source:
        Wang et al. 2025, QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning. Guided error,
        units by step and the held-out judgement are ours.
    """
    objective = Objective(denoiser, rows, guidance, batch_rows)
    groups = (rows.trajectories if trajectories is None else trajectories)[objective.units[:, 0]]
    seen, held_out = hold_out(groups, seed)
    known, judges = (objective.sample(units, MEASURED_PER_STEP) for units in (seen, held_out))
    measured = torch.cat((known, judges))
    options = [iterations, batch_rows, guidance, sorted(learn), lr, rounding_lr, seed, seen.tolist()]
    with _parameters_guarded(denoiser), _Learned(denoiser, frozenset(learn)) as learned:
        file = Snapshot(snapshot, f"{json.dumps(options)} {learned.digest()} {objective.digest()}")
        optimizer = CosineAdam([(learned.values, lr), (learned.codes, rounding_lr)], iterations)
        state = file.read() or {}
        first = int(state.pop("iteration", torch.tensor(0)))
        before = state.pop("errors") if state else objective.measure(measured, progress)
        if state:
            optimizer.load(state)
        weights = objective.weights(before, known)
        with learned.deployed():
            verdict = [judge()] if judge else None
        order = StratifiedOrder(objective.steps[seen], seed)

        def now(iteration: int) -> dict[str, Tensor]:
            return {"iteration": torch.tensor(iteration), "errors": before, **optimizer.state()}

        with learned.in_use():
            for iteration in range(first, iterations):
                progress("tuning", iteration, iterations)
                file.write(partial(now, iteration))
                units = seen[order.draw(iteration * objective.batch, objective.batch)]
                optimizer.step(iteration, partial(objective.loss, units, weights))
                learned.confine_()
        progress("tuning", iterations, iterations)
        file.write(partial(now, iterations), at_once=True)
        learned.write()
        after = objective.measure(measured, progress)
        if judge and verdict:
            with learned.deployed():
                verdict.append(judge())
            kept = verdict[1] < verdict[0]
        else:
            kept = bool((after * weights)[judges].mean() < (before * weights)[judges].mean())
        if not kept:
            learned.put_back()
    held = zip(objective.timesteps, *(objective.by_step(errors, judges) for errors in (before, after)), strict=True)
    before, after = before * weights, after * weights
    return TuneResult(
        float(before[known].mean()),
        float(after[known].mean()),
        float(before[judges].mean()),
        float(after[judges].mean()),
        kept,
        (verdict[0], verdict[1]) if verdict else None,
        {float(t): (float(a), float(b)) for t, a, b in held if not a.isnan()},
    )


class _Learned:
    """The values of a denoiser that are learned; a context that puts them back when it is left by an exception.

    Attributes:
        values: leaves in units of themselves or of what they are: growth of scales, biases, norms.
        codes: leaves in units of a code.
    """

    def __init__(self, denoiser: nn.Module, learn: frozenset[Learnable]) -> None:
        unknown = learn - set(get_args(Learnable))
        if unknown:
            raise TuningError(
                f"Nothing is called {', '.join(sorted(unknown))}",
                where="learn",
                remedy=f"Choose from {', '.join(get_args(Learnable))}.",
            )
        layers = [layer for layer in denoiser.modules() if isinstance(layer, QuantLayer)]
        self._deployed = {layer: layer.execution for layer in layers}
        self._fake = fake_execution(layers)
        self._parameters = _parameters(denoiser, learn)
        self._norms = [module for module in denoiser.modules() if isinstance(module, nn.GroupNorm)]
        self._weights = {layer: _Weight(layer, learn) for layer in layers if learn & {"scales", "rounding"}}
        ranged = [layer for layer in layers if isinstance(layer, QuantConv2d) and layer.input_scale is not None]
        self._ranges = {layer: _Range(layer) for layer in ranged if "input_scales" in learn}
        self._layers = layers
        self._originals = [parameter.detach().clone() for parameter in self._parameters]
        growths = [own.growth for own in self._weights.values() if own.growth is not None]
        growths += [own.growth for own in self._ranges.values()]
        self.codes = [own.codes for own in self._weights.values() if own.codes.requires_grad]
        self.values: list[Tensor] = [*growths, *self._parameters]
        if not (self.values or self.codes):
            raise TuningError(
                "The denoiser has nothing of what is to be learned",
                where=", ".join(sorted(learn)) or "learn",
                remedy="Tune a quantized denoiser, and learn scales at least.",
            )

    def __enter__(self) -> Self:
        self._fake.__enter__()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.put_back()
        self._fake.__exit__(kind, *rest)

    def deployed(self) -> AbstractContextManager[None]:
        """Within a `with` block, let the layers run as they did before they were learned: faster than fake."""
        return executed(self._deployed)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within a `with` block, let the layers compute with the values as they are being learned."""
        weights = {layer: own.weight for layer, own in self._weights.items()}
        ranges = {layer: own.scale for layer, own in self._ranges.items()}
        hooks = [norm.register_forward_pre_hook(_require_gradient) for norm in self._norms]
        try:
            with weights_replaced(weights), ranges_replaced(ranges):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def confine_(self) -> None:
        """Move values that have left their bounds to the nearest ones within."""
        with torch.no_grad():
            for weight in self._weights.values():
                weight.confine_()
            for range_ in self._ranges.values():
                range_.confine_()

    def write(self) -> None:
        """Give the layers the values as they are deployed."""
        for layer, own in self._weights.items():
            store(layer, own.packed())
        for conv, range_ in self._ranges.items():
            conv.input_scale = range_.scale().detach().clone()

    def put_back(self) -> None:
        """Give the denoiser what it had, bit for bit."""
        for layer, own in self._weights.items():
            store(layer, own.original)
        for conv, range_ in self._ranges.items():
            conv.input_scale = range_.original
        with torch.no_grad():
            for parameter, original in zip(self._parameters, self._originals, strict=True):
                parameter.copy_(original)

    def digest(self) -> str:
        """Return what tells these layers and parameters from others."""
        digest = hashlib.sha256()
        for layer in self._layers:
            for tensor in (layer.qweight, layer.scale, layer.multiplier, layer.input_scale):
                digest.update(b"" if tensor is None else tensor_sha256(tensor).encode())
        for original in self._originals:
            digest.update(tensor_sha256(original).encode())
        return digest.hexdigest()


class _Weight:
    """The weight of a layer: its codes, and scales that grow from what they were."""

    def __init__(self, layer: QuantLayer, learn: frozenset[Learnable]) -> None:
        self.original = layer.packed()
        self._grid = CodeGrid.of(self.original)
        self.growth = torch.zeros_like(layer.scale).requires_grad_(True) if "scales" in learn else None
        self.codes = self._grid.codes.clone().requires_grad_("rounding" in learn)

    def weight(self) -> Tensor:
        return self._grid.values(self._whole(), self._scale())

    def packed(self) -> PackedWeight:
        return self._grid.repack(self._whole(), self._scale())

    def confine_(self) -> None:
        if self.codes.requires_grad:
            self.codes.clamp_(self._grid.low, self._grid.high)
        if self.growth is not None:
            self.growth.clamp_(_SLOWEST, _FASTEST)

    def _whole(self) -> Tensor:
        return round_through(self.codes, self._grid.low, self._grid.high) if self.codes.requires_grad else self.codes

    def _scale(self) -> Tensor:
        scale = self.original.scale
        return scale if self.growth is None else scale * (1 + self.growth)


class _Range:
    """The static input scales of a layer, which grow from what they were."""

    def __init__(self, layer: QuantConv2d) -> None:
        assert layer.input_scale is not None
        self.original = layer.input_scale
        self.growth = torch.zeros_like(layer.input_scale).requires_grad_(True)

    def scale(self) -> Tensor:
        return self.original * (1 + self.growth)

    def confine_(self) -> None:
        self.growth.clamp_(_SLOWEST, _FASTEST)


def _parameters(denoiser: nn.Module, learn: frozenset[Learnable]) -> list[nn.Parameter]:
    """Return biases and parameters of norms, those that several modules share once.

    Raises:
        TuningError: one of them is not float32.
    """
    found: dict[nn.Parameter, str] = {}
    for name, module in denoiser.named_modules():
        own = {key: value for key, value in module._parameters.items() if value is not None}
        linear = isinstance(module, nn.Linear | _ConvNd)
        # Embeddings and tables of frequencies have a `weight` too, but nothing to keep from dividing by zero.
        norm = not linear and hasattr(module, "eps")
        wanted = (
            {"bias"} if linear and "biases" in learn else {"weight", "bias"} if norm and "norms" in learn else set()
        )
        found |= {value: f"{name}.{key}" for key, value in own.items() if key in wanted}
    for parameter, name in found.items():
        if parameter.dtype != torch.float32:
            raise TuningError(
                f"A parameter to learn is {parameter.dtype}, in which small steps are lost",
                where=name,
                remedy="Tune the denoiser in float32, before it is converted.",
            )
    return list(found)


def _require_gradient(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The backward of torch 2.13's group norm writes to the gradient of a channels-last input even if there is none to
    # be: with parameters that need one and an input that does not, the process crashes.
    x = args[0]
    return args if x.requires_grad or not torch.is_grad_enabled() else (x.detach().requires_grad_(True), *args[1:])


@contextmanager
def _parameters_guarded(denoiser: nn.Module) -> Iterator[None]:
    """Within a `with` block, let no parameter have a gradient unless asked for."""
    flags = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    denoiser.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
