"""A checkpoint explained from its manifest and headers alone: no weight is loaded."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcomp.calibrate.model_files import check_model_folder
from dcomp.compress.manifest import MANIFEST, check_manifest


@dataclass(frozen=True)
class InspectedLayer:
    """One layer of a checkpoint; errors are relative and None where nothing was quantized."""

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


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        layers: by name.
        left_in_float: the layers among them that kept their float weights.
        step_bins: number of activation tables; 0 without static activations.
        quality: what `dcomp validate --record` measured, if it did.
    """

    folder: str
    denoiser: str
    dcomp_version: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    calibration_sha256: str | None
    step_bins: int
    loras: list[dict[str, Any]]
    totals: dict[str, Any]
    quality: dict[str, Any] | None
    layers: list[InspectedLayer]

    @property
    def left_in_float(self) -> list[InspectedLayer]:
        """The layers that kept their float weights."""
        return [layer for layer in self.layers if layer.scheme is None]

    def facts(self) -> Iterator[tuple[str, str]]:
        """Yield what is true of the whole, for people."""
        totals = self.totals
        yield "made from", f"{self.source['name']} ({self.source['sha256'][:12]})"
        yield "bits per parameter", f"{totals['bits_per_param']:.2f}, all parameters of the denoiser counted"
        yield "denoiser", f"{totals['denoiser_bytes_ratio']:.3f} of its fp32 bytes"
        yield "pipeline", f"{totals['bytes_compressed']:,} bytes of {totals['bytes_original']:,}"
        calibration = self.recipe["calibration"]
        if self.calibration_sha256:
            tables = f", {self.step_bins} activation tables" if self.step_bins else ""
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
    section = model.denoiser.config.get("quantization_config") or {}
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
        totals=manifest.totals.model_dump(),
        quality=manifest.quality,
        layers=[InspectedLayer(name=name, **record.model_dump()) for name, record in manifest.layers.items()],
    )
