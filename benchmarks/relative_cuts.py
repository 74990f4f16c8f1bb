"""Cuts of one U-Net carried over to another of the same kind, with other depths and widths.

Each part and group of the other one is cut as the one that lies at the same relative place: the same side, the same
part of the way down, the same part of the layers there, and the same name within the layer.
"""

import re
from collections.abc import Iterable
from typing import Any

_NUMBER = re.compile(r"\.(\d+)(?=\.|$|:)")


def carried_over(cuts: Any, small: Any, large: Any) -> Any:
    """Return the cut list of a large denoiser.

    Args:
        cuts: of the small one.
        small: units of the small one.
        large: units of the large one.
    """
    from dcomp.compress.pruning.cut_list import CutList

    removed = frozenset(
        name for name, like in _likeness(large.parts, small.parts) if any(_within(like, part) for part in cuts.removed)
    )
    kept = {}
    for name, like in _likeness(large.groups, small.groups):
        if like in cuts.kept:
            members = large.groups[name].members
            stay = max(1, round(members * len(cuts.kept[like]) / small.groups[like].members))
            kept[name] = tuple(range(stay))
    return CutList(removed, kept).simplified(large)


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _likeness(names: Iterable[str], others: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield each name with that of the other model at the same relative place, where there is one."""
    own, theirs = _places(names), _places(others)
    for name, (words, place) in own.items():
        alike = [(there, other) for other, (same, there) in theirs.items() if same == words]
        if alike:
            yield name, min(alike, key=lambda each: sum(abs(a - b) for a, b in zip(place, each[0], strict=True)))[1]


def _places(names: Iterable[str]) -> dict[str, tuple[str, list[float]]]:
    """Return for each name its words without numbers, and its numbers as parts of the largest of names like it."""
    numbers = {name: [int(number) for number in _NUMBER.findall(name)] for name in names}
    words = {name: _NUMBER.sub(".*", name) for name in numbers}
    most: dict[tuple[str, int], int] = {}
    for name, found in numbers.items():
        prefix = words[name].split(".")[0]
        for depth, number in enumerate(found):
            key = (prefix, depth)
            most[key] = max(most.get(key, 0), number)
    return {
        name: (
            words[name],
            [number / max(1, most[words[name].split(".")[0], depth]) for depth, number in enumerate(found)],
        )
        for name, found in numbers.items()
    }
