"""What each stage of a recipe made of a model: one row a stage, end to end, always against the original."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from dcomp.cachequant.plan_set import MeasuredPlan
from dcomp.calibrate.final_latents import FinalLatents
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.recipes.follow import FollowedPlan


@dataclass(frozen=True)
class StageRow:
    """A stage.

    Attributes:
        name: of the stage, or of a cache plan.
        latent_error: of final latents against the original's, relative, geometric mean over trajectories that nothing
            was learned or chosen on but which stage to keep.
        nbytes: of the denoiser's tensors in memory.
        macs: multiply-accumulates of all calls of a picture, as a part of the original's.
    """

    name: str
    latent_error: float
    nbytes: int
    macs: float


class StageRows:
    """Measures stages as they are done.

    Args:
        pipeline: whose denoiser the stages change.
        judge: of final latents, from before the first stage.
        macs: multiply-accumulates of a call of the original.
    """

    def __init__(self, pipeline: OpenPipeline, judge: FinalLatents, macs: int) -> None:
        self._pipeline, self._judge, self._whole = pipeline, judge, macs
        self.rows: list[StageRow] = []

    def add(self, name: str, macs: int, error: float | None = None) -> None:
        """Take a stage as done.

        Args:
            name: of it.
            macs: of a call of the denoiser now.
            error: of final latents, if it was measured already.
        """
        found = self._judge.error() if error is None else error
        self.rows.append(StageRow(name, found, _nbytes(self._pipeline.denoiser), macs / self._whole))

    def add_plans(self, plans: Sequence[MeasuredPlan], macs: int) -> None:
        """Follow plans, each on what all stages before have made."""
        for plan in plans:
            with FollowedPlan(plan, self._pipeline.denoiser, self._pipeline.scheduler):
                error = self._judge.error()
            row = StageRow(
                f"plan {plan.name}", error, _nbytes(self._pipeline.denoiser), macs / self._whole / plan.speedup
            )
            self.rows.append(row)


def _nbytes(denoiser: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
