"""Write a compressed checkpoint folder, completely or not at all.

The folder is built beside its final place under a temporary name, synced to the disk, reopened by a fresh process and
only then renamed. A killed run leaves the old folder, the new one, or a temporary folder that the next run removes. A
lock keeps a second writer out. Everything but the denoiser is copied byte for byte; pickled files and code are left
behind. No file holds a time or a path, so equal inputs give equal bytes.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from filelock import FileLock, Timeout
from torch import Tensor, nn

from dcomp import UsageError, __version__
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
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGES = ("dcomp", "torch", "diffusers", "transformers", "safetensors")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class OutputError(UsageError):
    """An output folder that cannot be used."""


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
        quality: measured quality, if any.
        source: name and hash of the original model; hashed here when it is not given.
    """

    recipe: dict[str, Any]
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    calibration_sha256: str | None = None
    loras: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    source: Source | None = None


def write_checkpoint(
    pipeline: PipelineLike,
    output: Path,
    fields: ManifestFields,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replaced: Mapping[str, Path] | None = None,
    probe: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
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

    Returns:
        The manifest that was written.

    Raises:
        OutputError: the output exists and may not be replaced, or overlaps the source.
        CheckpointError: another writer, a full disk, or a folder that did not pass the fresh process.
    """
    output = Path(os.path.abspath(output.expanduser()))
    source = check_model_folder(pipeline.source, match_weights=False)
    _refuse_overlap(output, source.path)
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
    with _writing(output, overwrite, needed) as folder:
        hashes = {"model_index.json": write_text(folder / "model_index.json", _model_index(source, replaced))}
        for relative, path in copied.items():
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            hashes[relative] = _copy(path, folder / relative)
        if part.name not in replaced:
            hashes |= _write_denoiser(folder / part.name, denoiser, part, tensors, max_shard_bytes)
        manifest = _manifest(source, part, folder, hashes, fields)
        write_text(folder / MANIFEST, manifest.to_json())
        _sync_folders(folder)
        if probe is not None:
            written = denoiser if part.name not in replaced else _open_like(denoiser, folder / part.name)
            verify_checkpoint(folder, written, part.name, *probe)
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
    with _lock(folder), _disk_errors(folder, 1 << 20):
        temporary = folder / f".{MANIFEST}.{uuid.uuid4().hex[:8]}"
        try:
            write_text(temporary, manifest.to_json())
            os.replace(temporary, folder / MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(folder)
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
    config["quantization_config"] = DcompQuantizationConfig.from_denoiser(denoiser).to_dict()
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
        layers=dict(fields.layers),
        totals=Totals(
            bytes_original=source.nbytes,
            bytes_compressed=sum((folder / name).stat().st_size for name in hashes),
            denoiser_bytes_ratio=sum(path.stat().st_size for path in weights) / (4 * parameters),
            bits_per_param=8 * stored / parameters,
        ),
        quality=fields.quality,
        files=dict(sorted(hashes.items())),
    ).sealed()


@contextmanager
def _writing(output: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """Give a temporary folder that becomes `output` when the block ends, and vanishes when it raises."""
    with _disk_errors(output, needed):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _lock(output):
            _clean_up(output)
            check_output(output, overwrite)
            free = shutil.disk_usage(output.parent).free
            if free < needed:
                raise _disk_full(output, needed, free)
            temporary = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
            temporary.mkdir()
            try:
                yield temporary
                _publish(temporary, output)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _disk_errors(output: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise _disk_full(output, needed, shutil.disk_usage(_existing(output)).free) from error
        raise CheckpointError(
            f"The checkpoint cannot be written: {error.strerror or error}",
            where=str(output),
            remedy="Check the permissions of the output folder",
        ) from error


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    lock = FileLock(f"{output}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            "Another process is writing this checkpoint",
            where=str(output),
            remedy="Wait until it is done, or choose another output",
        ) from error
    try:
        yield
    finally:
        # While it is held: a process that waits for a removed lock file notices and starts over.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_output(output: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuse an output that exists, unless it is a dcomp checkpoint that may be replaced.

    Args:
        output: folder to make.
        overwrite: whether a checkpoint may be replaced.
        source: folder that it is made from; the two may not overlap.

    Raises:
        OutputError: says what is in the way.
    """
    if source is not None and source.is_dir():
        _refuse_overlap(output, source)
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError("The output is not a folder", where=str(output), remedy="Choose another output")
    if not output.exists() or not os.listdir(output):
        return
    if not overwrite:
        raise OutputError("The output folder exists", where=str(output), remedy="Choose another output or --overwrite")
    if not (output / MANIFEST).is_file() or not (output / "model_index.json").is_file():
        raise OutputError(
            "The output folder is no dcomp checkpoint, so it is not replaced",
            where=str(output),
            remedy="Remove it yourself or choose another output",
        )


def _refuse_overlap(output: Path, source: Path) -> None:
    one, other = output.resolve(), source.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise OutputError(
            "The output would overlap the model it is made from",
            where=str(output),
            remedy="Choose an output outside of the model folder",
        )


def _clean_up(output: Path) -> None:
    """Remove what a killed run left; put an old folder back that was moved away and never replaced."""
    for entry in os.scandir(output.parent):
        if entry.name.startswith(f".{output.name}.replaced-") and not output.exists():
            os.replace(entry.path, output)
        elif entry.name.startswith((f".{output.name}.partial-", f".{output.name}.replaced-")):
            shutil.rmtree(entry.path)


def _publish(temporary: Path, output: Path) -> None:
    """Give the new folder its name; the old one, if any, ends under the temporary name."""
    if not output.exists() or not os.listdir(output):
        os.replace(temporary, output)
    elif not _exchange(temporary, output):
        old = output.parent / f".{output.name}.replaced-{uuid.uuid4().hex[:8]}"
        os.replace(output, old)
        os.replace(temporary, output)
        shutil.rmtree(old, ignore_errors=True)
    _sync(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step, where the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _copy(source: Path, target: Path) -> str:
    with source.open("rb") as reader, HashingFile(target) as writer:
        while chunk := reader.read(_COPY_BYTES):
            writer.write(chunk)
        return writer.close()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folders(folder: Path) -> None:
    for current, _, _ in os.walk(folder):
        _sync(Path(current))


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _disk_full(output: Path, needed: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"The disk is full: {needed} bytes are needed and {free} are free",
        where=str(output),
        remedy="Free some space or choose an output on another disk; nothing was left behind",
    )


def _folder_name(path: Path) -> str:
    """Name a model without naming the machine: a hub cache entry by its repository, others by their folder."""
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return PurePosixPath(path).name
