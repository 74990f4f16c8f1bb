"""Whole denoisers in integers by other runtimes, as calls that `speed.py` times beside ours.

    python benchmarks/denoiser_peers.py "ONNX Runtime int8" FOLDER [--batch 2] [--latent 64]

Each runtime's own tool quantizes weights and inputs to 8 bits, with the call that is timed, or a corner of its latents,
as its one calibration sample. That takes several times the model's memory, so it happens in a process of its own that
leaves files in a folder; torchao quantizes what is in memory. The packages are imported when they are asked for (`pip
install openvino nncf onnxruntime onnx onnxscript torchao`); one that is not there raises ImportError.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from stable_diffusion_shape import random_arguments, random_unet

Arguments = tuple[Tensor, ...]
Call = Callable[[], Any]
NAMES = ("sample", "timestep", "context")
SIDES = ("height", "width")  # of latents, in ONNX


class Prediction(nn.Module):
    """A denoiser that takes and returns plain tensors, as converters need it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Return the prediction."""
        y: Tensor = self.denoiser(sample, timestep, context, return_dict=False)[0]
        return y


@dataclass(frozen=True)
class Peer:
    """A runtime.

    Attributes:
        packages: what it imports.
        load: takes the float denoiser, the arguments of a call and the folder; returns the call.
        quantize: takes the same and leaves the quantized model in the folder; None if `load` quantizes in memory.
    """

    packages: tuple[str, ...]
    load: Callable[[nn.Module, Arguments, Path], Call]
    quantize: Callable[[nn.Module, Arguments, Path], None] | None = None


def quantize_openvino(denoiser: nn.Module, args: Arguments, folder: Path) -> None:
    """Quantize by NNCF, with its preset for transformers."""
    import nncf
    import openvino

    model = openvino.convert_model(Prediction(denoiser), example_input=args)
    arrays = [value.numpy() for value in args]
    model.reshape({port.get_any_name(): list(a.shape) for port, a in zip(model.inputs, arrays, strict=True)})
    quantized = nncf.quantize(model, nncf.Dataset([arrays]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, folder / "int8.xml", compress_to_fp16=False)


def load_openvino(denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Return a call in OpenVINO."""
    import openvino

    arrays = [value.numpy() for value in args]
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(folder / "int8.xml", "CPU", settings).create_infer_request()
    return lambda: request.infer(arrays)[0]


def quantize_onnxruntime(denoiser: nn.Module, args: Arguments, folder: Path) -> None:
    """Quantize matrix products and convolutions with ranges of a small image: one of 64 x 64 takes over 24 GB."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    sample, *rest = args
    small = (sample[:, :, :16, :16].contiguous(), *rest)
    feed = {name: value.numpy() for name, value in zip(NAMES, small, strict=True)}

    class OneCall(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, np.ndarray]] = iter([feed])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    given = folder / "float" / "float.onnx"
    given.parent.mkdir(exist_ok=True)
    sides = {2: SIDES[0], 3: SIDES[1]}
    torch.onnx.export(
        Prediction(denoiser),
        small,
        str(given),
        input_names=list(NAMES),
        output_names=["y"],
        dynamic_axes={NAMES[0]: sides, "y": sides},
        dynamo=False,
    )
    quantize_static(
        given,
        folder / "int8.onnx",
        OneCall(),
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        use_external_data_format=True,
    )


def load_onnxruntime(denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Return a call in ONNX Runtime."""
    import onnxruntime

    feed = {name: value.numpy() for name, value in zip(NAMES, args, strict=True)}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for side, size in zip(SIDES, args[0].shape[2:], strict=True):
        options.add_free_dimension_override_by_name(side, size)
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, ["CPUExecutionProvider"])
    return lambda: session.run(["y"], feed)[0]


def load_torchao(denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Quantize the linear layers with torchao, inputs by token; it has no integer convolution."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = Prediction(copy.deepcopy(denoiser))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return lambda: model(*args)


PEERS = {
    "OpenVINO int8": Peer(("openvino", "nncf"), load_openvino, quantize_openvino),
    "ONNX Runtime int8": Peer(("onnxruntime", "onnx", "onnxscript"), load_onnxruntime, quantize_onnxruntime),
    "torchao int8": Peer(("torchao",), load_torchao),
}


def prepared(name: str, denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Return a call of a random U-Net in another runtime; quantize in another process what is not in the folder yet.

    Raises:
        ImportError: a package is not there.
        RuntimeError: quantizing failed, which by then has printed why, or was killed.
    """
    peer = PEERS[name]
    for package in peer.packages:
        if find_spec(package) is None:
            raise ImportError(f"no package {package}")
    batch, _, latent, _ = args[0].shape
    own = folder / f"{name} {batch} {latent}".replace(" ", "-")
    if peer.quantize is not None and not (own / "done").exists():
        sizes = ("--batch", str(batch), "--latent", str(latent))
        code = subprocess.run([sys.executable, "-P", __file__, name, str(own), *sizes]).returncode
        if code:
            raise RuntimeError(f"quantizing ended with code {code}")
    return peer.load(denoiser, args, own)


def main(
    name: Annotated[str, typer.Argument(help="Of `PEERS`.")], folder: Path, batch: int = 2, latent: int = 64
) -> None:
    """Quantize the random U-Net by a peer's tool and leave it in a folder, with an empty file `done` at last."""
    torch.set_grad_enabled(False)
    quantize = PEERS[name].quantize
    if quantize is None:
        raise typer.BadParameter(f"{name} quantizes in memory")
    folder.mkdir(parents=True, exist_ok=True)
    quantize(random_unet(), random_arguments(batch, latent), folder)
    (folder / "done").touch()


if __name__ == "__main__":
    typer.run(main)
