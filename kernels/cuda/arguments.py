"""What each kernel takes, as `arguments.h` has it: the names, the order and the types are the same."""

import ctypes
from typing import Any

import torch

POINTER, LONG, INT, UNSIGNED, FLOAT = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_float,
)
FLOAT_TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _fields(**names: Any) -> list[tuple[str, Any]]:
    """Return the fields of a struct: each keyword is a type, and its text the names of that type, in order."""
    types = {"pointers": POINTER, "longs": LONG, "ints": INT, "unsigned": UNSIGNED, "floats": FLOAT}
    return [(name, types[kind]) for kind, text in names.items() for name in text.split()]


class LinearArguments(ctypes.Structure):
    """Of linear_*."""

    _fields_ = _fields(
        pointers="x weight x_scale weight_scale bias out x_multipliers weight_multipliers hidden up",
        ints="rows outputs depth out_type corrections rank",
    )


class ConvArguments(ctypes.Structure):
    """Of conv_*."""

    _fields_ = _fields(
        pointers="x padding weight weight_sum x_scale x_zero weight_scale bias out",
        ints="rows outputs depth out_type height width channels out_pixels out_width scale_rows kernel_width"
        " stride_y stride_x padding_y padding_x dilation_y dilation_x",
        unsigned="channels_inverse kernel_width_inverse",
    )


class QuantizeStaticArguments(ctypes.Structure):
    """Of quantize_static."""

    _fields_ = _fields(pointers="x codes scale zero smooth", longs="count", ints="channels x_type")


class QuantizeSampleArguments(ctypes.Structure):
    """Of sample_range and quantize_sample."""

    _fields_ = _fields(pointers="x codes scale zero smooth ranges", longs="count", ints="channels parts x_type")


class QuantizeTokenArguments(ctypes.Structure):
    """Of quantize_token."""

    _fields_ = _fields(pointers="x smooth codes scale", ints="rows channels depth x_type")


class QuantizeGroupArguments(ctypes.Structure):
    """Of group_peak and quantize_group."""

    _fields_ = _fields(pointers="x smooth codes scale peaks", ints="rows channels depth group parts x_type")


class LowRankArguments(ctypes.Structure):
    """Of low_rank_*."""

    _fields_ = _fields(pointers="x smooth down codes scale hidden", ints="rows channels depth group rank x_type")


class QuantizeNibblesArguments(ctypes.Structure):
    """Of quantize_nibbles."""

    _fields_ = _fields(pointers="x smooth codes multipliers scale", ints="rows channels depth group block x_type")


class UnpackArguments(ctypes.Structure):
    """Of unpack_int8 and unpack_int4."""

    _fields_ = _fields(pointers="qweight multiplier scale out", ints="rows taps channels groups group out_type")


class GroupNormArguments(ctypes.Structure):
    """Of group_norm_*."""

    _fields_ = [
        *_fields(pointers="x weight bias moments ranges codes scale zero", ints="pixels channels groups"),
        *_fields(floats="epsilon", ints="silu parts x_type"),
    ]


class LayerNormArguments(ctypes.Structure):
    """Of layer_norm_token."""

    _fields_ = [
        *_fields(pointers="x weight bias gain shift codes scale", ints="rows channels depth gain_rows"),
        *_fields(floats="epsilon", ints="x_type"),
    ]


class KeyValueArguments(ctypes.Structure):
    """Of key_value_*."""

    _fields_ = _fields(pointers="k v moments tiles v_scale", ints="keys heads channels width parts x_type")


class AttentionArguments(ctypes.Structure):
    """Of attention_*."""

    _fields_ = _fields(
        pointers="q q_scale tiles v_scale out", ints="queries heads channels tile_count out_type", floats="scale"
    )
