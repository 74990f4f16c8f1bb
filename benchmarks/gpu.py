"""Speed on this machine's GPU: each operation, and one denoiser call at Stable Diffusion 1.5's shape, against bfloat16.

    python benchmarks/gpu.py [--batch 2] [--latent 64] [--repeats 20] [--operations] [--no-compile]

Weights are random: speed does not depend on them. Each round times everything once, in turn, so that a change of the
clock hits all; the ratio of a round is what counts, its median is what is shown. Operations are timed inside CUDA
graphs: the device alone. Calls of the denoiser are timed as they are used, and inside a graph. Before anything is
timed, results are compared with those of the definitions. Prints tables and writes `benchmarks/results/gpu.json`.

Without a GPU that our kernels run on it says what is missing, and exits with 1.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
from speed import quantized
from stable_diffusion_shape import random_arguments, random_unet

from dcomp.calibrate.clock import StepBins
from dcomp.kernels import dispatch, ops
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import compile as compiler
from dcomp.kernels.cuda import driver, loaded, rows
from dcomp.kernels.cuda.driver import DriverError
from dcomp.kernels.packing import PackedWeight, pack_weight

RESULTS = Path(__file__).parent / "results"
GROUP = 32
# (rows of a latent of 64 x 64 and a batch of 2, input channels, output channels)
LINEAR = (
    (8192, 320, 320),
    (8192, 320, 2560),
    (8192, 1280, 320),
    (2048, 640, 5120),
    (512, 1280, 10240),
    (2, 1280, 1280),
)
# (input channels, output channels, height and width), 3 x 3 taps
CONV = ((320, 320, 64), (960, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8))

# (heads, queries, keys, channels of a head)
ATTENTION = ((8, 4096, 4096, 40), (8, 4096, 77, 40), (24, 4096, 4096, 128))

Work = Callable[[], Any]


@dataclass
class Stopwatch:
    """Times work on the device: seconds of `calls` calls, without those of the processor where `graphs` is true."""

    device: torch.device
    calls: int = 1
    graphs: bool = False

    def prepare(self, work: Work) -> Work:
        """Run work until all is compiled, tested and packed, and return what is to be timed."""
        for _ in range(3):
            work()
        if not self.graphs:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.calls):
                work()
        return graph.replay

    def seconds(self, prepared: Work) -> float:
        """Return how long one call took."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            prepared()
            return time.perf_counter() - started
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        for _ in range(1 if self.graphs else self.calls):
            prepared()
        last.record()
        torch.cuda.synchronize(self.device)
        return float(first.elapsed_time(last)) / 1000 / self.calls


def ratios(works: dict[str, Work], stopwatch: Stopwatch, repeats: int) -> dict[str, dict[str, float]]:
    """Return how many times as fast as the first of some works each is: median, least and most of all rounds."""
    prepared = {name: stopwatch.prepare(work) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in prepared.items():
            seconds[name].append(stopwatch.seconds(work))
    first, *_ = seconds.values()
    found = {}
    for name, times in seconds.items():
        all_ = [of_first / own for of_first, own in zip(first, times, strict=True)]
        found[name] = {"speedup": statistics.median(all_), "speedup_min": min(all_), "speedup_max": max(all_)}
    return found


def weight(bits: int, shape: tuple[int, ...], device: torch.device) -> PackedWeight:
    """Return a random weight `[O, *taps, I]`, of 8 bits or of 4 with groups."""
    scale = torch.rand(shape[0], device=device) / 1000 + 1e-4
    if bits == 8:
        return pack_weight(torch.randint(-127, 128, shape, device=device), scale)
    groups = (*shape[:-1], -(-shape[-1] // GROUP))
    codes, sizes = torch.randint(-8, 8, shape, device=device), torch.randint(1, 16, groups, device=device)
    return pack_weight(codes, scale, sizes, group_size=GROUP)


def linear_works(shape: tuple[int, int, int], device: torch.device) -> dict[str, Work]:
    """Return what is to be compared of a linear layer."""
    count, channels, outputs = shape
    x = torch.randn(count, channels, device=device, dtype=torch.bfloat16)
    float_weight = torch.randn(outputs, channels, device=device, dtype=torch.bfloat16)
    bias = torch.randn(outputs, device=device)
    float_bias = bias.bfloat16()
    q, x_scale = ops.quantize_token(x)
    works: dict[str, Work] = {"bf16": lambda: functional.linear(x, float_weight, float_bias)}

    def product(packed: PackedWeight, q: Tensor, x_scale: Tensor) -> Tensor:
        stored = (packed.qweight, packed.scale, packed.multiplier, bias, channels, torch.bfloat16)
        y: Tensor = ops.linear_a8(q, x_scale, *stored)
        return y

    def by_int8(packed: PackedWeight, group: int) -> Tensor:
        image, scale = ops.quantize_group(x.unsqueeze(1), group)
        return product(packed, image.squeeze(1), scale)

    works["quantize_token alone"] = lambda: ops.quantize_token(x)
    for bits in (8, 4):
        packed = weight(bits, (outputs, channels), device)
        stored = (packed.qweight, packed.scale, packed.multiplier, bias, channels)
        works[f"W{bits}A8, product"] = lambda packed=packed: product(packed, q, x_scale)
        works[f"W{bits}A8, all"] = lambda packed=packed: product(packed, *ops.quantize_token(x))
        works[f"W{bits}A16"] = lambda stored=stored: ops.linear_a16(x, *stored)
    for group in (32, 64):
        works[f"W4A4, groups of {group}"] = lambda group=group: ops.linear_a4(x, group, *stored, torch.bfloat16)
        works[f"W4A4 by int8, groups of {group}"] = lambda group=group: by_int8(packed, group)
    if device.type == "cuda" and count > 16:
        codes = weight(8, (outputs, channels), device).qweight
        works["int8 product of torch, not scaled"] = lambda: torch._int_mm(q, codes.t())
    return works


def conv_works(shape: tuple[int, int, int], batch: int, device: torch.device) -> dict[str, Work]:
    """Return what is to be compared of a convolution with 3 x 3 taps."""
    channels, outputs, side = shape
    last = torch.channels_last
    x = torch.randn(batch, channels, side, side, device=device, dtype=torch.bfloat16).contiguous(memory_format=last)
    float_weight = torch.randn(outputs, channels, 3, 3, device=device, dtype=torch.bfloat16)
    float_weight = float_weight.contiguous(memory_format=last)
    bias = torch.randn(outputs, device=device)
    float_bias = bias.bfloat16()
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    codes = ops.quantize_sample(x)
    works: dict[str, Work] = {"bf16": lambda: functional.conv2d(x, float_weight, float_bias, padding=1)}

    def product(packed: PackedWeight, *codes: Tensor) -> Tensor:
        stored = (packed.qweight, packed.scale, packed.multiplier, bias)
        y: Tensor = ops.conv2d_a8(*codes, *stored, *geometry, torch.bfloat16)
        return y

    works["quantize_sample alone"] = lambda: ops.quantize_sample(x)
    for bits in (8, 4):
        packed = weight(bits, (outputs, 3, 3, channels), device)
        works[f"W{bits}A8, product"] = lambda packed=packed: product(packed, *codes)
        works[f"W{bits}A8, all"] = lambda packed=packed: product(packed, *ops.quantize_sample(x))
    return works


def attention_works(shape: tuple[int, int, int, int], batch: int, device: torch.device) -> dict[str, Work]:
    """Return what is to be compared of an attention: torch's own in bfloat16, and ours."""
    heads, queries, keys, channels = shape
    projected = (
        torch.randn(batch, n, heads, channels, device=device, dtype=torch.bfloat16) for n in (queries, keys, keys)
    )
    q, k, v = (x.transpose(1, 2) for x in projected)

    def ours() -> Tensor:
        with dispatch.use_backend("cuda" if device.type == "cuda" else "auto"):
            y: Tensor = ops.attention(q, k, v, channels**-0.5)
        return y

    return {"bf16": lambda: functional.scaled_dot_product_attention(q, k, v), "int8 scores, all": ours}


def denoisers(batch: int, latent: int, device: torch.device) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    """Return denoisers in bfloat16 and in integers, the inputs of a call, and how far integers are from definitions."""
    reference = random_unet()
    args = random_arguments(batch, latent)
    small = (args[0][:, :, :16, :16].contiguous(), args[1], args[2])
    facts: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for preset in ("w8a8", "w4a8"):
        started = time.perf_counter()
        model = copy.deepcopy(reference)
        quantized(model, preset, small, {}, StepBins((500.0,), (0,), ()))
        model = model.to(device)
        on_device = tuple(value.to(device) for value in small)
        ours = model(*on_device).sample
        with dispatch.use_backend("emulated"):
            exact = model(*on_device).sample
        facts[f"{preset}_relative_difference"] = float((ours - exact).norm() / exact.norm())
        facts[f"{preset}_bytes"] = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        models[preset] = model.to(torch.bfloat16)
        print(f"{preset}: quantized in {time.perf_counter() - started:.0f} s", flush=True)
    bf16 = reference.to(device, torch.bfloat16)
    facts["bf16_bytes"] = sum(t.nbytes for t in (*bf16.parameters(), *bf16.buffers()))
    inputs = tuple(value.to(device, torch.bfloat16 if value.ndim else None) for value in args)
    return {"bf16": bf16, **models}, inputs, facts


def denoiser_ratios(
    models: dict[str, Any], inputs: tuple[Any, ...], device: torch.device, repeats: int, compiled: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Time calls as they are used, with and without `torch.compile`, and inside a CUDA graph."""
    works: dict[str, Work] = {name: lambda model=model: model(*inputs) for name, model in models.items()}
    if compiled:
        for name, model in models.items():
            traced = torch.compile(model)
            works[f"{name}, compiled"] = lambda traced=traced: traced(*inputs)
    found = {"as it is called": ratios(works, Stopwatch(device), repeats)}
    # Without the hook that reads the timestep, which a graph cannot wait for.
    recorded: dict[str, Work] = {name: lambda model=model: model.forward(*inputs) for name, model in models.items()}
    found["in a CUDA graph"] = ratios(recorded, Stopwatch(device, graphs=True), repeats)
    return found


def missing() -> list[str]:
    """Say what keeps our kernels from running on this machine's first GPU; nothing if they run."""
    try:
        driver.device(0)
    except DriverError as error:
        return [f"GPU: {error}"]
    if not torch.cuda.is_available():
        return ["torch: it finds no GPU, though the driver does"]
    problem = loaded.defect(0)
    if problem is not None:
        return [f"kernels: {problem}"]
    names = ((operation, bits) for operation in dispatch.OPERATIONS for bits in (8, 4))
    problems = {rows.defect(operation, bits, 0) for operation, bits in names}
    return sorted(f"kernels: {problem}" for problem in problems if problem is not None)


def machine() -> dict[str, Any]:
    """Return what figures depend on."""
    device = driver.device(0)
    try:
        nvrtc = "{}.{}".format(*compiler.nvrtc().version)
    except BuildError as error:
        nvrtc = str(error)
    return {
        "device": device.name,
        "compute_capability": "{}.{}".format(*device.capability),
        "multiprocessors": device.multiprocessors,
        "driver": "{}.{}".format(*driver.version()),
        "nvrtc": nvrtc,
        "torch": torch.__version__,
    }


def table(title: str, lines: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return ratios as Markdown: a line for each shape, a column for each of what was compared."""
    columns = list(dict.fromkeys(name for found in lines.values() for name in found))[1:]
    text = [f"| {title}: speed / bf16 | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, found in lines.items():
        cells = [f"{found[column]['speedup']:.2f}" if column in found else "" for column in columns]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def main(
    batch: int = 2,
    latent: Annotated[int, typer.Option(help="Latent height and width of the denoiser's call.")] = 64,
    repeats: int = 20,
    operations: Annotated[bool, typer.Option("--operations", help="Leave the denoiser out.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile as well.")] = True,
) -> None:
    """Measure, print the tables, write the JSON."""
    problems = missing()
    if problems:
        print("This needs a GPU that the CUDA kernels of dcomp run on. What is missing here:")
        print("".join(f"  {problem}\n" for problem in problems))
        print("`dcomp doctor` says more.")
        raise typer.Exit(1)
    torch.set_grad_enabled(False)
    device = torch.device("cuda", 0)
    report: dict[str, Any] = {"machine": machine(), "batch": batch, "latent": latent, "repeats": repeats}
    print(json.dumps(report["machine"], indent=2), flush=True)
    alone = Stopwatch(device, calls=10, graphs=True)
    linear = {" x ".join(map(str, shape)): ratios(linear_works(shape, device), alone, repeats) for shape in LINEAR}
    print("\n" + table("linear, rows x inputs x outputs", linear), flush=True)
    conv = {
        "{0} x {2} x {2} to {1}".format(*shape): ratios(conv_works(shape, batch, device), alone, repeats)
        for shape in CONV
    }
    print("\n" + table("convolution 3 x 3", conv), flush=True)
    attention = {
        "{0} heads of {3}, {1} x {2}".format(*shape): ratios(attention_works(shape, batch, device), alone, repeats)
        for shape in ATTENTION
    }
    print("\n" + table("attention, queries x keys", attention), flush=True)
    report |= {"linear": linear, "convolution": conv, "attention": attention}
    if not operations:
        models, inputs, facts = denoisers(batch, latent, device)
        calls = denoiser_ratios(models, inputs, device, repeats, compiled)
        print("\n" + table("denoiser", calls))
        report |= {"denoiser": calls, **facts}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
