"""Check a pipeline folder before anything in it is loaded.

Every file is hostile until it passed: names that lead outside the folder, links, oversized or damaged JSON, indexes,
safetensors headers, and a denoiser whose config does not describe its weights are refused with the place and a remedy.
Weights must be safetensors; pickled files beside them are ignored and never copied. Code inside a model folder is
never run. What passes is described by `ModelFolder`, which lists exactly the files that belong to the pipeline.

Linked files may point to the `blobs` folder of the same model in a Hugging Face cache and nowhere else outside.
"""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcomp.calibrate.config_match import check_buildable, check_config_matches
from dcomp.calibrate.safetensors_file import (
    Header,
    ModelError,
    NonFinite,
    TensorInfo,
    find_nonfinite,
    read_json_object,
    read_safetensors_header,
)

__all__ = [
    "Component",
    "Header",
    "ModelError",
    "ModelFolder",
    "NonFinite",
    "TensorInfo",
    "check_finite",
    "check_model_folder",
    "find_nonfinite",
    "read_json_object",
    "read_safetensors_header",
]

MODEL_INDEX = "model_index.json"
MAX_INDEX_BYTES = 1 << 20
MAX_FILES = 10_000
MAX_DEPTH = 4
DENOISERS = ("unet", "transformer")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz")
# Never read and never copied: code, other frameworks' weights, and pickles that have a safetensors twin.
IGNORED = (*PICKLES, ".py", ".pyc", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".xml", ".gguf")
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_AGAIN = "Download or copy the model again"


@dataclass(frozen=True)
class Component:
    """One checked part of a pipeline.

    Attributes:
        files: name below the component's folder -> the real file to read or copy; a weight variant appears under the
            plain name that a pipeline without variant asks for.
        weights: shard file name -> its header, empty for parts without weights.
    """

    name: str
    library: str
    class_name: str
    path: Path
    config: dict[str, Any]
    files: dict[str, Path]
    weights: dict[str, Header]
    variant: str | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of all shards by name."""
        return {name: tensor for header in self.weights.values() for name, tensor in header.tensors.items()}

    @property
    def quant_method(self) -> str | None:
        """The quantization method named in the config, if any."""
        section = self.config.get("quantization_config")
        return str(section.get("quant_method")) if isinstance(section, dict) else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files of this component."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline folder whose files passed the checks."""

    path: Path
    class_name: str
    components: dict[str, Component]
    denoiser_name: str

    @property
    def denoiser(self) -> Component:
        """The component that the scheduler calls."""
        return self.components[self.denoiser_name]

    @property
    def variant(self) -> str | None:
        """The weight variant (such as "fp16") that must be named when loading, if the plain weights are absent."""
        return next((part.variant for part in self.components.values() if part.variant), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the pipeline, `model_index.json` included."""
        return (self.path / MODEL_INDEX).stat().st_size + sum(part.nbytes for part in self.components.values())


def check_model_folder(path: str | Path, *, match_weights: bool = True) -> ModelFolder:
    """Check a local pipeline folder and describe it.

    Args:
        path: folder with a `model_index.json`.
        match_weights: also build each diffusers model on the meta device and compare it with its weights.

    Raises:
        ModelError: the first thing that is wrong, with its place and a remedy.
    """
    folder = _open_folder(Path(path))
    index = read_json_object(_inside(folder / MODEL_INDEX, folder), max_bytes=MAX_INDEX_BYTES)
    where = str(folder / MODEL_INDEX)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or not class_name.isidentifier():
        raise _fault(
            "'_class_name' must name a pipeline class of diffusers",
            where,
            "Use a folder written by save_pretrained; code from a model is never run",
        )
    _require_pipeline_class(class_name, where)
    components = {
        name: _read_component(folder, name, *entry)
        for name, entry in ((name, _index_entry(name, value, where)) for name, value in index.items())
        if entry is not None
    }
    denoiser_name = next((name for name in DENOISERS if name in components), None)
    if denoiser_name is None or not components[denoiser_name].weights:
        raise _fault(
            f"The pipeline has no denoiser: none of {' and '.join(DENOISERS)} is a model",
            where,
            "Use a pipeline with a U-Net or a diffusion transformer",
        )
    if components[denoiser_name].library != "diffusers":
        raise _fault(
            f"The denoiser comes from {components[denoiser_name].library!r}, not from diffusers",
            where,
            "Use a pipeline whose denoiser is a diffusers model",
        )
    for part in components.values() if match_weights else ():
        if part.library == "diffusers" and part.weights:
            # The quantizer that opens a quantized model knows its tensors; here only the size of the build is bounded.
            check = check_config_matches if part.quant_method is None else check_buildable
            check(part.class_name, part.config, part.tensors, str(part.path / "config.json"))
    return ModelFolder(folder, class_name, components, denoiser_name)


def check_finite(component: Component, *, shown: int = 4) -> None:
    """Read all weights of a component once and refuse NaN and infinity, naming the layers.

    Raises:
        ModelError: the first `shown` tensors with their counts.
    """
    faults = [fault for header in component.weights.values() for fault in find_nonfinite(header)]
    if faults:
        listing = ", ".join(f"{fault.tensor} ({fault.count} of {fault.numel} values)" for fault in faults[:shown])
        more = f", and {len(faults) - shown} more" if len(faults) > shown else ""
        raise _fault(
            f"Weights are NaN or infinite: {listing}{more}",
            faults[0].file,
            f"{_AGAIN}; if it came like this, it was broken when it was saved",
        )


def _read_component(folder: Path, name: str, library: str, class_name: str) -> Component:
    """Check the files of one component: links, config, weight index and headers."""
    path = _inside(folder / name, folder)
    if not path.is_dir():
        raise _fault(f"{MODEL_INDEX} names the component {name!r}, which has no folder", path)
    files = _list_files(path, folder)
    described = [candidate for candidate in _CONFIGS if candidate in files]
    config = read_json_object(files[described[0]]) if described else {}
    chosen = _find_weights(path, files, library) if "config.json" in files else None
    if chosen is None and described == ["config.json"]:
        raise _no_weights(path, files)
    if chosen is None:
        return Component(name, library, class_name, path, config, _files_to_keep(files, None), {})
    if "adapter_config.json" in files:
        raise _fault(
            f"The component {name!r} contains an adapter",
            path,
            "Fuse the adapter into the weights and save the pipeline again",
        )
    weights = {shard: read_safetensors_header(files[shard]) for shard in chosen.shards}
    if chosen.index:
        _check_weight_map(files[chosen.index], weights)
    kept = _files_to_keep(files, chosen)
    return Component(name, library, class_name, path, config, kept, weights, chosen.variant)


@dataclass(frozen=True)
class _Weights:
    """Which files of a component hold its weights."""

    index: str | None
    shards: tuple[str, ...]
    variant: str | None = None


def _open_folder(path: Path) -> Path:
    remedy = f"Give the folder of a diffusers pipeline, the one that contains {MODEL_INDEX}"
    try:
        folder = path.expanduser().resolve()
        exists, is_folder = folder.exists(), folder.is_dir()
        entries = os.listdir(folder) if is_folder else []
    except (OSError, RuntimeError, ValueError) as error:
        raise _fault("The model folder cannot be read", path, remedy) from error
    if not exists:
        raise _fault("The model folder does not exist", path, remedy)
    if not is_folder:
        raise _fault(
            "The model is a single file",
            path,
            "Convert it to a folder with the pipeline class's from_single_file(...).save_pretrained(FOLDER)",
        )
    if not entries:
        raise _fault("The model folder is empty", path, remedy)
    if MODEL_INDEX not in entries:
        pickled = next((entry for entry in sorted(entries) if entry.endswith(PICKLES)), None)
        if pickled:
            raise _pickled(folder / pickled)
        raise _fault(f"The folder has no {MODEL_INDEX}", path, remedy)
    return folder


def _require_pipeline_class(class_name: str, where: str) -> None:
    import diffusers  # here because `dcomp --help` must stay light

    try:
        found = getattr(diffusers, class_name, None)
    except Exception as error:  # the lazy module imports the class's file, which may lack an optional package
        raise _fault(
            f"diffusers cannot provide {class_name}: {str(error)[:200]}", where, "Install what this pipeline needs"
        ) from error
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise _fault(
            f"{class_name!r} is no pipeline class of this diffusers",
            where,
            "Check the name or update diffusers; code from model folders is never run",
        )


def _index_entry(name: str, value: Any, where: str) -> tuple[str, str] | None:
    """Return (library, class) of a component; None for settings, private keys and absent components."""
    if name.startswith("_") or not isinstance(value, list):
        return None
    if value in ([None, None], []):
        return None
    if not _COMPONENT.fullmatch(name):
        raise _fault(
            f"The component name {name[:80]!r} is no plain folder name",
            where,
            "Component folders must lie directly inside the model folder",
        )
    if len(value) != 2 or not all(isinstance(part, str) and part.isidentifier() for part in value):
        raise _fault(f"The entry of component {name!r} must be a library and a class", where)
    library, class_name = value
    if library not in ("diffusers", "transformers") and not _is_pipeline_module(library):
        raise _fault(
            f"Component {name!r} needs code from {library!r}",
            where,
            "Only diffusers and transformers classes are opened; code that comes with a model is never run",
        )
    return library, class_name


def _is_pipeline_module(library: str) -> bool:
    from diffusers import pipelines  # an entry such as "stable_diffusion" means diffusers.pipelines.stable_diffusion

    return library in pipelines._import_structure or (Path(pipelines.__file__).parent / library).is_dir()


def _inside(path: Path, folder: Path) -> Path:
    """Resolve a path and refuse it unless it stays inside the folder or in the blobs of the same hub cache entry."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _fault("The path cannot be resolved", path) from error
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    if target.is_relative_to(folder) or (blobs is not None and target.is_relative_to(blobs)):
        return target
    raise _fault(
        "The path points outside the model folder", path, "Copy the real file into the folder in place of the link"
    )


def _list_files(path: Path, folder: Path) -> dict[str, Path]:
    """Return name below `path` -> real file of all files that matter, in name order."""
    found: dict[str, Path] = {}
    pending = [(path, "", 0)]
    while pending:
        current, prefix, depth = pending.pop()
        for entry in sorted(os.listdir(current)):
            if entry.startswith(".") or entry == "__pycache__":
                continue
            real = _inside(current / entry, folder)
            if not real.exists():
                raise _fault("A link leads nowhere", current / entry)
            mode = real.stat().st_mode
            if stat.S_ISDIR(mode):
                if depth >= MAX_DEPTH:
                    raise _fault("Folders are nested too deep", current / entry)
                pending.append((current / entry, f"{prefix}{entry}/", depth + 1))
            elif not stat.S_ISREG(mode):
                raise _fault("This is not a regular file", current / entry)
            else:
                found[prefix + entry] = real
        if len(found) + len(pending) > MAX_FILES:
            raise _fault(f"The component has more than {MAX_FILES} files", path)
    return dict(sorted(found.items()))


def _find_weights(path: Path, files: dict[str, Path], library: str) -> _Weights | None:
    """Choose the weights the way diffusers and transformers would; None if there are none."""
    base = "diffusion_pytorch_model" if library == "diffusers" else "model"
    index, single = f"{base}.safetensors.index.json", f"{base}.safetensors"
    # transformers prefers the single file, diffusers the index.
    for candidate in (index, single) if library == "diffusers" else (single, index):
        if candidate in files:
            return _weights(candidate, files)
    pattern = re.compile(rf"{base}\.(?:([A-Za-z0-9_]+)\.safetensors|safetensors\.index\.([A-Za-z0-9_]+)\.json)")
    variants = {match[1] or match[2]: match[0] for match in map(pattern.fullmatch, files) if match}
    if len(variants) > 1:
        raise _fault(
            f"Several weight variants ({', '.join(sorted(variants))}) and no plain weights",
            path,
            f"Keep one of them, under the name {single}",
        )
    return next((_weights(candidate, files, variant) for variant, candidate in variants.items()), None)


def _no_weights(path: Path, files: dict[str, Path]) -> ModelError:
    pickled = next((name for name in files if name.endswith(PICKLES)), None)
    if pickled:
        return _pickled(path / pickled)
    return _fault("There are no safetensors weights beside config.json", path)


def _weights(name: str, files: dict[str, Path], variant: str | None = None) -> _Weights:
    if not name.endswith(".json"):
        return _Weights(None, (name,), variant)
    content = read_json_object(files[name])
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise _fault("The shard index needs the objects 'metadata' and 'weight_map'", files[name])
    shards = sorted({value if isinstance(value, str) else repr(value) for value in weight_map.values()})
    for shard in shards:
        if shard != os.path.basename(shard) or "\\" in shard or not shard.endswith(".safetensors"):
            raise _fault(
                f"The shard index points to {shard[:80]!r}, which is no plain safetensors file name",
                files[name],
                "Shards must lie beside their index",
            )
        if shard not in files:
            raise _fault(f"The shard {shard[:80]!r} of the index is missing", files[name])
    return _Weights(name, tuple(shards), variant)


def _check_weight_map(index_path: Path, weights: dict[str, Header]) -> None:
    content = read_json_object(index_path)
    owners = {tensor: shard for shard, header in weights.items() for tensor in header.tensors}
    if sum(len(header.tensors) for header in weights.values()) != len(owners):
        raise _fault("A tensor is stored in two shards", index_path)
    wrong = sorted(name for name in owners.keys() ^ content["weight_map"].keys()) or sorted(
        name for name, shard in owners.items() if content["weight_map"][name] != shard
    )
    if wrong:
        problem = (
            f"The shard index disagrees with the shards about {len(wrong)} tensor(s), the first is {wrong[0][:80]!r}"
        )
        raise _fault(problem, index_path)
    total = sum(tensor.nbytes for header in weights.values() for tensor in header.tensors.values())
    claimed = content["metadata"].get("total_size", total)
    # Some writers count tied tensors twice or leave the size out, so only nonsense is refused.
    if isinstance(claimed, bool) or not isinstance(claimed, int | float) or not total / 2 <= claimed <= total * 2 + 1:
        problem = f"The shard index claims {str(claimed)[:40]} bytes of weights, the shards hold {total}"
        raise _fault(problem, index_path)


def _files_to_keep(files: dict[str, Path], chosen: _Weights | None) -> dict[str, Path]:
    """Keep what loading needs: the chosen weights and no others; a variant goes under its plain name."""
    kept: dict[str, Path] = {}
    for name, path in files.items():
        is_weight = name.endswith((".safetensors", *IGNORED)) or (".index." in name and name.endswith(".json"))
        if is_weight and (chosen is None or name not in (chosen.index, *chosen.shards)):
            continue
        # Shards keep their names, which the index lists.
        renamed = chosen is not None and chosen.variant is not None and name == (chosen.index or chosen.shards[0])
        kept[name.replace(f".{chosen.variant}.", ".") if chosen and renamed else name] = path
    return kept


def _fault(problem: str, where: Path | str, remedy: str = _AGAIN) -> ModelError:
    return ModelError(problem, where=str(where), remedy=remedy)


def _pickled(path: Path) -> ModelError:
    return _fault(
        "The weights are pickled, which can run code when opened, so they are not read",
        path,
        "Convert them where you trust them: load the pipeline with diffusers and call "
        "save_pretrained(FOLDER, safe_serialization=True)",
    )
