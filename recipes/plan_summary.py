"""What is shown of a checkpoint's cache plans: their worth, and what each call does, in words."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dcomp.cachequant.plan_set import FILE, MeasuredPlan, PlanSet


class PlanSummary(BaseModel):
    """A plan, as `dcomp validate --json` and `dcomp inspect --json` print it.

    Attributes:
        name: for `--plan`.
        speedup: multiply-accumulates of all calls by those that are left.
        expected_error: relative error of the final latents that the search expected; None if its planner says nothing.
        error, psnr_db: measured by the search, on pictures that it had not seen.
        predicted: for each call what is predicted in it; empty for a call that computes everything.
        unrounded: calls that round no inputs.
        corrected: calls in which what is predicted is corrected.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    speedup: float
    expected_error: float | None
    error: float
    psnr_db: float
    predicted: list[list[str]]
    unrounded: list[int]
    corrected: list[int]

    @property
    def computed_calls(self) -> int:
        """Calls that compute everything."""
        return sum(not call for call in self.predicted)


def summary_of(plan: MeasuredPlan) -> PlanSummary:
    """Return what is shown of a plan."""
    return PlanSummary(
        name=plan.name,
        speedup=plan.speedup,
        expected_error=plan.expected_error,
        error=plan.error,
        psnr_db=plan.psnr,
        predicted=[sorted({label_of(zone) for zone in row}) for row in plan.plan.actions],
        unrounded=sorted(plan.plan.unrounded),
        corrected=sorted({call for call, _ in plan.plan.corrections}),
    )


def summaries(folder: Path) -> list[PlanSummary]:
    """Return those of all plans of a model folder, slowest first; none if it has no plans.

    Raises:
        PlanError: its file cannot be used.
    """
    file = folder / FILE
    return [summary_of(plan) for plan in PlanSet.read(file).plans] if file.is_file() else []


def label_of(zone: str) -> str:
    """Return what a zone is called in pictures: of single modules, their name within a block."""
    return zone.rpartition(".")[2] or zone
