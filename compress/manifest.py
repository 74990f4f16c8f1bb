"""The manifest `dcomp.json` of a compressed checkpoint: what was done, what it cost, and the hash of every file.

It is read as untrusted input: bounded, no unknown fields, paths that stay inside the folder. `sha256` covers the
manifest itself, so that an edit by hand is noticed; it protects against damage and mistakes, not against an attacker
who can write the folder and knows how to hash.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dcomp import DcompError
from dcomp.calibrate.model_files import ModelError, read_json_object
from dcomp.calibrate.tree_file import file_sha256

MANIFEST = "dcomp.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 16 << 20
_LOADABLE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".gguf", ".index.json")
_REMAKE = "Download the checkpoint again or compress the model again"

Text = Annotated[str, Field(max_length=4096)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class CheckpointError(DcompError):
    """A compressed checkpoint that cannot be written, or cannot be trusted as it is."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Source(_Part):
    """The model that was compressed: its folder name, and a hash over all of its files."""

    name: Text
    sha256: Hash


class LayerRecord(_Part):
    """What became of one linear or convolution layer.

    Attributes:
        scheme: label such as "W4A8", or None for a layer left in float; `reason` then says why.
        weight_error: relative error of the weight, `|W - W^| / |W|`.
        output_error: relative error of the layer's output on recorded inputs.
        error_by_step: the same at each recorded timestep, noisiest first; empty where it was not measured.
        remarks: on channels and ranges without information.
        position: place in the order of execution, from 0; None in manifests of older versions.
    """

    role: Text
    scheme: Text | None = None
    weight_bits: Annotated[float, Field(gt=0, le=64)]
    input_bits: Annotated[float, Field(gt=0, le=64)]
    bytes_before: Count
    bytes_after: Count
    weight_error: Annotated[float, Field(ge=0)] | None = None
    output_error: Annotated[float, Field(ge=0)] | None = None
    error_by_step: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=10_000)] = []
    reason: Text | None = None
    remarks: Annotated[list[Text], Field(max_length=1_000)] = []
    position: Count | None = None


class Totals(_Part):
    """Sizes of the whole.

    Attributes:
        bytes_original: all files of the source pipeline.
        bytes_compressed: all files of the checkpoint but the manifest.
        denoiser_bytes_ratio: denoiser weight files against 4 bytes per original parameter.
        bits_per_param: bits of the denoiser's stored tensors, scales included, per original parameter.
    """

    bytes_original: Count
    bytes_compressed: Count
    denoiser_bytes_ratio: Annotated[float, Field(ge=0)]
    bits_per_param: Annotated[float, Field(ge=0)]


class Manifest(_Part):
    """The content of `dcomp.json`; `sha256` is the hash of all other fields.

    Attributes:
        timesteps: those of the layers' `error_by_step`, noisiest first; empty where they are not known.
        pruning: what was cut out of the source, and what that did; None if nothing was.
        guidance: scale of guidance that the denoiser has learned to predict with, in one context; None: it has not, and
            the pipeline guides it.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    dcomp_version: Text
    packages: Annotated[dict[Text, Text], Field(max_length=100)]
    source: Source
    recipe: dict[str, Any]
    calibration_sha256: Text | None = None
    loras: Annotated[list[dict[str, Any]], Field(max_length=100)] = []
    timesteps: Annotated[list[float], Field(max_length=10_000)] = []
    layers: Annotated[dict[Text, LayerRecord], Field(max_length=100_000)]
    totals: Totals
    quality: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    guidance: Annotated[float, Field(gt=1, le=1_000, allow_inf_nan=False)] | None = None
    files: Annotated[dict[Text, Hash], Field(max_length=10_000)]
    sha256: Text = ""

    def sealed(self) -> "Manifest":
        """Return a copy whose `sha256` fits its content."""
        return self.model_copy(update={"sha256": self._content_hash()})

    @property
    def intact(self) -> bool:
        """Whether `sha256` fits the content."""
        # A manifest of an older version lacks the keys that came later.
        return self.sha256 in (self._content_hash(), self._content_hash(as_read=True))

    def to_json(self) -> str:
        """Return the text of the file; equal manifests give equal text."""
        return json.dumps(self.model_dump(by_alias=True), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def _content_hash(self, as_read: bool = False) -> str:
        content = self.model_dump(by_alias=True, exclude={"sha256"}, exclude_unset=as_read)
        return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read `dcomp.json`; its own hash is checked by `check_manifest`.

    Raises:
        CheckpointError: not a dcomp checkpoint, or a manifest that is damaged or of an unknown schema.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        if (Path(folder) / "model_index.json").exists():
            raise CheckpointError(
                "This pipeline was not made by dcomp: it has no dcomp.json",
                where=str(folder),
                remedy="Open it with diffusers.DiffusionPipeline.from_pretrained, or compress it with `dcomp quantize`",
            )
        raise CheckpointError(
            "This is no compressed checkpoint: there is no dcomp.json",
            where=str(folder),
            remedy="Give the output folder of `dcomp quantize`",
        )
    try:
        content = read_json_object(path, max_bytes=MAX_MANIFEST_BYTES)
    except ModelError as error:
        raise CheckpointError(error.problem, where=error.where, remedy=_REMAKE) from error
    if content.get("schema") != SCHEMA:
        raise CheckpointError(
            f"The manifest has the schema {str(content.get('schema'))[:20]!r}, known is {SCHEMA}",
            where=str(path),
            remedy="Open it with the version of dcomp that wrote it",
        )
    try:
        manifest = Manifest.model_validate(content, strict=True)
    except (ValidationError, RecursionError) as error:
        raise CheckpointError(
            f"The manifest is damaged: {_first_fault(error)}", where=str(path), remedy=_REMAKE
        ) from error
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or len(parts) > 8:
            raise CheckpointError(
                f"The manifest lists {name[:80]!r}, which is no path inside the folder", where=str(path), remedy=_REMAKE
            )
    return manifest


def find_differences(folder: str | Path, manifest: Manifest, *, deep: bool = True) -> list[str]:
    """List how a folder differs from its manifest, by file name.

    Args:
        folder: the checkpoint.
        manifest: what `read_manifest` returned.
        deep: hash every file; otherwise weight files are only looked for.
    """
    root = Path(folder)
    differences = [] if manifest.intact else [f"{MANIFEST}: its own hash does not fit its content"]
    folders = {str(PurePosixPath(name).parent) for name in manifest.files} - {"."}
    for name, expected in sorted(manifest.files.items()):
        path = root / name
        if path.resolve().is_relative_to(root.resolve()) is False:
            differences.append(f"{name}: leads outside the folder")
        elif not path.is_file():
            differences.append(f"{name}: missing")
        elif (deep or not name.endswith(".safetensors")) and file_sha256(path) != expected:
            differences.append(f"{name}: its content has changed")
    for current, _, names in os.walk(root):
        inside = Path(current).relative_to(root).as_posix()
        for name in sorted(names):
            relative = name if inside == "." else f"{inside}/{name}"
            # A file that nobody listed may still be picked up by a loader: any in a component's folder, and code
            # or weights anywhere.
            if relative not in manifest.files and (inside in folders or name.lower().endswith(_LOADABLE)):
                differences.append(f"{relative}: not in the manifest")
    return differences


def check_manifest(folder: str | Path, deep: bool = True) -> Manifest:
    """Read the manifest of a checkpoint and compare it with the files.

    Raises:
        CheckpointError: the folder is no checkpoint, or differs from its manifest; every difference is named.
    """
    manifest = read_manifest(folder)
    differences = find_differences(folder, manifest, deep=deep)
    if differences:
        raise CheckpointError(
            f"The checkpoint is not what was written: {'; '.join(differences)}", where=str(folder), remedy=_REMAKE
        )
    return manifest


def _first_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part)[:60] for part in fault['loc'])}: {fault['msg'][:200]}"
    return "nested too deep"
