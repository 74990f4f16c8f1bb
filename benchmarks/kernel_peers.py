"""Single integer layers of other runtimes, as calls that `kernel_speed.py` times.

Each function returns a call that takes nothing and computes one layer from a float input to a float output, with 8-bit
inputs and weights in the runtime's own way. The packages are imported when they are asked for
(`pip install openvino onnxruntime onnx torchao`); one that is not there raises ImportError.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Call = Callable[[], Any]


def openvino_layer(x: Tensor, weight: Tensor, padding: int | None) -> Call:
    """Return a matrix product (padding None) or a convolution in OpenVINO, inputs by a static range."""
    import openvino
    from openvino import opset13 as ops

    inputs = ops.parameter(list(x.shape), np.float32)
    high = x.abs().max().item()
    ranges = [np.array(value, dtype=np.float32) for value in (-high, high * 127 / 128) * 2]
    codes = ops.fake_quantize(inputs, *ranges, 256)
    scale = (weight.abs().flatten(1).amax(1) / 127).numpy()
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    integers = ops.constant((weight.numpy() / scale).round().astype(np.int8))
    values = ops.multiply(ops.convert(integers, "f32"), ops.constant(scale))
    if padding is None:
        y = ops.matmul(codes, values, transpose_a=False, transpose_b=True)
    else:
        y = ops.convolution(codes, values, [1, 1], [padding] * 2, [padding] * 2, [1, 1])
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(openvino.Model([y], [inputs]), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.contiguous().numpy(), shared_memory=True))
    return request.infer


def onnxruntime_layer(x: Tensor, weight: Tensor, padding: int | None) -> Call:
    """Return a matrix product (padding None), inputs by a range of the moment, or a convolution in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scale = weight.abs().flatten(1).amax(1) / 127
    codes = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8).numpy()
    constants = {"w_scale": scale.numpy(), "w_zero": np.zeros(len(scale), np.int8)}
    if padding is None:
        constants["w"] = np.ascontiguousarray(codes.T)
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "q_scale", "q_zero"]),
            helper.make_node("MatMulInteger", ["q", "w", "q_zero", "w_zero"], ["sums"]),
            helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["q_scale", "w_scale"], ["scales"]),
            helper.make_node("Mul", ["floats", "scales"], ["y"]),
        ]
    else:
        constants["w"] = codes
        constants |= {"q_scale": np.float32(x.abs().max() / 127), "q_zero": np.uint8(128)}
        constants |= {"y_scale": np.float32(1.0), "y_zero": np.uint8(128)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "q_scale", "q_zero"], ["q"]),
            helper.make_node(
                "QLinearConv",
                ["q", "q_scale", "q_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"],
                ["out"],
                pads=[padding] * 4,
            ),
            helper.make_node("DequantizeLinear", ["out", "y_scale", "y_zero"], ["y"]),
        ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    value = onnxruntime.OrtValue.ortvalue_from_numpy(x.contiguous().numpy())
    return lambda: session.run_with_ort_values(["y"], {"x": value})


def torchao_layer(x: Tensor, weight: Tensor, padding: int | None) -> Call:
    """Return a linear layer of torchao with inputs by token; it has no convolution."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if padding is not None:
        raise ImportError("torchao has no integer convolution")
    layer = nn.Sequential(nn.Linear(*weight.t().shape, bias=False))
    layer[0].weight.data.copy_(weight)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return lambda: layer(x)


PEERS: dict[str, Callable[[Tensor, Tensor, int | None], Call]] = {
    "OpenVINO int8": openvino_layer,
    "ONNX Runtime int8": onnxruntime_layer,
    "torchao int8": torchao_layer,
}
