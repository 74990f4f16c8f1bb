"""The cut list: what pruning took out of a denoiser, by the names that the original has.

It holds no weights. Done again to the original architecture, even without values, it gives the shapes of the pruned
one, which is how a pruned checkpoint is opened.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from dcomp import UsageError
from dcomp.compress.pruning.units import Units

MAX_NAMES = 100_000
MAX_MEMBERS = 10_000_000  # of all groups together
_SENTENCE = 300  # characters of a name in a file


class CutError(UsageError):
    """Cuts that a denoiser cannot have."""


@dataclass(frozen=True)
class CutList:
    """What is cut.

    Attributes:
        removed: parts that go as a whole.
        kept: group -> the members that stay, ascending; groups that are not named stay whole.
    """

    removed: frozenset[str] = frozenset()
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is cut."""
        return bool(self.removed or self.kept)

    @property
    def hash(self) -> str:
        """What tells these cuts from others."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def check(self, units: Units) -> None:
        """Compare the cuts with what can be cut.

        Raises:
            CutError: a name is unknown, no member would stay, or members are none of the group's.
        """
        for name in self.removed:
            if name not in units.parts:
                raise _no_such(name, units)
        for name, members in self.kept.items():
            if name not in units.groups:
                raise _no_such(name, units)
            count = units.groups[name].members
            if not members or [*members] != sorted({*members}) or not 0 <= members[0] <= members[-1] < count:
                raise CutError(
                    f"The members that stay are none of the {count}, or not in their order",
                    where=name,
                    remedy="Name each member that stays once, ascending; to take all of them out, remove the part.",
                )

    def simplified(self, units: Units) -> "CutList":
        """Return the same cuts without those within removed parts, and without groups that stay whole."""

        def inside(path: str) -> bool:
            return any(path.startswith(f"{part}.") for part in self.removed)

        removed = frozenset(part for part in self.removed if not inside(part))
        kept = {
            name: members
            for name, members in self.kept.items()
            if len(members) < units.groups[name].members
            and not inside(units.groups[name].path)
            and units.groups[name].path not in removed
        }
        return CutList(removed, kept)

    def to_dict(self) -> dict[str, Any]:
        """Return the cuts as JSON data; members that stay are written as runs of first and last."""
        return {
            "removed": sorted(self.removed),
            "kept": {name: _runs(members) for name, members in sorted(self.kept.items())},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            CutError: the data has another form.
        """
        if not _is_form(data):
            raise CutError(
                "The list of cuts has another form than dcomp writes",
                where="cuts",
                remedy="Download the checkpoint again, or prune the model again.",
            )
        kept = {
            name: tuple(member for first, last in runs for member in range(first, last + 1))
            for name, runs in data["kept"].items()
        }
        return cls(frozenset(data["removed"]), kept)


def _no_such(name: str, units: Units) -> CutError:
    reason = units.left.get(name.partition(":")[0])
    return CutError(
        f"The denoiser has nothing of this name that can be cut{f': {reason}' if reason else ''}",
        where=name[:_SENTENCE],
        remedy="Run `dcomp prune MODEL --dry-run` to see what can be.",
    )


def _runs(members: tuple[int, ...]) -> list[list[int]]:
    runs: list[list[int]] = []
    for member in members:
        if runs and runs[-1][1] == member - 1:
            runs[-1][1] = member
        else:
            runs.append([member, member])
    return runs


def _is_form(data: Any) -> bool:
    if not isinstance(data, dict) or {*data} != {"removed", "kept"}:
        return False
    removed, kept = data["removed"], data["kept"]
    if not isinstance(removed, list) or not isinstance(kept, dict) or len(removed) + len(kept) > MAX_NAMES:
        return False
    if not all(map(_is_name, (*removed, *kept))) or not all(map(_are_runs, kept.values())):
        return False
    count: int = sum(last - first + 1 for runs in kept.values() for first, last in runs)
    return count <= MAX_MEMBERS


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _SENTENCE


def _are_runs(runs: Any) -> bool:
    """Whether these are runs of members, ascending and apart, none of them beyond what any group has."""
    if not isinstance(runs, list):
        return False
    before = -1
    for run in runs:
        if not isinstance(run, list) or len(run) != 2 or any(type(end) is not int for end in run):
            return False
        if not before < run[0] <= run[1] < MAX_MEMBERS:
            return False
        before = run[1]
    return True
