"""What quantizing one layer alone does to the prediction, for each layer and each scheme in question.

One layer at a time is replaced by its quantized form, and the denoiser runs over a few recorded rows. The squared error
of the guided prediction is taken step by step. Steps differ a hundredfold in it, and not in what it does to the
picture; so each step is divided by the mean over all measurements, and has the same say. `proxy_correlation` tells how
far the result ranks changes as final latents do.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.clock import StepBins, StepClock
from dcomp.calibrate.cost import layer_bytes
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.safetensors_file import read_json_object
from dcomp.calibrate.tree_file import replacing, tensor_sha256
from dcomp.compress.allocation import Option
from dcomp.compress.candidates import CHUNK_ROWS, FLOAT, Candidates, in_place, quantized_forms
from dcomp.compress.objective import Objective
from dcomp.compress.quantize_layer import Layer
from dcomp.compress.scheme import QScheme


class SensitivityError(DcompError):
    """A measurement that cannot be made, or a file that holds another one."""


@dataclass(frozen=True)
class Sensitivity:
    """Squared errors of the prediction with one layer quantized.

    Attributes:
        timesteps: of the rows, descending.
        by_step: layer -> label -> mean squared error at each timestep.
    """

    timesteps: tuple[float, ...]
    by_step: dict[str, dict[str, tuple[float, ...]]]

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """Layer -> label -> error, each step in parts of its mean over all measurements; all have the mean 1."""
        every = [steps for labels in self.by_step.values() for steps in labels.values()]
        norms = [math.fsum(values) / len(every) for values in zip(*every, strict=True)]
        counted = [i for i, norm in enumerate(norms) if norm > 0]
        return {
            layer: {
                label: math.fsum(steps[i] / norms[i] for i in counted) / max(1, len(counted))
                for label, steps in labels.items()
            }
            for layer, labels in self.by_step.items()
        }


def measure_sensitivity(
    denoiser: nn.Module,
    rows: RowBatch,
    candidates: Candidates,
    *,
    guidance: float | None = None,
    bins: StepBins | None = None,
    file: Path | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantize each layer in each way, alone, and measure the error of the prediction against the recorded one.

    The denoiser runs over all rows about once for each layer and once for each candidate, so that few rows (32, say)
    are meant. Linear and convolution layers take the very path of the quantization pass, with fake execution.

    Args:
        denoiser: float model in eval mode; afterwards as it was.
        rows: of the calibration set, with the float model's outputs.
        candidates: layer -> label -> scheme. Schemes with rounding "nearest" are cheap and rank alike.
        guidance: scale of the guided prediction, for rows in pairs; None takes the rows as they are.
        bins: for schemes with static ranges.
        file: where finished layers are kept, so that a killed run goes on.
        progress: called with a text, the count done and the total.

    Raises:
        SensitivityError: a prediction is not finite, or the file holds another measurement.
        CandidateError, QuantizationError: see `quantized_forms`.

    Source:
        Zhao et al. 2024, MixDQ, section 4.2: one layer at a time. The unit of a step is ours.
    """
    objective = Objective(denoiser, rows, guidance, CHUNK_ROWS)
    every = torch.arange(len(objective.units))
    asked = {layer: {label: s.to_dict() for label, s in labels.items()} for layer, labels in candidates.items()}
    about = [objective.digest(), tensor_sha256(objective.units), guidance, asked, bins.to_dict() if bins else None]
    results = _Results(file, sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())
    total = sum(map(len, candidates.values()))
    done = 0
    for name, schemes in candidates.items():
        progress("sensitivity", done, total)
        if name not in results.by_step:
            found = {}
            for label, quantized in quantized_forms(denoiser, rows, name, schemes, bins):
                with _tried(denoiser, name, quantized, bins), torch.no_grad():
                    errors = objective.measure(every, silent)
                if not torch.isfinite(errors).all():
                    raise SensitivityError(
                        "The prediction is not finite", where=f"{name}, {label}", remedy="Leave this scheme out."
                    )
                found[label] = tuple(objective.by_step(errors, every).tolist())
            results.add(name, found)
        done += len(schemes)
    progress("sensitivity", total, total)
    return Sensitivity(tuple(objective.timesteps.tolist()), {name: results.by_step[name] for name in candidates})


def options_of(
    denoiser: nn.Module,
    candidates: Candidates,
    sensitivity: Sensitivity,
    *,
    seconds: Mapping[str, Mapping[str, float]] | None = None,
    step_bins: int = 1,
) -> dict[str, list[Option]]:
    """Put sizes, errors and costs together for `allocate`.

    Args:
        denoiser: with the layers, float; may be on the meta device.
        candidates: layer -> label -> scheme.
        sensitivity: measured with these.
        seconds: layer -> label -> time of one call. Where "float" is a label, the layer may also stay as it is. Without
            times costs are 0.
        step_bins: entries of each table of static ranges.
    """
    errors = sensitivity.errors
    options: dict[str, list[Option]] = {}
    for name, schemes in candidates.items():
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, Layer)
        times = {} if seconds is None else seconds[name]
        ways: dict[str, QScheme | None] = {**({FLOAT: None} if FLOAT in times else {}), **schemes}
        options[name] = [
            Option(
                name,
                label,
                layer_bytes(layer, scheme, step_bins),
                0.0 if scheme is None else errors[name][label],
                0.0 if seconds is None else times[label],
            )
            for label, scheme in ways.items()
        ]
    return options


@dataclass(frozen=True)
class ProxyCorrelation:
    """How far the error of the prediction ranks changes as the error of final latents does.

    Attributes:
        rho: Spearman's rank correlation; None where one of the two does not vary.
        pairs: layer, label, error of the prediction as in `Sensitivity.errors`, and squared relative error of the
            final latents.
    """

    rho: float | None
    pairs: tuple[tuple[str, str, float, float], ...]

    @property
    def count(self) -> int:
        """Number of changes that were compared."""
        return len(self.pairs)


def proxy_correlation(
    pipeline: OpenPipeline,
    rows: RowBatch,
    candidates: Candidates,
    sensitivity: Sensitivity,
    prompts: Sequence[str],
    settings: Generation,
    *,
    count: int = 16,
    seed: int = 0,
    bins: StepBins | None = None,
    progress: Progress = silent,
) -> ProxyCorrelation:
    """Make some of the measured changes one at a time, and run short trajectories with each.

    Args:
        pipeline: in float; afterwards as it was.
        rows: that the sensitivity was measured with.
        candidates: likewise.
        sensitivity: of these candidates.
        prompts: of the trajectories; few, and few steps in the settings, are enough for a rank.
        settings: of the trajectories.
        count: changes, drawn from all layers and labels without repetition.
        seed: decides which.
        bins: for schemes with static ranges.
        progress: called with a text, the count done and the total.
    """
    changes = [(name, label) for name, labels in candidates.items() for label in labels]
    order = torch.randperm(len(changes), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [changes[i] for i in order[:count]]
    errors = sensitivity.errors

    def latents() -> Tensor:
        clock = StepClock(bins)
        return pipeline.run(prompts, range(len(prompts)), settings, decode=False, clock=clock).latents.double()

    reference = latents()
    pairs = []
    for done, (name, label) in enumerate(drawn):
        progress("trajectories with one layer quantized", done, len(drawn))
        scheme = {label: candidates[name][label]}
        for _, quantized in quantized_forms(pipeline.denoiser, rows, name, scheme, bins):
            with _tried(pipeline.denoiser, name, quantized, bins):
                squares = (latents() - reference).square().sum() / reference.square().sum()
        pairs.append((name, label, errors[name][label], float(squares)))
    progress("trajectories with one layer quantized", len(drawn), len(drawn))
    proxies, finals = ([pair[column] for pair in pairs] for column in (2, 3))
    varies = len(set(proxies)) > 1 and len(set(finals)) > 1
    return ProxyCorrelation(float(spearmanr(proxies, finals).statistic) if varies else None, tuple(pairs))


class _Results:
    """Errors of finished layers, in memory and in a file."""

    def __init__(self, file: Path | None, key: str) -> None:
        self.by_step: dict[str, dict[str, tuple[float, ...]]] = {}
        self._file, self._key = file, key
        if file is None or not file.exists():
            return
        stored = read_json_object(file)
        if stored.get("key") != key or not isinstance(stored.get("by_step"), dict):
            raise SensitivityError(
                "The file holds another measurement",
                where=str(file),
                remedy="Delete it, or measure with the rows, schemes and guidance that it was begun with.",
            )
        for name, labels in stored["by_step"].items():
            self.by_step[name] = {label: tuple(steps) for label, steps in labels.items()}

    def add(self, name: str, found: dict[str, tuple[float, ...]]) -> None:
        """Take a layer as done."""
        self.by_step[name] = found
        if self._file is not None:
            with replacing(self._file) as unfinished:
                unfinished.write_text(json.dumps({"key": self._key, "by_step": self.by_step}), encoding="utf-8")


@contextmanager
def _tried(denoiser: nn.Module, name: str, quantized: Any, bins: StepBins | None) -> Iterator[None]:
    """Let a quantized layer, in fake execution, stand in for the float one."""
    clock = StepClock(bins)
    quantized.eval()
    quantized.clock, quantized.execution = clock, "fake"
    with in_place(denoiser, {name: quantized}), clock.attach(denoiser):
        yield
