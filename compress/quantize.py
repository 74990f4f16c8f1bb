"""The quantization pass: float layers in, packed integer layers out, in an order that never has to be undone.

1. Weights to codes, layer by layer; each result is a file in the work folder, so a killed run goes on where it stopped.
2. Input ranges of statically quantized layers, observed on the calibration set with the quantized weights in place.
3. Layers replaced; each one's integer result compared with its fake-quantized one and with the float layer's.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.observer import HistogramObserver
from dcomp.calibrate.range_search import search_weight
from dcomp.calibrate.record import CalibrationSet
from dcomp.calibrate.tree_file import replacing
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear
from dcomp.compress.loader import attach_clock
from dcomp.compress.scheme import QScheme
from dcomp.kernels.packing import PackedWeight

INT_TOLERANCE = 1e-5  # of the largest output: integer against fake-quantized execution
SNAPSHOT_SECONDS = 15.0
ERROR_CALLS = 4  # recorded calls on which layer errors are measured

Progress = Callable[[str, int, int], None]
Layer = nn.Linear | nn.Conv2d


class QuantizationError(DcompError):
    """A layer that cannot be quantized, or that does not compute what was promised."""


@dataclass(frozen=True)
class LayerErrors:
    """What quantization did to one layer.

    Attributes:
        weight: relative error of the weight, `|W - W^| / |W|`.
        output: relative error of the output on recorded inputs, integer against float layer; None if never called.
        int_vs_fake: largest difference of the two executions, as a part of the largest output; None likewise.
    """

    weight: float
    output: float | None
    int_vs_fake: float | None


def quantize_denoiser(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    schemes: Mapping[str, QScheme],
    bins: StepBins | None,
    work: Path,
    progress: Progress = lambda text, done, total: None,
) -> dict[str, LayerErrors]:
    """Replace the layers of a denoiser by quantized ones, in place.

    Args:
        denoiser: float model in eval mode.
        calibration: recorded calls of this very model.
        schemes: layer name -> scheme; layers that are not named stay as they are.
        bins: which activation table serves which timestep; None if no scheme has static inputs.
        work: folder of resumable results; must belong to this model, calibration set and schemes.
        progress: called with a text, the count done and the total.

    Returns:
        The errors of each quantized layer.

    Raises:
        QuantizationError: weights or activations are not finite, or integer and fake execution disagree.
    """
    layers = {name: _float_layer(denoiser, name) for name in schemes}
    packed, weight_errors = _pack_weights(layers, schemes, work / "weights", progress)
    originals = {name: layer.weight for name, layer in layers.items()}
    static = [name for name, scheme in schemes.items() if scheme.input_granularity == "tensor"]
    clock = StepClock(bins)
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    with clock.attach(denoiser):
        for name, layer in layers.items():
            layer.weight = nn.Parameter(_to_torch(packed[name].dequantize()).to(originals[name]), requires_grad=False)
        if bins is not None:
            tables = _observe(denoiser, calibration, {n: schemes[n] for n in static}, clock, bins, work, progress)
    for name, layer in layers.items():
        layer.weight = originals[name]
        scale, zero = tables.get(name, (None, None))
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        replacement = kind.from_float(layer, packed[name], schemes[name], input_scale=scale, input_zero=zero)
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, replacement.eval())
    attach_clock(denoiser, bins)
    output_errors = _compare(denoiser, layers, calibration, progress)
    return {name: LayerErrors(weight_errors[name], *output_errors.get(name, (None, None))) for name in schemes}


def _float_layer(denoiser: nn.Module, name: str) -> Layer:
    layer = denoiser.get_submodule(name)
    if not isinstance(layer, Layer) or isinstance(layer, QuantLayer):
        raise QuantizationError(
            f"{type(layer).__name__} is no float linear or convolution layer",
            where=name,
            remedy="Leave it out of the schemes, or start from the original model.",
        )
    return layer


def _to_canonical(weight: Tensor) -> Tensor:
    """`[O, I]` stays, `[O, I, Kh, Kw]` becomes `[O, Kh, Kw, I]`."""
    return weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight


def _to_torch(weight: Tensor) -> Tensor:
    return weight.permute(0, 3, 1, 2) if weight.ndim == 4 else weight


def _pack_weights(
    layers: Mapping[str, Layer], schemes: Mapping[str, QScheme], folder: Path, progress: Progress
) -> tuple[dict[str, PackedWeight], dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    packed, errors = {}, {}
    for done, (name, layer) in enumerate(layers.items()):
        progress("weights", done, len(layers))
        scheme = schemes[name]
        weight = _to_canonical(layer.weight.detach().float())
        file = folder / f"{name}.safetensors"
        if file.exists():
            stored = load_file(file)
            packed[name] = PackedWeight(
                stored["qweight"],
                stored["scale"],
                stored.get("multiplier"),
                bits=scheme.weight_bits,
                group_size=scheme.group_size,
                in_channels=weight.shape[-1],
            )
        else:
            packed[name] = search_weight(weight, scheme.weight_bits, scheme.group_size, scheme.weight_range, name=name)
            buffers = {key: getattr(packed[name], key) for key in ("qweight", "scale", "multiplier")}
            _save_atomically({key: value.contiguous() for key, value in buffers.items() if value is not None}, file)
        errors[name] = _relative(packed[name].dequantize(), weight)
    progress("weights", len(layers), len(layers))
    return packed, errors


def _observe(
    denoiser: nn.Module,
    calibration: CalibrationSet,
    static: Mapping[str, QScheme],
    clock: StepClock,
    bins: StepBins,
    work: Path,
    progress: Progress,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `(scale fp32 [B], zero uint8 [B])` of each statically quantized layer."""
    if not static:
        return {}
    observers = {name: [HistogramObserver() for _ in range(bins.count)] for name in static}
    file = work / "ranges.safetensors"
    finished = _restore(observers, file)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for step_bin, rows in _rows_by_bin(args[0], clock):
                try:
                    observers[name][step_bin].update(rows)
                except DcompError as error:
                    raise QuantizationError(
                        f"The input of a layer is not finite at timestep {clock.timestep:g}",
                        where=name,
                        remedy="Check the model in float first: `dcomp generate MODEL PROMPT`.",
                    ) from error

        return hook

    hooks = [denoiser.get_submodule(name).register_forward_pre_hook(watch(name)) for name in static]
    saved = time.monotonic()
    try:
        total = len(calibration)
        for done, call in enumerate(calibration.calls()):
            if done < finished:
                continue
            progress("activation ranges", done, total)
            with torch.no_grad():
                denoiser(*call.args, **call.kwargs)
            if time.monotonic() - saved > SNAPSHOT_SECONDS or done + 1 == total:
                _snapshot(observers, done + 1, file)
                saved = time.monotonic()
        progress("activation ranges", total, total)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: HistogramObserver.tables(_fill_gaps(observers[name], name), static[name].input_range) for name in static
    }


def _rows_by_bin(x: Tensor, clock: StepClock) -> list[tuple[int, Tensor]]:
    if clock.row_bins is None or len(clock.row_bins) != len(x):
        return [(clock.bin, x)]
    return [(int(b), x[clock.row_bins == b]) for b in clock.row_bins.unique()]


def _fill_gaps(observers: list[HistogramObserver], name: str) -> list[HistogramObserver]:
    """Let a bin that no recorded call fell into share the nearest one's statistics."""
    seen = [i for i, observer in enumerate(observers) if observer.count]
    if not seen:
        raise QuantizationError(
            "A layer was never called while the calibration set was replayed",
            where=name,
            remedy="Leave it in float with --keep, or calibrate with inputs that use it.",
        )
    return [observers[min(seen, key=lambda s: abs(s - i))] for i in range(len(observers))]


def _snapshot(observers: Mapping[str, list[HistogramObserver]], finished: int, file: Path) -> None:
    tensors = {"finished": torch.tensor(finished)}
    for name, row in observers.items():
        for i, observer in enumerate(row):
            tensors |= {f"{name}:{i}:{key}": value for key, value in observer.state_dict().items()}
    _save_atomically(tensors, file)


def _restore(observers: Mapping[str, list[HistogramObserver]], file: Path) -> int:
    if not file.exists():
        return 0
    tensors = load_file(file)
    states: dict[tuple[str, int], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key != "finished":
            name, position, field = key.rsplit(":", 2)
            states.setdefault((name, int(position)), {})[field] = value
    for (name, step_bin), state in states.items():
        observers[name][step_bin].load_state_dict(state)
    return int(tensors["finished"])


def _compare(
    denoiser: nn.Module, originals: Mapping[str, Layer], calibration: CalibrationSet, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Run recorded calls through the quantized denoiser and compare each layer with its fake and its float form.

    The denoiser itself runs in integers, so layers see the inputs that they will see when deployed.
    """
    squares: dict[str, Tensor] = {}
    worst: dict[str, float] = {}

    def watch(name: str) -> Callable[[QuantLayer, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: QuantLayer, args: tuple[Tensor, ...], y: Tensor) -> None:
            fake = layer.fake_forward(args[0])
            reference = originals[name](args[0])
            peak = fake.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            worst[name] = max(worst.get(name, 0.0), ((y - fake).abs().max() / peak).item())
            energy = torch.stack(((y - reference).double().square().sum(), reference.double().square().sum()))
            squares[name] = squares.get(name, torch.zeros(2, dtype=torch.float64)) + energy

        return hook

    hooks = [denoiser.get_submodule(name).register_forward_hook(watch(name)) for name in originals]
    total = len(calibration)
    chosen = {round(i * (total - 1) / max(1, ERROR_CALLS - 1)) for i in range(min(ERROR_CALLS, total))}
    try:
        for index, call in enumerate(calibration.calls()):
            if index in chosen:
                progress("layer errors", index, total)
                with torch.no_grad():
                    denoiser(*call.args, **call.kwargs)
        progress("layer errors", total, total)
    finally:
        for hook in hooks:
            hook.remove()
    for name, difference in worst.items():
        if not difference <= INT_TOLERANCE:
            raise QuantizationError(
                f"Integer and fake-quantized execution differ by {difference:.1e} of the largest output",
                where=name,
                remedy="Run `dcomp doctor`; report this with its output, and leave the layer in float with --keep.",
            )
    return {name: ((s[0] / s[1].clamp_min(1e-300)).sqrt().item(), worst[name]) for name, s in squares.items()}


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _save_atomically(tensors: dict[str, Tensor], file: Path) -> None:
    with replacing(file) as unfinished:
        save_file(tensors, unfinished)
