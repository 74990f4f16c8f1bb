"""Second-order rounding: codes of a weight chosen by what they do to the layer's output, on a grid that is given.

With `H = X^T X / rows` of the layer's inputs X, a channel's mean squared output error is `d^T H d`, where d is what its
weights are off. Columns are those of the canonical weight `[O, *taps, I]` flattened, input channels fastest; a row of X
is what one output position reads. Letters: O output channels, I input channels, K columns. Grids come from
`calibrate/range_search.py`; here the codes are chosen anew, and at the end the scale of each channel.
"""

import torch
from torch import Tensor

from dcomp.compress.code_grid import CodeGrid
from dcomp.compress.moments import Moments
from dcomp.kernels.packing import PackedWeight

_COLUMNS = 128  # between two updates of all later columns; the paper's block size
_SWEEPS = 2  # of descent; the first gains 3 % of the error of 4-bit layers, the second 0.6 %, two more 0.3 %


def metric_error(weight: Tensor, packed: PackedWeight, moments: Moments) -> Tensor:
    """Return the mean squared output error of each output channel, fp64 `[O]`.

    Args:
        weight: fp32 `[O, *taps, I]`.
        packed: what stands for it.
        moments: of the layer's inputs.
    """
    difference = packed.dequantize().double() - weight.double()
    return _products(difference, moments, difference)[0]


def round_gptq(weight: Tensor, start: PackedWeight, moments: Moments, damp: float = 0.01) -> PackedWeight:
    """Choose codes column by column, each column making up for the errors of those before it.

    Columns with the largest inputs come first; a dead one, whose input is always 0, is rounded to nearest. Then each
    code in turn moves to where it is best beside all others, so that early columns make up for later ones too. At the
    end the scale of each channel is fitted to its codes by least squares. Of the start, the new codes, and the new
    codes with the new scale a channel keeps what is best, so `metric_error` of no channel is above that of the start.

    Args:
        weight: fp32 `[O, *taps, I]`.
        start: the grid, that is scales and multipliers, and the codes to beat.
        moments: of the layer's inputs.
        damp: part of the mean of H's diagonal that is added to it; more where H is too near to singular.

    Source:
        Frantar et al. 2023, GPTQ (algorithm 1); the order of columns is that of its reference code. Descent along
        coordinates: Behdin et al. 2023, QuantEase (algorithm 2).
    """
    weight = weight.detach().float()
    grid = CodeGrid.of(start)
    steps = grid.values(torch.ones_like(grid.codes), start.scale)
    chosen = [
        _choose_codes(w, s, grid.low, grid.high, h.double(), damp)
        for w, s, h in zip(moments.cut(weight), moments.cut(steps), moments.blocks, strict=True)
    ]
    new_codes = torch.cat([c.view(*weight.shape[:-1], -1) for c in chosen], -1)
    new_scale = _fitted_scale(weight, grid.values(new_codes, torch.ones_like(start.scale)), start.scale, moments)

    codes, scale = grid.codes, start.scale
    least = metric_error(weight, start, moments)
    for tried in (start.scale, new_scale):
        error = metric_error(weight, grid.repack(new_codes, tried), moments)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(_per_channel(better, codes), new_codes, codes)
        scale = torch.where(better, tried, scale)
    return grid.repack(codes, scale)


def _products(a: Tensor, moments: Moments, *others: Tensor) -> list[Tensor]:
    """Return `a^T H b` of each output channel, `[O]`, for fp64 tensors `[O, *taps, I]`."""
    images = [part @ block.double() for part, block in zip(moments.cut(a), moments.blocks, strict=True)]
    return [
        torch.stack([(i * part).sum(1) for i, part in zip(images, moments.cut(b), strict=True)]).sum(0) for b in others
    ]


def _choose_codes(weight: Tensor, steps: Tensor, low: int, high: int, h: Tensor, damp: float) -> Tensor:
    """Return the codes `[O, K]`, as floats, of a weight `[O, K]` on a grid of steps `[O, K]`."""
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h[order][:, order]
    factor = _error_factor(h, damp).float()
    # Transposed, so that a column of all channels is contiguous.
    weight, steps = weight.t()[order].contiguous(), steps.t()[order].contiguous()
    w, codes = weight.clone(), torch.empty_like(weight)
    for first in range(0, len(w), _COLUMNS):
        last = min(first + _COLUMNS, len(w))
        errors = torch.empty_like(w[first:last])
        # Rows are taken apart once: with few channels, indexing would take longer than the arithmetic.
        columns = zip(w[first:last], codes[first:last], steps[first:last], errors, factor[first:last], strict=True)
        for i, (column, code, step, error, row) in enumerate(columns, start=first + 1):
            torch.div(column, step, out=code).round_().clamp_(low, high)
            torch.addcmul(column, code, step, value=-1, out=error)
            w[i:last].addr_(row[i:last], error, alpha=-1)
        w[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    for _ in range(_SWEEPS):
        _descend(codes, weight, steps, low, high, h.float())
    return torch.empty_like(codes).index_copy_(0, order, codes).t()


def _descend(codes: Tensor, weight: Tensor, steps: Tensor, low: int, high: int, h: Tensor) -> None:
    """Move each code `[K, O]` in turn, in place, to where `d^T H d` is least while all others stay; dead ones stay.

    Args:
        codes: of the transposed weight `[K, O]`, on a grid of steps `[K, O]`.
        weight: the goal.
        steps: of the grid.
        low: lowest code.
        high: highest code.
        h: fp32 `[K, K]`.
    """
    off = codes * steps - weight  # d
    pull = h @ off
    curvature = h.diagonal().tolist()
    for first in range(0, len(codes), _COLUMNS):
        block = slice(first, first + _COLUMNS)
        near, pull_block, before = h[block, block], pull[block], off[block].clone()
        columns = zip(
            curvature[block], codes[block], weight[block], steps[block], off[block], pull_block, near, strict=True
        )
        for second, code, goal, step, d, p, row in columns:
            if second == 0:
                continue
            best = torch.sub(d, p, alpha=1 / second)  # of a code that need not be whole
            torch.div(best.add_(goal), step, out=code).round_().clamp_(low, high)
            moved = torch.addcmul(-goal, code, step).sub_(d)
            d += moved
            pull_block.addr_(row, moved)
        others = h[:, block].clone()
        others[block] = 0
        pull.addmm_(others, off[block] - before)


def _error_factor(h: Tensor, damp: float) -> Tensor:
    """Return U `[K, K]`, upper triangular with ones on the diagonal: `w_j -= error_i * U_ij` for all j > i.

    Its rows are those of the upper Cholesky factor of the inverse of H, each divided by its diagonal element. With
    `H = R R^T` and R upper triangular that factor is the inverse of R, so that H itself is never inverted.
    """
    diagonal = h.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while True:
        damped = h + torch.diag(torch.where(live, damp * mean, mean))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and lower.isfinite().all():
            break
        damp = max(10 * damp, 1e-6)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    factor: Tensor = upper / upper.diagonal()[:, None]
    return factor


def _fitted_scale(weight: Tensor, image: Tensor, scale: Tensor, moments: Moments) -> Tensor:
    """Return `w^T H c / c^T H c` for codes c times multipliers, or the old scale where that is no scale."""
    image = image.double()
    cross, square = _products(image, moments, weight.double(), image)
    fitted = (cross / square).float()
    return torch.where(fitted.isfinite() & (fitted >= torch.finfo(torch.float32).tiny), fitted, scale)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
