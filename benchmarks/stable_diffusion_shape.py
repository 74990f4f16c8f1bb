"""A U-Net of Stable Diffusion 1.5's shape with random weights, and the arguments of one call: speed needs no more.

Weights are normal, as those of trained layers nearly are. On AVX2 the speed of 8-bit weights depends on how many
neighbours add up to more than 128: about as many as in trained layers then, and several times as many if weights are
uniform, as torch makes them.
"""

from typing import Any

import torch
from torch import Tensor

UNET_SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def random_unet(seed: int = 0) -> Any:
    """Return the U-Net, in fp32, the same for each seed."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(**UNET_SD15).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.std().item())
    return model


def random_arguments(batch: int, latent: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(samples, timestep, contexts)` of a call, the same for each seed."""
    noise = torch.Generator().manual_seed(seed)
    samples = torch.randn(batch, UNET_SD15["in_channels"], latent, latent, generator=noise)
    contexts = torch.randn(batch, 77, UNET_SD15["cross_attention_dim"], generator=noise)
    return samples, torch.tensor(500), contexts
