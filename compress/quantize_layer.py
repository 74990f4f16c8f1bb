"""One layer, quantized with all of its inputs at hand: transforms, ranges, codes.

A pure function of the float layer, its scheme and its inputs. What turns out to be of no use (smoothing factors that do
not lower the error) is left out of the scheme of the result. Letters: N rows, O output and I input channels of a part,
B step bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.observer import HistogramObserver
from dcomp.calibrate.range_search import search_weight
from dcomp.compress.gptq import input_moments, round_gptq
from dcomp.compress.layers import QuantConv2d, Quantized, QuantLayer, QuantLinear, fake_quant_dynamic
from dcomp.compress.scheme import QScheme
from dcomp.compress.split import float_parts, join_parts, part_slices, parts_of
from dcomp.compress.transforms import choose_smoothing, low_rank_branch, rotate_weight
from dcomp.kernels import qparams
from dcomp.kernels.packing import PackedWeight

Layer = nn.Linear | nn.Conv2d
SMOOTHING_ROWS = 16  # on which factors are compared; the choice is between five candidates, not a fit


class QuantizationError(DcompError):
    """A layer that cannot be quantized, or that does not compute what was promised."""


def quantize_layer(
    layer: Layer, x: Tensor, scheme: QScheme, *, row_bins: Tensor | None = None, bins: int = 1, name: str = ""
) -> Quantized:
    """Make the quantized form of a float layer.

    Args:
        layer: left as it is.
        x: its inputs on N rows of the calibration set, `[N, ..., I]` or `[N, I, H, W]`.
        scheme: what to do.
        row_bins: step bin of each row, int64 `[N]`, for static ranges; None: all rows belong to bin 0.
        bins: B, rows of a static range's table.
        name: of the layer, for errors.

    Returns:
        The layer, in parts when the scheme has boundaries.

    Raises:
        QuantizationError: the inputs are not finite.
        RangeError: the weight is not finite.
    """
    if not torch.isfinite(x).all():
        raise QuantizationError(
            "The input of a layer is not finite",
            where=name,
            remedy="Check the model in float first: `dcomp generate MODEL PROMPT`.",
        )
    if not scheme.boundaries:
        return _Part(layer, x, scheme, name).quantize(row_bins, bins)
    axis = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
    slices = part_slices(x.shape[axis], scheme.boundaries)
    own = replace(scheme, boundaries=())
    parts = [
        _Part(part, x.narrow(axis, s.start, s.stop - s.start), own, name).quantize(row_bins, bins)  # type: ignore[arg-type]
        for part, s in zip(float_parts(layer, scheme.boundaries), slices, strict=True)
    ]
    return join_parts(layer, parts, scheme)


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

    def quantize(self, row_bins: Tensor | None, bins: int) -> QuantLayer:
        weight = to_canonical(self.layer.weight.detach().float())
        sigma = self._smoothing(weight) if self.scheme.smooth else None
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
        weight = self._rotated(weight)
        packed = self._search(weight)
        inputs = self._transformed(self.x, smooth_inv)
        if scheme.rounding != "nearest":
            packed = round_gptq(weight, packed, input_moments(self.layer, inputs))
        static = scheme.input_granularity == "tensor"
        scale, zero = _static_range(inputs, scheme, row_bins, bins) if static else (None, None)
        kind = QuantConv2d if isinstance(self.layer, nn.Conv2d) else QuantLinear
        return kind.from_float(self.layer, packed, scheme, scale, zero, smooth_inv=smooth_inv, low_rank=low_rank)

    def _smoothing(self, weight: Tensor) -> Tensor | None:
        few = self.x[:SMOOTHING_ROWS]  # the first rows are spread over steps and contexts
        return choose_smoothing(self.layer, weight, few, self._input_quantized, self._quantized)

    def _search(self, weight: Tensor) -> PackedWeight:
        scheme = self.scheme
        return search_weight(
            weight.contiguous(), scheme.weight_bits, scheme.group_size, scheme.weight_range, name=self.name
        )

    def _quantized(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight, in its own coordinates; a rotation is its own inverse."""
        return self._rotated(self._search(self._rotated(weight)).dequantize())

    def _rotated(self, weight: Tensor) -> Tensor:
        return rotate_weight(weight, self._block(weight)) if self.scheme.rotate else weight

    def _input_quantized(self, x: Tensor) -> Tensor:
        """Quantize and dequantize inputs, in their own coordinates."""
        values = self._transformed(x, None)
        if self.scheme.input_granularity == "tensor":  # the range of all rows together stands for a static one
            return self._transformed(qparams.fake_quant_sample(values[None])[0], None)
        conv = isinstance(self.layer, nn.Conv2d)
        last = fake_quant_dynamic(values.movedim(1, -1) if conv else values, self.scheme)
        return self._transformed(last.movedim(-1, 1) if conv else last, None)

    def _transformed(self, x: Tensor, smooth_inv: Tensor | None) -> Tensor:
        """Smooth and rotate inputs along their channels."""
        if smooth_inv is None and not self.scheme.rotate:
            return x.float()
        conv = isinstance(self.layer, nn.Conv2d)
        last = x.float().movedim(1, -1) if conv else x.float()
        last = last if smooth_inv is None else last * smooth_inv
        last = qparams.hadamard(last, self._block(last)) if self.scheme.rotate else last
        return last.movedim(-1, 1) if conv else last

    @staticmethod
    def _block(values: Tensor) -> int:
        return qparams.rotation_block(values.shape[-1])


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
        found.append(rotate_weight(own, qparams.rotation_block(own.shape[-1])) if layer.scheme.rotate else own)
    return found
