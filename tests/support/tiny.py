"""Real diffusers models and pipelines that are small enough for a test.

Every model is seeded, has fewer than one million parameters, and has no parameter that is zero or constant: AdaLN-Zero
gates, `proj_out` and norm affines are randomised, so that a dependence which exists is visible in the output. Channel
counts are multiples of 64 in some layers and not in others.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TEXT_WIDTH = 48  # channels of every tiny text encoder: no multiple of 64

_DENOISERS: dict[str, Callable[[], nn.Module]] = {
    "UNet2DModel": lambda: UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ),
    "UNet2DConditionModel": lambda: UNet2DConditionModel(**_UNET_CONDITION),
    "UNet2DConditionModel-linear": lambda: UNet2DConditionModel(**_UNET_CONDITION, use_linear_projection=True),
    "UNet2DConditionModel-xl": lambda: UNet2DConditionModel(
        **{**_UNET_CONDITION, "cross_attention_dim": 2 * TEXT_WIDTH},
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
    ),
    "DiTTransformer2DModel": lambda: DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    ),
    "PixArtTransformer2DModel": lambda: PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=72,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
        norm_num_groups=4,
        use_additional_conditions=False,
    ),
    "SD3Transformer2DModel": lambda: SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
    ),
    "FluxTransformer2DModel": lambda: FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    ),
}
_UNET_CONDITION: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}

XL = "UNet2DConditionModel-xl"  # pooled text and sizes beside the timestep; like the others, but not in every sweep
NAMES: tuple[str, ...] = tuple(name for name in _DENOISERS if name != XL)
"""Names that `tiny_denoiser`, `denoiser_inputs` and `save_tiny_pipeline` take; all of them have a pipeline."""
FEW_NAMES: tuple[str, ...] = ("UNet2DConditionModel", "DiTTransformer2DModel")  # as unlike as two can be
TRANSFORMER_NAMES: tuple[str, ...] = tuple(name for name in NAMES if "Transformer" in name)
TEXT_NAMES: tuple[str, ...] = tuple(name for name in NAMES if name not in ("UNet2DModel", "DiTTransformer2DModel"))


def tiny_denoiser(name: str, seed: int = 0) -> nn.Module:
    """Build a random denoiser in eval mode, float32, on the CPU; equal seeds give equal weights."""
    return _seeded(_DENOISERS[name], seed)


def denoiser_inputs(name: str, batch: int = 2, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a direct call `denoiser(*args, **kwargs)[0]`, as its pipeline would pass them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents, t = normal(batch, 4, 8, 8), torch.full((batch,), 501)
    text = normal(batch, 7, TEXT_WIDTH)
    if name == "UNet2DModel":
        return (normal(batch, 3, 8, 8), torch.tensor(501)), {"return_dict": False}
    if name == XL:
        added = {"text_embeds": normal(batch, TEXT_WIDTH), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * batch)}
        kwargs = {"encoder_hidden_states": normal(batch, 7, 2 * TEXT_WIDTH), "added_cond_kwargs": added}
        return (latents, torch.tensor(501)), {**kwargs, "return_dict": False}
    if name.startswith("UNet2DConditionModel"):
        return (latents, torch.tensor(501)), {"encoder_hidden_states": text, "return_dict": False}
    if name == "DiTTransformer2DModel":
        labels = torch.arange(batch) * 7 % 1000
        return (latents,), {"timestep": t, "class_labels": labels, "return_dict": False}
    if name == "PixArtTransformer2DModel":
        mask = torch.ones(batch, 7)
        mask[:, 5:] = 0
        return (latents,), {
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "timestep": t,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "return_dict": False,
        }
    if name == "SD3Transformer2DModel":
        return (), {
            "hidden_states": latents,
            "timestep": t.float(),
            "encoder_hidden_states": normal(batch, 7, 2 * TEXT_WIDTH),
            "pooled_projections": normal(batch, 2 * TEXT_WIDTH),
            "joint_attention_kwargs": None,
            "return_dict": False,
        }
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return (), {
        "hidden_states": normal(batch, 16, 16),
        "timestep": t.float() / 1000,
        "guidance": torch.full((batch,), 3.5),
        "pooled_projections": normal(batch, TEXT_WIDTH),
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(7, 3),
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def pipeline_options(name: str) -> dict[str, Any]:
    """Keyword arguments for the pipeline's own `__call__` that keep its pictures at 16 x 16 pixels (U-Net: 8 x 8)."""
    if name in ("UNet2DModel", "DiTTransformer2DModel"):
        return {}
    options: dict[str, Any] = {"height": 16, "width": 16}
    if name == "PixArtTransformer2DModel":
        options["use_resolution_binning"] = False
    if name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
        options["max_sequence_length"] = 16
    return options


def tiny_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """Build a whole pipeline around `tiny_denoiser(name, seed)`, with the scheduler its model family ships with."""
    denoiser = tiny_denoiser(name, seed)
    if name == "UNet2DModel":
        return DDPMPipeline(unet=denoiser, scheduler=DDPMScheduler())
    if name == XL:
        return StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer_2=_clip_tokenizer(),
            unet=denoiser,
            scheduler=EulerDiscreteScheduler(**_STABLE_DIFFUSION_BETAS),
        )
    if name.startswith("UNet2DConditionModel"):
        return StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=_clip_tokenizer(),
            unet=denoiser,
            scheduler=DDIMScheduler(**_STABLE_DIFFUSION_BETAS, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if name == "DiTTransformer2DModel":
        labels = {0: "tench, Tinca tinca", 1: "goldfish", 207: "golden retriever"}
        return DiTPipeline(
            transformer=denoiser, vae=_vae(), scheduler=DDIMScheduler(clip_sample=False), id2label=labels
        )
    if name == "PixArtTransformer2DModel":
        return PixArtAlphaPipeline(
            tokenizer=_t5_tokenizer(),
            text_encoder=_t5(TEXT_WIDTH),
            vae=_vae(),
            transformer=denoiser,
            scheduler=DPMSolverMultistepScheduler(),
        )
    if name == "SD3Transformer2DModel":
        return StableDiffusion3Pipeline(
            transformer=denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip(CLIPTextModelWithProjection),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(2 * TEXT_WIDTH),
            tokenizer_3=_t5_tokenizer(),
        )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_clip(CLIPTextModel),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(TEXT_WIDTH),
        tokenizer_2=_t5_tokenizer(),
        transformer=denoiser,
    )


def save_tiny_pipeline(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Save `tiny_pipeline(name, seed)` as a diffusers folder (safetensors only) and return the folder."""
    folder = Path(folder)
    with _quiet():
        tiny_pipeline(name, seed).save_pretrained(folder, safe_serialization=True)
    if name == "DiTTransformer2DModel":  # published folders carry the names, `save_pretrained` drops them
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": _CLASS_NAMES}, indent=2))
    return folder


def load_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """Open a saved folder as a stranger would, with plain diffusers, without progress bars."""
    with _quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


_CLASS_NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 207: "golden retriever"}
_STABLE_DIFFUSION_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@contextlib.contextmanager
def _quiet() -> Any:
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _seeded(build: Callable[[], nn.Module], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    _tie_time_embedders(model)
    return model


def _tie_time_embedders(model: nn.Module) -> None:
    # Published DiT checkpoints carry one bit-equal copy of the timestep and label embedders per block.
    copies = [module for name, module in model.named_modules() if name.endswith("norm1.emb")]
    for copy in copies[1:]:
        copy.load_state_dict(copies[0].state_dict())


def _vae() -> AutoencoderKL:
    return _seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            shift_factor=0.05,
        ),
        seed=1,
    )


def _clip(kind: type[nn.Module]) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return _seeded(lambda: kind(config), seed=2)


def _t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_vocabulary()),
        d_model=width,
        d_kv=12,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return _seeded(lambda: T5EncoderModel(config), seed=3)


@functools.cache
def _clip_vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return {piece: index for index, piece in enumerate(pieces)}


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=16)


@functools.cache
def _t5_vocabulary() -> tuple[tuple[str, float], ...]:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return (*special, *((chr(code), -3.0) for code in range(33, 127)))


def _t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=list(_t5_vocabulary()), extra_ids=0, model_max_length=512)
