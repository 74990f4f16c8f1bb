"""A model with one layer of every sort that decisions are made about, and what a probe would say of it."""

import torch
from torch import nn

from dcomp.calibrate.structure import LayerFacts, Role, Structure


class Parts(nn.Module):
    """One layer of every sort."""

    _keep_in_fp32_modules = ("fragile",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3))
        self.conv, self.linear = nn.Conv2d(64, 64, 3), nn.Linear(64, 64)
        self.narrow = nn.Linear(48, 1000)
        self.narrow_conv = nn.Conv2d(63, 8, 1)
        self.wide = nn.Linear(65, 8)
        self.strided = nn.Conv2d(64, 8, 1, stride=2)
        self.inset = nn.Conv2d(64, 8, 1, padding=1)
        self.pointwise = nn.Conv2d(64, 8, 1, padding="same")
        self.grouped = nn.Conv2d(128, 128, 3, groups=128)
        self.circular = nn.Conv2d(64, 64, 3, padding_mode="circular")
        self.uneven = nn.Conv2d(64, 64, 2, padding="same")
        self.even = nn.Conv2d(64, 64, 3, padding="same")
        self.fragile = nn.ModuleDict({"linear": nn.Linear(64, 64)})
        self.joined = nn.ModuleDict({k: nn.Linear(192, 8) for k in ("aligned", "astray", "minor")})
        self.shortcut = nn.Conv2d(128, 8, 1)
        self.behind = nn.Conv2d(128, 64, 3)
        self.idle = nn.Linear(64, 64)
        self.norm = nn.GroupNorm(2, 64)
        self.embedding = nn.Embedding(1000, 64)


def structure_of(model: nn.Module, **roles: tuple[Role, tuple[int, ...]]) -> Structure:
    """Facts about every layer; `roles` has those whose role or boundaries are special, dots written as underscores."""
    facts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
            usual = Role.CONV if kind == "conv2d" else Role.LINEAR
            role, boundaries = roles.get(name.replace(".", "_"), (usual, ()))
            facts[name] = LayerFacts(name, kind, role, frozenset(), boundaries)
    return Structure(facts, (), ())


PARTS = Parts()
STRUCTURE = structure_of(
    PARTS,
    joined_aligned=(Role.SHORTCUT, (64, 128)),
    joined_astray=(Role.SHORTCUT, (72,)),
    joined_minor=(Role.SHORTCUT, (32,)),
    shortcut=(Role.SHORTCUT, (64,)),
    behind=(Role.CONV, (64,)),  # a norm lies between it and the concatenation
    idle=(Role.UNUSED, ()),
)
