"""The reconstruction pass: after all layers are quantized, the codes of one block after the other are learned.

The float model's block outputs are recorded first, one file a block. Then the quantized denoiser runs once over all
rows, and every block waits for its inputs: they come from blocks that are finished. So a block answers for what went
wrong before it. A layer that belongs to no block is one by itself. Finished blocks are files: a killed run goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.progress import Progress, silent
from dcomp.calibrate.replay import Path as LeafPath
from dcomp.calibrate.replay import RowBatch, leaves_of
from dcomp.calibrate.tree_file import decode, encode, open_tensors, read_description, write_tree_file
from dcomp.compress.layers import QuantLayer
from dcomp.compress.quantize_layer import transformed_weight
from dcomp.compress.reconstruction import BlockCall, BlockResult, reconstruct_block
from dcomp.compress.soft_rounding import fake_execution
from dcomp.compress.split import parts_of, quantized_layers

BLOCK_ROWS = 16  # rows of an optimizer step, and of a chunk
DECIDED = 20.0  # learning rate times iterations, at which codes are decided
FIELDS = ("qweight", "scale", "multiplier")


class BlockError(DcompError):
    """A block whose rows cannot be told apart."""


@dataclass(frozen=True)
class FloatBlocks:
    """What reconstruction needs to know of the float model.

    Attributes:
        names: of the blocks.
        weights: layer name -> float weight, in torch's layout. Other layers keep their codes.
        batched: block -> which leaves of its arguments have rows.
        folder: with a file of outputs for each block.
    """

    names: tuple[str, ...]
    weights: dict[str, Tensor]
    batched: dict[str, frozenset[LeafPath]]
    folder: Path


@torch.no_grad()
def record_blocks(
    denoiser: nn.Module, rows: RowBatch, blocks: Sequence[str], layers: Sequence[str], folder: Path
) -> FloatBlocks:
    """Run the float denoiser over all rows and keep what each block answers.

    Args:
        denoiser: in float.
        rows: of the calibration set.
        blocks: names of modules, none inside another.
        layers: names of the layers whose codes are to be learned; one outside of all blocks becomes a block.
        folder: for the outputs; a complete one is not made again.

    Raises:
        BlockError: an argument of a block has rows and something else along one axis.
    """
    alone = [name for name in layers if not any(name.startswith(f"{block}.") for block in blocks)]
    used = [block for block in blocks if any(name.startswith(f"{block}.") for name in layers)]
    batched = batched_leaves(denoiser, rows, (*used, *alone))
    names = tuple(name for name, leaves in batched.items() if leaves)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors: dict[str, Tensor] = {}
            write_tree_file(folder / f"{name}.safetensors", {"output": encode(output, tensors, name)}, tensors)

        return hook

    if not all((folder / f"{name}.safetensors").exists() for name in names):
        with ExitStack() as stack:
            for name in names:
                stack.callback(denoiser.get_submodule(name).register_forward_hook(keep(name)).remove)
            denoiser(*rows.args, **rows.kwargs)
    weights = {name: denoiser.get_parameter(f"{name}.weight").detach() for name in layers}
    return FloatBlocks(names, weights, batched, folder)


@torch.no_grad()
def batched_leaves(denoiser: nn.Module, rows: RowBatch, names: Sequence[str]) -> dict[str, frozenset[LeafPath]]:
    """Find out which leaves of modules' arguments have rows along axis 0: those that grow with the rows of a call.

    The length of an axis alone does not tell: a table of positions may have as many tokens as there are rows.

    Raises:
        BlockError: a leaf grows with the rows, but has not as many entries.
    """
    few, more = (_lengths(denoiser, rows.take([0] * count), names) for count in (2, 3))
    found = {}
    for name in names:
        growing = {path for path, length in few[name].items() if length != more[name].get(path)}
        torn = [path for path in growing if (few[name][path], more[name].get(path)) != (2, 3)]
        if torn:
            argument = ".".join(map(str, min(torn, key=str)))
            raise BlockError(
                f"The argument {argument} has rows and something else along its first axis",
                where=name,
                remedy="Use `--method gptq`, which asks for no blocks.",
            )
        found[name] = frozenset(growing)
    return found


def _lengths(denoiser: nn.Module, rows: RowBatch, names: Sequence[str]) -> dict[str, dict[LeafPath, int]]:
    """Return the length of axis 0 of all tensors among the arguments of each module's first call."""
    seen: dict[str, dict[LeafPath, int]] = {}

    def hook(name: str) -> Callable[..., None]:
        def starts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leaves = leaves_of(args, kwargs).items()
            seen.setdefault(name, {path: len(x) for path, x in leaves if isinstance(x, Tensor) and x.ndim})

        return starts

    with ExitStack() as stack:
        for name in names:
            module = denoiser.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        denoiser(*rows.args, **rows.kwargs)
    return seen


def reconstruct_blocks(
    denoiser: nn.Module,
    rows: RowBatch,
    reference: FloatBlocks,
    folder: Path,
    *,
    iterations: int,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, BlockResult]:
    """Learn the codes of all blocks, in order of execution, in place.

    Args:
        denoiser: quantized; runs in fake execution meanwhile.
        rows: those that the reference was recorded with.
        reference: of the float model.
        folder: of finished blocks.
        iterations: optimizer steps for each block.
        seed: see `reconstruct_block`.
        progress: called with a text, the count done and the total.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, BlockResult] = {}
    parts = [layer for layer in denoiser.modules() if isinstance(layer, QuantLayer)]
    with fake_execution(parts), torch.no_grad(), ExitStack() as stack:
        for name in reference.names:
            block = denoiser.get_submodule(name)
            wait = _Waiting(name, block, rows, reference, folder, iterations, seed, results, progress)
            stack.enter_context(wait.installed())
        denoiser(*rows.args, **rows.kwargs)
    return results


@dataclass
class _Waiting:
    """A block that is reconstructed by its first call."""

    name: str
    block: nn.Module
    rows: RowBatch
    reference: FloatBlocks
    folder: Path
    iterations: int
    seed: int
    results: dict[str, BlockResult]
    progress: Progress

    @contextmanager
    def installed(self) -> Iterator[None]:
        inner = type(self.block).forward
        busy = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:
                return inner(self.block, *args, **kwargs)
            busy = True
            try:
                return self._answer(args, kwargs)
            finally:
                busy = False

        vars(self.block)["forward"] = forward
        try:
            yield
        finally:
            del self.block.forward

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = BlockCall(args, kwargs, self.reference.batched[self.name])
        file = self.folder / f"{self.name}.safetensors"
        if self.name not in self.results:
            self.results[self.name] = self._read(file) if file.exists() else self._reconstruct(call, file)
            self.progress("blocks", len(self.results), len(self.reference.names))
        clocks = {layer.clock for layer in self.block.modules() if isinstance(layer, QuantLayer) and layer.clock}
        answers = []
        for start in range(0, len(self.rows), BLOCK_ROWS):
            chunk = slice(start, start + BLOCK_ROWS)
            own_args, own_kwargs = call.take(chunk)
            for clock in clocks:
                clock.read(self.rows.timesteps[chunk])
            answers.append(self.block(*own_args, **own_kwargs))
        for clock in clocks:
            clock.read(self.rows.timesteps)
        return _joined(answers)

    def _reconstruct(self, call: BlockCall, file: Path) -> BlockResult:
        path = self.reference.folder / f"{self.name}.safetensors"
        targets = decode(read_description(path)["output"], open_tensors(path))
        with torch.enable_grad():
            result = reconstruct_block(
                self.block,
                call,
                targets,
                self._weights(),
                iterations=self.iterations,
                batch=BLOCK_ROWS,
                lr=DECIDED / self.iterations,
                seed=self.seed,
                groups=self.rows.trajectories,
                timesteps=self.rows.timesteps,
                progress=lambda text, done, total: self.progress(f"{text} {self.name}", done, total),
            )
        tensors = {f"{key}.{f}": getattr(p, f) for key, p in self._parts() for f in FIELDS if getattr(p, f) is not None}
        write_tree_file(file, {"result": asdict(result)}, {key: t.contiguous() for key, t in tensors.items()})
        return result

    def _read(self, file: Path) -> BlockResult:
        result, tensor = BlockResult(**read_description(file)["result"]), open_tensors(file)
        for key, part in self._parts():
            for field in FIELDS:
                if getattr(part, field) is not None:
                    getattr(part, field).copy_(tensor(f"{key}.{field}"))
        return result

    def _parts(self) -> list[tuple[str, QuantLayer]]:
        return [(name, m) for name, m in self.block.named_modules() if isinstance(m, QuantLayer)]

    def _weights(self) -> dict[str, Tensor]:
        """Name in the block of each part whose rounding is learned -> its float weight as its codes stand for it."""
        names = {part: name for name, part in self._parts()}
        found: dict[str, Tensor] = {}
        for name, layer in quantized_layers(self.block).items():
            weight = self.reference.weights.get(f"{self.name}.{name}" if name else self.name)
            if weight is not None:
                values = transformed_weight(weight, layer)
                found |= {names[part]: value for part, value in zip(parts_of(layer), values, strict=True)}
        return found


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, tuple | list):
        return type(first)(_joined(values) for values in zip(*parts, strict=True))
    return first
