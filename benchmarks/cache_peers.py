"""Other packages' caches, put on an open pipeline through their public functions and taken off again.

Every entry of `PEERS` has a grid of settings; a caller takes the best one for what it wants to spend. The packages are
imported when an entry is used: DeepCache and cache-dit are no dependencies of the project (`pip install DeepCache
cache-dit`), the others are diffusers' own. What cannot run on a model raises.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

Attached = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]
"""Open pipeline, setting -> a `with` block in which the pipeline caches."""

INTERVALS = (2, 3, 4, 5, 6, 8)
THRESHOLDS = (0.06, 0.09, 0.13, 0.18, 0.25, 0.35, 0.5)
_WARM_UP = 2  # steps that compute, where a package asks for a number


@dataclass(frozen=True)
class CachePeer:
    """A package's cache.

    Attributes:
        name: as printed.
        package: as imported.
        kind: of denoiser: "unet" with cross-attention, or "transformer".
        settings: gives the grid for a denoiser.
        attached: puts a setting on a pipeline.
    """

    name: str
    package: str
    kind: str
    settings: Callable[[Any], list[dict[str, Any]]]
    attached: Attached

    def fits(self, denoiser: Any) -> bool:
        """Whether the package is made for denoisers of this kind."""
        layered = hasattr(denoiser, "transformer_blocks")
        conditional = hasattr(denoiser, "down_blocks") and hasattr(denoiser.config, "cross_attention_dim")
        return layered if self.kind == "transformer" else conditional


@contextmanager
def _deepcache(pipeline: Any, setting: dict[str, Any]) -> Iterator[None]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline.pipe)
    helper.set_params(cache_interval=setting["interval"], cache_branch_id=setting["branch"])
    helper.enable()
    # Its state is that of one trajectory: of the first step it asks whether it is later than itself.
    with _at_each_start(pipeline, lambda: _forget(helper)):
        try:
            yield
        finally:
            helper.disable()


def _forget(helper: Any) -> None:
    helper.start_timestep = None
    helper.cached_output = {}


def _branches(unet: Any) -> list[dict[str, Any]]:
    """Every interval with every branch; three to a block, as the package counts."""
    branches = range(3 * len(unet.down_blocks))
    return [{"interval": interval, "branch": branch} for interval in INTERVALS for branch in branches]


@contextmanager
def _first_block(pipeline: Any, setting: dict[str, Any]) -> Iterator[None]:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(pipeline.denoiser, FirstBlockCacheConfig(threshold=setting["threshold"]))
    with _diffusers_hooks(pipeline, "fbc_leader_block_hook", "fbc_block_hook"):
        yield


@contextmanager
def _taylorseer(pipeline: Any, setting: dict[str, Any]) -> Iterator[None]:
    import torch
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    skipped, forecast = setting["skipped"], setting["forecast"]
    config = TaylorSeerCacheConfig(
        cache_interval=setting["interval"],
        disable_cache_before_step=_WARM_UP,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[forecast],
        skip_predict_identifiers=[skipped] if skipped else None,
    )
    apply_taylorseer_cache(pipeline.denoiser, config)
    with _diffusers_hooks(pipeline, "taylorseer_cache"):
        yield


def _forecasts(denoiser: Any) -> list[dict[str, Any]]:
    """Forecast the last projection and skip all blocks, or forecast what attention and feed-forward return."""
    last = next(name for name, _ in reversed([*denoiser.named_children()]) if name.startswith("proj_out"))
    parts = [
        {"forecast": f"^{last}$", "skipped": r"^transformer_blocks\.\d+$"},
        {"forecast": r"^transformer_blocks\.\d+\.(attn\d|ff)$", "skipped": None},
    ]
    return [{"interval": interval, **part} for part in parts for interval in INTERVALS]


@contextmanager
def _cache_dit(pipeline: Any, setting: dict[str, Any]) -> Iterator[None]:
    import cache_dit

    logging.disable(logging.WARNING)
    try:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=setting["threshold"],
            max_warmup_steps=_WARM_UP,
            num_inference_steps=setting["steps"],
        )
        taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if setting["forecast"] else None
        cache_dit.enable_cache(pipeline.pipe, cache_config=config, calibrator_config=taylor)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipeline.pipe)
    finally:
        logging.disable(logging.NOTSET)


def _thresholds(_: Any) -> list[dict[str, Any]]:
    return [{"threshold": threshold} for threshold in THRESHOLDS]


def _dual_blocks(_: Any) -> list[dict[str, Any]]:
    return [{"threshold": threshold, "forecast": order} for threshold in THRESHOLDS for order in (False, True)]


@contextmanager
def _diffusers_hooks(pipeline: Any, *names: str) -> Iterator[None]:
    """Within a `with` block, begin each trajectory as pipelines do that know diffusers' caches; then remove hooks."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    registry = HookRegistry.check_if_exists_or_initialize(pipeline.denoiser)

    def begin() -> None:
        registry.reset_stateful_hooks()
        registry.invalidate_child_registries_cache()
        _set_cache_context(pipeline.denoiser, CacheContext("all"))

    with _at_each_start(pipeline, begin):
        try:
            yield
        finally:
            for name in names:
                registry.remove_hook(name, recurse=True)


@contextmanager
def _at_each_start(pipeline: Any, begin: Callable[[], None]) -> Iterator[None]:
    """Call something whenever the pipeline begins a trajectory."""
    scheduler = pipeline.scheduler
    original = scheduler.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        begin()
        return original(*args, **kwargs)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError):
            del scheduler.set_timesteps


PEERS = (
    CachePeer("DeepCache", "DeepCache", "unet", _branches, _deepcache),
    CachePeer("diffusers first-block cache", "diffusers", "transformer", _thresholds, _first_block),
    CachePeer("diffusers TaylorSeer", "diffusers", "transformer", _forecasts, _taylorseer),
    CachePeer("cache-dit DBCache", "cache_dit", "transformer", _dual_blocks, _cache_dit),
)
