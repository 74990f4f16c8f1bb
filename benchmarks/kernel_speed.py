"""Speed of single operations on this processor: ours against torch's and other runtimes', in turns, as ratios.

    python benchmarks/kernel_speed.py [--threads 1] [--rounds 15] [--only linear]

A layer is timed from a float input to a float output. The fastest of `rounds` turns counts, because everything else
that runs only makes turns slower; what is ten times as slow as another has three turns. Values are random and weights
are normal, see `stable_diffusion_shape.py`. Peers that are not installed are left out, see `kernel_peers.py`. Prints
tables and writes `benchmarks/results/kernel_speed-<instruction set>.json`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from kernel_peers import PEERS

RESULTS = Path(__file__).parent / "results"
HOPELESS, HOPELESS_TURNS = 10, 3  # times as slow as the fastest, and turns that are enough to know it
GROUP = 64
LINEAR = ((8192, 320, 320), (2048, 640, 5120), (512, 1280, 1280), (154, 768, 1280))  # rows, inputs, outputs
CONVOLUTIONS = ((320, 64, 320), (640, 32, 640), (1280, 16, 1280))  # channels, pixels of a side, outputs; two samples
TOKENS = ((8192, 320), (2048, 1280))
IMAGES = ((320, 64), (640, 32))
SMOOTHED = (4096, 1280)
GROUPS = ((4096, 1, 1280), (4096, 1, 320), (1, 4096, 320))  # samples, rows of each, channels

Calls = dict[str, Callable[[], Any]]


def main(
    threads: int = 1,
    rounds: Annotated[int, typer.Option(help="Turns; the fastest counts.")] = 15,
    only: Annotated[list[str] | None, typer.Option(help="linear, convolution, quantize or norm; default: all.")] = None,
) -> None:
    """Measure, print the tables, write the JSON."""
    from speed import instruction_set, machine

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(), "threads": threads, "torch": torch.__version__, "tables": {}}
    for name, (base, cases) in TABLES.items():
        if only and name not in only:
            continue
        rows = report["tables"][name] = {"base": base, "rows": []}
        for label, calls in cases():
            found = fastest(calls, rounds)
            rows["rows"].append({"case": label, "ratios": {key: found[base] / took for key, took in found.items()}})
            print(
                f"{label}: " + ", ".join(f"{key} {v:.2f}" for key, v in rows["rows"][-1]["ratios"].items()), flush=True
            )
    (RESULTS / f"kernel_speed-{instruction_set()}.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + "\n\n".join(table(report, name) for name in report["tables"]))


def fastest(calls: Calls, rounds: int) -> dict[str, float]:
    """Return the least seconds of each call over `rounds` turns, after one that packs weights and fills caches."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if turn > HOPELESS_TURNS and best[name] > HOPELESS * min(best.values()):
                continue
            started = time.perf_counter()
            call()
            if turn:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def linear_layers() -> Any:
    """Yield linear layers: quantization and product, and the product alone."""
    from dcomp.kernels import ops

    for rows, inputs, outputs in LINEAR:
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        eight, four = stored_weights(outputs, inputs)
        codes, x_scale = ops.quantize_token(x)

        def ours(weight: Any, x: Tensor = x, inputs: int = inputs) -> Tensor:
            return ops.linear_a8(*ops.quantize_token(x), *weight, None, inputs)

        def product(weight: Any, codes: Tensor = codes, scale: Tensor = x_scale, inputs: int = inputs) -> Tensor:
            return ops.linear_a8(codes, scale, *weight, None, inputs)

        calls: Calls = {
            "fp32": lambda x=x, w=weight: functional.linear(x, w),
            "W8A8": lambda w=eight: ours(w),
            "W4A8": lambda w=four: ours(w),
            "W8A8 product": lambda w=eight: product(w),
            "W4A8 product": lambda w=four: product(w),
            "_int_mm": lambda q=codes, w=eight[0]: torch._int_mm(q, w.t()),
            "int4 op": int4_product(x, outputs),
        }
        yield f"{rows} x {inputs} x {outputs}", calls | peers(x, weight, None)


def convolutions() -> Any:
    """Yield 3 x 3 convolutions of two samples, from float to float, inputs by sample."""
    from dcomp.kernels import ops

    for channels, side, outputs in CONVOLUTIONS:
        x, weight = torch.randn(2, channels, side, side), torch.randn(outputs, channels, 3, 3)
        last = x.contiguous(memory_format=torch.channels_last)
        eight, four = stored_weights(outputs, 3, 3, channels)
        shape = ([1, 1], [1, 1], [1, 1], 1)

        def ours(weight: Any, x: Tensor = last, shape: Any = shape) -> Tensor:
            return ops.conv2d_a8(*ops.quantize_sample(x), *weight, None, *shape)

        calls: Calls = {
            "fp32": lambda x=x, w=weight: functional.conv2d(x, w, None, 1, 1),
            "W8A8": lambda w=eight: ours(w),
            "W4A8": lambda w=four: ours(w),
        }
        yield f"{channels} -> {outputs}, {side} x {side}", calls | peers(x, weight, 1)


def quantizations() -> Any:
    """Yield quantization by token, by sample, and by group, and of channels that are smoothed.

    `blocks` are torch's own operations in blocks, `steps` torch's product with factors of channels, then ours.
    """
    from dcomp.kernels import blocked, ops, qparams

    for rows, channels in TOKENS:
        x = torch.randn(rows, channels)
        yield (
            f"tokens {rows} x {channels}",
            {"eager": lambda x=x: qparams.quantize_token(x), "ours": lambda x=x: ops.quantize_token(x)},
        )
    for channels, side in IMAGES:
        x = torch.randn(2, channels, side, side).contiguous(memory_format=torch.channels_last)
        yield (
            f"samples 2 x {channels} x {side} x {side}",
            {"eager": lambda x=x: qparams.quantize_sample(x), "ours": lambda x=x: ops.quantize_sample(x)},
        )
    for samples, rows, channels in GROUPS:
        x = torch.randn(samples, rows, channels)
        yield (
            f"groups of {GROUP}, {samples} x {rows} x {channels}",
            {
                "eager": lambda x=x: qparams.quantize_group(x, GROUP),
                "blocks": lambda x=x: blocked.quantize_group(x, GROUP),
                "ours": lambda x=x: ops.quantize_group(x, GROUP),
            },
        )
    yield from smoothed_quantizations()


def smoothed_quantizations() -> Any:
    """Yield quantization of channels that are multiplied by factors."""
    from dcomp.kernels import ops, qparams

    rows, (channels, side) = torch.randn(SMOOTHED), IMAGES[0]
    image = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    static = (torch.tensor([0.03]), torch.tensor([128], dtype=torch.uint8))
    for name, x, given in (
        ("token", rows, ()),
        ("group", rows.unsqueeze(1), (GROUP,)),
        ("sample", image, ()),
        ("static", image, static),
    ):
        smooth = torch.rand(x.shape[1 if x.ndim == 4 else -1]) + 0.5
        ours, plain = (getattr(module, f"quantize_{name}") for module in (ops, qparams))
        yield (
            f"smoothed, {name}, {' x '.join(map(str, x.shape))}",
            {
                "eager": lambda x=x, a=given, s=smooth, f=plain: f(x, *a, s),
                "steps": lambda x=x, a=given, s=smooth, f=ours: f(qparams.smoothed(x, s), *a),
                "ours": lambda x=x, a=given, s=smooth, f=ours: f(x, *a, s),
            },
        )


def norms() -> Any:
    """Yield norm, activation and quantization; `steps` are torch's norm and activation, and our quantization."""
    from dcomp.kernels import ops, qparams

    for channels, side in IMAGES:
        x = torch.randn(2, channels, side, side).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, channels)
        static = (torch.tensor([0.03]), torch.tensor([20], dtype=torch.uint8))

        def normal(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return functional.silu(functional.group_norm(x, 32, weight, bias, 1e-5))

        norm = (x, 32, weight, bias, 1e-5, True)
        yield (
            f"GroupNorm, SiLU, static range, 2 x {channels} x {side} x {side}",
            {
                "eager": lambda normal=normal, s=static: qparams.quantize_static(normal(), *s),
                "steps": lambda normal=normal, s=static: ops.quantize_static(normal(), *s),
                "ours": lambda norm=norm, s=static: ops.group_norm_quantize(*norm, *s),
            },
        )
        yield (
            f"GroupNorm, SiLU, range of the sample, 2 x {channels} x {side} x {side}",
            {
                "eager": lambda normal=normal: qparams.quantize_sample(normal()),
                "steps": lambda normal=normal: ops.quantize_sample(normal()),
                "ours": lambda norm=norm: ops.group_norm_quantize(*norm, None, None),
            },
        )
    for rows, channels in TOKENS:
        x, weight, bias = torch.randn(1, rows, channels), *torch.randn(2, channels)
        gain, shift = torch.randn(2, 1, channels)

        def modulated(
            x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias, gain: Tensor = gain, shift: Tensor = shift
        ) -> Tensor:
            return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6) * (1 + gain[:, None]) + shift[:, None]

        norm = (x, weight, bias, gain, shift, 1e-6)
        yield (
            f"LayerNorm, modulated, tokens {rows} x {channels}",
            {
                "eager": lambda modulated=modulated: qparams.quantize_token(modulated()),
                "steps": lambda modulated=modulated: ops.quantize_token(modulated()[0]),
                "ours": lambda norm=norm: ops.layer_norm_quantize(*norm),
            },
        )


def stored_weights(outputs: int, *rest: int) -> tuple[Any, Any]:
    """Return random weights of 8 bits and of 4 bits in groups: packed, scale, multiplier."""
    scale = torch.rand(outputs)
    eight = torch.randn(outputs, *rest)
    eight = (eight * (127 / eight.flatten(1).abs().amax(1)).view(-1, *[1] * len(rest))).round().to(torch.int8)
    four = torch.randint(0, 256, (outputs, *rest[:-1], rest[-1] // 2), dtype=torch.uint8)
    multiplier = torch.randint(1, 16, (outputs, *rest[:-1], rest[-1] // GROUP), dtype=torch.int8)
    return (eight, scale, None), (four, scale, multiplier)


def int4_product(x: Tensor, outputs: int) -> Callable[[], Tensor]:
    """Return torch's product with 4-bit weights in groups, inputs in bfloat16."""
    codes = torch.randint(0, 16, (outputs, x.shape[1]), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    ranges = torch.rand(x.shape[1] // GROUP, outputs, 2).to(torch.bfloat16)
    halves = x.to(torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(halves, packed, GROUP, ranges)


def peers(x: Tensor, weight: Tensor, padding: int | None) -> Calls:
    """Return the layer in other runtimes, those that are here and have it."""
    calls: Calls = {}
    for name, make in PEERS.items():
        try:
            calls[name] = make(x, weight, padding)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return calls


TABLES: dict[str, tuple[str, Callable[[], Any]]] = {
    "linear": ("fp32", linear_layers),
    "convolution": ("fp32", convolutions),
    "quantize": ("eager", quantizations),
    "norm": ("eager", norms),
}


def table(report: dict[str, Any], name: str) -> str:
    """Return one of the tables as Markdown: how many times faster than its base everything is."""
    found = report["tables"][name]
    columns = list(dict.fromkeys(key for row in found["rows"] for key in row["ratios"] if key != found["base"]))
    lines = [f"| {name}, times faster than {found['base']} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in found["rows"]:
        values = (f"{row['ratios'][key]:.2f}" if key in row["ratios"] else "" for key in columns)
        lines.append(f"| {row['case']} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
