"""What the manifest says of each layer after a run."""

from torch import nn

from dcomp.calibrate.calibration_set import CalibrationSet
from dcomp.compress.foreign import ForeignResult
from dcomp.compress.manifest import LayerRecord
from dcomp.compress.time_table import Absent, TimeTable
from dcomp.recipes.plan import Plan
from dcomp.recipes.quantize_stage import StageResult


def timesteps_of(recorded: CalibrationSet | None, result: StageResult) -> list[float]:
    """Return the timesteps of the errors by step; a pass over few rows may have met fewer than were recorded."""
    if recorded is None or not any(len(e.by_step) == len(recorded.timesteps) for e in result.errors.values()):
        return []
    return [float(timestep) for timestep in recorded.timesteps]


def layer_records(plan: Plan, result: StageResult, denoiser: nn.Module) -> dict[str, LayerRecord]:
    """Return what became of each layer in dcomp's own format."""
    records = {}
    for position, (name, decision) in enumerate(result.decisions.items()):
        module = denoiser.get_submodule(name)
        scheme, error = decision.scheme, result.errors.get(name)
        table = isinstance(module, TimeTable | Absent)
        records[name] = LayerRecord(
            role=str(plan.structure.layers[name].role),
            scheme=scheme.label if scheme else "table" if table else None,
            weight_bits=scheme.weight_bits if scheme else 16 if table else 32,
            input_bits=scheme.input_bits if scheme else 32,
            bytes_before=plan.layer_bytes[name][0],
            bytes_after=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
            weight_error=error.weight if error else None,
            output_error=error.output if error else None,
            error_by_step=list(error.by_step) if error else [],
            reason=decision.reason,
            remarks=list(error.remarks) if error else [],
            position=position,
        )
    return records


def foreign_records(plan: Plan, foreign: ForeignResult) -> dict[str, LayerRecord]:
    """Return what became of each layer in another package's format."""
    records = {}
    for position, (name, facts) in enumerate(plan.structure.layers.items()):
        before, _ = plan.layer_bytes[name]
        kept = name in foreign.left_float
        records[name] = LayerRecord(
            role=str(facts.role),
            scheme=None if kept else f"{foreign.format} W{foreign.weight_bits}A16",
            weight_bits=32 if kept else foreign.weight_bits,
            input_bits=32 if kept else 16,
            bytes_before=before,
            bytes_after=before if kept else before * foreign.weight_bits // 32,
            reason=f"diffusers' {foreign.format} quantizer left it" if kept else f"in the format of {foreign.format}",
            position=position,
        )
    return records
