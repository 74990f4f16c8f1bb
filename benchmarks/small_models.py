"""Train two small pipelines to measure on: a class-conditional DiT and an unconditional U-Net.

    python benchmarks/small_models.py models/ [--only dit] [--steps 1500] [--pictures 288] [--seed 0]

Both learn from pictures that the embedded pipeline makes of its own prompts, in three classes: face, animal and food.
The DiT (diffusers' DiTTransformer2DModel) works on the latents of the embedded VAE, the U-Net (UNet2DModel) on the
pictures at 32 x 32. `models/dit` and `models/unet` are diffusers pipelines; one that is there is left alone. They are
test objects: small, with the layers and the timestep conditioning of their kinds, and no more. Training has a number of
steps and one thread, so that a processor makes the same model each time; it is in bfloat16 where the processor has it.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
import typer
from torch import Tensor, nn

CLASSES = ("face", "animal", "food")  # their number is the class label
NULL_CLASS = 1000  # DiTPipeline's label for "no class"; the model must know as many classes
DDPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STEPS, GUIDANCE = 20, 4.0  # of the embedded pipeline's pictures
FIRST_INDEX = 2_000_000  # noise that neither calibration nor validation starts from
PROMPT_LINES = 1_024
SIDE = 32  # of the U-Net's pictures, in pixels
BATCH = 32

Batch = Callable[[], tuple[Tensor, dict[str, Tensor]]]
NAMES = ("dit", "unet")


def main(
    folder: Path,
    only: Annotated[str | None, typer.Option(help="One of dit and unet; default: both.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each model.", min=1)] = 1500,
    pictures: Annotated[int, typer.Option(help="Training pictures, spread over the classes.")] = 288,
    seed: int = 0,
) -> None:
    """Make the models that are not there yet."""
    if only is not None and only not in NAMES:
        raise typer.BadParameter(f"{only!r} is not one of {', '.join(NAMES)}")
    for name in [only] if only else NAMES:
        print(make_model(name, folder, steps=steps, pictures=pictures, seed=seed))


def make_model(name: str, folder: Path, *, steps: int = 1500, pictures: int = 288, seed: int = 0) -> Path:
    """Return the folder of a model, trained now if it is not there."""
    output = folder / name
    if (output / "model_index.json").is_file():
        return output
    latents, images, labels, scaling_factor = training_pictures(folder / "pictures", pictures)
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # which decides the order of sums
    started = time.perf_counter()
    if name == "dit":
        model: Any = make_dit()
        losses = train(model, _dit_batches(latents, labels), steps)
        pipe = _dit_pipeline(model, scaling_factor)
    else:
        model = make_unet()
        small = F.interpolate(images, size=(SIDE, SIDE), mode="area") * 2 - 1
        losses = train(model, _unet_batches(small), steps)
        pipe = _unet_pipeline(model)
    facts = {
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "steps": steps,
        "seed": seed,
        "pictures": len(images),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_first": round(_mean(losses[: max(1, len(losses) // 20)]), 4),
        "loss_last": round(_mean(losses[-max(1, len(losses) // 20) :]), 4),
    }
    partial = output.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    if name == "dit":
        lines = [str(line % len(CLASSES)) for line in range(PROMPT_LINES)]
        (partial / "prompts.txt").write_text("\n".join(lines) + "\n")
    (partial / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    partial.rename(output)  # a killed run leaves no half-written model
    print(json.dumps({"model": name, **facts}), flush=True)
    return output


def training_pictures(work: Path, count: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Sample the embedded pipeline; a killed run goes on where it stopped.

    Returns:
        Latents fp32 [N, 4, 16, 16] as the VAE's decoder gets them but for its scale, pictures fp32 [N, 3, 64, 64] in
        [0, 1], classes int64 [N], and that scale.
    """
    from dcomp.calibrate.pipeline import Generation, open_pipeline
    from dcomp.recipes.demo import embedded_model
    from dcomp.recipes.trajectories import SampleFolder

    lines = (embedded_model() / "prompts.txt").read_text().splitlines()
    of_class = [[line for line in lines if line.startswith(name)] for name in CLASSES]
    labels = [number % len(CLASSES) for number in range(count)]
    prompts = [of_class[label][n // len(CLASSES) % len(of_class[label])] for n, label in enumerate(labels)]
    pipeline = open_pipeline(embedded_model())
    samples = SampleFolder(work, pipeline, prompts, Generation(STEPS, GUIDANCE, batch_size=16), FIRST_INDEX)
    samples.make(pipeline, lambda done, total: print(f"pictures {done} of {total}", flush=True))
    chunks = [samples.read(number) for number in range(len(samples.ranges))]
    latents, images = torch.cat([c.latents for c in chunks]), torch.cat([c.images for c in chunks])
    return latents, images, torch.tensor(labels), float(pipeline.pipe.vae.config.scaling_factor)


def make_dit() -> Any:
    """Build an untrained DiT whose blocks are the identity at first (adaLN-Zero)."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def make_unet() -> Any:
    """Build an untrained U-Net with attention at one of three resolutions."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=16,
    )


def train(model: nn.Module, batches: Batch, steps: int) -> list[float]:
    """Train to predict the noise, with min-SNR weights; leave the averaged weights in the model, return the losses."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**DDPM)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weight = snr.clamp(max=5) / snr  # Hang et al. 2023, min-SNR-5 for noise prediction
    # In training mode every block of diffusers' DiT drops labels by itself; the batches do it for all blocks at once.
    model.eval()
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01)
    losses: list[float] = []
    # Emulated bfloat16 takes 17 times as long as fp32.
    narrow = torch.cpu.get_capabilities().get("avx512_bf16", False)
    for step in range(steps):
        done = step / steps
        warm_up, decay = min(1, (step + 1) / 100), 0.51 + 0.49 * math.cos(math.pi * done)
        optimizer.param_groups[0]["lr"] = 1e-3 * warm_up * decay
        clean, conditions = batches()
        t = torch.randint(0, len(weight), (len(clean),))
        noise = torch.randn_like(clean)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            prediction = model(scheduler.add_noise(clean, noise, t), t, **conditions).sample
        loss = ((prediction.float() - noise).square().mean((1, 2, 3)) * weight[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        keep = min(0.998, len(losses) / (len(losses) + 9))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}, loss {_mean(losses[-50:]):.4f}, {done:.0%}", flush=True)
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)
    return losses


def _dit_batches(latents: Tensor, labels: Tensor) -> Batch:
    def draw() -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(0, len(latents), (BATCH,))
        dropped = torch.rand(BATCH) < 0.1
        return latents[chosen], {"class_labels": torch.where(dropped, NULL_CLASS, labels[chosen])}

    return draw


def _unet_batches(images: Tensor) -> Batch:
    def draw() -> tuple[Tensor, dict[str, Tensor]]:
        batch = images[torch.randint(0, len(images), (BATCH,))]
        return torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch.flip(-1), batch), {}

    return draw


def _dit_pipeline(model: Any, scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL, DiTPipeline

    from dcomp.recipes.demo import embedded_model

    vae = AutoencoderKL.from_pretrained(embedded_model() / "vae")
    vae.register_to_config(scaling_factor=scaling_factor)
    names = {str(number): name for number, name in enumerate(CLASSES)}
    return DiTPipeline(transformer=model, vae=vae, scheduler=_scheduler(), id2label=names)


def _unet_pipeline(model: Any) -> Any:
    from diffusers import DDIMPipeline

    return DDIMPipeline(unet=model, scheduler=_scheduler())


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**DDPM, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(main)
