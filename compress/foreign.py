"""Other packages' weight formats behind the same command: optimum-quanto and bitsandbytes through diffusers.

What is written here opens in plain diffusers without dcomp. Only linear layers are quantized, because diffusers' own
quantizers know no others; activations stay float. Whether a format works on this machine is found out by doing the
whole job on a very small model in a process of its own, with a time limit, never by asking for names or versions.

Files are written again with aligned tensors, and layers whose rows no alignment helps stay float: torch's int8 weight
product with bfloat16 inputs reads aligned vectors, and kills the process on mapped weights that are not.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcomp import DcompError, UsageError
from dcomp.calibrate.components import quiet
from dcomp.calibrate.model_files import check_model_folder
from dcomp.calibrate.pipeline import OpenPipeline
from dcomp.compress.weight_files import MAX_SHARD_BYTES, narrowed, write_text, write_weights

WEIGHT_BITS = {"quanto": (8, 4), "bnb": (8, 4)}
PROBE_SECONDS = 300  # quanto compiles an extension at its first 4-bit product: 80 s on one slow core
_MODULES = {"quanto": ("optimum.quanto", "optimum-quanto"), "bnb": ("bitsandbytes", "bitsandbytes")}
_VECTOR_BYTES = 16
_INSTEAD = "Use --format dcomp, which runs everywhere"


class ForeignFormatError(UsageError):
    """A foreign weight format that cannot be used here or as asked."""


class ForeignWriteError(DcompError):
    """A foreign package that failed at its work on this model."""


@dataclass(frozen=True)
class ForeignResult:
    """A denoiser folder in a foreign format.

    Attributes:
        folder: the component's folder: config.json and aligned safetensors files.
        bytes: size of all its files.
        layers: number of quantized layers.
        left_float: names of linear and convolution layers that were not quantized, in order.
    """

    folder: Path
    format: str
    weight_bits: int
    bytes: int
    layers: int
    left_float: tuple[str, ...]


def check_foreign(format: str, weight_bits: int, device: str = "cpu", *, seconds: float = PROBE_SECONDS) -> None:
    """Make sure that this machine can quantize, save, reload and run a model in `format`.

    The first call for a format takes some seconds, or a minute where a package has to compile something; the result is
    kept for the life of the process.

    Raises:
        ForeignFormatError: unknown format, package not installed, or the trial failed; says why and what to do.
    """
    _require_known(format, weight_bits)
    module, package = _MODULES[format]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ForeignFormatError(
            f"The package {package} is not installed",
            where=f"--format {format}",
            remedy=f"Run `pip install 'dcomp[{format}]'`",
        )
    fault = _try_out(format, weight_bits, device, seconds)
    if fault is not None:
        raise ForeignFormatError(fault[0], where=f"--format {format}, {weight_bits} bit, {device}", remedy=fault[1])


def quantize_foreign(pipeline: OpenPipeline, format: str, weight_bits: int, folder: str | Path) -> ForeignResult:
    """Write the pipeline's denoiser, as it is in memory now, in a foreign format.

    The float layers keep the dtype of the source files where that loses nothing.

    Args:
        pipeline: an open pipeline, its denoiser in float; it is not changed.
        format: "quanto" or "bnb".
        weight_bits: 8 or 4.
        folder: the component's new folder; replaced if it exists.

    Raises:
        ForeignFormatError: format and bits do not go together, or the denoiser is quantized already.
        ForeignWriteError: the package failed, or found nothing to quantize.
    """
    _require_known(format, weight_bits)
    if getattr(pipeline.denoiser, "is_quantized", False):
        raise ForeignFormatError(
            "The denoiser is quantized already", where=pipeline.denoiser_name, remedy="Start from the original model"
        )
    stored = check_model_folder(pipeline.source, match_weights=False).denoiser.tensors
    narrow = {name: info.dtype for name, info in stored.items() if info.dtype in ("F16", "BF16")}
    return _quantize(pipeline.denoiser, format, weight_bits, Path(folder), narrow)


def _require_known(format: str, weight_bits: int) -> None:
    if weight_bits not in WEIGHT_BITS.get(format, ()):
        known = ", ".join(f"{name} ({' or '.join(map(str, bits))} bit)" for name, bits in WEIGHT_BITS.items())
        raise ForeignFormatError(
            f"There is no format {format!r} with {weight_bits}-bit weights",
            where="--format",
            remedy=f"Use dcomp, or one of: {known}",
        )


def _config(format: str, weight_bits: int, float_layers: list[str]) -> Any:
    from diffusers import BitsAndBytesConfig, QuantoConfig

    if format == "quanto":
        return QuantoConfig(weights_dtype=f"int{weight_bits}", modules_to_not_convert=float_layers)
    if weight_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _crashing_layers(denoiser: nn.Module, format: str, weight_bits: int) -> list[str]:
    """Last parts of the names of layers whose rows cannot be aligned; diffusers' config knows layers by these only.

    quanto takes torch's int8 product for multiples of 4 input channels, and that needs rows of whole vectors.
    """
    if format != "quanto" or weight_bits != 8:
        return []
    linears = [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
    uneven = [name for name, x in linears if x.in_features % 4 == 0 and x.in_features % _VECTOR_BYTES]
    return sorted({name.rpartition(".")[2] for name in uneven})


def _quantize(denoiser: nn.Module, format: str, bits: int, folder: Path, narrow: dict[str, str]) -> ForeignResult:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work, quiet():
        plain, saved, done = (Path(work) / name for name in ("plain", "saved", "done"))
        denoiser.save_pretrained(plain)  # type: ignore[operator]
        config = _config(format, bits, _crashing_layers(denoiser, format, bits))
        try:
            quantized = _open(type(denoiser), plain, quantization_config=config)
            quantized.save_pretrained(saved)
        except Exception as error:
            raise ForeignWriteError(
                f"{_MODULES[format][1]} failed on this model: {_first_line(error)}",
                where=type(denoiser).__name__,
                remedy=_INSTEAD,
            ) from error
        layers, left_float = _sort_layers(denoiser, quantized)
        if not layers:
            raise ForeignWriteError(
                "No layer of the denoiser could be quantized", where=type(denoiser).__name__, remedy=_INSTEAD
            )
        _rewrite(saved, done, narrow)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(done, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    return ForeignResult(folder, format, bits, size, layers, left_float)


def _open(model_class: Any, folder: Path, **options: Any) -> Any:
    options = {"torch_dtype": torch.float32, "use_safetensors": True, "local_files_only": True} | options
    return model_class.from_pretrained(folder, **options).eval()


def _sort_layers(before: nn.Module, after: nn.Module) -> tuple[int, tuple[str, ...]]:
    """Count the layers whose class changed, and name the linear and convolution layers whose class did not."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    names = [name for name, layer in before.named_modules() if isinstance(layer, kinds)]
    left_float = tuple(name for name in names if type(after.get_submodule(name)) is type(before.get_submodule(name)))
    return len(names) - len(left_float), left_float


def _rewrite(saved: Path, folder: Path, narrow: dict[str, str]) -> None:
    """Write what diffusers saved again: aligned, in a fixed order, and without this machine's paths."""
    from safetensors.torch import load_file

    folder.mkdir()
    config = json.loads((saved / "config.json").read_text())
    config.pop("_name_or_path", None)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: x for file in sorted(saved.glob("*.safetensors")) for name, x in load_file(file).items()}  # mapped
    tensors = {name: narrowed(x, narrow.get(name)) for name, x in tensors.items()}
    write_weights(folder, tensors, MAX_SHARD_BYTES, {"format": "pt"})


def _first_line(error: BaseException | str) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


@cache
def _try_out(format: str, weight_bits: int, device: str, seconds: float) -> tuple[str, str] | None:
    """Run the trial in a process of its own; return what is wrong and the remedy, or None."""
    lock = _compiler_lock() if format == "quanto" and weight_bits == 4 else None
    locked_before = lock is not None and lock.exists()
    program = "import sys; from dcomp.compress.foreign import _trial; _trial(*sys.argv[1:])"
    # ninja may lie beside python only; last, because another ninja than at generation time would compile all again
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, format, str(weight_bits), device],
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return _explain_timeout(seconds, lock, locked_before)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if lock is not None and not locked_before:
            lock.unlink(missing_ok=True)
        raise
    if process.returncode == 0:
        return None
    reason = output.strip().rpartition("\n")[2]
    if process.returncode < 0:
        return f"A trial on a very small model was killed by signal {-process.returncode}", _INSTEAD
    return f"A trial on a very small model failed: {reason or 'no reason given'}", _remedy(format, reason)


def _remedy(format: str, reason: str) -> str:
    if format == "bnb" and "GPU" in reason:
        return f"diffusers opens bitsandbytes weights on a GPU only: run this on such a machine, or: {_INSTEAD}"
    if "ninja" in reason.lower() or "compil" in reason.lower() or "extension" in reason.lower():
        return f"quanto compiles its 4-bit kernel: install a C++ compiler and `ninja`, or use 8 bits. {_INSTEAD}"
    return _INSTEAD


def _explain_timeout(seconds: float, lock: Path | None, locked_before: bool) -> tuple[str, str]:
    problem = f"A trial on a very small model did not end within {seconds:g} s"
    if lock is not None and locked_before:
        return f"{problem}: quanto waits for another compilation", f"If none is running, delete {lock} and try again"
    if lock is not None:
        lock.unlink(missing_ok=True)  # our own compilation was killed; left there, it would stop all later ones
    return problem, _INSTEAD


def _compiler_lock() -> Path | None:
    found = importlib.util.find_spec("optimum.quanto")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "library" / "extensions" / "cpp" / "build" / "lock"


def _trial(format: str, weight_bits: str, device: str) -> None:
    """Quantize, save, reload and run the smallest transformer; the last line printed says what went wrong."""
    warnings.simplefilter("ignore")
    from diffusers import DiTTransformer2DModel

    try:
        torch.manual_seed(0)
        model: Any = DiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=32, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
        )
        model.eval()
        inputs = {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "timestep": torch.tensor([500]),
            "class_labels": torch.tensor([1]),
        }
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with tempfile.TemporaryDirectory() as work, quiet(), torch.no_grad():
            result = _quantize(model, format, int(weight_bits), Path(work) / "transformer", {})
            output = _open(type(model), result.folder).to(device)(**inputs).sample
            original = model.to(device)(**inputs).sample
        error = ((output - original).norm() / original.norm()).item()
        if not error < 0.5:
            raise RuntimeError(f"The result is wrong, relative error {error:.2g}")
    except Exception as error:
        print(_first_line(error.__cause__ or error), flush=True)
        sys.exit(1)
