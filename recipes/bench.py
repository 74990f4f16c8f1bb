"""Time a compressed pipeline against its original: ratios with their spread, memory and bytes.

Both denoisers are in one process and run in turns (A B, B A, ...), so that whatever else the machine does meets both
alike; each pair gives one ratio, and the median, the smallest and the largest are reported. Milliseconds are given for
orientation only: they belong to this machine and hour. Peak memory is measured in a fresh process for each side.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from dcomp import UsageError
from dcomp.calibrate.cost import count_macs
from dcomp.calibrate.pipeline import Generation, OpenPipeline, open_pipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.prompts import read_prompts
from dcomp.calibrate.timing import time_in_turns
from dcomp.recipes.peak_memory import PeakMemory, measure_peak
from dcomp.recipes.settings import calibration_of, generation_settings, settings_of_original

MIN_REPEATS = 3
RECORDED_STEPS = 2  # of the short trajectory whose denoiser calls are replayed

Call = tuple[tuple[Any, ...], dict[str, Any]]


class BenchResult(BaseModel):
    """What `bench` measured; `original` is the side that it is measured against.

    Attributes:
        speedup, speedup_min, speedup_max: median, smallest and largest ratio of original to compressed time of the
            same denoiser calls, over all pairs of runs.
        original_ms, compressed_ms: median milliseconds of one denoiser call of `batch` samples.
        generation_speedup, ..._min, ..._max: the same for whole generations without decoding; None when not asked for.
        peak_bytes, peak_bytes_original: largest resident memory of a fresh process that loads the pipeline and makes
            one batch of pictures; None when not measured.
        peak_bytes_imports: what that process held before it opened the compressed pipeline.
        denoiser_bytes, denoiser_bytes_original: parameters and buffers in memory as loaded; what kernels keep beside
            them, such as reordered weights, is in `peak_bytes` alone.
        macs, macs_original: multiply-accumulates of the recorded calls, one batch.
        repeats: number of pairs.
        calls: recorded denoiser calls in one run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    speedup: float
    speedup_min: float
    speedup_max: float
    original_ms: float
    compressed_ms: float
    generation_speedup: float | None
    generation_speedup_min: float | None
    generation_speedup_max: float | None
    peak_bytes: int | None
    peak_bytes_original: int | None
    peak_bytes_imports: int | None
    denoiser_bytes: int
    denoiser_bytes_original: int
    denoiser_bytes_ratio: float
    macs: int
    macs_original: int
    macs_ratio: float
    repeats: int
    calls: int
    batch: int
    steps: int
    threads: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return self.model_dump(mode="json")


def bench(
    compressed: str | Path,
    against: str | Path,
    *,
    repeats: int = 9,
    batch: int = 1,
    generations: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    prompts: Sequence[str] | None = None,
    peak: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BenchResult:
    """Measure speed, memory and bytes of a compressed pipeline against its original.

    Args:
        compressed: folder or hub id.
        against: the original, of the same kind.
        repeats: pairs of runs, at least `MIN_REPEATS`; a single shot is no measurement.
        batch: samples in a denoiser call; guidance doubles them as it does in use.
        generations: pairs of whole generations to time as well.
        steps: default, like `guidance`, `scheduler` and `seed`: as the checkpoint was calibrated.
        guidance: guidance scale.
        scheduler: class to run both sides with.
        seed: of the noise.
        prompts: texts or classes; default: built-in ones.
        peak: measure peak memory, which opens each pipeline once more in a process of its own.
        device: where to run.
        progress: called with a text, the count done and the total.

    Raises:
        UsageError: too few repeats, or pipelines that cannot be opened or compared.
        PeakMemoryError: a process that measured memory failed.
    """
    if repeats < MIN_REPEATS:
        raise UsageError(f"{repeats} repeats tell nothing about the spread", remedy=f"Ask for at least {MIN_REPEATS}.")
    settings = generation_settings(compressed, steps=steps, guidance=guidance, seed=seed, batch_size=batch)
    scheduler = scheduler or scheduler_of(compressed)
    both = (settings_of_original(compressed, settings), settings)
    report = progress or silent
    models = (against, compressed)
    sides = []
    for number, model in enumerate(models):
        report("opening both pipelines", number, 2)
        sides.append(_Side(open_pipeline(model, scheduler=scheduler, device=device), both[number]))
    report("opening both pipelines", 2, 2)
    first = sides[0].pipeline
    if not prompts:
        prompts = read_prompts(None, batch, first.kind, model=first.source, classes=first.classes)
    texts = fill_prompts(prompts, batch)
    del first
    pairs, whole, figures = _take_turns(sides, texts, repeats, generations, report)
    sides.clear()  # before other processes open them again
    memory: list[PeakMemory] = []
    for number, model in enumerate(models if peak else ()):
        report("peak memory, one fresh process each", number, 2)
        memory.append(measure_peak(model, texts, both[number], scheduler=scheduler, device=device))
        report("peak memory, one fresh process each", number + 1, 2)
    return BenchResult(
        **_ratios("speedup", pairs),
        **_ratios("generation_speedup", whole),
        **figures,
        original_ms=statistics.median(a for a, _ in pairs) * 1e3 / figures["calls"],
        compressed_ms=statistics.median(b for _, b in pairs) * 1e3 / figures["calls"],
        peak_bytes=memory[1].peak if memory else None,
        peak_bytes_original=memory[0].peak if memory else None,
        peak_bytes_imports=memory[1].imports if memory else None,
        denoiser_bytes_ratio=figures["denoiser_bytes"] / figures["denoiser_bytes_original"],
        macs_ratio=figures["macs"] / figures["macs_original"],
        repeats=repeats,
        batch=batch,
        steps=settings.steps,
        threads=torch.get_num_threads(),
        device=device,
    )


def scheduler_of(compressed: str | Path) -> str | None:
    """Return the scheduler class that a checkpoint was calibrated to be deployed with; None for the model's own."""
    calibration = calibration_of(compressed)
    return calibration.scheduler if calibration else None


def record_calls(pipeline: OpenPipeline, prompts: Sequence[str], settings: Generation) -> list[Call]:
    """Return the arguments of the denoiser's calls in a short seeded trajectory of one batch."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((_copy(args), _copy(kwargs)))

    short = replace(settings, steps=min(settings.steps, RECORDED_STEPS), batch_size=len(prompts))
    hook = pipeline.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipeline.run(prompts, range(len(prompts)), short, decode=False)
    finally:
        hook.remove()
    return calls


def macs_of(pipeline: OpenPipeline, prompts: Sequence[str], settings: Generation) -> int:
    """Return the multiply-accumulates of the denoiser's calls in a short trajectory of one batch."""
    return _count(pipeline.denoiser, record_calls(pipeline, prompts, settings))


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; those that share memory count once."""
    sizes = {}
    for tensor in (*module.parameters(), *module.buffers()):
        sizes[(tensor.device, tensor.data_ptr()) if tensor.numel() else id(tensor)] = tensor.nbytes
    return sum(sizes.values())


def fill_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """Return `count` prompts, going round when there are fewer."""
    return [prompts[i % len(prompts)] for i in range(count)]


@dataclass
class _Side:
    """An open pipeline, how it makes pictures, and the denoiser calls that were recorded from it."""

    pipeline: OpenPipeline
    settings: Generation
    calls: list[Call] = field(default_factory=list)

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.denoiser

    def record(self, prompts: Sequence[str]) -> None:
        self.calls = record_calls(self.pipeline, prompts, self.settings)

    def macs(self) -> int:
        return _count(self.denoiser, self.calls)

    def replay(self) -> None:
        with torch.no_grad():
            for args, kwargs in self.calls:
                self.denoiser(*args, **kwargs)
        self._finish()

    def generate(self, prompts: Sequence[str]) -> None:
        self.pipeline.run(prompts, range(len(prompts)), self.settings, decode=False)
        self._finish()

    def _finish(self) -> None:
        device = next(self.denoiser.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _take_turns(
    sides: Sequence[_Side],
    prompts: Sequence[str],
    repeats: int,
    generations: int,
    report: Progress,
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], dict[str, Any]]:
    """Return the timed pairs of denoiser calls and of generations, and what can be counted."""
    original, compressed = sides
    for side in sides:
        side.record(prompts)
    if len(original.calls) != len(compressed.calls):
        raise UsageError(
            f"For the same steps the denoisers are called {len(original.calls)} and {len(compressed.calls)} times",
            remedy="Give both the same scheduler with --scheduler.",
        )
    pairs = time_in_turns(
        original.replay, compressed.replay, repeats, lambda done, total: report("denoiser calls in turns", done, total)
    )
    whole: list[tuple[float, float]] = []
    if generations:
        whole = time_in_turns(
            lambda: original.generate(prompts),
            lambda: compressed.generate(prompts),
            generations,
            lambda done, total: report("generations in turns", done, total),
            warm_ups=0,  # the denoisers are warm
        )
    return (
        pairs,
        whole,
        {
            "denoiser_bytes": tensor_bytes(compressed.denoiser),
            "denoiser_bytes_original": tensor_bytes(original.denoiser),
            "macs": compressed.macs(),
            "macs_original": original.macs(),
            "calls": len(compressed.calls),
        },
    )


def _count(denoiser: nn.Module, calls: Sequence[Call]) -> int:
    return sum(count_macs(denoiser, args, kwargs).total for args, kwargs in calls)


def _ratios(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    ratios = [a / b for a, b in pairs]
    return {
        name: statistics.median(ratios) if ratios else None,
        f"{name}_min": min(ratios, default=None),
        f"{name}_max": max(ratios, default=None),
    }


def _copy(value: Any) -> Any:
    """Copy the tensors of an argument tree; schedulers and pipelines may change them in place later."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value
