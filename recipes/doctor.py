"""What this machine will use for each operation, and why."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch

from dcomp import __version__
from dcomp.kernels import dispatch

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "accelerate", "peft", "datasets")
EXTRAS = {
    "peft": "dcomp[lora]",
    "optuna": "dcomp[evolve]",
    "datasets": "dcomp[datasets]",
    "optimum-quanto": "dcomp[quanto]",
    "bitsandbytes": "dcomp[bnb]",
}


def examine() -> dict[str, Any]:
    """Return facts about packages, processor, memory, disk and the chosen implementation of each operation."""
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
        "kernels": dispatch.explain(),
        "missing_extras": {name: extra for name, extra in EXTRAS.items() if _version(name) is None},
        "settings": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA") if key in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
