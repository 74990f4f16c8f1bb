"""What a recipe will do to a model, found out before any weight is touched: layers, sizes, time and memory."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from dcomp import UsageError
from dcomp.calibrate.cost import count_macs, layer_bytes
from dcomp.calibrate.final_latents import PICTURES
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.structure import Role, Structure, probe_structure
from dcomp.compress.coverage import Coverage, coverage
from dcomp.compress.policy import Decision, Treatment, choose_schemes
from dcomp.compress.pruning.options import PARTS
from dcomp.compress.pruning.prune import METHODS
from dcomp.compress.pruning.recovery import BATCH_ROWS
from dcomp.recipes.prune_outlook import Outlook, outlook, stored_bytes
from dcomp.recipes.prune_stage import trajectories_to_learn_from
from dcomp.recipes.schema import QuantizeStage, Recipe

Call = tuple[tuple[Any, ...], dict[str, Any]]

# Weights searched per second, below the 2.5 to 3.4 million measured on one busy core; only for the plan's estimate.
WEIGHTS_PER_SECOND = 1_000_000
# Calls' worth of time for each row: of the pass (fake, float, moments, once more for chunks), of a step of tuning.
PASS_CALLS, TUNE_CALLS = 3.0, 4.0
WARM_CALLS, QUICK_SECONDS = 3, 2.0
RECOVER_CALLS = 4.0
SEARCH_CALLS = 20.0  # of each sample and step of a search for cache plans
TUNE_ROWS = 16  # of one iteration of tuning
FIXED_SECONDS = 15.0  # opening, writing, and the fresh process that checks what was written


@dataclass(frozen=True)
class Plan:
    """What a recipe will do.

    Attributes:
        model: folder of the model.
        denoiser: class of its denoiser.
        kind: what a picture is conditioned on.
        structure: what probing found.
        decisions: layer name -> scheme and reason, in order of execution.
        layer_bytes: layer name -> bytes before, in fp32, and after.
        coverage: size of the whole, and what stays in float.
        macs: multiply-accumulates of one denoiser call for one prompt, all contexts.
        seconds: estimated time of the whole run.
        memory_bytes: estimated peak memory of the run.
        notes: what a person should know before the work starts.
        outlook: what can be pruned; None if the recipe does not ask for it.
    """

    model: str
    denoiser: str
    kind: str
    recipe: Recipe
    structure: Structure
    decisions: dict[str, Decision]
    layer_bytes: dict[str, tuple[int, int]]
    coverage: Coverage
    macs: int
    seconds: float
    memory_bytes: int
    notes: tuple[str, ...] = ()
    outlook: Outlook | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        layers = {
            name: {
                "role": str(self.structure.layers[name].role),
                "scheme": decision.scheme.label if decision.scheme else None,
                "reason": decision.reason,
                "bytes_before": self.layer_bytes[name][0],
                "bytes_after": self.layer_bytes[name][1],
            }
            for name, decision in self.decisions.items()
        }
        return {
            "schema_version": 1,
            "model": self.model,
            "denoiser": self.denoiser,
            "kind": self.kind,
            "recipe": self.recipe.to_dict(),
            "layers": layers,
            "left_in_float": [asdict(part) for part in self.coverage.left_in_float],
            "bytes_before": self.coverage.bytes_before,
            "bytes_after": self.coverage.bytes_after,
            "bits_per_param": self.coverage.bits_per_param,
            "macs": self.macs,
            "prunable": None if self.outlook is None else self.outlook.to_dict(),
            "seconds": round(self.seconds, 1),
            "memory_bytes": self.memory_bytes,
            "notes": list(self.notes),
        }


def make_plan(
    pipeline: OpenPipeline, recipe: Recipe, prompts: Sequence[str], notes: Sequence[str] = ()
) -> tuple[Plan, Call]:
    """Probe an open pipeline with the first denoiser call of its own trajectory.

    Returns:
        The plan, and the arguments of that call.

    Raises:
        SchemeError: layers cannot be quantized as asked; all are listed.
    """
    options = recipe.calibration
    args, kwargs = first_call(
        pipeline, prompts[:1], Generation(options.steps, options.guidance, options.seed, options.height, options.width)
    )
    denoiser = pipeline.denoiser
    started = time.perf_counter()
    macs = count_macs(denoiser, args, kwargs).total
    call_seconds = _warm_seconds(denoiser, args, kwargs, time.perf_counter() - started)
    structure = probe_structure(denoiser, args, kwargs)
    stage = recipe.quantize
    foreign = stage is not None and stage.format != "dcomp"
    decisions = _decide_foreign(structure, stage) if stage and foreign else _decide(denoiser, structure, stage)
    bins = min(stage.step_bins, options.steps) if stage else 1
    sizes = {
        name: (
            layer_bytes(_layer(denoiser, name), None),
            layer_bytes(_layer(denoiser, name), decision.scheme, bins),
        )
        for name, decision in decisions.items()
    }
    total = coverage(denoiser, decisions, bins)
    if stage and foreign:
        total = _shrink_linears(total, denoiser, structure, weight_bits(stage))
    seconds, memory = FIXED_SECONDS, psutil.Process().memory_info().rss + total.bytes_after
    if total.bytes_after != total.bytes_before and not foreign:
        assert stage
        # Calls are measured with all contexts of one prompt, rows are contexts.
        seconds += call_seconds * len(prompts) * options.steps
        seconds += total.parameters / WEIGHTS_PER_SECOND + call_seconds * PASS_CALLS * stage.rows
        if stage.tune:
            rounds = 1 + stage.tune_rounding
            seconds += call_seconds * TUNE_CALLS * TUNE_ROWS * stage.tune * rounds
            seconds += call_seconds * PICTURES * options.steps * (1 + 2 * rounds)
    found = None
    if recipe.prune:
        scale = pipeline.guidance(options.guidance)
        if recipe.prune.recover_guidance and (scale is None or scale <= 1):
            raise UsageError(
                f"There is no guidance to learn: {type(pipeline.pipe).__name__} runs without",
                where="recover_guidance",
                remedy="Leave it out, or ask for a guidance above 1.",
            )
        found = outlook(denoiser, recipe.prune, stored_bytes(pipeline), args, kwargs)
        cuts = len(found.units.parts) + len(PARTS) * len(found.units.groups)
        seconds += call_seconds * len(prompts) * options.steps  # a calibration set of the whole model
        contexts = 1 if scale is None else 2
        seconds += call_seconds * cuts * recipe.prune.rows / contexts * METHODS[recipe.prune.method].measured
        seconds += call_seconds * PICTURES * options.steps * (1 + recipe.prune.proposals)
        if recipe.prune.recover != "none":
            learned_from = trajectories_to_learn_from(recipe.prune, min(options.max_calls, options.steps) * contexts)
            seconds += call_seconds * options.steps * (learned_from if learned_from > len(prompts) else 0)
            seconds += call_seconds * RECOVER_CALLS * BATCH_ROWS / contexts * recipe.prune.recover_iterations
    if recipe.schedule:
        seconds += call_seconds * SEARCH_CALLS * recipe.schedule.samples * options.steps
    plan = Plan(
        model=str(pipeline.source),
        denoiser=type(denoiser).__name__,
        kind=pipeline.kind,
        recipe=recipe,
        structure=structure,
        decisions=decisions,
        layer_bytes=sizes,
        coverage=total,
        macs=macs,
        seconds=seconds,
        memory_bytes=int(memory),
        notes=(*notes, *_notes(structure)),
        outlook=found,
    )
    return plan, (args, kwargs)


def _warm_seconds(denoiser: nn.Module, args: Any, kwargs: Any, first: float) -> float:
    """Return the time of a call: of a quick one again, since the first of a model also makes what later ones find."""
    for _ in range(WARM_CALLS if first < QUICK_SECONDS else 0):
        started = time.perf_counter()
        with torch.no_grad():
            denoiser(*args, **kwargs)
        first = min(first, time.perf_counter() - started)
    return first


def weight_bits(stage: QuantizeStage) -> int:
    """Return the weight bits that a stage's preset stands for."""
    return 4 if stage.preset.startswith("w4") else 8


def treatment_of(stage: QuantizeStage) -> Treatment:
    """Return how a stage quantizes layers, whatever their precision."""
    ranges = ("input_group", "weight_range", "input_range", "inputs")
    names = (*ranges, "rounding", "split", "smooth", "rotate", "directions", "rank")
    return Treatment(**{name: getattr(stage, name) for name in names})


class _CallSeen(Exception):  # noqa: N818 - not an error: it ends a trajectory that has shown what was wanted
    pass


def first_call(pipeline: OpenPipeline, prompts: Sequence[str], settings: Generation) -> Call:
    """Return the arguments of the first denoiser call of a trajectory, and run no further."""
    seen: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _CallSeen

    handle = pipeline.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        pipeline.run(prompts, range(len(prompts)), settings, decode=False)
    except _CallSeen:
        pass
    finally:
        handle.remove()
    return seen[0]


def _decide(denoiser: nn.Module, structure: Structure, stage: QuantizeStage | None) -> dict[str, Decision]:
    if stage is None:
        return choose_schemes(denoiser, structure, "float")
    return choose_schemes(denoiser, structure, stage.preset, stage.keep, stage.overrides, treatment_of(stage))


def _decide_foreign(structure: Structure, stage: QuantizeStage) -> dict[str, Decision]:
    words = {
        "linear": f"left to {stage.format}: {weight_bits(stage)}-bit weights, float input",
        "conv2d": f"diffusers' {stage.format} quantizer knows linear layers only",
    }
    return {name: Decision(None, words[facts.kind]) for name, facts in structure.layers.items()}


def _shrink_linears(total: Coverage, denoiser: nn.Module, structure: Structure, bits: int) -> Coverage:
    """Count the weights of linear layers at `bits` each; a foreign format's scales are not known here."""
    linears = {name for name, facts in structure.layers.items() if facts.kind == "linear"}
    saved = sum(_layer(denoiser, name).weight.numel() * (32 - bits) // 8 for name in linears)
    after = total.bytes_after - saved
    return replace(
        total,
        bytes_after=after,
        ratio=after / total.bytes_before,
        bits_per_param=8 * after / max(1, total.parameters),
        left_in_float=tuple(part for part in total.left_in_float if part.name not in linears),
    )


def _layer(denoiser: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    layer = denoiser.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)  # structure probing describes no others
    return layer


def _notes(structure: Structure) -> list[str]:
    unused = structure.named(Role.UNUSED)
    if not unused:
        return []
    return [
        f"{len(unused)} layers were not executed in the probed call and stay in float: {', '.join(sorted(unused)[:4])}."
    ]
