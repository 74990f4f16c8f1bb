"""Write a compressed checkpoint folder, completely or not at all.

The folder is reopened by a fresh process before it gets its name; `output_folder.py` keeps it from being seen half
written. Everything but the denoiser is copied byte for byte; pickled files and code are left behind. No file holds a
time or a path, so equal inputs give equal bytes.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from torch import Tensor, nn

from dcomp import __version__
from dcomp.calibrate.components import quiet
from dcomp.calibrate.model_files import Component, ModelFolder, check_model_folder, read_safetensors_header
from dcomp.calibrate.tree_file import file_sha256
from dcomp.compress.layers import QuantLayer
from dcomp.compress.loader import DcompQuantizationConfig
from dcomp.compress.manifest import (
    MANIFEST,
    CheckpointError,
    LayerRecord,
    Manifest,
    Source,
    Totals,
    check_manifest,
    read_manifest,
)
from dcomp.compress.output_folder import (
    OutputError,
    check_output,
    disk_errors,
    locked,
    sync_folder,
    sync_folders,
    writing,
)
from dcomp.compress.pruning.plain import plain_config
from dcomp.compress.verify import verify_checkpoint
from dcomp.compress.weight_files import (
    MAX_SHARD_BYTES,
    HashingFile,
    narrowed,
    weights_nbytes,
    write_text,
    write_weights,
)

__all__ = [
    "CheckpointError",
    "LayerRecord",
    "Manifest",
    "ManifestFields",
    "OutputError",
    "Source",
    "Totals",
    "check_manifest",
    "check_output",
    "hash_model",
    "read_manifest",
    "update_quality",
    "write_checkpoint",
]

_COPY_BYTES = 4 << 20
_PACKAGES = ("dcomp", "torch", "diffusers", "transformers", "safetensors")


class PipelineLike(Protocol):
    """What the writer needs of an open pipeline: its denoiser and the folder that it came from."""

    denoiser_name: str
    source: Path

    @property
    def denoiser(self) -> nn.Module:
        """The compressed denoiser."""


@dataclass(frozen=True)
class ManifestFields:
    """What only the caller knows about a checkpoint.

    Attributes:
        recipe: the resolved recipe, JSON values only.
        layers: layer name -> what became of it.
        calibration_sha256: hash of the calibration set, if one was used.
        loras: adapters that were fused first.
        timesteps: of the errors by step in `layers`, noisiest first.
        quality: measured quality, if any.
        source: name and hash of the original model; hashed here when it is not given.
        pruning: what was cut, JSON values only; None if nothing was.
        guidance: scale that the denoiser has learned; None: its pipeline guides it.
    """

    recipe: dict[str, Any]
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    calibration_sha256: str | None = None
    loras: list[dict[str, Any]] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    source: Source | None = None
    pruning: dict[str, Any] | None = None
    guidance: float | None = None


def write_checkpoint(
    pipeline: PipelineLike,
    output: Path,
    fields: ManifestFields,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replaced: Mapping[str, Path] | None = None,
    probe: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Manifest:
    """Write a pipeline with its denoiser as it is in memory.

    Args:
        pipeline: its denoiser holds the compressed layers, its `source` all other files.
        output: folder to make; its parent is made too.
        fields: what goes into the manifest beside sizes and hashes.
        overwrite: replace an existing dcomp checkpoint.
        max_shard_bytes: largest weight file.
        replaced: component name -> finished folder that takes the place of the source's: the denoiser in another
            package's format, a text encoder with fused adapters, another scheduler.
        probe: arguments of one denoiser call. When given, a fresh process opens the written folder before it gets
            its name, repeats the call and must agree bit for bit.
        finish: called with the written folder before it gets its name; adds files that are not of the manifest.

    Returns:
        The manifest that was written.

    Raises:
        OutputError: the output exists and may not be replaced, or overlaps the source.
        CheckpointError: another writer, a full disk, or a folder that did not pass the fresh process.
    """
    output = Path(os.path.abspath(output.expanduser()))
    source = check_model_folder(pipeline.source, match_weights=False)
    check_output(output, overwrite, source.path)
    denoiser = pipeline.denoiser
    if pipeline.denoiser_name not in source.components:
        raise CheckpointError(
            f"The model folder has no component {pipeline.denoiser_name!r}",
            where=str(source.path),
            remedy="Open the pipeline from the folder again",
        )
    part = source.components[pipeline.denoiser_name]
    replaced = replaced or {}
    copied = {
        f"{other.name}/{name}": path
        for other in source.components.values()
        if other is not part and other.name not in replaced
        for name, path in other.files.items()
    }
    copied |= {f"{name}/{path.name}": path for name, new in replaced.items() for path in sorted(new.iterdir())}
    tensors = {} if part.name in replaced else _tensors_of(denoiser, part)
    needed = weights_nbytes(tensors) + sum(path.stat().st_size for path in copied.values()) + (4 << 20)
    with writing(output, overwrite, needed) as folder:
        hashes = {"model_index.json": write_text(folder / "model_index.json", _model_index(source, replaced))}
        for relative, path in copied.items():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            hashes[relative] = _copy(path, folder / relative)
        if part.name not in replaced:
            hashes |= _write_denoiser(folder / part.name, denoiser, part, tensors, max_shard_bytes)
        manifest = _manifest(source, part, folder, hashes, fields)
        write_text(folder / MANIFEST, manifest.to_json())
        sync_folders(folder)
        if probe is not None:
            written = denoiser if part.name not in replaced else _open_like(denoiser, folder / part.name)
            verify_checkpoint(folder, written, part.name, *probe)
        if finish is not None:
            finish(folder)
            sync_folders(folder)
    return manifest


def hash_model(folder: ModelFolder) -> Source:
    """Name a model by its folder and a hash over all files that belong to its pipeline."""
    digest = hashlib.sha256(file_sha256(folder.path / "model_index.json").encode())
    for part in sorted(folder.components.values(), key=lambda part: part.name):
        for name, path in sorted(part.files.items()):
            digest.update(f"\n{part.name}/{name} {file_sha256(path)}".encode())
    return Source(name=_folder_name(folder.path), sha256=digest.hexdigest())


def update_quality(folder: Path, quality: dict[str, Any]) -> Manifest:
    """Write measured quality into the manifest of a checkpoint, in one step."""
    manifest = read_manifest(folder)
    if not manifest.intact:
        raise CheckpointError(
            "The manifest was changed since it was written",
            where=str(folder / MANIFEST),
            remedy="Compress the model again",
        )
    manifest = manifest.model_copy(update={"quality": quality}).sealed()
    with locked(folder), disk_errors(folder, 1 << 20):
        temporary = folder / f".{MANIFEST}.{uuid.uuid4().hex[:8]}"
        try:
            write_text(temporary, manifest.to_json())
            os.replace(temporary, folder / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
    return manifest


def _model_index(source: ModelFolder, replaced: Mapping[str, Path]) -> str:
    """Return the source's `model_index.json`, with the class of a replaced scheduler."""
    text = (source.path / "model_index.json").read_text()
    if "scheduler" not in replaced:
        return text
    index = json.loads(text)
    index["scheduler"][1] = json.loads((replaced["scheduler"] / "scheduler_config.json").read_text())["_class_name"]
    return json.dumps(index, indent=2) + "\n"


def _tensors_of(denoiser: nn.Module, part: Component) -> dict[str, Tensor]:
    ours = tuple(f"{name}." for name, layer in denoiser.named_modules() if isinstance(layer, QuantLayer))
    stored = {name: tensor.dtype for name, tensor in part.tensors.items()}
    return {
        name: tensor if name.startswith(ours) else narrowed(tensor, stored.get(name))
        for name, tensor in denoiser.state_dict().items()
    }


def _write_denoiser(
    folder: Path, denoiser: nn.Module, part: Component, tensors: dict[str, Tensor], max_shard_bytes: int
) -> dict[str, str]:
    folder.mkdir()
    config = {key: value for key, value in part.config.items() if key not in ("_name_or_path", "quantization_config")}
    ours = DcompQuantizationConfig.from_denoiser(denoiser)
    plain = plain_config(denoiser, ours.cuts, config)
    if plain is None or ours.layers or ours.features:
        config["quantization_config"] = ours.to_dict()
    else:
        config = plain
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    hashes = {"config.json": write_text(folder / "config.json", text)}
    hashes |= write_weights(folder, tensors, max_shard_bytes, {"format": "pt", "dcomp.version": __version__})
    return {f"{part.name}/{name}": digest for name, digest in hashes.items()}


def _open_like(denoiser: nn.Module, folder: Path) -> nn.Module:
    options = {"dtype": denoiser.dtype, "use_safetensors": True, "local_files_only": True}
    with quiet():
        opened: nn.Module = type(denoiser).from_pretrained(folder, **options).eval()  # type: ignore[attr-defined]
    return opened


def _manifest(
    source: ModelFolder, part: Component, folder: Path, hashes: dict[str, str], fields: ManifestFields
) -> Manifest:
    weights = [folder / name for name in hashes if name.startswith(f"{part.name}/") and name.endswith(".safetensors")]
    headers = [read_safetensors_header(path) for path in weights]
    parameters = max(1, sum(tensor.numel for tensor in part.tensors.values()))
    stored = sum(tensor.nbytes for header in headers for tensor in header.tensors.values())
    return Manifest(
        dcomp_version=__version__,
        packages={name: version(name) for name in _PACKAGES},
        source=fields.source or hash_model(source),
        recipe=fields.recipe,
        calibration_sha256=fields.calibration_sha256,
        loras=fields.loras,
        timesteps=fields.timesteps,
        layers=dict(fields.layers),
        totals=Totals(
            bytes_original=source.nbytes,
            bytes_compressed=sum((folder / name).stat().st_size for name in hashes),
            denoiser_bytes_ratio=sum(path.stat().st_size for path in weights) / (4 * parameters),
            bits_per_param=8 * stored / parameters,
        ),
        quality=fields.quality,
        pruning=fields.pruning,
        guidance=fields.guidance,
        files=dict(sorted(hashes.items())),
    ).sealed()


def _copy(source: Path, target: Path) -> str:
    with source.open("rb") as reader, HashingFile(target) as writer:
        while chunk := reader.read(_COPY_BYTES):
            writer.write(chunk)
        return writer.close()


def _folder_name(path: Path) -> str:
    """Name a model without naming the machine: a hub cache entry by its repository, others by their folder."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return PurePosixPath(path).name
