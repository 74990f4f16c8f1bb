"""Joint reconstruction of the layers that depend on the timestep alone: one block between the timestep and the model.

All that this block will ever read is known, so no optimizer is needed. In order of execution each layer gets the float
weight that makes up best for what the quantized layers before it do wrong, then codes for it by second-order rounding.
What counts are the block's *features*: outputs that are read by more than the block's own layers.

Letters: N timesteps, T of them deployed, I input and O output channels of a layer.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dcomp.calibrate.replay import Path as LeafPath
from dcomp.calibrate.replay import RowBatch, leaves_of, map_leaves
from dcomp.calibrate.sampling import spread
from dcomp.calibrate.structure import Role, Structure
from dcomp.calibrate.tree_file import open_tensors, read_description, write_tree_file
from dcomp.compress.altered_calls import answering, at_timestep
from dcomp.compress.layers import QuantLinear
from dcomp.compress.quantize_layer import quantize_layer
from dcomp.compress.scheme import QScheme

OTHERS = 128  # timesteps beside the deployed ones; every other one is learned from, the rest judge
OTHERS_WEIGHT = 0.01  # of those learned from, all together, as a part of the weight of all deployed ones
DAMP = 0.01  # part of the mean squared input that holds a weight where it is

Answer = Callable[[str, Tensor], Tensor]
"""Name of a layer and its input -> its output."""


@dataclass(frozen=True)
class TimeBlockResult:
    """What reconstruction did to the block.

    All four errors are squared errors of a feature, as parts of its squared float values, on average over the features.

    Attributes:
        features: names of the layers whose outputs leave the block.
        initial: at the deployed timesteps, with the codes that the layers came with.
        final: likewise with the new codes.
        held_out_initial: at timesteps between the deployed ones that nothing was learned from.
        held_out_final: likewise.
        kept: whether the layers have the new codes: if the first error fell and the other did not grow.
    """

    features: tuple[str, ...]
    initial: float
    final: float
    held_out_initial: float
    held_out_final: float
    kept: bool


def time_weights(denoiser: nn.Module, structure: Structure, layers: Collection[str]) -> dict[str, Tensor]:
    """Return name -> float weight of those among some layers that make up the block, before they are quantized."""
    return {
        name: denoiser.get_parameter(f"{name}.weight").detach()
        for name, facts in structure.layers.items()
        if name in layers and facts.role is Role.TIME and facts.kind == "linear"
    }


@torch.no_grad()
def reconstruct_time_block(
    denoiser: nn.Module,
    rows: RowBatch,
    weights: Mapping[str, Tensor],
    timesteps: Iterable[float],
    file: Path,
) -> TimeBlockResult:
    """Choose the codes of the block's layers anew, in place.

    The denoiser runs once, on one row of the calibration set at N timesteps, to cut out the block. What the rest of the
    denoiser computes makes no difference.

    Args:
        denoiser: quantized, in eval mode.
        rows: of the calibration set; N is at most their number.
        weights: of `time_weights`, `[O, I]`; the layers are quantized now.
        timesteps: those that are deployed. Where they are more than half of the rows, evenly spaced ones stand for all.
        file: of the finished block; if it is there, it is read.

    Source:
        Huang et al. 2024, TFMQ-DM (temporal information aware reconstruction), for the block and the error that counts;
        there, rounding is learned with Adam. Li et al. 2025, GPTAQ, for targets from float inputs; here they change the
        weight in closed form before it is rounded.
    """
    layers = {name: cast(QuantLinear, denoiser.get_submodule(name)) for name in weights}
    if file.exists():
        return _read(denoiser, layers, file)
    times = _Timesteps.of(timesteps, len(rows))
    batch = rows.take([0] * len(times.values))
    args, kwargs = at_timestep(denoiser, batch.args, batch.kwargs, times.values)
    watch = _BlockWatch(len(times.values))
    exact = watch.watched(partial(_float_answer, layers, weights))
    with answering({layer: partial(exact, name) for name, layer in layers.items()}), watch:
        denoiser(*args, **kwargs)
    features = watch.features()
    made: dict[str, QuantLinear] = {}

    def fitted(name: str, x: Tensor) -> Tensor:
        made[name] = _fitted(name, layers[name], weights[name], watch.inputs[name], x, times.weights)
        return made[name].fake_forward(x)

    before = watch.run(lambda name, x: layers[name].fake_forward(x))
    after = watch.run(fitted)

    def error(outputs: Mapping[str, Tensor], which: Tensor) -> float:
        parts = [_relative(outputs[name][which], watch.outputs[name][which]) for name in features]
        return sum(parts) / max(1, len(parts))

    initial, final = (error(outputs, times.deployed) for outputs in (before, after))
    held_out_initial, held_out_final = (error(outputs, times.held_out) for outputs in (before, after))
    kept = final < initial and held_out_final <= held_out_initial
    result = TimeBlockResult(features, initial, final, held_out_initial, held_out_final, kept)
    if not kept:
        made = {}
    for name, layer in made.items():
        _replace(denoiser, name, layer)
    schemes = {name: layer.scheme.to_dict() for name, layer in made.items()}
    tensors = {f"{name}:{key}": t.contiguous() for name, layer in made.items() for key, t in layer.state_dict().items()}
    write_tree_file(file, {"result": asdict(result), "schemes": schemes}, tensors)
    return result


def _read(denoiser: nn.Module, layers: Mapping[str, QuantLinear], file: Path) -> TimeBlockResult:
    description, tensor = read_description(file), open_tensors(file)
    for name, scheme in description["schemes"].items():
        layer = QuantLinear.from_shape(layers[name], QScheme.from_dict(scheme), 1)
        layer.load_state_dict({key: tensor(f"{name}:{key}") for key in layer.state_dict()}, assign=True)
        _replace(denoiser, name, layer)
    result = description["result"]
    return TimeBlockResult(**{**result, "features": tuple(result["features"])})


def _replace(denoiser: nn.Module, name: str, layer: QuantLinear) -> None:
    before = cast(QuantLinear, denoiser.get_submodule(name))
    layer.clock, layer.execution = before.clock, before.execution
    denoiser.set_submodule(name, layer.eval())


@dataclass(frozen=True)
class _Timesteps:
    """What the denoiser is told, fp32 `[N]`; how much each row counts, `[N]`; and masks of two kinds of rows, `[N]`."""

    values: Tensor
    weights: Tensor
    deployed: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, timesteps: Iterable[float], room: int) -> "_Timesteps":
        known = torch.tensor(sorted({float(t) for t in timesteps}))
        known = known[spread(len(known), max(1, room // 2))]
        others = torch.linspace(float(known[0]), float(known[-1]), min(OTHERS, room - len(known)) + 2)[1:-1]
        if bool((known == known.round()).all()):
            others = others.round()
        others = others[~torch.isin(others, known)].unique()
        learned = torch.arange(len(others)) % 2 == 0
        weight = OTHERS_WEIGHT * len(known) / max(1, int(learned.sum()))
        none = torch.zeros(len(known), dtype=torch.bool)
        return cls(
            torch.cat([known, others]),
            torch.cat([torch.ones(len(known)), learned * weight]),
            torch.cat([~none, torch.zeros_like(learned)]),
            torch.cat([none, ~learned]),
        )


def _float_answer(layers: Mapping[str, QuantLinear], weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    bias = layers[name].bias
    return functional.linear(x.float(), weights[name].float(), None if bias is None else bias.float()).to(x.dtype)


@dataclass(frozen=True)
class _Origin:
    """What a tensor is made of: outputs of layers and nothing else, and how, from these by name."""

    layers: frozenset[str]
    make: Callable[[Mapping[str, Tensor]], Tensor]


class _BlockWatch(TorchFunctionMode):
    """Cuts the block out of one run of the denoiser, while active: what layers read of each other, and who else does.

    Args:
        rows: N; layers that read another number of rows are not part of the block.

    Attributes:
        inputs: first input of each layer, in order of execution.
        outputs: the outputs to these.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._origins = WeakTensorKeyDictionary()
        self._read: dict[str, _Origin | None] = {}
        self._read_outside: set[str] = set()
        self._inside = False

    def watched(self, answer: Answer) -> Answer:
        """Return an answer that reports what it reads and makes."""

        def watching(name: str, x: Tensor) -> Tensor:
            self._inside = True
            y = answer(name, x)
            self._inside = False
            if name not in self.inputs and len(x) == self._rows:
                self.inputs[name], self.outputs[name], self._read[name] = x, y, self._origins.get(x)
                self._origins[y] = _Origin(frozenset({name}), lambda outputs: outputs[name])
            return y

        return watching

    def run(self, answer: Answer) -> dict[str, Tensor]:
        """Run the block alone, on the inputs that it had, and return its layers' outputs."""
        outputs: dict[str, Tensor] = {}
        for name, x in self.inputs.items():
            origin = self._read[name]
            outputs[name] = answer(name, x if origin is None else origin.make(outputs))
        return outputs

    def features(self) -> tuple[str, ...]:
        """Return the layers whose outputs are read by more than the block."""
        inside = frozenset[str]().union(*(origin.layers for origin in self._read.values() if origin))
        return tuple(name for name in self.inputs if name in self._read_outside or name not in inside)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note what it made of whose outputs."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._inside:
            return output
        read = [leaf for leaf in leaves_of(args, kwargs).values() if isinstance(leaf, Tensor)]
        made = {path: leaf for path, leaf in leaves_of((output,), {}).items() if isinstance(leaf, Tensor)}
        origins = [self._origins[tensor] for tensor in read if tensor in self._origins]
        if not origins or not made:
            return output
        names = frozenset[str]().union(*(origin.layers for origin in origins))
        in_place = any(tensor is other for tensor in made.values() for other in read)
        if len(origins) < len(read) or in_place:
            self._read_outside |= names
            for tensor in made.values():
                self._origins.pop(tensor, None)
        else:
            replay = _replay(func, *map_leaves(args, kwargs, lambda _, leaf: self._origin_or(leaf)))
            for path, tensor in made.items():
                self._origins[tensor] = _Origin(names, partial(replay, path))
        return output

    def _origin_or(self, leaf: Any) -> Any:
        return self._origins[leaf] if isinstance(leaf, Tensor) else leaf


def _replay(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[LeafPath, Mapping[str, Tensor]], Tensor]:
    """Return a function that calls `func` again on other outputs of layers, and takes one leaf of its result."""

    def again(path: LeafPath, outputs: Mapping[str, Tensor]) -> Tensor:
        made = map_leaves(args, kwargs, lambda _, leaf: leaf.make(outputs) if isinstance(leaf, _Origin) else leaf)
        tensor: Tensor = leaves_of((func(*made[0], **made[1]),), {})[path]
        return tensor

    return again


def _fitted(name: str, layer: QuantLinear, weight: Tensor, exact: Tensor, x: Tensor, weights: Tensor) -> QuantLinear:
    """Quantize a layer so that it answers to `x` what the float one answers to `exact`.

    Args:
        name: of the layer.
        layer: its quantized form so far.
        weight: float `[O, I]`.
        exact: input in the float block, `[N, ..., I]`.
        x: input in the quantized block, likewise.
        weights: how much each row counts, `[N]`.
    """
    used = weights > 0
    root = weights[used].sqrt().to(x.device).view(-1, *[1] * (x.ndim - 1))
    exact, x = exact[used].float() * root, x[used].float() * root
    with torch.device("meta"):
        wanted = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    wanted.weight = nn.Parameter(_made_up(weight, exact.flatten(0, -2), x.flatten(0, -2)), requires_grad=False)
    wanted.bias = layer.bias
    sigma = None if layer.smooth_inv is None else 1 / layer.smooth_inv
    return cast(QuantLinear, quantize_layer(wanted, x, layer.scheme, name=name, sigma=sigma))


def _made_up(weight: Tensor, exact: Tensor, x: Tensor) -> Tensor:
    """Return the weight that gives of `x` what `weight` gives of `exact`, both `[N, I]`, and changes least."""
    weight, exact, x = weight.double(), exact.double(), x.double()
    moments = x.T @ x
    held = (DAMP * moments.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    moments.diagonal().add_(held)
    missing = weight @ (exact - x).T @ x
    change: Tensor = torch.linalg.solve(moments, missing, left=False)
    return (weight + change).float()


def _relative(values: Tensor, exact: Tensor) -> float:
    """Return the squared error as a part of the squared exact values; 0 of nothing."""
    error, energy = ((t.double()).square().sum() for t in (values - exact, exact))
    return float(error / energy.clamp_min(torch.finfo(torch.float64).tiny))
