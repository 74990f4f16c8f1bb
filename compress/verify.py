"""Reopen a written checkpoint in a fresh process and compare it with what was promised.

The parent stores one denoiser call and its result; the child knows nothing but the folder. It compares every file with
the manifest, opens the folder with plain diffusers after `import dcomp`, repeats the call and compares the results bit
for bit. Both run with the same number of threads, because the order of float additions depends on it.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.tree_file import decode, encode, open_tensors, read_description, write_tree_file
from dcomp.compress.layers import QuantLayer
from dcomp.compress.manifest import CheckpointError, find_differences, read_manifest

TIMEOUT_SECONDS = 3600.0
_FORMAT = "verify-1"
_ALIGNMENT = 64  # bytes; that of torch's allocator


def verify_checkpoint(
    folder: Path,
    denoiser: nn.Module,
    denoiser_name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Run one call here and in a fresh process that opens the folder, and require equal bits.

    Args:
        folder: a complete checkpoint.
        denoiser: the denoiser that was written, in memory, on the CPU.
        denoiser_name: its name in the pipeline.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        timeout: seconds after which the fresh process is given up.

    Raises:
        CheckpointError: the process failed, a file differs from the manifest, or a bit differs.
    """
    with tempfile.TemporaryDirectory(prefix="dcomp-verify-") as work:
        probe = Path(work) / "probe.safetensors"
        save_probe(probe, denoiser, denoiser_name, args, kwargs)
        result = _run_child(folder, probe, timeout)
    if result.get("problem"):
        raise _failed(str(result["problem"]))
    if result.get("differences"):
        raise _failed("; ".join(result["differences"]))
    if result.get("equal") is not True:
        raise _failed(f"a denoiser call gives another result, by up to {result.get('max_difference')}")


def save_probe(
    path: Path, denoiser: nn.Module, denoiser_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Store one call of a denoiser and its result."""
    tensors: dict[str, Tensor] = {}
    description = {
        "format": _FORMAT,
        "denoiser": denoiser_name,
        "threads": torch.get_num_threads(),
        "dtype": str(_float_dtype(denoiser)),
        "args": encode(args, tensors, "args"),
        "kwargs": encode(kwargs, tensors, "kwargs"),
        "output": encode(call_denoiser(denoiser, args, kwargs), tensors, "output"),
    }
    write_tree_file(path, description, tensors)


def call_denoiser(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a denoiser with its layers' own clocks attached, and return the prediction."""
    _align(denoiser)
    clocks = {id(clock): clock for layer in denoiser.modules() if (clock := getattr(layer, "clock", None)) is not None}
    with contextlib.ExitStack() as attached, torch.inference_mode():
        for clock in clocks.values():
            attached.enter_context(clock.attach(denoiser))
        output = denoiser(*args, **{**kwargs, "return_dict": False})
    prediction: Tensor = output[0]
    return prediction


def _align(denoiser: nn.Module) -> None:
    """Move tensors that are mapped from a file to where the allocator would put them.

    Products over memory at odd addresses may add up in another order, and two files have theirs at different ones.
    """
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if type(tensor.data) is Tensor and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def compare(folder: Path, probe: Path) -> dict[str, Any]:
    """Do the fresh process's work and return what it prints."""
    differences = find_differences(folder, read_manifest(folder), deep=True)
    if differences:
        return {"differences": differences}
    description = read_description(probe)
    torch.set_num_threads(int(description["threads"]))
    tensor = open_tensors(probe)
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, str(description["dtype"]).removeprefix("torch."))
    pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    args, kwargs = decode(description["args"], tensor), decode(description["kwargs"], tensor)
    found = call_denoiser(getattr(pipe, description["denoiser"]), args, kwargs)
    expected = decode(description["output"], tensor)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return {"equal": False, "max_difference": f"{found.dtype} {list(found.shape)}"}
    equal = torch.equal(_bits(found), _bits(expected))
    return {"equal": equal, "max_difference": (found.double() - expected.double()).abs().max().item()}


def _float_dtype(denoiser: nn.Module) -> torch.dtype:
    """Return the dtype of the layers that stayed in float; those of quantized layers never change."""
    layers = (layer for layer in denoiser.modules() if not isinstance(layer, QuantLayer))
    floats = (p.dtype for layer in layers for p in layer.parameters(recurse=False) if p.is_floating_point())
    return next(floats, torch.float32)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _run_child(folder: Path, probe: Path, timeout: float) -> dict[str, Any]:
    # -P keeps the working folder off the child's path; an inherited PYTHONPATH could shadow the installed package.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-m", "dcomp.compress.verify", str(folder), str(probe)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=probe.parent
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(f"the fresh process did not answer within {timeout:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1])
        assert isinstance(result, dict)
    except (IndexError, ValueError, AssertionError) as error:
        tail = " ".join(done.stderr.strip().splitlines()[-3:])[-400:]
        raise _failed(f"the fresh process ended with code {done.returncode}: {tail}") from error
    return result


def _failed(reason: str) -> CheckpointError:
    return CheckpointError(
        f"The written checkpoint failed its check in a fresh process: {reason}",
        remedy="Nothing was published; run `dcomp doctor`, then compress the model again",
    )


def _main(folder: str, probe: str) -> None:
    try:
        result = compare(Path(folder), Path(probe))
    except DcompError as error:
        result = {"problem": str(error)}
    except Exception as error:  # the parent must hear of whatever diffusers raises
        result = {"problem": f"{type(error).__name__}: {str(error)[:400]}"}
    print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
