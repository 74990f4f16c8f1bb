"""One layer, quantized with all of its inputs at hand: transforms, ranges, codes.

A pure function of the float layer, its scheme and its inputs. What turns out to be of no use (smoothing factors that do
not lower the error) is left out of the scheme of the result. Letters: N rows, O output and I input channels of a part,
B step bins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.observer import HistogramObserver
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.gptq import round_gptq
from dcomp.compress.layers import QuantConv2d, QuantLayer, QuantLinear, fake_quant_dynamic
from dcomp.compress.moments import input_moments
from dcomp.compress.quantized import Quantized
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import float_parts, join_parts, part_slices, parts_of
from dcomp.compress.transforms import (
    LEAST_GAIN,
    Reader,
    carried_weight,
    choose_smoothing,
    low_rank_branch,
    principal_directions,
    rotate_weight,
)
from dcomp.kernels import qparams
from dcomp.kernels.packing import PackedWeight

Layer = nn.Linear | nn.Conv2d
SMOOTHING_ROWS = 16  # on which factors are compared; the choice is between five candidates, not a fit


class QuantizationError(DcompError):
    """A layer that cannot be quantized, or that does not compute what was promised."""


def quantize_layer(
    layer: Layer,
    x: Tensor,
    scheme: QScheme,
    *,
    row_bins: Tensor | None = None,
    bins: int = 1,
    name: str = "",
    timesteps: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Quantized:
    """Make the quantized form of a float layer.

    Args:
        layer: left as it is.
        x: its inputs on N rows of the calibration set, `[N, ..., I]` or `[N, I, H, W]`.
        scheme: what to do.
        row_bins: step bin of each row, int64 `[N]`, for static ranges; None: all rows belong to bin 0.
        bins: B, rows of a static range's table.
        name: of the layer, for errors.
        timesteps: of the rows, `[N]`, for errors.
        sigma: smoothing factors, fp32 `[I]`; None: a layer that may be smoothed chooses its own. One with boundaries
            takes none.

    Returns:
        The layer, in parts when the scheme has boundaries.

    Raises:
        QuantizationError: the inputs are not finite.
        RangeError: the weight is not finite.
    """
    require_finite(x, "input", name, timesteps)
    parts = _parts(layer, x, scheme, name)
    rotate, sigmas = _choose_transforms(parts, scheme, sigma)
    layers = [
        replace(part, scheme=replace(part.scheme, rotate=rotate)).quantize(row_bins, bins, own)
        for part, own in zip(parts, sigmas, strict=True)
    ]
    return join_parts(layer, layers, replace(scheme, rotate=rotate))


def shared_smoothing(layers: Sequence[Layer], x: Tensor, schemes: Sequence[QScheme]) -> Tensor | None:
    """Choose smoothing factors for all layers that read a tensor together.

    Args:
        layers: in float.
        x: what they read on N rows of the calibration set.
        schemes: of the layers, without boundaries.

    Returns:
        sigma, fp32 `[I]`; None where no factors help.
    """
    few = x[:SMOOTHING_ROWS]  # the first rows are spread over steps and contexts
    parts = [_Part(layer, few, scheme, "") for layer, scheme in zip(layers, schemes, strict=True)]
    return choose_smoothing([part.reader(rotate=False) for part in parts], few)


def _parts(layer: Layer, x: Tensor, scheme: QScheme, name: str) -> list["_Part"]:
    if not scheme.boundaries:
        return [_Part(layer, x, scheme, name)]
    axis = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
    slices = part_slices(x.shape[axis], scheme.boundaries)
    own = replace(scheme, boundaries=())
    return [
        _Part(part, x.narrow(axis, s.start, s.stop - s.start), own, name)  # type: ignore[arg-type]
        for part, s in zip(float_parts(layer, scheme.boundaries), slices, strict=True)
    ]


def _choose_transforms(
    parts: Sequence["_Part"], scheme: QScheme, sigma: Tensor | None
) -> tuple[bool, list[Tensor | None]]:
    """Return whether a layer is rotated, and the smoothing factors of its parts: what gives the least output error.

    One answer about rotation serves all parts, because one scheme describes them.
    """
    unsmoothed: list[Tensor | None] = [None] * len(parts)
    smoothed, given = unsmoothed, sigma is not None
    if given:
        smoothed = [sigma]
    elif scheme.smooth:
        smoothed = [shared_smoothing([part.layer], part.x, [part.scheme]) for part in parts]
    if not scheme.rotate:
        return False, smoothed

    def error(rotate: bool, sigmas: Sequence[Tensor | None]) -> float:
        few = [part.x[:SMOOTHING_ROWS].float() for part in parts]
        return sum(p.reader(rotate).error(x, s) for p, x, s in zip(parts, few, sigmas, strict=True))

    plain = error(False, smoothed)
    turned = [(error(True, sigmas), sigmas) for sigmas in ([smoothed] if given else [smoothed, unsmoothed])]
    least, sigmas = min(turned, key=lambda pair: pair[0])
    return (True, sigmas) if least < (1 - LEAST_GAIN) * plain else (False, smoothed)


def require_finite(values: Tensor, what: str, name: str, timesteps: Tensor | None = None) -> None:
    """Refuse the input or the output of a layer that holds NaN or infinity, and say how much of it, and where first.

    Args:
        values: with N rows along the first axis.
        what: "input" or "output".
        name: of the layer.
        timesteps: of the rows, `[N]`; a tensor with other rows has none.

    Raises:
        QuantizationError: it does.
    """
    good = torch.isfinite(values)
    if bool(good.all()):
        return
    rows = (~good).reshape(len(good), -1).any(1).nonzero().flatten().tolist()
    bad = values.numel() - int(good.sum())
    known = timesteps is not None and len(timesteps) == len(values)
    when = f", at timestep {float(timesteps[rows[0]]):g}" if known and timesteps is not None else ""
    raise QuantizationError(
        f"The {what} of a layer is not finite: {bad} of {values.numel()} values, in {len(rows)} of {len(values)} "
        f"calibration rows, the first of them row {rows[0]}{when}",
        where=name,
        remedy="Check the model in float first: `dcomp generate MODEL PROMPT`.",
    )


def to_canonical(weight: Tensor) -> Tensor:
    """`[O, I]` stays, `[O, I, Kh, Kw]` becomes `[O, Kh, Kw, I]`."""
    return weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight


@dataclass(frozen=True)
class _Part:
    """A float layer over the input channels of one part, with their inputs."""

    layer: Layer
    x: Tensor
    scheme: QScheme
    name: str

    def quantize(self, row_bins: Tensor | None, bins: int, sigma: Tensor | None) -> QuantLayer:
        weight = to_canonical(self.layer.weight.detach().float())
        scheme = replace(self.scheme, smooth=sigma is not None)
        weight = weight if sigma is None else weight * sigma
        smooth_inv = None if sigma is None else 1 / sigma
        low_rank = None
        if scheme.rank:
            down, up, _ = low_rank_branch(weight, scheme.rank, self._quantized)
            # The branch reads the raw input, and the residual is taken with the factors as they are stored.
            stored = (down.float() if smooth_inv is None else down.float() * smooth_inv).half()
            read = stored.float() if sigma is None else stored.float() * sigma
            weight = weight - (up.float() @ read.flatten(1)).view_as(weight)
            low_rank = (stored, up)
        inputs, floats = self._channels_last(self.x.float()), None
        inputs = inputs if smooth_inv is None else inputs * smooth_inv
        if scheme.directions:
            directions = principal_directions(inputs, scheme.directions)
            inputs, _ = qparams.take_out(inputs, directions)
            codes, scales, weight = carried_weight(weight, directions)
            floats = (directions, codes, scales)
        weight, inputs = self._rotated(weight), self._channels_first(self._rotated(inputs))
        packed = self._search(weight) if scheme.rounding == "nearest" else self._rounded(weight, inputs)
        static = scheme.input_granularity == "tensor"
        scale, zero = _static_range(inputs, scheme, row_bins, bins) if static else (None, None)
        kind = QuantConv2d if isinstance(self.layer, nn.Conv2d) else QuantLinear
        return kind.from_float(
            self.layer, packed, scheme, scale, zero, smooth_inv=smooth_inv, directions=floats, low_rank=low_rank
        )

    def _rounded(self, weight: Tensor, inputs: Tensor) -> PackedWeight:
        """Quantize a weight by what it makes of the layer's inputs, both transformed."""
        read = inputs
        if self.scheme.input_bits == 4:
            read = self._channels_first(fake_quant_dynamic(self._channels_last(inputs), self.scheme))
        return round_gptq(weight, self._search(weight), input_moments(self.layer, read).shrunk())

    def reader(self, rotate: bool) -> Reader:
        """Return the layer, rotated or not, as the choice of transforms sees it."""
        weight = to_canonical(self.layer.weight.detach().float())
        own = replace(self, scheme=replace(self.scheme, rotate=rotate))
        return Reader(self.layer, weight, own._input_quantized, own._quantized)

    def _search(self, weight: Tensor) -> PackedWeight:
        scheme = self.scheme
        return search_weight(
            weight.contiguous(), scheme.weight_bits, scheme.group_size, scheme.weight_range, name=self.name
        )

    def _quantized(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight, in its own coordinates; a rotation is its own inverse."""
        return self._rotated(self._search(self._rotated(weight)).dequantize())

    def _rotated(self, values: Tensor) -> Tensor:
        """Rotate a weight, or inputs with their channels last."""
        return qparams.hadamard(values, qparams.rotation_block(values.shape[-1])) if self.scheme.rotate else values

    def _input_quantized(self, x: Tensor) -> Tensor:
        """Quantize and dequantize inputs, in their own coordinates."""
        rest, kept = self._channels_last(x.float()), None
        if self.scheme.directions:
            directions = principal_directions(rest, self.scheme.directions)
            rest, along = qparams.take_out(rest, directions)
            kept = along @ directions.float()
        values = self._rotated(rest)
        if self.scheme.input_granularity == "tensor":  # the range of all rows together stands for a static one
            values = qparams.fake_quant_sample(values[None])[0]
        else:
            values = fake_quant_dynamic(values, self.scheme)
        values = self._rotated(values)
        return self._channels_first(values if kept is None else values + kept)

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else x

    def _channels_first(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if isinstance(self.layer, nn.Conv2d) else x


def _static_range(x: Tensor, scheme: QScheme, row_bins: Tensor | None, bins: int) -> tuple[Tensor, Tensor]:
    """Return `(scale fp32 [B], zero uint8 [B])`; a bin that no row fell into shares the nearest one's statistics."""
    observers = [HistogramObserver() for _ in range(bins)]
    for step_bin, rows in _by_bin(x, row_bins):
        observers[step_bin].update(rows)
    seen = [i for i, observer in enumerate(observers) if observer.count]
    filled = [observers[min(seen, key=lambda s: abs(s - i))] for i in range(bins)]
    return HistogramObserver.tables(filled, scheme.input_range)


def _by_bin(x: Tensor, row_bins: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    if row_bins is None:
        yield 0, x
        return
    for step_bin in row_bins.unique().tolist():
        yield step_bin, x[row_bins == step_bin]


def transformed_weight(weight: Tensor, layer: Quantized) -> list[Tensor]:
    """Return the float weight of each part of a quantized layer in the coordinates of its codes, `[O, *taps, I]`.

    Args:
        weight: of the float layer, in torch's layout.
        layer: its quantized form.
    """
    canonical, found = to_canonical(weight.float()), []
    for part, channels in zip(parts_of(layer), part_slices(canonical.shape[-1], layer.scheme.boundaries), strict=True):
        own = canonical[..., channels]
        if part.lr_down is not None and part.lr_up is not None:
            own = own - (part.lr_up.float() @ part.lr_down.float().flatten(1)).view_as(own)
        own = own if part.smooth_inv is None else own / part.smooth_inv
        own = own if part.directions is None else carried_weight(own, part.directions)[2]
        found.append(rotate_weight(own, qparams.rotation_block(own.shape[-1])) if layer.scheme.rotate else own)
    return found
