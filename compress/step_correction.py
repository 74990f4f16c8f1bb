"""Step-wise correction: a scale and a bias for each output channel and step bin that undo what quantization does to it.

The float and the quantized model run side by side, as two halves of one batch: attention, norms and whatever else has
no weights of its own treats both alike, and each quantized layer answers to its half. So a layer is compared with what
the float model has in its place, errors of the layers before it included, and nothing has to be recorded. Its tables
are the least squares fit, and layers behind it see them at work. At run time they are part of the weight's scale and
of the bias.

Letters: N rows, O output channels, B step bins.

Source:
    Liu et al. 2025, CacheQuant: Comprehensively Accelerated Diffusion Models, decoupled error correction. That the bias
    is part of what is fitted, the fits of bins that lean on a common one, and the held-out judgement are ours.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.tree_file import open_tensors, read_description, write_tree_file
from dcomp.compress.held_out import hold_out
from dcomp.compress.loader import attach_clock
from dcomp.compress.objective import Objective
from dcomp.compress.quantize import in_chunks
from dcomp.compress.quantized import Quantized
from dcomp.compress.split import parts_of, quantized_layers

PRIOR_ROWS = 4.0  # the weight of what is assumed before a bin's own rows are seen, in rows
HELD_OUT = 0.25  # of the trajectories judge
SLOPES = (0.25, 4.0)  # bounds of a factor
VARIES = 1e-5  # part of a channel's size below which it counts as constant
LEAST_GAIN = 0.01  # part of the squared error on held-out rows that a layer's tables must take away


@dataclass(frozen=True)
class Correction:
    """What tables did to one layer, on rows of trajectories that they were not fitted to.

    Attributes:
        before: relative error of its output, everything before it corrected.
        after: the same with tables.
        kept: whether it has them.
    """

    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class CorrectionResult:
    """What correction did.

    Attributes:
        layers: of each layer that tables were fitted for, in order of execution.
        held_out_initial: mean squared error of the predictions on held-out rows, each step in units of what it was.
        held_out_final: likewise with all tables.
        kept: whether the denoiser has the tables; if predictions got no better, it is what it was.
    """

    layers: dict[str, Correction]
    held_out_initial: float
    held_out_final: float
    kept: bool


def float_modules(denoiser: nn.Module, layers: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules of a float denoiser that have parameters, before a pass replaces or changes any.

    Args:
        denoiser: in float.
        layers: names of those that will be replaced; they are not copied.
    """
    leaves = {n: m for n, m in denoiser.named_modules() if not [*m.children()] and [*m.parameters()]}
    return {name: module if name in layers else copy.deepcopy(module) for name, module in leaves.items()}


@torch.no_grad()
def correct_steps(
    denoiser: nn.Module,
    reference: Mapping[str, nn.Module],
    rows: RowBatch,
    bins: StepBins,
    folder: Path,
    *,
    skip: Collection[str] = (),
    guidance: float | None = None,
    batch_rows: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> CorrectionResult:
    """Give the layers of a quantized denoiser tables for their outputs, in place, where that helps.

    Args:
        denoiser: quantized and tuned; whatever changes it afterwards makes the tables stale.
        reference: what `float_modules` returned before it was quantized.
        rows: of the calibration set; twice as many are in memory at once.
        bins: which row of the tables serves which timestep; those of static ranges, where there are any.
        folder: of finished layers; must belong to this denoiser, these rows and bins.
        skip: layers whose outputs are not those of the float model, because factors were moved into them.
        guidance: see `Objective`; decides by which error the whole is judged.
        batch_rows: rows of a forward pass that judges.
        seed: decides which trajectories judge.
        progress: called with a text, the count done and the total.

    Raises:
        HeldOutError: all rows belong to one trajectory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fitted, judges = hold_out(rows.trajectories, seed, HELD_OUT)
    clock = attach_clock(denoiser, bins)
    objective = Objective(denoiser, rows, guidance, batch_rows)
    units = torch.isin(objective.units[:, 0], judges).nonzero().flatten()
    before = objective.measure(units, progress)
    names = [name for name in quantized_layers(denoiser) if name not in skip]
    row_bins = torch.tensor([bins.lookup(t) for t in rows.timesteps.tolist()])
    fit = _Fit(folder, row_bins, bins.count, fitted, judges, len(names), progress)
    with _side_by_side(denoiser, reference, clock, len(rows), names, fit):
        double = rows.take(torch.arange(len(rows)).repeat(2))
        denoiser(*double.args, **double.kwargs)
    after = objective.measure(units, progress)
    weights = objective.weights(before, units)
    initial, final = (float((errors * weights)[units].mean()) for errors in (before, after))
    if not final < initial:
        for layer in quantized_layers(denoiser).values():
            _take_away(layer)
    if not any(table is not None for p in _parts(denoiser) for table in (p.input_scale, p.step_scale)):
        clock.bins = None
    return CorrectionResult(fit.results, initial, final, final < initial)


def fit_steps(y: Tensor, reference: Tensor, row_bins: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Fit `reference ~ scale[b] * y + bias[b]` for each channel and bin.

    First one line is fitted for all bins, then one for each bin. Each leans on what it starts from as if that were
    `PRIOR_ROWS` rows: the common line on the identity, a bin's line on the common one. So a bin without rows has the
    common line, and a channel that does not vary keeps the factor.

    Args:
        y: `[N, ..., O]`.
        reference: likewise.
        row_bins: int64 `[N]`.
        bins: B.

    Returns:
        scale and bias, fp32 `[B, O]`.
    """
    one = torch.ones(y.shape[-1], dtype=torch.float64)
    moments = [_Moments.of(y[row_bins == b], reference[row_bins == b]) for b in range(bins)]
    common = sum(moments, _Moments.of(y[:0], reference[:0])).line(one, 0 * one)
    lines = [own.line(*common) for own in moments]
    scale, bias = (torch.stack(side).float() for side in zip(*lines, strict=True))
    return scale, bias


@dataclass(frozen=True)
class _Moments:
    """Means and centred sums of products of each channel, fp64 `[O]`; they can be added up.

    Source:
        Chan et al. 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """

    rows: int
    count: int
    y: Tensor
    reference: Tensor
    yy: Tensor
    yr: Tensor

    @classmethod
    def of(cls, y: Tensor, reference: Tensor) -> "_Moments":
        flat, other = (t.reshape(-1, t.shape[-1]).double() for t in (y, reference))
        if not len(flat):
            return cls(0, 0, *(flat.new_zeros(flat.shape[-1]) for _ in range(4)))
        mean, target = flat.mean(0), other.mean(0)
        centred = flat - mean
        return cls(len(y), len(flat), mean, target, centred.square().sum(0), (centred * (other - target)).sum(0))

    def __add__(self, other: "_Moments") -> "_Moments":
        count = self.count + other.count
        part = other.count / max(1, count)
        between = self.count * part
        y, reference = other.y - self.y, other.reference - self.reference
        return _Moments(
            self.rows + other.rows,
            count,
            self.y + part * y,
            self.reference + part * reference,
            self.yy + other.yy + between * y.square(),
            self.yr + other.yr + between * y * reference,
        )

    def line(self, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return slope and intercept, which lean on a line given before."""
        trust = self.rows / (self.rows + PRIOR_ROWS)
        varies = self.yy > VARIES**2 * (self.yy + self.count * self.y.square())
        own = torch.where(varies, (self.yr / self.yy.clamp_min(1e-300)).clamp(*SLOPES), scale)
        slope = scale + trust * (own - scale)
        middle = scale * self.y + bias
        return slope, middle + trust * (self.reference - middle) - slope * self.y


@dataclass
class _Fit:
    """The tables of layers, as they are fitted one after the other, on disk."""

    folder: Path
    row_bins: Tensor
    bins: int
    fitted: Tensor
    judges: Tensor
    total: int
    progress: Progress

    def __post_init__(self) -> None:
        self.results: dict[str, Correction] = {}
        self.progress("corrections", 0, self.total)

    def correct(self, name: str, layer: Quantized, y: Tensor, reference: Tensor) -> bool:
        """Give a layer its tables, or not; say whether it has some now.

        Args:
            name: of the layer.
            layer: without tables.
            y: its outputs `[N, ..., O]`.
            reference: those of the float model.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            self._write(file, layer, y, reference)
        result = self.results[name] = Correction(**read_description(file)["result"])
        if result.kept:
            tensor = open_tensors(file)
            layer.correct(tensor("step_scale"), tensor("step_bias"))
        self.progress("corrections", len(self.results), self.total)
        return result.kept

    def _write(self, file: Path, layer: Quantized, y: Tensor, reference: Tensor) -> None:
        scale, bias = fit_steps(y[self.fitted], reference[self.fitted], self.row_bins[self.fitted], self.bins)
        seen, target, rows = y[self.judges].double(), reference[self.judges].double(), self.row_bins[self.judges]
        shape = (len(rows), *[1] * (y.ndim - 2), y.shape[-1])
        corrected = seen * scale[rows].view(shape) + bias[rows].view(shape)
        size = target.norm().clamp_min(1e-150)
        before, after = (float((values - target).norm() / size) for values in (seen, corrected))
        kept = before > 0 and after**2 <= (1 - LEAST_GAIN) * before**2
        if layer.bias is not None:  # the tables stand for it too
            bias = bias + scale * layer.bias.float()
        tables = {"step_scale": scale, "step_bias": bias} if kept else {}
        write_tree_file(file, {"result": asdict(Correction(before, after, kept))}, tables)


@contextmanager
def _side_by_side(
    denoiser: nn.Module,
    reference: Mapping[str, nn.Module],
    clock: StepClock,
    count: int,
    names: Collection[str],
    fit: _Fit,
) -> Iterator[None]:
    """Within a `with` block, let a denoiser be the float model for the first half of its rows, and itself for the rest.

    Args:
        denoiser: quantized.
        reference: float modules by name.
        clock: of the denoiser.
        count: rows of one half.
        names: of layers to correct.
        fit: what corrects them.
    """
    layers = quantized_layers(denoiser)
    within = {module for layer in layers.values() for module in layer.modules()}
    answers: dict[nn.Module, Callable[..., Any]] = {
        layer: _both(reference[name], layer, name, name in names, clock, count, fit) for name, layer in layers.items()
    }
    for name, module in denoiser.named_modules():
        if module not in within and name in reference and not _same(module, reference[name]):
            answers[module] = _either(reference[name], module, count)
    try:
        for module, forward in answers.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in answers:
            vars(module).pop("forward", None)


def _both(
    original: nn.Module, layer: Quantized, name: str, wanted: bool, clock: StepClock, count: int, fit: _Fit
) -> Callable[[Tensor], Tensor]:
    """Return the forward of a quantized layer that is corrected by its first call."""
    axis = 1 if isinstance(layer, nn.Conv2d) else -1

    def forward(x: Tensor) -> Tensor:
        if len(x) != 2 * count:  # something that rows share
            return layer.fake_forward(x)
        if clock.row_bins is not None:
            clock.row_bins = clock.row_bins[-count:]
        exact, own = x.chunk(2)
        target = in_chunks(original, exact, clock, count)
        y = in_chunks(layer.fake_forward, own, clock, count)
        if wanted and name not in fit.results and fit.correct(name, layer, *(t.movedim(axis, -1) for t in (y, target))):
            y = in_chunks(layer.fake_forward, own, clock, count)
        return torch.cat([target, y])

    return forward


def _either(original: nn.Module, module: nn.Module, count: int) -> Callable[..., Any]:
    """Return a forward by the original for the first half of the rows, and by the module itself for the second."""
    itself = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not any(_has_rows(value, count) for value in (*args, *kwargs.values())):
            return itself(module, *args, **kwargs)

        def half(i: int) -> tuple[list[Any], dict[str, Any]]:
            cut = [value.chunk(2)[i] if _has_rows(value, count) else value for value in (*args, *kwargs.values())]
            return cut[: len(args)], dict(zip(kwargs, cut[len(args) :], strict=True))

        (first, first_named), (second, second_named) = half(0), half(1)
        return torch.cat([original(*first, **first_named), itself(module, *second, **second_named)])

    return forward


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == 2 * count


def _same(module: nn.Module, original: nn.Module) -> bool:
    theirs = dict(original.named_parameters())
    return all(torch.equal(value, theirs[name]) for name, value in module.named_parameters())


def _parts(denoiser: nn.Module) -> list[Any]:
    return [part for layer in quantized_layers(denoiser).values() for part in parts_of(layer)]


def _take_away(layer: Quantized) -> None:
    for part in parts_of(layer):
        part.step_scale, part.step_bias = None, None
        part.scheme = replace(part.scheme, corrected=False)
    layer.scheme = replace(layer.scheme, corrected=False)
