"""LoRA adapters, fused into the float weights before anything looks at the model.

Reads safetensors only, checks every byte range and value first, and never believes that "loaded" means "applied": the
weights of the layers that an adapter touches are compared before and after. Refuses adapters that match no layer, that
change nothing, or that leave values that are not finite. Fuse first, quantize afterwards.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.components import quiet
from dcomp.calibrate.safetensors_file import Header, find_nonfinite, read_safetensors_header

_FITTING = "Use an adapter made for this architecture"
_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")


class AdapterError(UsageError):
    """An adapter that cannot be fused into this model."""


@dataclass(frozen=True)
class FusedAdapter:
    """What one adapter did.

    Attributes:
        name: file name of the adapter.
        sha256: of the file.
        layers: number of layers whose weights changed.
        components: pipeline components that have such layers, in order.
        ignored: matrix pairs of the file for which the model has no layer; 0 if all were used.
    """

    name: str
    sha256: str
    scale: float
    layers: int
    components: tuple[str, ...]
    ignored: int


def parse_adapter(spec: str) -> tuple[Path, float]:
    """Split `PATH[:scale]`; a path that exists as written wins.

    Raises:
        AdapterError: nothing there, a scale that is no usable number, or not one safetensors file.
    """
    path, scale = Path(spec), 1.0
    if not path.exists() and ":" in spec:
        head, _, tail = spec.rpartition(":")
        try:
            path, scale = Path(head), float(tail)
        except ValueError as error:
            raise _fault("The scale is not a number, or the path does not exist", spec, "Write PATH:0.8") from error
    if not math.isfinite(scale) or scale == 0:
        raise _fault(f"The scale {scale:g} cannot be used", spec, "Use a finite number other than 0")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise _fault(f"The folder holds {len(files)} safetensors files", str(path), "Name the file of the adapter")
        path = files[0]
    if not path.is_file():
        raise _fault("The adapter was not found", str(path), "Check the path")
    if path.suffix != ".safetensors":
        raise _fault("The adapter is no .safetensors file", str(path), "Convert it; pickled weights are not opened")
    return path, scale


def fuse_lora(
    pipe: Any, specs: Sequence[str], fit: Callable[[Any, Path], dict[str, Tensor] | None] | None = None
) -> tuple[FusedAdapter, ...]:
    """Fuse adapters into the weights of a diffusers pipeline, one after the other, and unload them.

    Args:
        pipe: a `DiffusionPipeline` with float weights, changed in place. After an error it must be opened again.
        specs: `PATH[:scale]` each.
        fit: returns the tensors of an adapter's file as this pipeline needs them, or None: as they are.

    Returns:
        One record per adapter, in the given order.

    Raises:
        AdapterError: a file or adapter that cannot be used; all files are checked before the first is fused.
        ModelError: a safetensors file that is damaged.
    """
    if not specs:
        return ()
    if not hasattr(pipe, "load_lora_weights"):
        raise _fault("This pipeline takes no adapters", type(pipe).__name__, "Leave --lora out")
    if importlib.util.find_spec("peft") is None:
        raise _fault("The package peft is not installed", "--lora", "Run `pip install 'dcomp[lora]'`")
    checked = [(*parse_adapter(spec), spec) for spec in specs]
    headers = [check_adapter(path) for path, _, _ in checked]
    with quiet():
        return tuple(
            _fuse(pipe, path, scale, header, fit) for (path, scale, _), header in zip(checked, headers, strict=True)
        )


def _fault(problem: str, where: str, remedy: str) -> AdapterError:
    return AdapterError(problem, where=where, remedy=remedy)


def check_adapter(path: Path) -> Header:
    """Read the header of an adapter's file and look at its values.

    Raises:
        AdapterError: a value is not finite, or there are no matrices of a LoRA.
        ModelError: the file is damaged.
    """
    header = read_safetensors_header(path)
    broken = next(find_nonfinite(header), None)
    if broken is not None:
        raise _fault(
            f"{broken.tensor} has {broken.count} values that are NaN or infinite", str(path), "Train or get it again"
        )
    if not any("lora" in name for name in header.tensors):
        raise _fault("The file holds no LoRA matrices", str(path), "Give a LoRA in the format of diffusers or PEFT")
    return header


def _fuse(
    pipe: Any, path: Path, scale: float, header: Header, fit: Callable[[Any, Path], dict[str, Tensor] | None] | None
) -> FusedAdapter:
    adapter = f"dcomp_{path.stem}".replace(".", "_")
    fitted = fit(pipe, path) if fit else None
    try:
        if fitted is not None:
            pipe.load_lora_weights(fitted, adapter_name=adapter)
        else:
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter, local_files_only=True)
        before = {name: _fingerprint(layer.get_base_layer()) for name, layer in _adapted(pipe)}
        components = [name for name in pipe.components if any(key.startswith(f"{name}.") for key in before)]
        if components:
            pipe.fuse_lora(components=components, lora_scale=scale, adapter_names=[adapter])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _fault(f"The adapter does not fit this model: {reason}", str(path), _FITTING) from error
    finally:
        pipe.unload_lora_weights()
    if not before:
        raise _fault("The adapter matches no layer of this model", str(path), _FITTING)
    after = {name: pipe.components[name.split(".")[0]].get_submodule(name.partition(".")[2]) for name in before}
    infinite = [name for name, layer in after.items() if not all(t.isfinite().all() for t in layer.parameters())]
    if infinite:
        raise _fault(f"Fusing at scale {scale:g} makes {infinite[0]} infinite", str(path), "Use a smaller scale")
    changed = [name for name, layer in after.items() if _fingerprint(layer) != before[name]]
    if not changed:
        raise _fault(
            f"The adapter changes no weight at scale {scale:g}", str(path), "Use a larger scale, or leave it out"
        )
    pairs = sum(name.endswith(_DOWN) for name in header.tensors)
    with path.open("rb") as file:
        digest = sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    touched = {name.split(".")[0] for name in changed}
    return FusedAdapter(
        path.name,
        digest.hexdigest(),
        scale,
        len(changed),
        tuple(name for name in components if name in touched),
        max(0, pairs - len(before)),
    )


def _adapted(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Layers that an adapter wraps now, as `component.layer`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for component, model in pipe.components.items():
        if isinstance(model, nn.Module):
            for name, layer in model.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    yield f"{component}.{name}", layer


def _fingerprint(layer: nn.Module) -> str:
    digest = sha256()
    for parameter in layer.parameters():
        digest.update(_bytes(parameter.detach()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat: memoryview = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
    return flat
