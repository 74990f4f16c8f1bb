"""What this machine will use for each operation and for the layers of a checkpoint, and why."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import torch

from dcomp import UsageError, __version__
from dcomp.kernels import build_cache, dispatch
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as compiler
from dcomp.kernels.cuda import driver, loaded, self_test
from dcomp.kernels.cuda.driver import DriverError

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "accelerate", "peft", "datasets")
EXTRAS = {
    "peft": "dcomp[lora]",
    "optuna": "dcomp[evolve]",
    "datasets": "dcomp[datasets]",
    "optimum-quanto": "dcomp[quanto]",
    "bitsandbytes": "dcomp[bnb]",
}


def examine(checkpoint: str | Path | None = None, pattern: str = "*") -> dict[str, Any]:
    """Return facts about packages, processor, memory, disk, GPUs and the chosen implementation of each operation.

    Where there is a GPU, kernels for it are compiled and tested now, unless that was done before.

    Args:
        checkpoint: folder whose layers shall be told as well; no weights are read.
        pattern: of names of layers, as `*.attn1.*`.

    Raises:
        CheckpointError, ModelError: the folder is not a checkpoint that can be opened.
        UsageError: no quantized layer matches.
    """
    devices = ["cpu", *(_gpus() or ["cuda"])]
    layers = [] if checkpoint is None else explain_layers(checkpoint, pattern, devices)
    kernels = dispatch.explain(devices)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    interesting = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
    return {
        "schema_version": 1,
        "dcomp": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": {
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "features": [f for f in interesting if capabilities.get(f)],
        },
        "memory_bytes": psutil.virtual_memory().total,
        "memory_free_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "cuda": _cuda(),
        "built": _built(),
        "kernels": kernels,
        "layers": layers,
        "missing_extras": {name: extra for name, extra in EXTRAS.items() if _version(name) is None},
        "settings": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA") if key in os.environ},
    }


def explain_layers(checkpoint: str | Path, pattern: str, devices: Sequence[str]) -> list[dict[str, str]]:
    """Return which row of the dispatch table runs the operations of layers of a checkpoint, and why not a faster one.

    Args:
        checkpoint: folder that `dcomp quantize` wrote; no weights are read.
        pattern: of names of layers.
        devices: as `dispatch.explain` takes them.

    Raises:
        CheckpointError, ModelError: the folder is not a checkpoint that can be opened.
        UsageError: no quantized layer matches.
    """
    from dcomp.calibrate.model_files import check_model_folder
    from dcomp.compress.loader import QUANT_METHOD, empty_denoiser
    from dcomp.compress.split import parts_of, quantized_layers

    denoiser = check_model_folder(checkpoint, match_weights=False).denoiser
    layers = quantized_layers(empty_denoiser(denoiser)) if denoiser.quant_method == QUANT_METHOD else {}
    found = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
    if not found:
        shown = ", ".join(list(layers)[:3])
        raise UsageError(
            f"No quantized layer matches {pattern!r}",
            where=str(checkpoint),
            remedy=f"Use a pattern of names, such as {shown}." if layers else "Name a folder that dcomp quantized.",
        )
    lines = []
    for name, layer in found.items():
        # Parts of a split layer run the same operations, on fewer channels.
        operations = max((part.operations() for part in parts_of(layer)), key=_reduction)
        for device in devices:
            for operation, asked in operations.items():
                choice = dispatch.choose(operation, device=device, **asked)
                lines.append(
                    {
                        "layer": name,
                        "scheme": layer.scheme.label,
                        "operation": operation,
                        "device": device,
                        "row": choice.row,
                        "reason": choice.reason,
                    }
                )
    return lines


def _reduction(operations: dict[str, dict[str, Any]]) -> int:
    return max(int(weight.get("reduction", 1)) for weight in operations.values())


def _gpus() -> list[str]:
    try:
        return [f"cuda:{index}" for index in range(driver.count())]
    except DriverError:
        return []


def _cuda() -> dict[str, Any]:
    """Return what our CUDA kernels need, and of each device what they found there; or why it is not there."""
    facts: dict[str, Any] = {"torch": torch.version.cuda}
    try:
        facts["driver"] = "{}.{}".format(*driver.version())
    except DriverError as error:
        return facts | {"driver": None, "problem": str(error), "compiler": None, "devices": []}
    try:
        nvrtc = compiler.nvrtc()
        facts["compiler"] = "NVRTC {}.{} ({})".format(*nvrtc.version, nvrtc.name)
    except BuildError as error:
        facts |= {"compiler": None, "problem": str(error)}
    facts["devices"] = [_device(index) for index in range(driver.count())]
    return facts


def _device(index: int) -> dict[str, Any]:
    device, known = driver.device(index), self_test.known(index)
    return {
        "name": device.name,
        "compute_capability": "{}.{}".format(*device.capability),
        "problem": loaded.defect(index),
        "tested_kernels": sorted(name for name, problem in known.items() if problem is None),
        "unusable_kernels": {name: problem for name, problem in known.items() if problem is not None},
    }


def _built() -> dict[str, Any]:
    """Return where kernels are kept that were compiled here, and how much there is."""
    try:
        folder, problem = str(build_cache.folder()), None
    except BuildError as error:
        folder, problem = None, str(error)
    files, nbytes = build_cache.usage()
    return {"folder": folder, "problem": problem, "files": files, "bytes": nbytes}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
