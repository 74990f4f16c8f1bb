"""Whether layers can have the schemes that are chosen for them: every layer that cannot is named, in one error.

Shapes alone are read, so this is done before anything is recorded. What the weights hold is a second question, asked of
all layers at once too.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.compress.scheme import QScheme, SchemeError
from dcomp.compress.split import empty_layer
from dcomp.kernels.qparams import rotation_block

SHOWN = 10  # layers that an error lists


class WeightError(DcompError):
    """Weights that no integers stand for."""


def check_schemes(
    denoiser: nn.Module, schemes: Mapping[str, QScheme], refused: Mapping[str, SchemeError] | None = None
) -> None:
    """Refuse all schemes that their layers cannot have.

    Args:
        denoiser: in float, on any device, also meta.
        schemes: layer name -> scheme.
        refused: what is known to be impossible already.

    Raises:
        SchemeError: the first `SHOWN` layers with their problems, how many there are, and a remedy for each kind.
    """
    problems = dict(refused or {})
    for name, scheme in schemes.items():
        problem = _problem(denoiser.get_submodule(name), scheme)
        if problem is not None:
            problems[name] = problem
    if problems:
        lines = [f"{name}: {problem.problem}" for name, problem in problems.items()]
        raise SchemeError(
            _listed(f"{_count(problems)} cannot be quantized as asked", lines),
            remedy=" ".join(dict.fromkeys(problem.remedy for problem in problems.values())),
        )


def check_weights(denoiser: nn.Module, schemes: Mapping[str, QScheme]) -> None:
    """Refuse weights and biases that are not finite.

    Args:
        denoiser: in float.
        schemes: layer name -> scheme; other layers may hold anything.

    Raises:
        WeightError: the first `SHOWN` layers, with how many values, and the place of the first.
    """
    lines = []
    for name in schemes:
        for key, tensor in denoiser.get_submodule(name).named_parameters(recurse=False):
            bad = _not_finite(tensor)
            if len(bad):
                where = ", ".join(map(str, bad[0].tolist()))
                lines.append(f"{name}.{key}: {len(bad)} of {tensor.numel()} values, the first at [{where}]")
    if lines:
        raise WeightError(
            _listed("Weights are NaN or infinite", lines),
            remedy="Repair the model or download it again.",
        )


def _problem(layer: nn.Module, scheme: QScheme) -> SchemeError | None:
    try:
        with torch.device("meta"):
            empty_layer(layer, scheme, 1)
    except SchemeError as error:
        return error
    channels = layer.in_features if isinstance(layer, nn.Linear) else int(getattr(layer, "in_channels", 0))
    parts = [stop - start for start, stop in pairwise((0, *scheme.boundaries, channels))]
    if scheme.rotate and all(rotation_block(part) == 1 for part in parts):
        return SchemeError(
            f"A rotation changes nothing where channels are odd in number ({', '.join(map(str, parts))})",
            remedy="Leave the rotation out for layers with an odd number of input channels.",
        )
    return None


def _not_finite(tensor: Tensor) -> Tensor:
    """Return the places `[N, axes]` of values that are NaN or infinite."""
    if bool(torch.isfinite(tensor.detach().sum())):  # a sum may overflow, but hides neither NaN nor infinity
        return torch.empty(0, tensor.ndim, dtype=torch.int64)
    return torch.nonzero(~torch.isfinite(tensor.detach()))


def _count(problems: Mapping[str, SchemeError]) -> str:
    return "1 layer" if len(problems) == 1 else f"{len(problems)} layers"


def _listed(head: str, lines: list[str]) -> str:
    shown = f", the first {SHOWN}" if len(lines) > SHOWN else ""
    return "\n".join([f"{head}{shown}:", *(f"  {line}" for line in lines[:SHOWN])])
