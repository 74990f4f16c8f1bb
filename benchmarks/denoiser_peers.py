"""Whole denoisers in integers by other runtimes, as calls that `speed.py` times beside ours.

Each function takes a float U-Net, the arguments of one call and an empty folder, and returns a call that takes nothing
and computes the prediction with 8-bit weights and inputs, as the runtime's own tool quantizes a model whose one
calibration sample is that call. The packages are imported when they are asked for
(`pip install openvino nncf onnxruntime onnx onnxscript torchao`); one that is not there raises ImportError.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Arguments = tuple[Tensor, ...]
Call = Callable[[], Any]


class Prediction(nn.Module):
    """A denoiser that takes and returns plain tensors, as converters need it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Return the prediction."""
        y: Tensor = self.denoiser(sample, timestep, context, return_dict=False)[0]
        return y


def openvino_denoiser(denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Quantize by NNCF for OpenVINO, with its preset for transformers."""
    import nncf
    import openvino

    model = openvino.convert_model(Prediction(denoiser), example_input=args)
    arrays = [value.numpy() for value in args]
    model.reshape({port.get_any_name(): list(a.shape) for port, a in zip(model.inputs, arrays, strict=True)})
    quantized = nncf.quantize(model, nncf.Dataset([arrays]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(quantized, "CPU", settings).create_infer_request()
    return lambda: request.infer(arrays)[0]


def onnxruntime_denoiser(denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Quantize matrix products and convolutions with static ranges in ONNX Runtime."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    names = ["sample", "timestep", "context"]
    feed = {name: value.numpy() for name, value in zip(names, args, strict=True)}

    class OneCall(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, np.ndarray]] = iter([feed])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    given, made = folder / "float.onnx", folder / "int8.onnx"
    torch.onnx.export(Prediction(denoiser), args, str(given), input_names=names, output_names=["y"], dynamo=False)
    quantize_static(
        given,
        made,
        OneCall(),
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        use_external_data_format=True,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(made, options, ["CPUExecutionProvider"])
    return lambda: session.run(["y"], feed)[0]


def torchao_denoiser(denoiser: nn.Module, args: Arguments, folder: Path) -> Call:
    """Quantize the linear layers with torchao, inputs by token; it has no integer convolution."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = Prediction(copy.deepcopy(denoiser))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return lambda: model(*args)


PEERS: dict[str, Callable[[nn.Module, Arguments, Path], Call]] = {
    "OpenVINO int8": openvino_denoiser,
    "ONNX Runtime int8": onnxruntime_denoiser,
    "torchao int8": torchao_denoiser,
}
