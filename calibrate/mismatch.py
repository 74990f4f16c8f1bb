"""Whether a calibration set belongs to the pipeline and the settings that a model is compressed for.

Ranges hold on the trajectory that they were found on. Another scheduler, step count, guidance or size is refused by
name, unless the user says that it is meant; then it is measured how far the two trajectories are apart. What cannot be
replayed at all, a denoiser of another architecture, is always refused.
"""

import hashlib
import inspect
import json
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from dcomp.calibrate.calibration_set import CalibrationError, CalibrationSet
from dcomp.calibrate.clock import StepClock, log_snr_function
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.tree_file import tensor_sha256

_SCHEDULER = "scheduler"


def check_matches(
    recorded: CalibrationSet, pipeline: OpenPipeline, settings: Generation, allow_mismatch: bool = False
) -> list[str]:
    """Compare a calibration set with what a model will be deployed as.

    Args:
        recorded: the set.
        pipeline: as deployed, in float. Where it differs, one trajectory of it is run to measure the distance.
        settings: as deployed; seed and batch size may be any.
        allow_mismatch: return differences as notes instead of refusing them.

    Returns:
        Notes as sentences; empty when nothing differs.

    Raises:
        CalibrationError: something differs and is not allowed, or the denoiser has another architecture.
    """
    parts, replayable = _other_components(recorded, pipeline)
    values = _other_settings(recorded, pipeline, settings)
    differences = [*parts, *values]
    if not differences:
        return []
    if not replayable:
        raise CalibrationError(
            f"The calibration set was recorded with another denoiser: {'; '.join(differences)}",
            where=str(recorded.folder),
            remedy="Record one of this model with `dcomp calibrate`.",
        )
    if not allow_mismatch:
        raise CalibrationError(
            f"The calibration set was recorded otherwise: {'; '.join(differences)}",
            where=str(recorded.folder),
            remedy="Record one with `dcomp calibrate` and these settings, or use this one with --allow-mismatch.",
        )
    notes = [f"The calibration set was recorded otherwise: {difference}." for difference in differences]
    return [*notes, _distance(recorded, pipeline, settings)]


def describe_components(pipeline: OpenPipeline) -> dict[str, dict[str, str]]:
    """Return class, hash of the config and hash of the weights of each part of a pipeline, by name."""
    described = {}
    for name, part in sorted(pipeline.pipe.components.items()):
        if part is None:
            continue
        config: Any = getattr(part, "config", None) or {}
        config = config.to_dict() if hasattr(config, "to_dict") else config
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        described[name] = {"class": type(part).__name__, "config": _sha256(config)}
        if isinstance(part, nn.Module):
            described[name]["weights"] = _sha256({key: tensor_sha256(t) for key, t in part.state_dict().items()})
    return described


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _other_components(recorded: CalibrationSet, pipeline: OpenPipeline) -> tuple[list[str], bool]:
    """Return what differs between the pipelines, and whether calls of the one can be replayed by the other."""
    if recorded.model == pipeline.fingerprint():
        return [], True
    before, now = recorded.components, describe_components(pipeline)
    if not before:
        return ["another model, scheduler or adapter, and the set is too old to tell which"], True
    differences, replayable = [], True
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, {}), now.get(name, {})
        if old == new:
            continue
        if old.get("class") != new.get("class"):
            differences.append(f"{name} {old.get('class', 'missing')} instead of {new.get('class', 'none')}")
        elif old.get("config") != new.get("config"):
            differences.append(f"another configuration of the {name} {new['class']}")
        else:
            differences.append(f"other weights of the {name}, by training or by an adapter")
        architecture = [{key: side.get(key) for key in ("class", "config")} for side in (old, new)]
        replayable &= name != pipeline.denoiser_name or architecture[0] == architecture[1]
    return differences or ["another model, scheduler or adapter"], replayable


def _other_settings(recorded: CalibrationSet, pipeline: OpenPipeline, settings: Generation) -> list[str]:
    now, defaults = asdict(settings), _defaults(pipeline)
    differences = []
    for key in ("steps", "guidance", "height", "width"):
        old, new = (defaults.get(key) if side[key] is None else side[key] for side in (recorded.settings, now))
        if old != new:
            texts = ["the pipeline's default" if value is None else f"{value:g}" for value in (old, new)]
            differences.append(f"{key} {texts[0]} instead of {texts[1]}")
    return differences


def _defaults(pipeline: OpenPipeline) -> dict[str, float]:
    """Return what None means in the settings of a pipeline, as far as it can be seen."""
    pipe = pipeline.pipe
    guidance = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    size = getattr(pipe, "default_sample_size", None) or getattr(pipeline.denoiser.config, "sample_size", None)
    factor = getattr(pipe, "vae_scale_factor", None)
    known: dict[str, float] = {}
    if guidance is not None and isinstance(guidance.default, int | float):
        known["guidance"] = guidance.default
    if isinstance(size, int) and isinstance(factor, int):
        known |= {"height": size * factor, "width": size * factor}
    return known


def _distance(recorded: CalibrationSet, pipeline: OpenPipeline, settings: Generation) -> str:
    """Run one deployed trajectory and say how far its timesteps are from calibrated ones."""
    clock, told = StepClock(), set[float]()

    def on_step(call: int, calls: int, latents: Tensor) -> None:
        told.add(clock.timestep)

    pipeline.run(recorded.prompts[:1], [0], settings, decode=False, clock=clock, on_step=on_step)
    log_snr = log_snr_function(pipeline.scheduler, max(*told, *recorded.all_timesteps))
    known = sorted(log_snr(t) for t in recorded.timesteps)
    distances = [min(abs(log_snr(t) - other) for other in known) for t in told]
    gaps = [after - before for before, after in pairwise(known)]
    spacing = f" Calibrated ones are {sum(gaps) / len(gaps):.3g} apart on average." if gaps else ""
    return (
        f"The {len(told)} timesteps to deploy are {sum(distances) / len(distances):.3g} in log-SNR from the nearest "
        f"calibrated one on average, and {max(distances):.3g} at most.{spacing}"
    )
