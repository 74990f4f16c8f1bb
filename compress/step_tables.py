"""Layers that have tables with a row for each step bin, and how the bin of each sample picks its row.

There are tables of a static input range, and those of a correction, which become part of the weight's scale and of the
bias. Letters: B step bins, O output channels, N samples.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dcomp.compress.quantized import Quantized
from dcomp.compress.scheme import SchemeError
from dcomp.kernels import qparams


class SteppedLayer(Quantized):
    """What a layer with one integer weight does with its tables.

    Attributes:
        scale: fp32 `[O]` of the weight.
        input_scale: fp32 `[B]` of a static input range, else None. Tables of one row serve every bin.
        step_scale, step_bias: fp32 `[B, O]` of a corrected layer, else None; of the parts of a split layer only the
            first has a bias.
    """

    scale: Tensor
    input_scale: Tensor | None
    step_scale: Tensor | None
    step_bias: Tensor | None

    def correct(self, step_scale: Tensor, step_bias: Tensor | None) -> None:
        """Give the layer tables of its output's scale and bias; those that it had are replaced.

        Args:
            step_scale: fp32 `[B, O]`, factors of the output without bias.
            step_bias: fp32 `[B, O]`, what is added to that; the layer's own bias, times the factor, is part of it. None
                for a part of a layer that is not the first.

        Raises:
            SchemeError: the tables have another form, or not as many rows as those of the inputs.
        """
        bins = len(step_scale if self.input_scale is None else self.input_scale)
        expected = form_of(torch.empty(bins, len(self.scale), device="meta"))
        forms = {form_of(table) for table in (step_scale, step_bias) if table is not None}
        if forms != {expected}:
            raise SchemeError(
                f"Tables of a correction are {' and '.join(sorted(forms))}, but this layer needs {expected}",
                where=str(self),
                remedy="Use fp32 tables with a row for each step bin.",
            )
        self.step_scale, self.step_bias = step_scale, step_bias
        self.scheme = replace(self.scheme, corrected=True)

    def _by_bin(self, x: Tensor, apply: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Apply a function to all samples of a step bin at once.

        Args:
            x: samples along the first axis.
            apply: function of samples and their bin.
        """
        rows = self._bins(x)
        if isinstance(rows, int):
            return apply(x, rows)
        masks = {step_bin: rows == step_bin for step_bin in rows.unique().tolist()}
        outputs = {step_bin: apply(x[mask], step_bin) for step_bin, mask in masks.items()}
        first = outputs[int(rows[0])]
        y = first.new_empty(len(x), *first.shape[1:])
        for step_bin, mask in masks.items():
            y[mask] = outputs[step_bin]
        return y

    def _bins(self, x: Tensor) -> int | Tensor:
        """Return the step bin of the whole input, or of each sample where the clock knows them; 0 without tables.

        Raises:
            SchemeError: the tables have no row for the bin.
        """
        table = self.input_scale if self.step_scale is None else self.step_scale
        if self.clock is None or table is None or len(table) == 1:
            return 0
        rows = self.clock.row_bins
        mixed = rows is not None and x.ndim > 1 and len(rows) == len(x) > 0
        last = int(rows.max()) if rows is not None and mixed else self.clock.bin
        if last >= len(table):
            raise SchemeError(
                f"The clock is in step bin {last}, the layer has tables for {len(table)}",
                where=str(self),
                remedy="Give the layer the clock that it was calibrated with.",
            )
        return rows.to(x.device) if rows is not None and mixed else last

    def _scale_and_bias(self, step_bin: int) -> tuple[Tensor, Tensor | None]:
        """Return the scale of the weight and the bias, `[O]` each, with a bin's correction in them."""
        if self.step_scale is None:
            return self.scale, self._bias
        return self.scale * self.step_scale[step_bin], None if self.step_bias is None else self.step_bias[step_bin]

    def _of_output(self, weight: Tensor, step_bin: int | None) -> Tensor:
        """Return a float weight `[O, ...]` with a bin's correction in it."""
        if self.step_scale is None or step_bin is None:
            return weight
        return weight * qparams.along_first(self.step_scale[step_bin], weight.ndim)

    def _corrected(self, y: Tensor, x: Tensor, axis: int) -> Tensor:
        """Apply the tables to an output that has no bias, as fake execution does; O is along an axis of `y`."""
        if self.step_scale is None:
            return y
        rows = self._bins(x)
        shape = [1] * y.ndim
        shape[axis] = y.shape[axis]
        if isinstance(rows, Tensor):
            shape[0] = len(x)
        y = y * self.step_scale[rows].view(shape)
        return y if self.step_bias is None else y + self.step_bias[rows].view(shape)

    @property
    def _bias(self) -> Tensor | None:
        return None if self.bias is None or self.step_scale is not None else self.bias.float()


def form_of(tensor: Tensor | None) -> str:
    """Return dtype and shape of a buffer as text."""
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
