"""A checkpoint explained from its manifest and headers alone: no weight is loaded."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dcomp.calibrate.model_files import check_model_folder
from dcomp.compress.manifest import MANIFEST, check_manifest
from dcomp.compress.scheme import QScheme
from dcomp.recipes.plan_summary import summaries


@dataclass(frozen=True)
class InspectedLayer:
    """One layer of a checkpoint; errors are relative and None where nothing was quantized.

    Attributes:
        error_by_step: at each of `Inspection.timesteps`; empty where it was not measured.
        reason: why this scheme, with what was left out, or why float.
        remarks: on channels and ranges without information.
        position: place in the order of execution; None in checkpoints of older versions.
        rounding: how codes of its weight were chosen; None without codes.
        transforms: what its scheme has beyond codes, in words.
    """

    name: str
    role: str
    scheme: str | None
    weight_bits: float
    input_bits: float
    bytes_before: int
    bytes_after: int
    weight_error: float | None
    output_error: float | None
    error_by_step: list[float]
    reason: str | None
    remarks: list[str]
    position: int | None
    rounding: str | None = None
    transforms: list[str] = field(default_factory=list)

    @property
    def worst_step(self) -> int | None:
        """Where its error is largest, counted from the noisiest step."""
        errors = self.error_by_step
        return max(range(len(errors)), key=errors.__getitem__) if errors else None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        timesteps: those of the layers' errors by step, noisiest first; empty where they are not known.
        layers: in order of execution, or by name where that is not known.
        left_in_float: the layers among them that kept their float weights.
        step_bins: rows of each table over the steps; 0 without static inputs and corrections.
        quality: what `dcomp validate --record` measured, if it did.
        plans: its cache plans, slowest first.
    """

    folder: str
    denoiser: str
    dcomp_version: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    calibration_sha256: str | None
    step_bins: int
    loras: list[dict[str, Any]]
    timesteps: list[float]
    totals: dict[str, Any]
    quality: dict[str, Any] | None
    plans: list[dict[str, Any]]
    layers: list[InspectedLayer]

    @property
    def left_in_float(self) -> list[InspectedLayer]:
        """The layers that kept their float weights."""
        return [layer for layer in self.layers if layer.scheme is None]

    @property
    def worst(self) -> list[InspectedLayer]:
        """The quantized layers, largest output error first."""
        measured = [layer for layer in self.layers if layer.output_error is not None]
        return sorted(measured, key=lambda layer: -(layer.output_error or 0))

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what is true of the whole, for people."""
        totals = self.totals
        yield "made from", f"{self.source['name']} ({self.source['sha256'][:12]})"
        yield "bits per parameter", f"{totals['bits_per_param']:.2f}, all parameters of the denoiser counted"
        yield "denoiser", f"{totals['denoiser_bytes_ratio']:.3f} of its fp32 bytes"
        yield "pipeline", f"{totals['bytes_compressed']:,} bytes of {totals['bytes_original']:,}"
        calibration = self.recipe["calibration"]
        if self.calibration_sha256:
            tables = f", tables of {self.step_bins} steps" if self.step_bins else ""
            yield "calibrated", f"{calibration['samples']} trajectories of {calibration['steps']} steps{tables}"
        if self.loras:
            yield "adapters", ", ".join(f"{lora['name']} x {lora['scale']}" for lora in self.loras)
        if self.quality:
            measured = self.quality
            yield (
                "measured",
                (
                    f"PSNR {measured['psnr_db']:.1f} dB, latent error {measured['latent_rel_error']:.3f} "
                    f"on {measured['samples']} samples"
                ),
            )
        if self.plans:
            yield "cache plans", ", ".join(f"{plan['name']} ({plan['psnr_db']:.1f} dB)" for plan in self.plans)
        kept = [layer.name for layer in self.left_in_float]
        yield "layers in float", ", ".join(kept[:8]) + (f" and {len(kept) - 8} more" if len(kept) > 8 else "") or "none"

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON data."""
        return {"schema_version": 1, **asdict(self), "left_in_float": [layer.name for layer in self.left_in_float]}


def inspect(folder: str | Path) -> Inspection:
    """Read a checkpoint's manifest and describe it.

    Raises:
        CheckpointError: not a dcomp checkpoint, or changed since it was written.
        ModelError: the files of the pipeline are damaged.
    """
    if not (Path(folder) / MANIFEST).is_file():
        check_model_folder(folder, match_weights=False)  # says it better when there is no model at all
    manifest = check_manifest(folder, deep=False)
    model = check_model_folder(folder, match_weights=False)
    # With diffusers, which takes seconds; bad news does without.
    from dcomp.compress.loader import DcompQuantizationConfig

    section = model.denoiser.config.get("quantization_config") or {}
    ours = DcompQuantizationConfig.from_dict(section) if section.get("quant_method") == "dcomp" else None
    schemes = {name: ours.schemes[key] for name, key in ours.layers.items()} if ours else {}
    records = sorted(manifest.layers.items(), key=lambda item: (item[1].position or 0, _by_number(item[0])))
    bins = section.get("step_bins") or {}
    return Inspection(
        folder=str(folder),
        denoiser=model.denoiser.class_name,
        dcomp_version=manifest.dcomp_version,
        source=manifest.source.model_dump(),
        recipe=manifest.recipe,
        calibration_sha256=manifest.calibration_sha256,
        step_bins=len(bins.get("boundaries", ())) + 1 if bins else 0,
        loras=manifest.loras,
        timesteps=manifest.timesteps,
        totals=manifest.totals.model_dump(),
        quality=manifest.quality,
        plans=[plan.model_dump() for plan in summaries(Path(folder))],
        layers=[
            InspectedLayer(name=name, **record.model_dump(), **_of_scheme(schemes.get(name)))
            for name, record in records
        ],
    )


def _by_number(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _of_scheme(scheme: QScheme | None) -> dict[str, Any]:
    """Return rounding and transforms of a layer."""
    if scheme is None:
        return {}
    words = (
        (scheme.boundaries, f"split at {', '.join(map(str, scheme.boundaries))}"),
        (scheme.smooth, "smoothed"),
        (scheme.rotate, "rotated"),
        (scheme.directions, f"{scheme.directions} directions in float"),
        (scheme.rank, f"branch of rank {scheme.rank}"),
    )
    return {"rounding": scheme.rounding, "transforms": [text for there, text in words if there]}
