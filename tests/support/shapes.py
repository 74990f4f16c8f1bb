"""Denoisers of published shapes, without values, and a call of each."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]

_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_XL: dict[str, Any] = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
_PIXART: dict[str, Any] = {"cross_attention_dim": 1152, "sample_size": 64, "caption_channels": 4096}
_SD3: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}


def _of(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _numbers(count: int = 2) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64, device="meta")


_SHAPES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Call]]] = {
    "SD1.5": (
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        lambda: ((_of(2, 4, 64, 64), torch.tensor(5)), {"encoder_hidden_states": _of(2, 77, 768)}),
    ),
    "SDXL": (
        lambda: UNet2DConditionModel(**_SDXL),
        lambda: (
            (_of(2, 4, 128, 128), torch.tensor(5)),
            {
                "encoder_hidden_states": _of(2, 77, 2048),
                "added_cond_kwargs": {"text_embeds": _of(2, 1280), "time_ids": _of(2, 6)},
            },
        ),
    ),
    "DiT-XL/2": (
        lambda: DiTTransformer2DModel(**_XL, num_layers=28, sample_size=32, num_embeds_ada_norm=1000),
        lambda: ((_of(2, 4, 32, 32),), {"timestep": _numbers(), "class_labels": _numbers()}),
    ),
    "PixArt": (
        lambda: PixArtTransformer2DModel(**_XL, **_PIXART, num_layers=28, use_additional_conditions=False),
        lambda: (
            (_of(2, 4, 64, 64),),
            {
                "encoder_hidden_states": _of(2, 120, 4096),
                "timestep": _numbers(),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
    ),
    "SD3-medium": (
        lambda: SD3Transformer2DModel(**_SD3),
        lambda: (
            (),
            {
                "hidden_states": _of(2, 16, 64, 64),
                "timestep": _of(2),
                "encoder_hidden_states": _of(2, 154, 4096),
                "pooled_projections": _of(2, 2048),
            },
        ),
    ),
    "FLUX-dev": (
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        lambda: (
            (),
            {
                "hidden_states": _of(1, 1024, 64),
                "timestep": _of(1),
                "guidance": _of(1),
                "pooled_projections": _of(1, 768),
                "encoder_hidden_states": _of(1, 128, 4096),
                "txt_ids": _of(128, 3),
                "img_ids": _of(1024, 3),
            },
        ),
    ),
}
SHAPES = tuple(_SHAPES)


def shape_of(name: str) -> tuple[nn.Module, Call]:
    """Build a denoiser on the meta device; within `torch.device("meta")` it can be called."""
    build, call = _SHAPES[name]
    with torch.device("meta"):
        return build().eval(), call()
