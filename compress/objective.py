"""The error that tuning lowers: how far a denoiser is from recorded predictions, step by step.

It is the squared error of the prediction, or of the guided prediction `u + g (c - u)` where rows come in pairs (u, c).
Two things make it what the picture suffers from. Errors of steps differ a hundredfold, what they do to the picture does
not; hence each step's error has a unit of its own. And errors that have nothing to do with each other average out over
the steps, while one along the prediction itself does not, since predictions of neighbouring steps are nearly parallel:
over T steps its square grows like T squared, and that of others like T. So it counts T times. Without that, the least
error is that of predictions that are too small, as it is of any estimate from noisy data.

Letters: N rows; U units, which are pairs of rows or single ones; T timesteps.
"""

import torch
from torch import Tensor, nn

from dcomp.calibrate.progress import Progress
from dcomp.calibrate.replay import RowBatch, predict
from dcomp.calibrate.tree_file import tensor_sha256

_LEAST_UNIT = 1e-6  # of the largest error of a step: one without error must not drown the others


class Objective:
    """The errors of a denoiser on recorded rows.

    Attributes:
        units: int64 `[U, 2]` with guidance, the rows of each pair, else `[U, 1]`.
        timesteps: distinct timesteps, descending.
        steps: int64 `[U]`, position of each unit's timestep among them.
        batch: units of a forward pass.
    """

    def __init__(self, denoiser: nn.Module, rows: RowBatch, guidance: float | None, batch_rows: int) -> None:
        self._denoiser, self._rows, self._guidance = denoiser, rows, guidance
        guided = guidance is not None and rows.pairs is not None
        self.units = rows.pairs if guided and rows.pairs is not None else torch.arange(len(rows.outputs)).view(-1, 1)
        descending, self.steps = (-rows.timesteps.double()[self.units[:, 0]]).unique(return_inverse=True)
        self.timesteps = -descending
        self.batch = max(1, batch_rows // self.units.shape[1])

    def errors(self, units: Tensor) -> Tensor:
        """Return the mean squared error of some units, with what lies along the prediction T times; differentiable."""
        batch = self._rows.take(self.units[units].flatten())
        exact = batch.outputs.float()
        error = self._guided(predict(self._denoiser, batch).float() - exact).flatten(1)
        exact = self._guided(exact).flatten(1)
        along = (error * exact).sum(1).square() / exact.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        return (error.square().sum(1) + (len(self.timesteps) - 1) * along) / error.shape[1]

    def _guided(self, values: Tensor) -> Tensor:
        if self.units.shape[1] == 1:
            return values
        assert self._guidance is not None
        return values[0::2] + self._guidance * (values[1::2] - values[0::2])

    def loss(self, units: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of the errors of some units, with weights `[U]`."""
        return (self.errors(units) * weights[units].float()).mean()

    def weights(self, errors: Tensor, units: Tensor) -> Tensor:
        """Return what turns errors into parts of the mean error of their step over some of the units, fp64 `[U]`."""
        mean = self.by_step(errors, units)
        mean = torch.where(mean.isnan(), self.by_step(errors, (~errors.isnan()).nonzero().flatten()), mean)
        return 1 / mean.clamp_min(max(_LEAST_UNIT * float(mean.max()), 1e-300))[self.steps]

    def sample(self, units: Tensor, per_step: int) -> Tensor:
        """Return the first few of some units at each step, ascending."""
        chosen = [units[self.steps[units] == step][:per_step] for step in range(len(self.timesteps))]
        return torch.cat(chosen).sort().values

    def measure(self, units: Tensor, progress: Progress) -> Tensor:
        """Return the errors of some units, fp64 `[U]`; NaN for all others."""
        errors = torch.full((len(self.units),), torch.nan, dtype=torch.float64)
        with torch.no_grad():
            for done, part in enumerate(units.split(self.batch)):
                progress("errors of the prediction", done * self.batch, len(units))
                errors[part] = self.errors(part).double()
        progress("errors of the prediction", len(units), len(units))
        return errors

    def by_step(self, errors: Tensor, units: Tensor) -> Tensor:
        """Return the mean error of some units at each step, fp64; NaN where a step has none of them."""
        zeros = torch.zeros(len(self.timesteps), dtype=torch.float64)
        steps = self.steps[units]
        return zeros.index_add(0, steps, errors[units]) / zeros.index_add(0, steps, torch.ones_like(errors[units]))

    def digest(self) -> str:
        """Return what tells these rows from others."""
        return f"{tensor_sha256(self._rows.outputs)} {tensor_sha256(self._rows.timesteps)}"
