"""Block reconstruction: round the weights of a block up or down together, so that its output comes nearest to float.

A block is any module with quantized layers inside. It is given the inputs that the quantized model before it produces,
and must answer what the float block answers to the float model's. Letters: N rows; O, taps and I as in
`kernels/packing.py`.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import Path, map_leaves
from dcomp.calibrate.tensor_watch import tensors_in
from dcomp.compress.code_grid import CodeGrid
from dcomp.compress.held_out import hold_out
from dcomp.compress.layers import QuantLayer
from dcomp.compress.soft_rounding import (
    fake_execution,
    inverse_soft_step,
    soft_step,
    store,
    undecided,
    weights_replaced,
)
from dcomp.kernels.packing import PackedWeight

WARM_UP = 0.2  # of the iterations, in which nothing draws a code up or down but the output
BETA_FIRST, BETA_LAST = 20.0, 2.0


@dataclass(frozen=True)
class BlockCall:
    """A call of a block over N rows.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        batched: which leaves of both have rows, along axis 0; all others belong to every row.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batched: Collection[Path]

    def take(self, rows: Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of some rows: views for a slice, copies for indices."""
        return map_leaves(self.args, self.kwargs, lambda path, leaf: leaf[rows] if path in self.batched else leaf)


@dataclass(frozen=True)
class BlockResult:
    """What reconstruction did to a block.

    All four errors are squared errors of the block's output, as parts of the squared float output.

    Attributes:
        initial: on the rows that were learned from, with the codes that the block came with.
        final: likewise with the learned codes.
        held_out_initial: on the other rows.
        held_out_final: likewise.
        undecided: largest distance of a learned rounding from up or down before it was decided; 0 is clear, 0.5 open.
        changed: part of the codes that are others now; 0 if the result was not kept.
        kept: whether the block has the learned codes; otherwise it is as it was, because held-out rows got no better.
    """

    initial: float
    final: float
    held_out_initial: float
    held_out_final: float
    undecided: float
    changed: float
    kept: bool


def reconstruct_block(
    block: nn.Module,
    call: BlockCall,
    targets: Any,
    weights: Mapping[str, Tensor],
    *,
    iterations: int = 1500,
    batch: int = 64,
    lr: float = 2e-2,
    lam: float = 0.1,
    seed: int = 0,
    groups: Tensor | None = None,
    timesteps: Tensor | None = None,
    progress: Progress = silent,
) -> BlockResult:
    """Learn the rounding of every quantized layer of a block, in place.

    Each code lies between the two that surround the float weight on the layer's grid. Scales, multipliers and input
    ranges stay. The loss is the squared error of the output, divided by that of rounding to nearest, so that `lam`
    means the same for every block. Deterministic.

    Args:
        block: in eval mode; gradients must pass through its forward.
        call: what the quantized model before the block gives it.
        targets: the float block's answer: a tensor, or a tuple, list or dict of them. Rows lie along axis 0.
        weights: name of a quantized layer in the block (empty for the block itself) -> float weight `[O, *taps, I]`,
            with whatever transforms its codes are meant for. Layers that are not named keep their codes.
        iterations: optimizer steps.
        batch: rows of a step, and rows that run at once.
        lr: of Adam, for the logits. Measured: all codes are decided in time if `lr * iterations` is 18 or more.
        lam: weight of each undecided code, beside a loss that is about 1.
        seed: decides which rows are held out and which are drawn.
        groups: integers `[N]`, the trajectory of each row; without it each row is one.
        timesteps: `[N]`, what the clocks of static input ranges are told; without it they stay where they are.
        progress: called with a text, the count done and the total.

    Raises:
        HeldOutError: all rows belong to one trajectory.

    Source:
        Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization; Li et al. 2021, BRECQ,
        section 3.2. The scale-free loss and the judgement by held-out rows are ours.
    """
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, QuantLayer)}
    soft = {layer: _SoftWeight(layer, weights[name]) for name, layer in layers.items() if name in weights}
    rows = _Rows(block, call, list(tensors_in(targets)), timesteps)
    learn, held_out = hold_out(torch.arange(rows.count) if groups is None else groups, seed)
    with _without_gradients(block), fake_execution(layers.values()):
        before = rows.errors(batch)
        with weights_replaced({layer: weight.decided for layer, weight in soft.items()}):
            nearest = float(rows.errors(batch)[learn].mean())
        if soft and nearest > 0:
            with weights_replaced({layer: weight.values for layer, weight in soft.items()}):
                _learn(list(soft.values()), rows, learn, nearest, iterations, batch, lr, lam, seed, progress)
        with weights_replaced({layer: weight.decided for layer, weight in soft.items()}):
            after = rows.errors(batch)
    kept = bool(after[held_out].sum() < before[held_out].sum())
    changed = sum(weight.changed() for weight in soft.values()) / max(1, sum(w.logits.numel() for w in soft.values()))
    if kept:
        for layer, weight in soft.items():
            store(layer, weight.packed())
    energy = rows.energy

    def relative(errors: Tensor, which: Tensor) -> float:
        return float(errors[which].sum() / energy[which].sum().clamp_min(1e-300))

    return BlockResult(
        relative(before, learn),
        relative(after, learn),
        relative(before, held_out),
        relative(after, held_out),
        max((weight.undecided() for weight in soft.values()), default=0.0),
        changed if kept else 0.0,
        kept,
    )


class _SoftWeight:
    """The weight of one layer, each code somewhere between the two around its float value."""

    def __init__(self, layer: QuantLayer, weight: Tensor) -> None:
        self.grid = CodeGrid.of(layer.packed())
        exact = self.grid.to_codes(weight)
        self.floor = exact.floor()
        self.logits = inverse_soft_step(exact - self.floor).requires_grad_(True)

    def values(self) -> Tensor:
        return self._values(soft_step(self.logits))

    def decided(self) -> Tensor:
        return self._values(self._up())

    def packed(self) -> PackedWeight:
        return self.grid.repack(self._codes(self._up()), self.grid.packed.scale)

    def changed(self) -> int:
        return int((self._codes(self._up()) != self.grid.codes).sum())

    def undecided(self) -> float:
        h = soft_step(self.logits.detach())
        return float(torch.minimum(h, 1 - h).max()) if h.numel() else 0.0

    def _up(self) -> Tensor:
        return (self.logits.detach() >= 0).float()

    def _codes(self, h: Tensor) -> Tensor:
        return (self.floor + h).clamp(self.grid.low, self.grid.high)

    def _values(self, h: Tensor) -> Tensor:
        return self.grid.values(self._codes(h), self.grid.packed.scale)


class _Rows:
    """All rows of a block's call and of its targets."""

    def __init__(self, block: nn.Module, call: BlockCall, targets: Sequence[Tensor], timesteps: Tensor | None) -> None:
        self.block, self.call, self.targets, self.timesteps = block, call, targets, timesteps
        self.count = len(targets[0])
        layers = [layer for layer in block.modules() if isinstance(layer, QuantLayer)]
        self.clocks = dict.fromkeys(layer.clock for layer in layers if layer.clock is not None)
        self.energy = _squares(targets).double()

    def errors(self, batch: int) -> Tensor:
        """Return the squared error of every row's output, fp64 `[N]`."""
        with torch.no_grad():
            return torch.cat([self.error_of(rows) for rows in torch.arange(self.count).split(batch)]).double()

    def error_of(self, rows: Tensor) -> Tensor:
        """Return the squared error of the output of some rows; differentiable."""
        args, kwargs = self.call.take(rows)
        if self.timesteps is not None:
            for clock in self.clocks:
                clock.read(self.timesteps[rows])
        outputs = list(tensors_in(self.block(*args, **kwargs)))
        wanted = [target[rows] for target in self.targets]
        return _squares([output.float() - target.float() for output, target in zip(outputs, wanted, strict=True)])


def _learn(
    soft: Sequence[_SoftWeight],
    rows: _Rows,
    learn: Tensor,
    unit: float,
    iterations: int,
    batch: int,
    lr: float,
    lam: float,
    seed: int,
    progress: Progress,
) -> None:
    logits = [weight.logits for weight in soft]
    optimizer = torch.optim.Adam(logits, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    warm_up = WARM_UP * iterations
    order = learn[:0]
    for iteration in range(iterations):
        progress("block reconstruction", iteration, iterations)
        if len(order) < min(batch, len(learn)):
            order = learn[torch.randperm(len(learn), generator=generator)]
        drawn, order = order[:batch], order[batch:]
        with torch.enable_grad():
            loss = rows.error_of(drawn).mean() / unit
            if iteration >= warm_up:
                part = (iteration - warm_up) / max(1.0, iterations - warm_up)
                beta = BETA_FIRST + (BETA_LAST - BETA_FIRST) * part
                open_codes = torch.stack([undecided(soft_step(v), beta).sum() for v in logits]).sum()
                loss = loss + lam * open_codes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    progress("block reconstruction", iterations, iterations)


@contextmanager
def _without_gradients(block: nn.Module) -> Any:
    flags = {parameter: parameter.requires_grad for parameter in block.parameters()}
    block.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each row over all tensors, `[N]`."""
    return torch.stack([tensor.float().square().flatten(1).sum(1) for tensor in tensors]).sum(0)
