"""How long each layer takes, in float and in each form that it may get, within one call of the denoiser.

Float times of all layers come from the same calls, so that they add up to no more than the call takes; what is left is
the `rest` that no choice changes. A form's time is the float time of its layer times their ratio, timed in turns. The
sum over layers is an estimate: caches are warmer in a loop over one layer than they are in a call. What a choice of
forms really saves is measured by calls with all of them.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import RowBatch
from dcomp.calibrate.safetensors_file import read_json_object
from dcomp.calibrate.timing import time_in_turns
from dcomp.calibrate.tree_file import replacing
from dcomp.compress.candidates import FLOAT, Candidates, in_place, layer_input, quantized_forms

CALLS = 9  # of the float denoiser; medians count
PAIRS = 5  # of a form and its float layer
SECONDS = 0.01  # of one timed run of a layer


@dataclass(frozen=True)
class LayerTimes:
    """Seconds in one call of the denoiser.

    Attributes:
        seconds: layer -> label -> time of that form; the label "float" is the layer as it is.
        rest: of everything that is not one of these layers.
    """

    seconds: dict[str, dict[str, float]]
    rest: float

    @property
    def total(self) -> float:
        """Of the float denoiser."""
        return self.rest + sum(forms[FLOAT] for forms in self.seconds.values())

    @property
    def least(self) -> float:
        """Of the denoiser with the fastest form of each layer."""
        return self.rest + sum(min(forms.values()) for forms in self.seconds.values())


def measure_layer_times(
    denoiser: nn.Module, rows: RowBatch, candidates: Candidates, *, file: Path, progress: Progress = silent
) -> LayerTimes:
    """Time a call of the denoiser and, against it, each candidate in integer execution.

    Args:
        denoiser: float model in eval mode.
        rows: of one call as it is made in use, such as one sample with its guidance contexts.
        candidates: layer -> label -> scheme.
        file: where the result is kept: a run that goes on must choose as it did before, and times differ.
        progress: called with a text, the count done and the total.

    Raises:
        CandidateError: a layer is never called.
    """
    key = _key(candidates, rows)
    if file.exists() and (stored := read_json_object(file)).get("key") == key:
        return LayerTimes(stored["seconds"], stored["rest"])
    total, floats = _float_times(denoiser, rows, [*candidates])
    found: dict[str, dict[str, float]] = {}
    for done, (name, schemes) in enumerate(candidates.items()):
        progress("time of each layer", done, len(candidates))
        layer, x = denoiser.get_submodule(name), layer_input(denoiser, rows, name)
        found[name] = {FLOAT: floats[name]}
        for label, form in quantized_forms(denoiser, rows, name, schemes, None):
            form.eval()
            with torch.no_grad():
                pairs = time_in_turns(lambda: layer(x), lambda: form(x), PAIRS, min_seconds=SECONDS)  # noqa: B023
            found[name][label] = floats[name] * statistics.median(b / a for a, b in pairs)
    progress("time of each layer", len(candidates), len(candidates))
    times = LayerTimes(found, max(0.0, total - sum(floats.values())))
    with replacing(file) as unfinished:
        unfinished.write_text(json.dumps({"key": key, "seconds": times.seconds, "rest": times.rest}), encoding="utf-8")
    return times


def measure_speedup(
    denoiser: nn.Module, rows: RowBatch, candidates: Candidates, chosen: Mapping[str, str], *, file: Path
) -> float:
    """Return how many times as fast as in float a call is with the chosen forms, in integer execution and in turns.

    Args:
        denoiser: float model in eval mode; afterwards as it was.
        rows: of one call as it is made in use.
        candidates: layer -> label -> scheme.
        chosen: layer -> label; those that are "float" stay as they are.
        file: where results are kept, one for each choice: a run that goes on must find what it found before.

    Raises:
        CandidateError: a layer is never called.
    """
    schemes = {name: {label: candidates[name][label]} for name, label in chosen.items() if label != FLOAT}
    key = _key(schemes, rows)
    stored = read_json_object(file) if file.exists() else {}
    if key not in stored:
        forms = {
            name: form.eval()
            for name, labels in schemes.items()
            for _, form in quantized_forms(denoiser, rows, name, labels, None)
        }

        def mixed() -> None:
            with in_place(denoiser, forms):
                denoiser(*rows.args, **rows.kwargs)

        with torch.no_grad():
            pairs = time_in_turns(lambda: denoiser(*rows.args, **rows.kwargs), mixed, CALLS)
        stored[key] = statistics.median(a / b for a, b in pairs)
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(stored), encoding="utf-8")
    return float(stored[key])


def _key(schemes: Candidates, rows: RowBatch) -> str:
    """Return what times depend on, as a hash."""
    asked = {layer: {label: scheme.to_dict() for label, scheme in forms.items()} for layer, forms in schemes.items()}
    return sha256(json.dumps([asked, len(rows), torch.get_num_threads()], sort_keys=True).encode()).hexdigest()


def _float_times(denoiser: nn.Module, rows: RowBatch, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the median seconds of a call, and of each layer within it."""
    spent: dict[str, float] = {}
    started: dict[str, float] = {}

    def begin(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            started[name] = time.perf_counter()

        return hook

    def end(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started[name]

        return hook

    totals, each = [], []
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            layer = denoiser.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(begin(name)).remove)
            stack.callback(layer.register_forward_hook(end(name)).remove)
        for _ in range(1 + CALLS):  # the first warms up
            spent.clear()
            start = time.perf_counter()
            denoiser(*rows.args, **rows.kwargs)
            totals.append(time.perf_counter() - start)
            each.append(dict(spent))
    return statistics.median(totals[1:]), {
        name: statistics.median(times.get(name, 0.0) for times in each[1:]) for name in names
    }
