"""How far what a zone computes moves from call to call of the reference trajectory: the costs of open-loop planners.

Both distances are between a call that computes and a later one that would read it, so they know the anchor of a
segment; they do not know what a difference does to the picture. Letters: T calls, W calls that a tensor is kept for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dcomp.cachequant.executor import CacheExecutor, following
from dcomp.cachequant.guide import CallOrder
from dcomp.cachequant.zones import Zone
from dcomp.calibrate.pipeline import Generation, OpenPipeline
from dcomp.calibrate.progress import Progress, silent


@dataclass(frozen=True)
class Drift:
    """Distances of a zone's tensors, fp64 `[T, T]`: row s computes, column t > s would read it.

    Infinite where t is W or more calls later, 0 where t is not later.

    Attributes:
        absolute: sum of absolute differences over all elements and samples, CacheQuant's cost.
        cosine: one minus the cosine of the two, mean over samples, DDT's cost.
    """

    absolute: Tensor
    cosine: Tensor


@dataclass(frozen=True)
class Reference:
    """What the trajectory that computes everything showed.

    Attributes:
        timesteps: of the T calls, as the denoiser was told them.
        drifts: zone -> distances.
        bytes_kept: zone -> bytes of what is kept of one call, of one batch.
    """

    timesteps: tuple[float, ...]
    drifts: dict[str, Drift]
    bytes_kept: dict[str, int]


def record_reference(
    pipeline: OpenPipeline,
    zones: Sequence[Zone],
    prompts: Sequence[str],
    indices: Sequence[int],
    settings: Generation,
    *,
    window: int,
    progress: Progress = silent,
) -> Reference:
    """Run trajectories that compute everything, and compare what zones return at each call with calls before.

    Args:
        pipeline: float or quantized: the model that will run.
        zones: to watch; what W calls of them return is held in memory.
        prompts: of the trajectories.
        indices: of their noise.
        settings: as deployed.
        window: W, at least 2.
        progress: called with a text, the count done and the total.
    """
    watch = _Watch(tuple(zones), window)
    with following(pipeline.denoiser, pipeline.scheduler, watch) as executor:
        hook = pipeline.denoiser.register_forward_hook(lambda *_: watch.look(executor))
        try:
            pipeline.run(
                prompts,
                indices,
                settings,
                decode=False,
                on_step=lambda done, total, _: progress("reference trajectories", done, total),
            )
        finally:
            hook.remove()
    return watch.result()


@dataclass
class _Watch:
    """A guide that lets everything run and keeps what zones returned for W calls."""

    zones: tuple[Zone, ...]
    window: int
    timesteps: dict[int, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    absolute: dict[tuple[str, int, int], float] = field(default_factory=dict)
    cosines: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)

    def place(self, timestep: float, before: int | None) -> int:
        call = 0 if before is None else before + 1
        self.timesteps[call] = timestep
        return call

    def order(self, call: int) -> CallOrder:
        names = frozenset(zone.name for zone in self.zones)
        gone = call - self.window  # `look` compares with the W - 1 calls before
        return CallOrder(keep=names, forget=tuple((name, gone) for name in names) if gone >= 0 else ())

    def look(self, executor: CacheExecutor) -> None:
        """Compare what the call that just ended returned with the calls before it."""
        for zone in self.zones:
            kept = executor.kept(zone)
            now, last = max(kept), kept[max(kept)]
            self.sizes[zone.name] = sum(tensor.nbytes for tensors in last for tensor in tensors)
            for before in kept:
                if before == now:
                    continue
                key = (zone.name, before, now)
                pairs = [
                    (one.double(), other.double())
                    for own, others in zip(kept[before], last, strict=True)
                    for one, other in zip(own, others, strict=True)
                ]
                distance = sum(float((other - one).abs().sum()) for one, other in pairs)
                self.absolute[key] = self.absolute.get(key, 0.0) + distance
                self.cosines.setdefault(key, []).extend(_cosines(pairs))

    def result(self) -> Reference:
        calls = len(self.timesteps)
        later = torch.arange(calls)[None, :] - torch.arange(calls)[:, None]
        drifts = {}
        for zone in self.zones:
            absolute = torch.where(later >= self.window, torch.inf, 0.0).double()
            cosine = absolute.clone()
            for (name, before, now), value in self.absolute.items():
                if name == zone.name:
                    absolute[before, now] = value
                    values = self.cosines[name, before, now]
                    cosine[before, now] = 1 - sum(values) / len(values)
            drifts[zone.name] = Drift(absolute, cosine)
        return Reference(tuple(self.timesteps[call] for call in range(calls)), drifts, dict(self.sizes))


def _cosines(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the cosine between both sides of each sample, over all tensors together."""
    batched = [(one.flatten(1), other.flatten(1)) for one, other in pairs if one.ndim]
    product = sum((one * other).sum(1) for one, other in batched)
    sizes: Any = [sum(side[i].square().sum(1) for side in batched) for i in (0, 1)]
    return list((product / (sizes[0] * sizes[1]).sqrt().clamp(min=1e-300)).tolist())
