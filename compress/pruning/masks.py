"""Masks of the members of groups, learned end to end over whole trajectories.

A mask is a gate of hard concrete form between 0 and 1 in front of the layers that read a member. What is compared is
the final latents, so that an error of an early call counts as what it becomes. Of each call of the denoiser only the
inputs are kept for the way back, and the call is made again there, with the same masks: memory is that of one call and
of T latents. The price of what stays open rises from step to step, so that gates close one after the other, and how
long one was open says how much it matters. Letters: M members of a group, T calls.

Source: Zhang et al. 2024, EcoDiff (arXiv 2412.02852), sections 3.2 and 3.3; Louizos et al. 2018 for the gate. The
rising price is ours.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcomp.calibrate.progress import Progress, silent
from dcomp.compress.altered_calls import answering
from dcomp.compress.pruning.units import Group

START = 3.0  # of the logits: nearly open
TEMPERATURE, STRETCH = 0.83, (-0.1, 1.1)
SQUEEZE = 0.1  # of the noise, which keeps gates from being torn open and shut
RATE = 0.15  # of Adam
PRICES = (0.5, 20.0)  # of a whole model that is kept, in parts of the variance of the latents: first and last
ITERATIONS = 120

Latents = Callable[[int], Tensor]
"""Number of a trajectory -> its final latents, with gradients if they are asked for."""


def learn_masks(
    denoiser: nn.Module,
    groups: Mapping[str, Group],
    weights: Mapping[str, int],
    latents: Latents,
    trajectories: int,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Return how open the gates of all members were, mean over the steps, fp64 `[M]` for each group.

    Args:
        denoiser: in float and eval mode, without parameters that ask for gradients; it stays as it is.
        groups: whose members are masked.
        weights: group -> parameters of a member, which are what keeping it costs.
        latents: runs one of the trajectories, with the denoiser as it is then.
        trajectories: how many there are.
        iterations: steps, each with one of them.
        seed: of the noise.
        progress: called with a text, the count done and the total.
    """
    first, last = PRICES
    opened = {name: torch.zeros(group.members, dtype=torch.float64) for name, group in groups.items()}
    logits = {name: torch.full((group.members,), START, requires_grad=True) for name, group in groups.items()}
    whole = sum(weights[name] * group.members for name, group in groups.items())
    with torch.no_grad():
        targets = [latents(number) for number in range(min(trajectories, iterations))]
    optimizer = torch.optim.Adam([*logits.values()], lr=RATE)
    for iteration in range(iterations):
        progress("masks", iteration, iterations)
        number = iteration % len(targets)
        generator = torch.Generator().manual_seed((seed << 20) + iteration)
        with torch.enable_grad():
            gates = {name: gate(logit, torch.rand(len(logit), generator=generator)) for name, logit in logits.items()}
            kept = torch.stack([weights[name] * logit.sigmoid().sum() for name, logit in logits.items()]).sum() / whole
            optimizer.zero_grad()
            with masked(denoiser, groups, gates), calls_again(denoiser):  # until the way back has been gone
                error = (latents(number) - targets[number]).square().mean() / targets[number].var()
                (error + first * (last / first) ** ((iteration + 1) / iterations) * kept).backward()
        optimizer.step()
        for name, logit in logits.items():
            opened[name] += logit.detach().double().sigmoid() / iterations
    progress("masks", iterations, iterations)
    return opened


def gate(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return gates `[M]` between 0 and 1 for noise `[M]`, uniform between 0 and 1."""
    noise = (uniform + SQUEEZE).log() - (1 - uniform + SQUEEZE).log()
    low, high = STRETCH
    return (((noise + logits) / TEMPERATURE).sigmoid() * (high - low) + low).clamp(0, 1)


@contextmanager
def masked(denoiser: nn.Module, groups: Mapping[str, Group], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within a `with` block, let layers read members multiplied by their gates.

    Args:
        denoiser: with the groups.
        groups: by name.
        gates: group -> `[M]`.
    """
    with ExitStack() as stack:
        for name, values in gates.items():
            for owned in groups[name].consumers:
                layer = denoiser.get_submodule(owned.tensor.rpartition(".")[0])
                start, stop = owned.start, owned.start + groups[name].members * owned.width
                by_channel = values.repeat_interleave(owned.width)

                def multiply(
                    layer: nn.Module, args: Any, start: int = start, stop: int = stop, gates: Tensor = by_channel
                ) -> Any:
                    x = args[0]
                    axis = 1 if isinstance(layer, nn.Conv2d) else x.dim() - 1
                    shape = [-1 if place == axis else 1 for place in range(x.dim())]
                    own = x.narrow(axis, start, stop - start) * gates.to(x.dtype).view(shape)
                    before, after = x.narrow(axis, 0, start), x.narrow(axis, stop, x.shape[axis] - stop)
                    return (torch.cat((before, own, after), axis), *args[1:])

                stack.callback(layer.register_forward_pre_hook(multiply).remove)
        yield


@contextmanager
def calls_again(denoiser: nn.Module) -> Iterator[None]:
    """Within a `with` block, keep only the inputs of each call for the way back, and make the call again there.

    Whatever changes the denoiser must still do so then.
    """
    forward = denoiser.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    with answering({denoiser: call}):
        yield
