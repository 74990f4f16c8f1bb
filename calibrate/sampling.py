"""Which calls of a trajectory a calibration set keeps.

Calls are counted from pure noise. They are the same for every trajectory of a set, and each is kept with the timestep
that it was made at, so that no way of choosing can put a wrong label on it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from dcomp import UsageError


class SamplingError(UsageError):
    """A way of choosing calls that does not exist."""


@dataclass(frozen=True)
class Sampling:
    """How calls are chosen when not all are kept.

    Attributes:
        kind: "uniform" spreads them evenly, the first and the last included; "normal" draws them around one place.
        mu: centre of "normal" as a part of the trajectory, 0 at the picture and 1 at pure noise.
        sigma: its standard deviation, likewise.

    Raises:
        SamplingError: an unknown kind, or numbers that are no centre and deviation.

    Source:
        Shang et al. 2023, Post-training Quantization on Diffusion Models, section 3.3. Theirs moves draws from outside
        to the ends, and labels noisy samples as less noisy ones; both are mended here.
    """

    kind: Literal["uniform", "normal"] = "uniform"
    mu: float = 0.4
    sigma: float = 0.4

    def __post_init__(self) -> None:
        numbers = all(type(value) in (int, float) for value in (self.mu, self.sigma))
        if self.kind not in ("uniform", "normal") or not (numbers and 0 <= self.mu <= 1 and 1e-3 <= self.sigma <= 1e3):
            raise SamplingError(
                f"Calls cannot be chosen by {self.kind!r} with mu {self.mu} and sigma {self.sigma}",
                where="sampling",
                remedy="Use uniform, or normal with mu from 0 to 1 and sigma from 0.001 to 1000.",
            )

    def choose(self, total: int, count: int, seed: int = 0) -> list[int]:
        """Return `min(count, total)` distinct call indices below `total`, ascending.

        "normal" draws a place from N(mu, sigma) until it falls on a call that is not taken yet.
        """
        if self.kind == "uniform" or count >= total:
            return spread(total, count)
        weight = _log_masses(total, self.mu, self.sigma)
        # Drawing again until something new comes is the same as taking the largest of weights with Gumbel noise.
        uniform = torch.rand(total, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        noise = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
        drawn = (weight + noise).topk(count).indices
        return sorted(total - 1 - index for index in drawn.tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return a form for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned.

        Raises:
            SamplingError: a key is unknown, or the values are impossible.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise SamplingError(f"Not a sampling: {error}", remedy="Use the keys kind, mu and sigma.") from error


def spread(total: int, count: int) -> list[int]:
    """Return `min(count, total)` distinct indices below `total`, evenly spaced, the first and the last included."""
    count = min(count, total)
    if count <= 1:
        return [0][:count]
    return [(2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


def _log_masses(total: int, mu: float, sigma: float) -> Tensor:
    """Return the logarithm of the normal distribution's mass in each of `total` equal parts of 0 to 1, fp64."""
    edges = (torch.arange(total + 1, dtype=torch.float64) / total - mu) / sigma
    low, high = edges[:-1], edges[1:]
    above = low > 0  # the upper tail as the lower one, where small masses have all their digits
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    larger: Tensor = torch.special.log_ndtr(high)
    smaller: Tensor = torch.special.log_ndtr(low)
    return larger + (-torch.expm1(smaller - larger)).log()
