"""Facts about a denoiser, found by running it: what each layer depends on, reads and is for.

One recorded call is cut to a single sample and repeated, each time with another group of inputs changed; a layer
depends on a group if and only if something that it reads or returns differs in any bit. Class names play no part;
`POSITIONS` is the one table of exceptions. Only hashes of activations are kept, and nothing is changed: the denoiser
is in its former mode afterwards.

A *layer* here is an `nn.Linear` or `nn.Conv2d`, not a subclass of them, which may compute something else; other parts
of the denoiser are not described.
"""

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.tensor_watch import TensorWatch

GROUPS = ("time", "latents", "text", "condition")

TIMESTEP, TEXT = "timestep", "encoder_hidden_states"
POSITIONS = ("img_ids", "txt_ids")  # Flux: coordinates of tokens, without a batch axis, the same in every call


class StructureError(DcompError):
    """A denoiser, or a call of it, that cannot be probed."""


class Role(StrEnum):
    """What a layer is for; the first that applies, in this order."""

    UNUSED = "unused"  # not executed in the probed call
    INPUT = "input"  # reads the latents, with no other layer before it
    OUTPUT = "output"  # the last executed layer that depends on the latents
    TIME = "time"  # depends on the timestep alone
    TEXT = "text"  # depends on the text tokens alone
    MODULATION = "modulation"  # depends on timestep or global conditions, neither on latents nor on text tokens
    SHORTCUT = "shortcut"  # reads a concatenation itself, without a norm between
    CONV = "conv"
    LINEAR = "linear"


@dataclass(frozen=True)
class LayerFacts:
    """What probing found out about one layer.

    Attributes:
        name: path in the denoiser.
        kind: "linear" or "conv2d".
        role: what it is for.
        depends: the groups of inputs, out of `GROUPS`, that it depends on.
        boundaries: input channels at which another part of a concatenation begins; empty without one.
        shared_input: layers with the same number read the very same tensor; None for a tensor of its own.
        calls: how often one call of the denoiser runs it.
    """

    name: str
    kind: str
    role: Role
    depends: frozenset[str]
    boundaries: tuple[int, ...] = ()
    shared_input: int | None = None
    calls: int = 0


@dataclass(frozen=True)
class Structure:
    """Everything that probing found out about a denoiser.

    Attributes:
        layers: facts by name, in order of execution; unused ones last.
        blocks: names of its repeated units in order of execution: they overlap nowhere and hold two or more layers.
        tied: layers that are bit-equal copies of each other, each set in order of execution.
    """

    layers: dict[str, LayerFacts]
    blocks: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]

    def named(self, *roles: Role) -> set[str]:
        """Names of the layers with one of these roles."""
        return {name for name, facts in self.layers.items() if facts.role in roles}


def is_layer(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` or `nn.Conv2d`, and not one of their subclasses."""
    return type(module) in (nn.Linear, nn.Conv2d)


def probe_structure(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Structure:
    """Run a denoiser about six times on one sample of a call and report what its layers are.

    Args:
        denoiser: the model with its real weights, as a gate that is zero hides what it gates.
        args: positional arguments of a recorded call.
        kwargs: its keyword arguments.

    Raises:
        StructureError: the call does not fit the model, lacks latents or a timestep, or does not repeat bit by bit.
    """
    layers = {name: module for name, module in denoiser.named_modules() if is_layer(module)}
    call = _Call.bind(denoiser, args, kwargs)
    with torch.no_grad(), _eval_mode(denoiser):
        watch = TensorWatch(call.bound.arguments[call.latents])
        base = _run(denoiser, layers, call, watch)
        _require_repeatable(base, _run(denoiser, layers, call))
        depends: dict[str, set[str]] = {name: set() for name in layers}
        for group in GROUPS:
            changed = call.with_other(group)
            try:
                run = _run(denoiser, layers, changed) if changed else base
            except IndexError:  # a class table with one row: there is no other id, hence no dependence
                run = base
            for name in layers:
                if base.hashes.get(name) != run.hashes.get(name):
                    depends[name].add(group)
    last = next((name for name in reversed(base.order) if "latents" in depends[name]), None)
    shared = _shared(watch.inputs)
    facts = {}
    for name in [*base.hashes, *(name for name in layers if name not in base.hashes)]:
        facts[name] = LayerFacts(
            name,
            "conv2d" if isinstance(layers[name], nn.Conv2d) else "linear",
            _role(name, layers[name], depends[name], watch, last) if name in base.hashes else Role.UNUSED,
            frozenset(depends[name]),
            # Where no latents arrive (sines and cosines of an embedding) the parts need no ranges of their own.
            watch.boundaries.get(name, ()) if "latents" in depends[name] else (),
            shared.get(name),
            len(base.hashes.get(name, ())),
        )
    return Structure(facts, _blocks(denoiser, list(base.hashes)), _tied({name: layers[name] for name in facts}))


def _role(name: str, layer: nn.Module, depends: set[str], watch: TensorWatch, last: str | None) -> Role:
    if name in watch.first and "latents" in depends:
        return Role.INPUT
    if name == last:
        return Role.OUTPUT
    if depends == {"time"}:
        return Role.TIME
    if depends == {"text"}:
        return Role.TEXT
    if depends and depends <= {"time", "condition"}:
        return Role.MODULATION
    if name in watch.direct:
        return Role.SHORTCUT
    return Role.CONV if isinstance(layer, nn.Conv2d) else Role.LINEAR


def _shared(inputs: Mapping[str, int]) -> dict[str, int]:
    """Keep the numbers of tensors that several layers read."""
    numbers = list(inputs.values())
    return {name: number for name, number in inputs.items() if numbers.count(number) > 1}


@dataclass(frozen=True)
class _Call:
    """Arguments by the names of the signature, cut to one sample; `latents` names the first of them."""

    bound: inspect.BoundArguments
    latents: str

    @classmethod
    def bind(cls, denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "_Call":
        signature = inspect.signature(denoiser.forward)
        remedy = "Pass the arguments of a real call of this model, as its pipeline makes it."
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise StructureError(f"The call does not fit the model: {error}", remedy=remedy) from error
        latents = next(iter(signature.parameters))
        sample = bound.arguments.get(latents)
        if not isinstance(sample, Tensor) or not sample.is_floating_point() or sample.ndim < 2 or not len(sample):
            raise StructureError(f"The first argument `{latents}` is not a batch of latents", remedy=remedy)
        if bound.arguments.get(TIMESTEP) is None:
            raise StructureError(f"The call has no argument `{TIMESTEP}`", remedy=remedy)
        batch = len(sample)

        def cut(path: tuple[str, ...], value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim and len(value) == batch and path[0] not in POSITIONS
            # The last sample has the prompt; the first may be the empty one, where attention to a single token is 1.
            return value[-1:].clone() if batched else value

        return cls(_rebound(bound, cut), latents)

    def with_other(self, group: str) -> "_Call | None":
        """Return the call with other, equally legal values in a group; None if it has no such inputs."""
        generator = torch.Generator().manual_seed(0)
        found = False

        def change(path: tuple[str, ...], value: Any) -> Any:
            nonlocal found
            if self._group(path, value) != group:
                return value
            found = True
            if group == "time":
                return _other_time(value)
            if value.is_floating_point():
                return value * 0.5 + torch.randn(value.shape, generator=generator).to(value) + 1
            return torch.where(value > 0, value - 1, 1)

        bound = _rebound(self.bound, change)
        return _Call(bound, self.latents) if found else None

    def _group(self, path: tuple[str, ...], value: Any) -> str | None:
        if path[0] == TIMESTEP:
            return "time" if isinstance(value, Tensor | int | float) else None
        if not isinstance(value, Tensor) or value.dtype == torch.bool or any("mask" in part for part in path):
            return None
        if path[0] == self.latents:
            return "latents"
        if path[0].startswith(TEXT):
            return "text"
        return "condition" if value.ndim and len(value) == 1 and path[0] not in POSITIONS else None


def _rebound(bound: inspect.BoundArguments, change: Callable[[tuple[str, ...], Any], Any]) -> inspect.BoundArguments:
    """Copy bound arguments, with `change(path, leaf)` at every leaf of dicts, lists and tuples."""

    def walk(path: tuple[str, ...], value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk((*path, str(key)), item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(walk((*path, str(i)), item) for i, item in enumerate(value))
        return change(path, value)

    arguments = {name: walk((name,), value) for name, value in bound.arguments.items()}
    return inspect.BoundArguments(bound.signature, arguments)


def _other_time(value: Any) -> Any:
    """Move timesteps by a quarter of their range, which is 0..1 for flow models that divide by 1000."""
    times = torch.as_tensor(value)
    shift = 0.251 if times.is_floating_point() and float(times.max()) <= 1 else 251
    moved = torch.where(times >= shift, times - shift, times + shift).to(times.dtype)
    return moved if isinstance(value, Tensor) else moved.item()


@dataclass
class _Run:
    """Hashes of each call's input and output by layer, and the order in which layers ran."""

    hashes: dict[str, list[bytes]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def _run(denoiser: nn.Module, layers: Mapping[str, nn.Module], call: _Call, watch: TensorWatch | None = None) -> _Run:
    run = _Run()

    def hook(name: str) -> Callable[..., None]:
        def finished(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            if watch is not None:
                watch.reads(name, module, x)
            run.order.append(name)
            run.hashes.setdefault(name, []).append(_digest(x, output))

        return finished

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        if watch is not None:
            stack.enter_context(watch)
        denoiser(*call.bound.args, **call.bound.kwargs)
    return run


def _digest(*tensors: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _require_repeatable(first: _Run, second: _Run) -> None:
    for name, hashes in first.hashes.items():
        if second.hashes.get(name) != hashes:
            raise StructureError(
                "The denoiser computes something else when the same call is repeated",
                where=name,
                remedy="Remove what is random before this layer (dropout, label dropping, noise made in the model).",
            )


@contextmanager
def _eval_mode(denoiser: nn.Module) -> Iterator[None]:
    training = [module for module in denoiser.modules() if module.training]
    denoiser.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _blocks(denoiser: nn.Module, used: list[str]) -> tuple[str, ...]:
    """Find the repeated units: those the model declares, else the members of its module lists; the innermost ones."""
    declared = {
        *(getattr(denoiser, "_no_split_modules", None) or ()),
        *(getattr(denoiser, "_repeated_blocks", None) or ()),
    }
    modules = dict(denoiser.named_modules())
    if declared:
        candidates = [name for name, module in modules.items() if type(module).__name__ in declared]
    else:
        lists = [(name, module) for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        candidates = [f"{name}.{i}" for name, members in lists for i in range(len(members))]
    # One layer alone (a projection inside an attention, a down-sampler) is not worth a reconstruction of its own.
    inside = {name: [layer for layer in used if layer.startswith(f"{name}.")] for name in candidates}
    large = [name for name in candidates if len(inside[name]) > 1]
    inner = [name for name in large if not any(other.startswith(f"{name}.") for other in large)]
    return tuple(sorted(inner, key=lambda name: used.index(inside[name][0])))


def _tied(layers: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Find layers with bit-equal parameters and settings; cheap keys first, so that few weights are hashed whole."""
    sets = [list(layers)]
    for key in (_settings, _sample, _content):
        sets = [group for members in sets for group in _grouped(members, layers, key)]
    return tuple(tuple(group) for group in sets)


def _grouped(
    names: Iterable[str], layers: Mapping[str, nn.Module], key: Callable[[nn.Module], Hashable]
) -> list[list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(layers[name]), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _settings(layer: nn.Module) -> tuple[str, ...]:
    return (layer.extra_repr(), *(f"{name}{tuple(p.shape)}{p.dtype}" for name, p in layer.named_parameters()))


def _sample(layer: nn.Module) -> bytes:
    return _digest(*(parameter.reshape(-1)[:: max(1, parameter.numel() // 64)] for parameter in layer.parameters()))


def _content(layer: nn.Module) -> bytes:
    return _digest(*layer.parameters())
