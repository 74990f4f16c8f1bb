"""Running statistics of a layer's input, and the static uint8 range that they call for.

A histogram of bins `k = trunc(x / width)` where the width is a power of two that doubles when a larger value arrives.
Bins of one width nest in those of the next, so the counts depend on the values alone: any order, split or merge of the
same data gives the same state. Nothing here keeps or changes a tensor; a tensor that is not finite is refused.

Notation: `q = clamp(rint(x / scale) + zero, 0, 255)`; `lo <= 0 <= hi` are the ends of the range, so real 0 is exact.
"""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from dcomp import DcompError

RangeMethod = Literal["mse", "minmax"]

BINS = 2048  # index k + BINS / 2; the bin of zero reaches from -width to width, and index 0 stays empty
LEVELS = 255
SMALLEST_SCALE = 2.0**-100  # its inverse, which kernels multiply by, is still finite in float32

_HALF = BINS // 2
_SMALLEST_EXPONENT = -90
_CHUNK = 1 << 16  # elements: the bin numbers of a chunk stay in the second-level cache
_K = torch.arange(BINS) - _HALF


class ObserverError(DcompError):
    """A tensor whose range cannot be measured, or statistics that are missing or damaged."""


class HistogramObserver:
    """Histogram of everything passed to `update`, with exact extremes; starts empty.

    Attributes:
        count: number of elements seen.
        minimum: smallest element seen, `inf` at the start.
        maximum: largest element seen, `-inf` at the start.
    """

    def __init__(self) -> None:
        self.minimum, self.maximum = math.inf, -math.inf
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._exponent = _SMALLEST_EXPONENT  # all magnitudes are below 2 ** exponent = width * BINS / 2

    @property
    def count(self) -> int:
        """Number of elements seen."""
        return int(self._counts.sum())

    def update(self, x: Tensor) -> None:
        """Count the elements of a tensor of any shape and dtype, as float32.

        Raises:
            ObserverError: an element is NaN or infinite; the statistics are unchanged.
        """
        if x.numel() == 0:
            return
        flat = _flatten(x.detach())
        if flat.dtype not in (torch.float16, torch.bfloat16):
            flat = flat.float()
        lowest, highest = (float(end) for end in torch.aminmax(flat))
        if not max(abs(lowest), abs(highest)) <= torch.finfo(torch.float32).max:
            raise ObserverError(
                f"A tensor of shape {tuple(x.shape)} holds NaN or infinite values",
                remedy="Run the model in float32 and find the first layer whose output is not finite.",
            )
        if lowest or highest:  # zeros need no width; frexp would give them that of 1
            self._widen(math.frexp(max(abs(lowest), abs(highest)))[1])
        self.minimum, self.maximum = min(self.minimum, lowest), max(self.maximum, highest)
        # A product with a power of two and a conversion that truncates are exact. int16 holds every bin number, and
        # with this chunk size an update takes a quarter of the time of torch.histc.
        inverse_width = 2.0 ** (_HALF.bit_length() - 1 - self._exponent)
        counts = torch.zeros(BINS, dtype=torch.int64, device=x.device)
        for chunk in flat.split(_CHUNK):
            index = (chunk.float() * inverse_width).to(torch.int16).add_(_HALF)
            counts += torch.bincount(index, minlength=BINS)
        self._counts += counts.cpu()

    def merge(self, other: Self) -> None:
        """Add another observer's elements to this one, as if this one had seen them."""
        self._widen(other._exponent)
        self._counts += _rebin(other._counts, self._exponent - other._exponent)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the whole state into three small tensors."""
        return {
            "counts": self._counts.clone(),
            "extremes": torch.tensor([self.minimum, self.maximum], dtype=torch.float64),
            "exponent": torch.tensor(self._exponent),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the state by one from `state_dict`.

        Raises:
            ObserverError: a tensor is missing or has another shape or dtype.
        """
        wanted = {key: (value.shape, value.dtype) for key, value in self.state_dict().items()}
        if {key: (value.shape, value.dtype) for key, value in state.items()} != wanted:
            raise ObserverError(
                "Stored statistics of a layer input are damaged", remedy="Start afresh: remove the work folder."
            )
        self._counts = state["counts"].clone()
        self.minimum, self.maximum = state["extremes"].tolist()
        self._exponent = int(state["exponent"])

    def qparams(self, method: RangeMethod = "mse") -> tuple[Tensor, int]:
        """Choose `(scale, zero)` for uint8 codes: a float32 scalar and an integer in 0..255; see `tables`."""
        scale, zero = self.tables([self], method)
        return scale[0], int(zero[0])

    @staticmethod
    def tables(observers: Sequence["HistogramObserver"], method: RangeMethod = "mse") -> tuple[Tensor, Tensor]:
        """Choose `(scale, zero)` of many observers at once.

        `minmax` takes the extremes, widened to hold 0. `mse` moves both ends inwards, each by itself, to the smallest
        expected `|x - x^|^2`, and keeps the extremes where that gains less than 1 %. If only zeros were seen, the
        scale is 1 and zero 0; a constant is met exactly.

        Returns:
            scale (float32) and zero (uint8), one element per observer.

        Raises:
            ObserverError: an observer has seen nothing.

        Source:
            mse over both ends: Banner et al. 2019, Post training 4-bit quantization (section 3), with the error taken
            from the histogram instead of a fitted density.
        """
        if any(not observer.count for observer in observers):
            raise ObserverError(
                "A layer input was never observed", remedy="Use a calibration set that reaches every layer."
            )
        scales, zeros = [], []
        for start in range(0, len(observers), 64):
            part = observers[start : start + 64]
            width = torch.tensor([2.0 ** (o._exponent - _HALF.bit_length() + 1) for o in part], dtype=torch.float64)
            lo = torch.tensor([o.minimum for o in part], dtype=torch.float64) / width
            hi = torch.tensor([o.maximum for o in part], dtype=torch.float64) / width
            scale, zero = _affine(lo.clamp(max=0), hi.clamp(min=0), width)
            if method == "mse":
                scale, zero = _search(torch.stack([o._counts for o in part]).double(), width, lo, hi, scale, zero)
            scales.append(scale.float())
            zeros.append(zero.to(torch.uint8))
        return torch.cat(scales), torch.cat(zeros)

    def _widen(self, exponent: int) -> None:
        if exponent > self._exponent:
            self._counts = _rebin(self._counts, exponent - self._exponent)
            self._exponent = exponent


def _flatten(x: Tensor) -> Tensor:
    # Order does not matter, so a channels-last tensor is read as it lies in memory.
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).reshape(-1) if channels_last else x.reshape(-1)


def _rebin(counts: Tensor, doublings: int) -> Tensor:
    if not doublings:
        return counts
    index = _HALF + torch.div(_K, 2 ** min(doublings, _HALF.bit_length()), rounding_mode="trunc")
    return torch.zeros_like(counts).index_add_(0, index, counts)


def _affine(lo: Tensor, hi: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32-rounded scales and integer zeros, both as float64, of ranges given in bin widths."""
    scale = ((hi - lo) / LEVELS * width).clamp(min=SMALLEST_SCALE).float().double()
    scale = torch.where(hi > lo, scale, torch.ones_like(scale))
    return scale, (-lo * width / scale).round().clamp(0, LEVELS)


def _search(
    counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor, scale: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """Improve `(scale, zero)` of `N` observers; `lo` and `hi` are the extremes in bin widths."""
    below, above = lo.clamp(max=0), hi.clamp(min=0)
    clip_below, clip_above = _clipping_costs(counts)
    mass = counts.sum(1)

    def model(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        # Noise of rounding (step^2 / 12) plus what is clipped at each end, for every pair of shrink factors [N, F].
        a, b = below[:, None] * f, above[:, None] * g
        left = clip_below.gather(1, (a.floor() + _HALF).long().clamp(0, BINS))
        right = clip_above.gather(1, (b.ceil() + _HALF).long().clamp(0, BINS))
        step = (b[:, None, :] - a[:, :, None]) / LEVELS
        cost = (mass[:, None, None] * step.square() / 12 + left[:, :, None] + right[:, None, :]).flatten(1)
        best = cost.argmin(1)
        return f.gather(1, best[:, None] // g.shape[1]), g.gather(1, best[:, None] % g.shape[1])

    coarse = torch.logspace(0, -2, 48, dtype=torch.float64).expand(len(mass), -1)
    fine = torch.linspace(0.9, 1.1, 21, dtype=torch.float64)
    f, g = model(coarse, coarse)
    f, g = model((f * fine).clamp(max=1), (g * fine).clamp(max=1))
    # The model is blind to where the values lie between two levels: settle the last per cent on the histogram itself.
    near = torch.tensor([0.96, 0.98, 1.0, 1.02, 1.04], dtype=torch.float64)
    f, g = (f * near).clamp(max=1).repeat_interleave(5, 1), (g * near).clamp(max=1).repeat(1, 5)
    scales, zeros = _affine(below[:, None] * f, above[:, None] * g, width[:, None])
    scales, zeros = torch.cat([scale[:, None], scales], 1), torch.cat([zero[:, None], zeros], 1)
    cost = _expected_error(counts, width, lo, hi, scales, zeros)
    cost[:, 0] *= 0.99
    best = cost.argmin(1, keepdim=True)
    return scales.gather(1, best)[:, 0], zeros.gather(1, best)[:, 0]


def _clipping_costs(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sum |x - e|^2` of what is below and above each edge `e = -BINS/2 .. BINS/2`; unit: width; to one bin."""
    centre = _K + 0.5 * torch.sign(_K)
    edge = torch.arange(BINS + 1).double() - _HALF
    moments = torch.stack([counts, counts * centre, counts * (centre.square() + 1 / 12)])
    left = torch.nn.functional.pad(moments.cumsum(-1), (1, 0))
    right = moments.sum(-1, keepdim=True) - left

    def cost(m: Tensor) -> Tensor:
        return (m[2] - 2 * edge * m[1] + edge.square() * m[0]).clamp(min=0)

    return cost(left), cost(right)


def _expected_error(counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Integrate `|x - x^|^2` over `N` histograms for candidates `[N, C]`, uniform inside a bin; in any one unit."""
    upper = (_K + (_K >= 0)).double()
    edge = torch.cat([upper[:1] - 1, upper])[None].clamp(lo[:, None], hi[:, None])  # no bin reaches past the extremes
    span = edge.diff()
    costs = []
    for c in range(scale.shape[1]):
        step = (scale[:, c] / width)[:, None]
        y = edge / step
        n = y.round().clamp(-zero[:, c, None], LEVELS - zero[:, c, None])
        r = y - n
        integral = (n / 12 + r * r * r / 3).diff() * step / span
        mean = torch.where(span > 0, integral, r[:, 1:].square())  # no width: all elements are equal
        costs.append((mean * counts).sum(1) * step[:, 0].square())
    return torch.stack(costs, 1)
