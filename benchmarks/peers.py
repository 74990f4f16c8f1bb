"""Other packages' post-training quantization, applied to a denoiser in memory through their public functions.

Every entry of `PEERS` quantizes the layers that its package supports, with the package's own defaults, and leaves the
others in fp32. The packages are imported when an entry is applied: torchao and sdnq are no dependencies of the project
(`pip install torchao sdnq`), optimum-quanto and bitsandbytes are extras of it. What cannot run on a machine raises; the
caller prints the reason.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 64  # input channels that share a scale, as in our 4-bit weights
CALIBRATION_PROMPTS = 8  # of quanto's static activation ranges

Apply = Callable[["Context"], int]


@dataclass
class Context:
    """What a peer may use.

    Attributes:
        pipeline: an `OpenPipeline` in float; its denoiser is changed in place.
        decide: gives layer name -> scheme of our own recipe of some preset, for quantizing the same layers.
        calibrate: runs the pipeline for that many calibration prompts.
    """

    pipeline: Any
    decide: Callable[[str], dict[str, Any]]
    calibrate: Callable[[int], None]

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser."""
        denoiser: nn.Module = self.pipeline.denoiser
        return denoiser


@dataclass(frozen=True)
class Peer:
    """A package and a setting of it.

    Attributes:
        name: as printed.
        bits: label of weights and activations, such as `w8a16`.
        package: as installed by pip.
        apply: quantizes in place; returns the bytes of the denoiser, with codes at their nominal width.
        note: what a reader must know of the row.
    """

    name: str
    bits: str
    package: str
    apply: Apply
    note: str = ""


def stored_bytes(denoiser: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, those inside of packages' tensor classes included.

    Codes count at their nominal width: torchao keeps 4-bit codes in bytes on a CPU and still counts 4 bits each.
    """
    seen: set[int] = set()
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    tensors += [tensor for p in denoiser.parameters() for tensor in _beside(p)]
    return -(-sum(_bits(tensor, seen) for tensor in tensors) // 8)


def _bits(tensor: Tensor, seen: set[int], width: int | None = None) -> int:
    inner = _inner(tensor)
    if inner:
        width = {torch.int4: 4}.get(getattr(tensor, "target_dtype", None))
        return sum(_bits(part, seen, width if name == "qdata" else None) for name, part in inner.items())
    key = tensor.data_ptr() if tensor.numel() else id(tensor)
    if key in seen:
        return 0
    seen.add(key)
    return tensor.numel() * (width or 8 * tensor.element_size())


def _inner(tensor: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors of a tensor class; nothing for a plain tensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return {}
    flatten = getattr(tensor, "__tensor_flatten__", None)
    names = flatten()[0] if flatten else ["_data"]  # quanto's PackedTensor
    found = {name: getattr(tensor, name, None) for name in names}
    return {name: part for name, part in found.items() if isinstance(part, Tensor)}


def _beside(parameter: Tensor) -> list[Tensor]:
    """Return what bitsandbytes keeps as attributes of a parameter: scales, and the table of codes."""
    state = getattr(parameter, "quant_state", None)
    packed = state.as_dict(packed=False).values() if state is not None else ()
    rows = getattr(parameter, "SCB", None)
    return [value for value in (*packed, rows) if isinstance(value, Tensor)]


def _torchao(config: Callable[[], Any], divisor: int = 1) -> Apply:
    """Quantize linear layers; torchao refuses those that its groups do not divide, and they stay float."""

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and layer.in_features % divisor == 0

    def apply(context: Context) -> int:
        from torchao.quantization import quantize_

        quantize_(context.denoiser, config(), fits)
        return stored_bytes(context.denoiser)

    return apply


def _ao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _ao_int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _ao_int4() -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=GROUP)


def _ao_intx4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def _ao_int8_dynamic_intx4() -> Any:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))


def _quanto(weights: str, activations: str | None = None) -> Apply:
    def apply(context: Context) -> int:
        from optimum import quanto

        types = {"weights": getattr(quanto, weights), "activations": getattr(quanto, activations or "", None)}
        quanto.quantize(context.denoiser, **types)
        if activations:
            with quanto.Calibration():
                context.calibrate(CALIBRATION_PROMPTS)
        quanto.freeze(context.denoiser)
        return stored_bytes(context.denoiser)

    return apply


def _quanto_same_layers(preset: str) -> Apply:
    """Quantize the layers of our own recipe at its bits and group size; the codes' values are kept as floats."""

    def apply(context: Context) -> int:
        from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight

        total = 8 * stored_bytes(context.denoiser)
        for name, scheme in context.decide(preset).items():
            weight = context.denoiser.get_submodule(name).weight.data
            if scheme.group_size is None:
                scale = AbsmaxOptimizer()(weight, qint8, 0)
                codes = quantize_weight(weight, qint8, 0, scale)
            else:
                scale, shift = MaxOptimizer()(weight, qint4, 0, scheme.group_size)
                codes = quantize_weight(weight, qint4, 0, scale, shift, scheme.group_size)
            total += _bits(codes, set()) - 8 * weight.nbytes
            weight.copy_(codes.dequantize().view_as(weight))
        return -(-total // 8)

    return apply


def _sdnq(weights: str, *, product: bool = False) -> Apply:
    def apply(context: Context) -> int:
        # Read at import: compiling every shape takes minutes, and changes no figure but time.
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
        from sdnq import sdnq_post_load_quant

        options = {"use_quantized_matmul": product, "use_quantized_matmul_conv": product}
        model = sdnq_post_load_quant(context.denoiser, weights_dtype=weights, quant_conv=True, **options)
        setattr(context.pipeline.pipe, context.pipeline.denoiser_name, model)
        return stored_bytes(model)

    return apply


def _bnb(bits: int) -> Apply:
    def apply(context: Context) -> int:
        import bitsandbytes as bnb

        def convert(layer: nn.Linear) -> nn.Module:
            shape = (layer.in_features, layer.out_features, layer.bias is not None)
            if bits == 4:
                new = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.load_state_dict(layer.state_dict())
            return new.to("cpu").requires_grad_(False)  # quantizes on the way

        for name, layer in list(context.denoiser.named_modules()):
            if type(layer) is nn.Linear:
                context.denoiser.set_submodule(name, convert(layer))
        kept = [p for p in context.denoiser.parameters() if type(p).__name__ in ("Params4bit", "Int8Params")]
        if any(p.dtype.is_floating_point for p in kept):
            raise RuntimeError("bitsandbytes left the weights in float on this device")
        return stored_bytes(context.denoiser)

    return apply


_LINEAR = "linear layers only"
PEERS = (
    Peer("torchao int8 weights", "w8a16", "torchao", _torchao(_ao_int8), _LINEAR),
    Peer("torchao int8 weights, int8 dynamic", "w8a8", "torchao", _torchao(_ao_int8_dynamic), _LINEAR),
    Peer("torchao int4 weights (Int4WeightOnlyConfig)", "w4a16", "torchao", _torchao(_ao_int4, GROUP), _LINEAR),
    Peer("torchao int4 weights (IntxWeightOnlyConfig)", "w4a16", "torchao", _torchao(_ao_intx4, GROUP), _LINEAR),
    Peer("torchao int4 weights, int8 dynamic", "w4a8", "torchao", _torchao(_ao_int8_dynamic_intx4, GROUP), _LINEAR),
    Peer("quanto qint8", "w8a16", "optimum-quanto", _quanto("qint8")),
    Peer("quanto qint8, qint8 activations", "w8a8", "optimum-quanto", _quanto("qint8", "qint8")),
    Peer("quanto qint4", "w4a16", "optimum-quanto", _quanto("qint4")),
    Peer("quanto qint4, qint8 activations", "w4a8", "optimum-quanto", _quanto("qint4", "qint8")),
    Peer(
        "quanto, our layers and bits",
        "w4a16",
        "optimum-quanto",
        _quanto_same_layers("w4a16"),
        "codes alone differ",
    ),
    Peer("SDNQ int8", "w8a16", "sdnq", _sdnq("int8"), "quant_conv"),
    Peer("SDNQ int8, int8 products", "w8a8", "sdnq", _sdnq("int8", product=True), "quant_conv"),
    Peer("SDNQ int4", "w4a16", "sdnq", _sdnq("int4"), "quant_conv"),
    Peer("SDNQ int4, int8 products", "w4a8", "sdnq", _sdnq("int4", product=True), "quant_conv"),
    Peer("bitsandbytes int8", "w8a16", "bitsandbytes", _bnb(8), _LINEAR),
    Peer("bitsandbytes nf4", "w4a16", "bitsandbytes", _bnb(4), _LINEAR),
)
