"""One run of a denoiser for a whole picture: some layers at all timesteps and conditions, and nothing else.

The latents have no values (`form_tensor.py`), so that only what reads none of them is computed. Parts of the model that
hold none of the wanted layers are not even gone through twice: what they return has a form that is known by then.

Letters: N rows of a call, U distinct conditions among them, W timesteps that are computed at once, O output features.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.replay import Path, leaves_of, map_leaves
from dcomp.calibrate.structure import POSITIONS, TEXT, TIMESTEP
from dcomp.compress.altered_calls import answering
from dcomp.compress.form_tensor import FormMemory, FormTensor


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, and which of its rows have the same conditions.

    Attributes:
        bound: by the names of the signature.
        latents: name of the first of them.
        batch: N.
        device: of the latents.
        conditions: names of the conditions that have a row axis, such as `class_labels`.
        key: bytes of all of their distinct rows.
        distinct: for each distinct condition the first row that has it, U of them.
        row_of: for each row the number of its condition.
    """

    bound: inspect.BoundArguments
    latents: str
    batch: int
    device: torch.device
    conditions: frozenset[str]
    key: bytes
    distinct: tuple[int, ...]
    row_of: tuple[int, ...]

    @classmethod
    def of(cls, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Self:
        """Read the arguments of a call of a denoiser."""
        signature = inspect.signature(denoiser.forward)
        bound = signature.bind(*args, **kwargs)
        latents = next(iter(signature.parameters))
        batch, device = len(bound.arguments[latents]), bound.arguments[latents].device
        found = {
            ".".join(map(str, path)): leaf
            for path, leaf in leaves_of((), bound.arguments).items()
            if _kind(path, leaf, latents, batch) == "condition"
        }
        rows = [b"".join(parts) for parts in zip(*(_row_bytes(found[name]) for name in sorted(found)), strict=True)]
        rows = rows or [b""] * batch
        first = {row: rows.index(row) for row in dict.fromkeys(rows)}
        numbers = {row: number for number, row in enumerate(first)}
        row_of = tuple(numbers[row] for row in rows)
        return cls(bound, latents, batch, device, frozenset(found), b"".join(first), tuple(first.values()), row_of)

    def ahead(self, timesteps: Sequence[float]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Return arguments for a row of each distinct condition at each timestep, and the timestep of each row.

        Nothing with a row axis has values but these and the conditions.
        """
        rows = len(timesteps) * len(self.distinct)
        index = torch.tensor(self.distinct * len(timesteps), device=self.device)
        told = self.bound.arguments[TIMESTEP]
        times = torch.tensor(timesteps, dtype=torch.float64).repeat_interleave(len(self.distinct))
        whole = bool((times == times.round()).all())
        dtype = told.dtype if isinstance(told, Tensor) else torch.int64 if isinstance(told, int) else torch.float32
        times = times.to(self.device, dtype if whole or dtype.is_floating_point else torch.float32)

        def change(path: Path, leaf: Any) -> Any:
            kind = _kind(path, leaf, self.latents, self.batch)
            if kind == "condition":
                return leaf[index]
            return FormTensor.of(leaf, rows) if kind == "other" else leaf

        _, arguments = map_leaves((), self.bound.arguments, change)
        bound = inspect.BoundArguments(self.bound.signature, {**arguments, TIMESTEP: times})
        return bound.args, bound.kwargs, times


def _kind(path: Path, leaf: Any, latents: str, batch: int) -> str | None:
    """Say what a leaf is: a condition with a row axis, something else with one, or neither."""
    name = str(path[0])
    if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != batch or name in (TIMESTEP, *POSITIONS):
        return None
    if name == latents or name.startswith(TEXT) or leaf.dtype == torch.bool or any("mask" in str(p) for p in path):
        return "other"
    return "condition"


def _row_bytes(leaf: Tensor) -> list[bytes]:
    return [row.tobytes() for row in leaf.detach().cpu().contiguous().view(len(leaf), -1).view(torch.uint8).numpy()]


def run_ahead(
    denoiser: nn.Module,
    names: Collection[str],
    arguments: Arguments,
    timesteps: Sequence[float],
    clock: StepClock,
    memory: FormMemory,
    compute: Callable[[str, Tensor], Tensor],
) -> dict[str, list[Tensor]]:
    """Run layers for each distinct condition of a call at each of some timesteps.

    Args:
        denoiser: in eval mode; hooks on it are passed by, those on its modules are not.
        names: of the layers.
        arguments: of the call.
        timesteps: W of them.
        clock: follows the denoiser; tells tables the timesteps.
        memory: of this denoiser.
        compute: runs one of the layers, by its name.

    Returns:
        Layer name -> for each time that one call runs it, its output `[W * U, ..., O]`, timesteps outermost.

    Raises:
        ValueError: a layer reads something that depends on the latents. Others: whatever the model's code raises.
    """
    layers = {name: denoiser.get_submodule(name) for name in names}
    args, kwargs, times = arguments.ahead(timesteps)
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def recorded(name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            outputs[name].append(compute(name, x))
            return outputs[name][-1]

        return run

    answers: dict[nn.Module, Callable[..., Any]] = {layer: recorded(name) for name, layer in layers.items()}
    answers |= {module: memory.answer(module) for module in _parts_without({*layers.values()}, denoiser)}
    with ExitStack() as stack:
        stack.callback(clock.read, arguments.bound.arguments[TIMESTEP])
        clock.read(times)
        stack.enter_context(answering(answers))
        type(denoiser).forward(denoiser, *args, **kwargs)
    for name, found in outputs.items():
        if any(isinstance(y, FormTensor) or len(y) != len(times) for y in found):
            raise ValueError(f"{name} has no output for each timestep and condition")
    return outputs


def _parts_without(wanted: Collection[nn.Module], module: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest parts of a module that hold none of the wanted ones."""
    for child in module.children():
        if child in wanted:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or any(inner in wanted for inner in child.modules()):
            yield from _parts_without(wanted, child)
        else:
            yield child
