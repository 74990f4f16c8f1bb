"""Train the embedded text-to-image pipeline from nothing, on a CPU, in stages that can be interrupted.

The result is a Stable-Diffusion-architecture pipeline (CLIP text encoder, AutoencoderKL, UNet2DConditionModel with skip
connections and cross-attention, DDIM scheduler) over 64x64 emoji pictures. Each stage reads and writes one work folder:

    npm pack emoji-datasource-google@16.0.0 && tar xf emoji-datasource-google-16.0.0.tgz
    python train.py pictures package/ --work run/         # the package's pictures and names -> emoji-64.parquet
    python train.py tokenizer --work run/                 # byte-pair vocabulary of the captions
    python train.py autoencoder --work run/ --minutes 30
    python train.py denoiser --work run/ --minutes 180    # text encoder and U-Net; run again to go on
    python train.py export --work run/ --output .         # EMA weights, fp16 safetensors

`--init FOLDER` lets the denoiser go on from a saved pipeline (its VAE and tokenizer must be the work folder's).
"""

import io
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image
from torch import Tensor

CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
CAPTION_TOKENS = 24
BATCH = 24
DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)
Work = Annotated[Path, typer.Option(help="Work folder: every stage reads and writes here.")]
Minutes = Annotated[float, typer.Option(help="Length of this run; the learning rate falls to zero at its end.")]


def read_pictures(work: Path, categories: tuple[str, ...] | None = None) -> tuple[Tensor, list[str]]:
    """Return uint8 pictures `[N, 3, 64, 64]` and their captions."""
    rows = pq.read_table(work / "emoji-64.parquet").to_pylist()
    rows = [row for row in rows if categories is None or row["category"] in categories]
    images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), [row["text"] for row in rows]


def to_unit(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


@app.command()
def pictures(package: Path, work: Work) -> None:
    """Turn the unpacked npm package into one parquet file: pictures on white, captions, categories."""
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for entry in json.loads((package / "emoji.json").read_text()):
        file = package / "img" / "google" / "64" / entry["image"]
        if entry["category"] == "Component" or not entry["has_img_google"] or not file.exists():
            continue  # components are the bare skin tones
        drawing = Image.open(file).convert("RGBA")
        canvas = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
        png = io.BytesIO()
        canvas.resize((64, 64), Image.Resampling.LANCZOS).save(png, "PNG")
        subcategory = entry["subcategory"].replace("-", " ")
        rows.append(
            {
                "image": {"bytes": png.getvalue(), "path": entry["image"]},
                "text": f"{subcategory}: {entry['name'].lower()}",
                "category": entry["category"],
                "codepoints": entry["unified"],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), work / "emoji-64.parquet")
    print(f"{len(rows)} pictures")


@app.command()
def tokenizer(work: Work) -> None:
    """Train a CLIP-style byte-pair tokenizer on the captions."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    _, captions = read_pictures(work)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    folder = work / "bpe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CAPTION_TOKENS)
    clip.save_pretrained(work / "tokenizer")


@app.command()
def autoencoder(work: Work, minutes: Minutes = 30) -> None:
    """Train the VAE: L1 on pixels and on edges, a light KL term."""
    from diffusers import AutoencoderKL

    data, _ = read_pictures(work)
    folder = work / "vae"
    vae = (
        AutoencoderKL.from_pretrained(folder)
        if folder.exists()
        else AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
            mid_block_add_attention=False,
        )
    )
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    started, step = time.time(), 0
    while (done := (time.time() - started) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * max(0.02, 1 - done)
        batch = to_unit(data[torch.randint(0, len(data), (16,))])
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        edges = (decoded.diff(dim=-1) - batch.diff(dim=-1)).abs().mean()
        edges = edges + (decoded.diff(dim=-2) - batch.diff(dim=-2)).abs().mean()
        loss = (decoded - batch).abs().mean() + 0.5 * edges + 2e-4 * posterior.kl().float().mean() / 1024
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(step, round(loss.item(), 4), flush=True)
    vae.save_pretrained(folder)


def make_parts(tokens: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Build an untrained U-Net and text encoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            projection_dim=128,
        )
    )
    return unet, text


def encode_pictures(work: Path, scaling_factor: float | None) -> tuple[Tensor, Tensor, float]:
    """Return scaled latents `[N, 4, 16, 16]` of the pictures and of their mirror images, and the scale."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    data = to_unit(read_pictures(work, CATEGORIES)[0])
    with torch.no_grad():
        plain, mirrored = (
            torch.cat([vae.encode(b).latent_dist.mode() for b in x.split(64)]) for x in (data, data.flip(-1))
        )
    scaling_factor = scaling_factor or 1 / plain.std().item()
    return plain * scaling_factor, mirrored * scaling_factor, scaling_factor


@app.command()
def denoiser(
    work: Work,
    minutes: Minutes = 180,
    learning_rate: Annotated[float, typer.Option(help="Peak; half a cosine to zero over the run.")] = 8e-4,
    init: Annotated[Path | None, typer.Option(help="Go on from this saved pipeline.")] = None,
) -> None:
    """Train U-Net and text encoder: noise prediction, min-SNR weights, 10 % empty captions, EMA."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(work / "tokenizer")
    captions = read_pictures(work, CATEGORIES)[1]

    def tokenize(texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": CAPTION_TOKENS, "truncation": True, "return_tensors": "pt"}
        return tokens(texts, **options).input_ids

    ids, empty = tokenize(captions), tokenize([""])[0]
    torch.manual_seed(0)
    unet, text = make_parts(len(tokens))
    scaling_factor = None
    if init is not None:
        start = StableDiffusionPipeline.from_pretrained(init, safety_checker=None)
        unet.load_state_dict(start.unet.state_dict())
        text.load_state_dict(start.text_encoder.state_dict())
        scaling_factor = start.vae.config.scaling_factor
    plain, mirrored, scaling_factor = encode_pictures(work, scaling_factor)

    scheduler = DDPMScheduler(**DDPM)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = snr.clamp(max=5) / snr  # Hang et al. 2023, min-SNR-5 for noise prediction
    parameters = [*unet.parameters(), *text.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01)
    step, state = 0, work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        unet.load_state_dict(saved["unet"])
        text.load_state_dict(saved["text"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]

    def save() -> None:
        parts = {"unet": unet.state_dict(), "text": text.state_dict(), "optimizer": optimizer.state_dict()}
        temporary = state.with_suffix(".tmp")
        torch.save({**parts, "average": average, "step": step, "scaling_factor": scaling_factor}, temporary)
        os.replace(temporary, state)

    torch.manual_seed(int(time.time()))
    started, first, losses = time.time(), step, []
    while (done := (time.time() - started) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = (
            learning_rate * min(1, (step - first + 1) / 100) * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))
        )
        chosen = torch.randint(0, len(plain), (BATCH,))
        latents = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, mirrored[chosen], plain[chosen])
        caption = ids[chosen].clone()
        caption[torch.rand(BATCH) < 0.1] = empty
        t = torch.randint(0, 1000, (BATCH,))
        noise = torch.randn_like(latents)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedded = text(caption).last_hidden_state
            prediction = unet(scheduler.add_noise(latents, noise, t), t, embedded).sample
        loss = ((prediction.float() - noise).pow(2).mean((1, 2, 3)) * weight[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if step % 50 == 0:
            speed = BATCH * (step - first) / (time.time() - started)
            print(step, f"{np.mean(losses[-200:]):.4f} {speed:.1f} pictures/s {done:.0%}", flush=True)
        if step % 200 == 0:
            save()
    save()


@app.command()
def export(work: Work, output: Annotated[Path, typer.Option(help="Folder of the finished pipeline.")]) -> None:
    """Write the averaged weights as a diffusers pipeline in fp16 safetensors."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(work / "tokenizer")
    saved = torch.load(work / "state.pt", weights_only=True)
    unet, text = make_parts(len(tokens))
    for parameter, mean in zip([*unet.parameters(), *text.parameters()], saved["average"], strict=True):
        parameter.data.copy_(mean)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    vae.register_to_config(scaling_factor=saved["scaling_factor"])
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokens,
        unet=unet,
        scheduler=DDIMScheduler(**DDPM, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(output)


if __name__ == "__main__":
    app()
