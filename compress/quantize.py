"""The quantization pass: one run of the denoiser over all rows of the calibration set, layers replaced as it goes.

Every layer that has a scheme waits for its inputs. They arrive from the quantized part of the model before it, for all
rows at once; the layer is quantized with them, and answers in its fake-quantized form. So each layer sees what it will
see when deployed, nothing runs twice, and the float weights of a finished layer are not needed again. Each result is a
file in the work folder: a killed run goes on where it stopped.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.record import CalibrationSet, RecordedCall
from dcomp.calibrate.replay import RowBatch, gather_rows
from dcomp.calibrate.tree_file import replacing
from dcomp.compress.attention import attend_by_kernels
from dcomp.compress.dead_channels import find_remarks
from dcomp.compress.folding import Fold
from dcomp.compress.loader import attach_clock
from dcomp.compress.quantize_layer import Layer, QuantizationError, quantize_layer, require_finite, shared_smoothing
from dcomp.compress.scheme import QScheme
from dcomp.compress.scheme_check import check_schemes, check_weights
from dcomp.compress.split import empty_layer, is_quantized, quantized_layers

__all__ = [
    "INT_TOLERANCE",
    "LayerErrors",
    "QuantizationError",
    "compare_executions",
    "quantize_denoiser",
]

INT_TOLERANCE = 1e-5  # of the largest output: integer against fake-quantized execution
CHECKED_CALLS = 3  # recorded calls on which the two executions are compared
ROWS_BYTES = 4 << 30  # of activations that are alive at once in the pass
CHUNK_ROWS = 16  # rows that a finished layer answers at once


@dataclass(frozen=True)
class LayerErrors:
    """What quantization did to one layer.

    Attributes:
        weight: relative error of the weight, `|W - W^| / |W|`.
        output: relative error of the output on rows of the calibration set, inputs from the quantized model.
        by_step: the same at each timestep of the rows, noisiest first; empty for a layer whose input has other rows.
        int_vs_fake: largest difference of the two executions, as a part of the largest output; None until measured.
        remarks: on channels and ranges without information, as sentences without a full stop.
    """

    weight: float
    output: float
    by_step: tuple[float, ...] = ()
    int_vs_fake: float | None = None
    remarks: tuple[str, ...] = ()


def quantize_denoiser(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    schemes: Mapping[str, QScheme],
    bins: StepBins | None,
    work: Path,
    progress: Progress = silent,
    *,
    rows: int = 256,
    seed: int = 0,
    folds: Sequence[Fold] = (),
) -> dict[str, LayerErrors]:
    """Replace the layers of a denoiser by quantized ones, in place.

    Args:
        denoiser: float model in eval mode.
        calibration: recorded calls of this very model.
        schemes: layer name -> scheme; layers that are not named stay as they are.
        bins: which activation table serves which timestep; None if no scheme has static inputs.
        work: folder of resumable results; must belong to this model, calibration set, schemes and options.
        progress: called with a text, the count done and the total.
        rows: rows of the calibration set; fewer where their activations would need more than `ROWS_BYTES`.
        seed: of the choice of rows.
        folds: tensors whose smoothing factors are to be the same for all layers that read them.

    Returns:
        The errors of each quantized layer, in order of execution.

    Raises:
        SchemeError: layers cannot have their schemes; all are listed.
        WeightError: weights are not finite; all are listed.
        QuantizationError: activations are not finite, or a layer was never called. The denoiser then is as it was.
    """
    layers = {name: _float_layer(denoiser, name) for name in schemes}
    if not layers:
        attach_clock(denoiser, bins)
        return {}
    check_schemes(denoiser, schemes)
    check_weights(denoiser, schemes)
    batch = rows_of_pass(denoiser, calibration, rows, seed)
    folder = work / "layers"
    folder.mkdir(parents=True, exist_ok=True)
    shared = _shared_factors(layers, schemes, folds)
    clock, results = StepClock(bins), _Results(folder, RowSteps(batch.timesteps), len(layers), progress)
    with clock.attach(denoiser), ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.enter_context(_waiting(name, layer, schemes[name], shared.get(name), clock, results))
        denoiser(*batch.args, **batch.kwargs)
    unseen = [name for name in layers if name not in results.layers]
    if unseen:
        raise QuantizationError(
            f"{len(unseen)} layer(s) were never called while the calibration set was replayed",
            where=", ".join(unseen[:3]),
            remedy="Leave them in float with --keep, or calibrate with inputs that use them.",
        )
    for name, result in results.layers.items():
        denoiser.set_submodule(name, result)
        result.execution = "int"
    attach_clock(denoiser, bins)
    attend_by_kernels(denoiser)
    return results.errors


def rows_of_pass(
    denoiser: nn.Module, calibration: CalibrationSet, rows: int, seed: int, *, copies: int = 1
) -> RowBatch:
    """Return the rows that a pass over the whole denoiser works with, at most `rows`; it has each of them so often."""
    count = min(rows, _rows_that_fit(denoiser, next(calibration.calls())) // copies)
    return gather_rows(calibration, count, seed, denoiser=denoiser)


def compare_executions(
    denoiser: nn.Module, calibration: CalibrationSet, progress: Progress = silent
) -> dict[str, float]:
    """Run recorded calls in integers and compare each quantized layer with its fake execution of the same input.

    Returns:
        Largest difference of each layer that was called, as a part of its largest output.

    Raises:
        QuantizationError: one is above `INT_TOLERANCE`.
    """
    worst: dict[str, float] = {}

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            fake = layer.fake_forward(args[0])
            peak = fake.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            difference = ((y - fake).abs().max() / peak).nan_to_num(nan=math.inf)  # `max` would overlook NaN
            worst[name] = max(worst.get(name, 0.0), float(difference))

        return hook

    total = len(calibration)
    chosen = {round(i * (total - 1) / max(1, CHECKED_CALLS - 1)) for i in range(min(CHECKED_CALLS, total))}
    with ExitStack() as stack:
        for name, layer in quantized_layers(denoiser).items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        for index, call in enumerate(calibration.calls()):
            if index in chosen:
                progress("integers against floats", index, total)
                with torch.no_grad():
                    denoiser(*call.args, **call.kwargs)
    progress("integers against floats", total, total)
    for name, difference in worst.items():
        if not difference <= INT_TOLERANCE:
            raise QuantizationError(
                f"Integer and fake-quantized execution differ by {difference:.1e} of the largest output",
                where=name,
                remedy="Run `dcomp doctor`; report this with its output, and leave the layer in float with --keep.",
            )
    return worst


class RowSteps:
    """Which rows belong to which timestep."""

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps, self.count = timesteps, len(timesteps)
        descending, self._index = torch.unique(-timesteps.double(), return_inverse=True)
        self._steps = len(descending)

    def relative(self, squares: Tensor, norms: Tensor) -> tuple[float, ...]:
        """Return the relative error at each step, noisiest first, of squared errors and norms by row."""
        zeros = torch.zeros(self._steps, dtype=torch.float64)
        by_step = zeros.index_add(0, self._index, squares) / zeros.index_add(0, self._index, norms).clamp_min(1e-300)
        return tuple(by_step.sqrt().tolist())


class _Results:
    """Finished layers in order of execution, on disk and in memory."""

    def __init__(self, folder: Path, steps: RowSteps, total: int, progress: Progress) -> None:
        self.layers: dict[str, Any] = {}
        self.errors: dict[str, LayerErrors] = {}
        self.steps = steps
        self._folder, self._total, self._progress = folder, total, progress
        progress("layers", 0, total)

    def read(self, name: str, layer: Layer, bins: int) -> Any:
        """Return the layer's result of an earlier run, or None."""
        file = self._folder / f"{name}.safetensors"
        if not file.exists():
            return None
        with safe_open(file, "pt") as stored:
            about = json.loads(stored.metadata()["dcomp"])
        result = empty_layer(layer, QScheme.from_dict(about["scheme"]), bins)
        result.load_state_dict(load_file(file), assign=True)
        self.errors[name] = LayerErrors(
            about["weight"], about["output"], tuple(about["by_step"]), remarks=tuple(about["remarks"])
        )
        return result

    def write(self, name: str, result: Any, errors: LayerErrors) -> None:
        """Keep a new result."""
        self.errors[name] = errors
        about = {
            "scheme": result.scheme.to_dict(),
            "weight": errors.weight,
            "output": errors.output,
            "by_step": errors.by_step,
            "remarks": errors.remarks,
        }
        tensors = {key: value.detach().contiguous() for key, value in result.state_dict().items()}
        with replacing(self._folder / f"{name}.safetensors") as unfinished:
            save_file(tensors, unfinished, metadata={"dcomp": json.dumps(about)})

    def finish(self, name: str, result: Any) -> None:
        """Take a layer as done."""
        self.layers[name] = result
        self._progress("layers", len(self.layers), self._total)


@contextmanager
def _waiting(
    name: str, layer: Layer, scheme: QScheme, shared: "_SharedFactors | None", clock: StepClock, results: _Results
) -> Iterator[None]:
    """Let a float layer be quantized by its first call within a `with` block, and answer as its quantized form."""
    bins = clock.bins.count if clock.bins else 1

    rows = results.steps.count

    def arrive(x: Tensor) -> Tensor:
        row_bins = clock.row_bins if clock.row_bins is not None and len(clock.row_bins) == len(x) else None
        timesteps = results.steps.timesteps
        require_finite(x, "input", name, timesteps)  # before factors are chosen by it
        sigma = shared.of(x) if shared else None
        own = replace(scheme, smooth=scheme.smooth and (shared is None or sigma is not None))
        result = quantize_layer(
            layer, x, own, row_bins=row_bins, bins=bins, name=name, timesteps=timesteps, sigma=sigma
        ).eval()
        result.clock, result.execution = clock, "fake"
        y = in_chunks(result, x, clock, rows)
        reference = in_chunks(partial(_float_forward, layer), x, clock, rows)
        require_finite(y, "output", name, timesteps)
        errors = _errors(layer, result, y, reference, results.steps)
        results.write(name, result, replace(errors, remarks=find_remarks(layer, x, scheme, row_bins)))
        results.finish(name, result)
        return y

    def forward(x: Tensor) -> Tensor:
        result = results.layers.get(name)
        if result is None:
            result = results.read(name, layer, bins)
            if result is None:
                return arrive(x)
            result.eval()
            result.clock, result.execution = clock, "fake"
            results.finish(name, result)
        return in_chunks(result, x, clock, rows)

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del layer.forward


class _SharedFactors:
    """Smoothing factors of layers that read one tensor, chosen by the first that asks.

    After a restart that is another layer, but the tensor and the float weights are the same, and so are the factors.
    """

    def __init__(self, layers: Sequence[Layer], schemes: Sequence[QScheme]) -> None:
        self._layers, self._schemes = layers, schemes
        self._found: Tensor | None = None
        self._asked = False

    def of(self, x: Tensor) -> Tensor | None:
        """Return sigma for the tensor `x`; None where no factors help."""
        if not self._asked:
            self._found, self._asked = shared_smoothing(self._layers, x, self._schemes), True
        return self._found


def _shared_factors(
    layers: Mapping[str, Layer], schemes: Mapping[str, QScheme], folds: Sequence[Fold]
) -> dict[str, _SharedFactors]:
    found: dict[str, _SharedFactors] = {}
    for fold in folds:
        shared = _SharedFactors([layers[name] for name in fold.layers], [schemes[name] for name in fold.layers])
        found |= dict.fromkeys(fold.layers, shared)
    return found


def _float_forward(layer: Layer, x: Tensor) -> Tensor:
    y: Tensor = type(layer).forward(layer, x)  # type: ignore[arg-type]
    return y


def _errors(layer: Layer, result: Any, y: Tensor, reference: Tensor, steps: RowSteps) -> LayerErrors:
    weight = layer.weight.detach().float()
    squares, norms = (
        torch.linalg.vector_norm(t.flatten(1), dim=1).double().square() for t in (y - reference, reference)
    )
    return LayerErrors(
        weight=float((result.dequantize() - weight).norm() / weight.norm().clamp_min(1e-30)),
        output=float((squares.sum() / norms.sum().clamp_min(1e-300)).sqrt()),
        by_step=steps.relative(squares, norms) if len(y) == steps.count else (),
    )


def in_chunks(layer: Callable[[Tensor], Tensor], x: Tensor, clock: StepClock, rows: int) -> Tensor:
    """Apply a layer to a few rows at a time, which is faster than to all; the clock's rows follow.

    Args:
        layer: the layer.
        x: its input; one whose first axis does not count rows is taken whole.
        clock: with the bins of all rows.
        rows: their number.
    """
    if len(x) != rows:
        return layer(x)
    row_bins, parts = clock.row_bins, []
    try:
        for start in range(0, rows, CHUNK_ROWS):
            clock.row_bins = None if row_bins is None else row_bins[start : start + CHUNK_ROWS]
            parts.append(layer(x[start : start + CHUNK_ROWS]))
    finally:
        clock.row_bins = row_bins
    return torch.cat(parts)


def _rows_that_fit(denoiser: nn.Module, call: RecordedCall) -> int:
    """How many rows may run at once; the largest layer's input and output stand for all that is alive then."""
    largest = 1

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = [t for t in (*args, output) if isinstance(t, Tensor) and t.ndim > 1]
        largest = max(largest, sum(t[0].numel() for t in tensors if len(t) == len(call.output)))

    with ExitStack() as stack, torch.no_grad():
        for layer in denoiser.modules():
            if isinstance(layer, Layer):
                stack.callback(layer.register_forward_hook(hook).remove)
        denoiser(*call.args, **call.kwargs)
    return max(8, ROWS_BYTES // (4 * 4 * largest))


def _float_layer(denoiser: nn.Module, name: str) -> Layer:
    try:
        layer = denoiser.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(
            "The denoiser has no such layer", where=name, remedy="Leave it out of the schemes."
        ) from error
    if not isinstance(layer, Layer) or is_quantized(layer):
        raise QuantizationError(
            f"{type(layer).__name__} is no float linear or convolution layer",
            where=name,
            remedy="Leave it out of the schemes, or start from the original model.",
        )
    return layer
