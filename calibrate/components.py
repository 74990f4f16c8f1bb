"""Parts of a diffusers pipeline: where its folder is, which one is the denoiser, and another scheduler for it.

Also `quiet`, without which opening and running one prints warnings that mean nothing to a user.
"""

import contextlib
import difflib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from dcomp import UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def local_folder(model: str | Path) -> Path:
    """Return the path of a model; a hub id is downloaded, safetensors only, unless a folder has that name.

    Raises:
        UsageError: the hub has no such model or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        return path
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            return Path(DiffusionPipeline.download(str(model), use_safetensors=True))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"There is no folder {str(model)!r}, and the hub gives no model of this name: {reason}",
                where=str(model),
                remedy="Pass the path of a pipeline folder, or check the name and the connection.",
            ) from error


def find_denoiser(pipe: Any) -> str:
    """Return the name of the one part that takes a timestep; `unet` and `transformer` go before all others.

    Raises:
        UsageError: there is none, or more than one.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    callable_with_time = [
        name for name, part in modules.items() if "timestep" in inspect.signature(part.forward).parameters
    ]
    named = [name for name in ("unet", "transformer") if name in callable_with_time]
    chosen = named or callable_with_time
    rivals = [name for name in callable_with_time if chosen and name.startswith(f"{chosen[0]}_")]
    if len(chosen) == 1 and not rivals:
        return chosen[0]
    found = ", ".join(callable_with_time) or "none"
    raise UsageError(
        f"{type(pipe).__name__} must have one denoiser, a part that takes a timestep, and has: {found}",
        where=", ".join(modules) or "no models at all",
        remedy="Use a pipeline with one U-Net or one diffusion transformer.",
    )


def other_scheduler(current: Any, name: str) -> Any:
    """Make a scheduler of another class with the noise schedule of the current one.

    Args:
        current: the pipeline's scheduler.
        name: class name in diffusers, in any case; "Scheduler" at its end may be left out.

    Raises:
        UsageError: no such class, or one for models of another kind; names the nearest that would do.
    """
    import diffusers

    short = name.strip().lower().removesuffix("scheduler")
    usable = {cls.__name__: cls for cls in current.compatibles}
    if _family(current) == "flow":
        everything = [getattr(diffusers, item) for item in dir(diffusers) if item.startswith("FlowMatch")]
        usable |= {cls.__name__: cls for cls in everything if hasattr(cls, "from_config")}
    by_short = {key.lower().removesuffix("scheduler"): cls for key, cls in usable.items()}
    if short in by_short:
        return by_short[short].from_config(current.config)
    spelled = by_short | {f"{key}scheduler": cls for key, cls in by_short.items()}
    near = difflib.get_close_matches(short, spelled, 1, cutoff=0.4)
    hint = f"did you mean {spelled[near[0]].__name__}?" if near else "one of " + ", ".join(sorted(usable))
    raise UsageError(
        f"{name!r} is no scheduler that can sample a model made for {type(current).__name__}",
        where="scheduler",
        remedy=f"Use a diffusers class name: {hint}",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, warnings and import chatter of diffusers, transformers and bitsandbytes from the user.

    Their settings are as before afterwards. Errors still come through.
    """
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    levels = diffusers_log.get_verbosity(), transformers_log.get_verbosity()
    bars = diffusers_log.is_progress_bar_enabled(), transformers_log.is_progress_bar_enabled()
    backend = logging.getLogger("bitsandbytes")
    backend_level = backend.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            backend.setLevel(logging.ERROR)
            for log in (diffusers_log, transformers_log):
                log.set_verbosity_error()
                log.disable_progress_bar()
            yield
        finally:
            backend.setLevel(backend_level)
            for log, level, bar in zip((diffusers_log, transformers_log), levels, bars, strict=True):
                log.set_verbosity(level)
                if bar:
                    log.enable_progress_bar()


def _family(scheduler: Any) -> str:
    if hasattr(scheduler, "alphas_cumprod"):
        return "diffusion"
    return "edm" if "sigma_data" in scheduler.config else "flow"
