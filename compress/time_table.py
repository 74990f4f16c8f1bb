"""Tables of temporal features: what stands in the place of layers that depend on the timestep alone.

`TimeTable` holds the T outputs of such a layer, one row for each deployed timestep; `Absent` stands for a layer that is
read by tables alone and holds nothing at all. They are stored under the layer's name, see `to_config`. Which layers
become what is decided by `temporal.py`.

Letters: T rows of a table, I input and O output features.
"""

import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.clock import StepClock
from dcomp.compress.manifest import CheckpointError
from dcomp.compress.quantized import WeightForm

MAX_ROWS = 10_000
MAX_LAYERS = 100_000
ABSENT = "absent"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_REMEDY = "Download the checkpoint again or compress the model again"


class FeatureError(DcompError):
    """A temporal feature that cannot be a table, or a table that is asked for what it does not hold."""


class TimeTable(nn.Module):
    """The outputs of a linear layer that depends on the timestep alone.

    It is no `nn.Linear`: an adapter for the layer would be fed with the zeros of an `Absent`, and has to be refused.

    Attributes:
        timesteps: fp32 `[T]`, strictly descending, in the units that the denoiser is told.
        values: fp16 or fp32 `[T, O]`.
        clock: tells the timestep; must be attached to the denoiser.
    """

    timesteps: Tensor
    values: Tensor

    def __init__(self, timesteps: Tensor, values: Tensor, in_features: int, clock: StepClock | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, values.shape[1]
        self.clock = clock
        self.register_buffer("timesteps", timesteps)
        self.register_buffer("values", values)
        self._read: tuple[Tensor, list[float]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of the clock's timestep; only shape, dtype and device of `x` are used.

        A timestep between two rows is interpolated linearly, one outside takes the nearest row.

        Args:
            x: `[..., I]`; the first axis is that of the samples where their timesteps differ.

        Returns:
            `[..., O]` in the dtype of `x`, in memory of its own.

        Raises:
            FeatureError: the clock is missing or was told nothing, or there are not as many samples as timesteps.
        """
        told = () if self.clock is None else self.clock.row_timesteps or (self.clock.timestep,)
        if not told or any(math.isnan(t) for t in told):
            raise FeatureError(
                "A table does not know the timestep",
                where=str(self),
                remedy="Give it a clock that follows the denoiser, and call the denoiser as a whole.",
            )
        y = x.new_empty(*x.shape[:-1], self.out_features)
        if len(told) == 1:
            return y.copy_(self._row(told[0]))
        if x.ndim < 2 or len(told) != len(x):
            raise FeatureError(
                f"A table is read for {list(x.shape[:-1])} rows, but the denoiser was told {len(told)} timesteps",
                where=str(self),
                remedy="Pass one timestep for each sample, or one for all of them.",
            )
        rows = torch.stack([self._row(t).float() for t in told])
        return y.copy_(rows.view(len(told), *[1] * (x.ndim - 2), self.out_features))

    def check(self) -> None:
        """Look at what a file filled in.

        Raises:
            CheckpointError: the timesteps do not descend, or a number is not finite.
        """
        good = bool(torch.isfinite(self.values).all() and torch.isfinite(self.timesteps).all())
        if not good or bool((self.timesteps.diff() >= 0).any()):
            raise CheckpointError("A table of temporal features is damaged", where=str(self), remedy=_REMEDY)

    @property
    def weight(self) -> WeightForm:
        """Shape, dtype and device of the weight, which is not there; some models look at its dtype."""
        return WeightForm(torch.Size((self.out_features, self.in_features)), self.values.device)

    def _row(self, t: float) -> Tensor:
        """Return `[O]`: a row as it is stored, or fp32 between two of them."""
        known = self._known()
        # Rounded like the table, lest a timestep that was told as a double lies between itself and the next row.
        t = struct.unpack("f", struct.pack("f", min(max(t, known[-1]), known[0])))[0]
        row = bisect_left(known, -t, key=lambda timestep: -timestep)  # the first one that is not above t
        if known[row] == t:
            return self.values[row]
        part = (known[row - 1] - t) / (known[row - 1] - known[row])
        return torch.lerp(self.values[row - 1].float(), self.values[row].float(), part)

    def _known(self) -> list[float]:
        # On a GPU every reading of the buffer would wait for the device.
        if self._read is None or self._read[0] is not self.timesteps:
            self._read = (self.timesteps, self.timesteps.tolist())
        return self._read[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._read = None  # the buffer is filled in place
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers to a device but never change their dtype, whatever `fn` does."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return cast(Self, super()._apply(keep_dtype, recurse))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the sizes."""
        rows, width = self.values.shape
        return f"rows={rows}, width={width}, dtype={_dtype_name(self.values.dtype)}"


class Absent(nn.Module):
    """Stands where a layer was whose output nobody reads any more: zeros of its width."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros `[..., O]` in the dtype of `x`."""
        return x.new_zeros(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> WeightForm:
        """Shape and dtype of the weight, which is not there; some models look at its dtype."""
        return WeightForm(torch.Size((self.out_features, self.in_features)), torch.device("cpu"))

    def extra_repr(self) -> str:
        """Return the width."""
        return f"width={self.out_features}"


def to_config(denoiser: nn.Module) -> dict[str, Any]:
    """Describe the tables that a denoiser has now: layer name -> what `empty_table` reads."""
    config: dict[str, Any] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, TimeTable):
            rows, width = module.values.shape
            config[name] = {"rows": rows, "width": width, "dtype": _dtype_name(module.values.dtype)}
        elif isinstance(module, Absent):
            config[name] = ABSENT
    return config


def from_config(denoiser: nn.Module, config: Any) -> None:
    """Replace layers by empty tables for a checkpoint to fill; nothing is replaced if an entry is impossible.

    The tables get their clock, and have to be checked (`TimeTable.check`), after the weights are there.

    Args:
        denoiser: model with float layers, usually on the meta device.
        config: untrusted; what `to_config` returned.

    Raises:
        CheckpointError: there is no such layer, or an entry is impossible for it.
    """
    if not isinstance(config, Mapping) or len(config) > MAX_LAYERS:
        raise _broken(f"the features are no object with at most {MAX_LAYERS} entries", "features")
    modules = dict(denoiser.named_modules())
    made = {}
    for name, entry in config.items():
        layer = modules.get(name) if isinstance(name, str) and name else None
        if layer is None:
            raise _broken("names no layer of the model", str(name))
        with torch.device(next(layer.parameters(), torch.empty(0)).device):
            made[name] = empty_table(name, layer, entry)
    for name, module in made.items():
        denoiser.set_submodule(name, module)


def empty_table(name: str, layer: nn.Module, entry: Any) -> TimeTable | Absent:
    """Make what a checkpoint's config says, with uninitialised buffers on the current default device.

    Args:
        name: of the layer.
        layer: float layer in its place; may be on the meta device.
        entry: untrusted; "absent", or an object with exactly the keys `rows`, `width` and `dtype`.

    Raises:
        CheckpointError: the entry is impossible for this layer.
    """
    if type(layer) is not nn.Linear:
        raise _broken("names no linear layer", name)
    if entry == ABSENT:
        return Absent(layer.in_features, layer.out_features)
    if not isinstance(entry, Mapping) or set(entry) != {"rows", "width", "dtype"}:
        raise _broken("is neither 'absent' nor an object with rows, width and dtype", name)
    rows, width, dtype = entry["rows"], entry["width"], entry["dtype"]
    if type(rows) is not int or not 1 <= rows <= MAX_ROWS:
        raise _broken(f"needs 1 to {MAX_ROWS} rows", name)
    if type(width) is not int or width != layer.out_features:
        raise _broken(f"needs the width {layer.out_features}", name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(f"needs one of the dtypes {', '.join(DTYPES)}", name)
    return TimeTable(
        torch.empty(rows, dtype=torch.float32), torch.empty(rows, width, dtype=DTYPES[dtype]), layer.in_features
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _broken(problem: str, name: str) -> CheckpointError:
    return CheckpointError(f"The feature {name[:80]!r} {problem}", where="features", remedy=_REMEDY)
