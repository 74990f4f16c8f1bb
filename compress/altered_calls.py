"""Calls of a denoiser in which modules are stood in for, the timestep is another one, or layers are listened to."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def answering(answers: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within a `with` block, let functions answer in the place of modules; hooks on these still run."""
    before = {module: vars(module).get("forward") for module in answers}
    for module, answer in answers.items():
        vars(module)["forward"] = answer
    try:
        yield
    finally:
        for module, forward in before.items():
            del vars(module)["forward"]
            vars(module).update({} if forward is None else {"forward": forward})


def at_timestep(
    denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], t: float | Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with another timestep, or one for each sample, in the form of the call's own."""
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs)
    told = bound.arguments["timestep"]
    if isinstance(told, Tensor):
        times = torch.as_tensor(t, dtype=torch.float64)
        fractions = not told.is_floating_point() and bool((times != times.round()).any())
        times = times.to(told.device, torch.float32 if fractions else told.dtype)
        bound.arguments["timestep"] = times.expand(told.shape).contiguous()
    else:
        bound.arguments["timestep"] = int(t) if isinstance(told, int) and float(t).is_integer() else t
    return bound.args, bound.kwargs


def outputs_of(
    denoiser: nn.Module, names: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, list[Tensor]]:
    """Run a call and return all outputs of each layer in it."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name, outputs in seen.items():
            hook = denoiser.get_submodule(name).register_forward_hook(lambda *run, kept=outputs: kept.append(run[-1]))
            stack.callback(hook.remove)
        denoiser(*args, **kwargs)
    return seen
