"""Temporal features as tables: layers that depend on the timestep alone are replaced by their outputs.

A sampler deploys T timesteps, so such a layer has T outputs. `TimeTable` holds them, one row each, and the layer's
weights leave the file and the hot path. A layer that is read by tables alone holds nothing at all: `Absent`. Which is
which is found by running, not by name. Layers that also read global conditions have no such table.

Letters: T rows of a table, N samples, I input and O output features.

Source: Huang et al. 2025, Temporal Feature Matters (cache-based maintenance, disturbance-aware selection).
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.calibrate.calibration_set import CalibrationSet, RecordedCall
from dcomp.calibrate.clock import StepClock, clock_of
from dcomp.calibrate.cost import layer_bytes
from dcomp.calibrate.pipeline import prediction_of
from dcomp.calibrate.range_search import search_weight
from dcomp.calibrate.record import spread
from dcomp.calibrate.structure import Role, Structure
from dcomp.compress.altered_calls import answering, at_timestep, outputs_of
from dcomp.compress.layers import QuantLinear
from dcomp.compress.scheme import QScheme
from dcomp.compress.time_table import DTYPES, MAX_ROWS, Absent, FeatureError, TimeTable

PROBED_CALLS = 3  # recorded calls by which layers are found absent and the disturbance is measured
_ROW_TOLERANCE = 1e-5  # of the largest output: equal rows through one matrix product may differ by rounding


@dataclass(frozen=True)
class Feature:
    """What becomes of one layer.

    Attributes:
        form: "table" or "absent".
        rows: T; 0 if absent.
        width: O.
        layer_bytes: of the layer that goes, at the scheme that the plan was made for.
    """

    form: Literal["table", "absent"]
    rows: int
    width: int
    layer_bytes: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the table with values of a dtype."""
        return self.rows * (self.width * dtype.itemsize + torch.float32.itemsize)


@dataclass(frozen=True)
class FeaturePlan:
    """Which layers become tables.

    Attributes:
        features: by layer name, in order of execution.
        kept: layers of `Role.TIME` that stay what they are -> why.
        calls: recorded calls that it was found by; tables are filled at their batch shape.
    """

    features: dict[str, Feature]
    kept: dict[str, str]
    calls: tuple[RecordedCall, ...] = field(repr=False, compare=False)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tables with values of a dtype."""
        return sum(feature.nbytes(dtype) for feature in self.features.values())

    @property
    def layer_bytes(self) -> int:
        """Bytes of all layers that go, at the schemes that the plan was made for."""
        return sum(feature.layer_bytes for feature in self.features.values())

    def named(self, form: Literal["table", "absent"]) -> list[str]:
        """Names of the layers that take a form."""
        return [name for name, feature in self.features.items() if feature.form == form]


@dataclass(frozen=True)
class FeatureReport:
    """What replacing layers by tables did.

    Attributes:
        tables: names of the layers that are tables now.
        absent: names of those that hold nothing.
        rows: T.
        nbytes: of all tables.
        layer_bytes: of the layers before, as the plan counts them.
        disturbance: largest difference between predictions before and after, over the plan's calls.
        peak: largest absolute value of the predictions before.
    """

    tables: tuple[str, ...]
    absent: tuple[str, ...]
    rows: int
    nbytes: int
    layer_bytes: int
    disturbance: float
    peak: float


@dataclass(frozen=True)
class Variant:
    """One form of a feature against the float layer.

    Attributes:
        error: squared error, summed over timesteps and channels.
        cosine: mean cosine distance over the timesteps.
        nbytes: in the file.
    """

    error: float
    cosine: float
    nbytes: int


@dataclass(frozen=True)
class FeatureChoice:
    """Both forms of a feature, and the closer one."""

    table: Variant
    quantized: Variant

    @property
    def form(self) -> Literal["table", "quantized"]:
        """The form with the smaller error, then with the smaller cosine distance; the table if they are equal."""
        table, quantized = self.table, self.quantized
        worse = (table.error, table.cosine) > (quantized.error, quantized.cosine)
        return "quantized" if worse else "table"

    @property
    def chosen(self) -> Variant:
        """The form that is taken."""
        return self.table if self.form == "table" else self.quantized


@torch.no_grad()
def plan_features(
    denoiser: nn.Module,
    structure: Structure,
    calibration: CalibrationSet,
    *,
    timesteps: Iterable[float] | None = None,
    schemes: Mapping[str, QScheme] | None = None,
    keep: Mapping[str, str] | None = None,
) -> FeaturePlan:
    """Find out which layers can be tables, and which of them nobody reads then. Changes nothing.

    All layers of `Role.TIME` become tables. Then each one, in order of execution, answers zeros: it is absent if the
    predictions of `PROBED_CALLS` recorded calls stay the same in every bit.

    Args:
        denoiser: float model in eval mode.
        structure: what probing it found.
        calibration: recorded calls of this very model.
        timesteps: those that will be deployed; by default all of the recorded trajectory.
        schemes: of layers, for their bytes; a layer without one counts as it is.
        keep: names of layers that shall stay what they are -> why.

    Raises:
        FeatureError: there are no timesteps, too many, or some that are not finite.
    """
    rows = len(_distinct(calibration.all_timesteps if timesteps is None else timesteps))
    chosen = spread(len(calibration), PROBED_CALLS)
    calls = tuple(call for i, call in enumerate(calibration.calls(_device(denoiser))) if i in chosen)
    names = [name for name, facts in structure.layers.items() if facts.role is Role.TIME]
    return _plan(denoiser, names, calls, rows, schemes or {}, keep or {})


@torch.no_grad()
def cache_features(
    denoiser: nn.Module,
    plan: FeaturePlan,
    timesteps: Iterable[float],
    dtype: torch.dtype = torch.float16,
    *,
    clock: StepClock | None = None,
) -> FeatureReport:
    """Replace the planned layers by tables, in place.

    Rows come from the float layers, run at the batch shape of the plan's first call: at another batch size a matrix
    product may sum in another order.

    Args:
        denoiser: model in eval mode in which the planned layers are still float; others may be quantized.
        plan: from `plan_features` of this model.
        timesteps: those that are deployed, in any order, repeats allowed.
        dtype: of the values, torch.float16 or torch.float32.
        clock: already follows the denoiser; by default its `dcomp_clock`, which is attached if it has none.

    Raises:
        FeatureError: a layer is not float, a value does not fit into the dtype, or the timesteps are unusable.
    """
    if dtype not in DTYPES.values():
        raise FeatureError(f"Tables hold no {dtype}", where="dtype", remedy=f"Use {' or '.join(DTYPES)}.")
    known = _distinct(timesteps)
    layers = {name: _float_linear(denoiser, name) for name in plan.features}
    before = [_predict(denoiser, call) for call in plan.calls]
    traced = _trace(denoiser, plan.named("table"), plan.calls[0], known) if layers else {}
    tables = {name: outputs.to(dtype) for name, (_, outputs) in traced.items()}
    for name, values in tables.items():
        if not bool(torch.isfinite(values).all()):
            raise FeatureError(
                f"A temporal feature does not fit into {dtype}", where=name, remedy="Use float32, or keep the layer."
            )
    clock = clock or clock_of(denoiser)
    for name, layer in layers.items():
        made: nn.Module = Absent(layer.in_features, layer.out_features)
        if name in tables:
            rows = torch.tensor(known, dtype=torch.float32, device=tables[name].device)
            made = TimeTable(rows, tables[name], layer.in_features, clock)
        denoiser.set_submodule(name, made.train(layer.training))
    after = [replace(call, output=prediction) for call, prediction in zip(plan.calls, before, strict=True)]
    return FeatureReport(
        tuple(plan.named("table")),
        tuple(plan.named("absent")),
        len(known),
        sum(table.nbytes + 4 * len(known) for table in tables.values()),
        plan.layer_bytes,
        disturbance(denoiser, after),
        max((prediction.abs().max().item() for prediction in before), default=0.0),
    )


@torch.no_grad()
def disturbance(denoiser: nn.Module, calls: Iterable[RecordedCall]) -> float:
    """Return the largest difference between a denoiser's predictions and those of recorded calls."""
    return max(((_predict(denoiser, call) - call.output).abs().max().item() for call in calls), default=0.0)


@torch.no_grad()
def choose_features(
    denoiser: nn.Module,
    plan: FeaturePlan,
    schemes: Mapping[str, QScheme],
    timesteps: Iterable[float],
    dtype: torch.dtype = torch.float16,
    *,
    quantize: "Callable[[nn.Linear, QScheme], nn.Module] | None" = None,
) -> tuple[FeaturePlan, dict[str, FeatureChoice]]:
    """Compare each table with the quantized form of its layer, and take the closer one. Changes nothing.

    Errors are sums over the timesteps, each layer on its float inputs. A layer that is better quantized is run, hence
    the layers that it reads are absent no longer: the plan is made anew until no table loses.

    Args:
        denoiser: the float model.
        plan: of it, with all layers as tables that can be.
        schemes: of layers, by name; those without one have no quantized form.
        timesteps: those that are deployed.
        dtype: of the tables' values.
        quantize: makes the quantized form of a float layer; by default with rounding to nearest.

    Returns:
        The plan without the layers that are better quantized (they are in `kept`), and the comparison of every
        layer that is a table in one of the plans made on the way and has a scheme.
    """
    known, quantize, names = _distinct(timesteps), quantize or _round_to_nearest, [*plan.features, *plan.kept]
    choices: dict[str, FeatureChoice] = {}
    while True:
        fresh = [name for name in plan.named("table") if name in schemes and name not in choices]
        for name, (inputs, outputs) in (_trace(denoiser, fresh, plan.calls[0], known) if fresh else {}).items():
            layer = _float_linear(denoiser, name)
            quantized = quantize(layer, schemes[name])(inputs)
            bytes_of_table = plan.features[name].nbytes(dtype)
            choices[name] = FeatureChoice(
                _variant(outputs.to(dtype), outputs, bytes_of_table),
                _variant(quantized, outputs, layer_bytes(layer, schemes[name])),
            )
        lost = [name for name in plan.named("table") if name in choices and choices[name].form == "quantized"]
        if not lost:
            return plan, choices
        kept = {**plan.kept, **dict.fromkeys(lost, "its quantized form is closer than its table")}
        plan = _plan(denoiser, names, plan.calls, len(known), schemes, kept)


def _plan(
    denoiser: nn.Module,
    names: Sequence[str],
    calls: Sequence[RecordedCall],
    rows: int,
    schemes: Mapping[str, QScheme],
    keep: Mapping[str, str],
) -> FeaturePlan:
    modules = dict(denoiser.named_modules())
    seen = [outputs_of(denoiser, names, call.args, call.kwargs) for call in calls]
    reasons = {name: keep.get(name) or _obstacle(modules[name], [run[name] for run in seen]) for name in names}
    # All rows of a recorded call have one timestep, so that the first one speaks for all.
    firsts = [
        {name: run[name][0].reshape(-1, run[name][0].shape[-1])[0] for name in names if not reasons[name]}
        for run in seen
    ]

    def predictions(absent: Collection[str]) -> Iterator[Tensor]:
        for call, row in zip(calls, firsts, strict=True):
            values = {name: torch.zeros_like(row[name]) if name in absent else row[name] for name in row}
            with answering({modules[name]: _repeat(value) for name, value in values.items()}):
                yield _predict(denoiser, call)

    expected = list(predictions(()))
    absent: set[str] = set()
    features = {}
    for name in (name for name in names if not reasons[name]):
        same = all(torch.equal(p, e) for p, e in zip(predictions({*absent, name}), expected, strict=True))
        layer = cast(nn.Linear, modules[name])
        stored = layer_bytes(layer, schemes.get(name))
        absent |= {name} if same else set()
        features[name] = Feature("absent" if same else "table", 0 if same else rows, layer.out_features, stored)
    return FeaturePlan(features, {name: reason for name, reason in reasons.items() if reason}, tuple(calls))


def _obstacle(layer: nn.Module, runs: Sequence[Sequence[Tensor]]) -> str | None:
    """Say why a layer cannot be a table; None if it can."""
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is no float linear layer"
    if not all(runs):
        return "not executed in every recorded call"
    for outputs in runs:
        rows = torch.cat([output.reshape(-1, layer.out_features) for output in outputs])
        if not bool((rows - rows[0]).abs().max() <= _ROW_TOLERANCE * rows.abs().max()):
            return "has several outputs at one timestep"
    return None


def _repeat(row: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: row.expand(*x.shape[:-1], -1).contiguous()


def _predict(denoiser: nn.Module, call: RecordedCall) -> Tensor:
    return prediction_of(denoiser(*call.args, **call.kwargs))


class _AllSeen(Exception):  # noqa: N818 - no error: it ends a call of which nothing more is wanted
    pass


def _trace(
    denoiser: nn.Module, names: Sequence[str], call: RecordedCall, timesteps: Sequence[float]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the inputs `[T, I]` and outputs `[T, O]` of layers in a call that is made at each timestep.

    A call ends with the last of these layers, which is early in a transformer.
    """
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    done: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def finished(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if name not in done:
                both = (args[0] if args else kwargs["input"], output)
                x, y = (tensor.reshape(-1, tensor.shape[-1])[0].clone() for tensor in both)
                rows[name].append((x, y))
                done.add(name)
            if len(done) == len(names):
                raise _AllSeen

        return finished

    with ExitStack() as stack:
        for name in names:
            layer = denoiser.get_submodule(name)
            stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        for t in timesteps:
            done.clear()
            args, kwargs = at_timestep(denoiser, call.args, call.kwargs, t)
            try:
                denoiser(*args, **kwargs)
            except _AllSeen:
                continue
            missing = next(name for name in names if name not in done)
            raise FeatureError(f"A layer is not executed at timestep {t:g}", where=missing, remedy="Keep the layer.")
    stacked = {name: [torch.stack(side) for side in zip(*pairs, strict=True)] for name, pairs in rows.items()}
    return {name: (inputs, outputs) for name, (inputs, outputs) in stacked.items()}


def _round_to_nearest(layer: nn.Linear, scheme: QScheme) -> nn.Module:
    weight = layer.weight.detach().float()
    packed = search_weight(weight, scheme.weight_bits, scheme.group_size, scheme.weight_range)
    quantized = QuantLinear.from_float(layer, packed, scheme)
    quantized.execution = "fake"
    return quantized


def _variant(values: Tensor, exact: Tensor, nbytes: int) -> Variant:
    values, exact = values.double(), exact.double()
    error = (values - exact).square().sum().item()
    cosine = 1 - functional.cosine_similarity(values, exact).mean().item()
    return Variant(error if math.isfinite(error) else math.inf, cosine if math.isfinite(cosine) else 2.0, nbytes)


def _distinct(timesteps: Iterable[float]) -> list[float]:
    """Return timesteps as fp32 holds them, descending."""
    rounded = torch.tensor([float(t) for t in timesteps], dtype=torch.float32)
    known = sorted(set(rounded.tolist()), reverse=True)
    if not 1 <= len(known) <= MAX_ROWS or not bool(torch.isfinite(rounded).all()):
        raise FeatureError(
            f"A table needs 1 to {MAX_ROWS} finite timesteps", where="timesteps", remedy="Deploy other timesteps."
        )
    return known


def _float_linear(denoiser: nn.Module, name: str) -> nn.Linear:
    layer = denoiser.get_submodule(name)
    if type(layer) is not nn.Linear:
        raise FeatureError(
            f"{type(layer).__name__} is no float linear layer",
            where=name,
            remedy="Make tables before layers are quantized.",
        )
    return layer


def _device(denoiser: nn.Module) -> torch.device:
    return next(denoiser.parameters()).device
