import itertools
import math
import os
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.compress.allocation import AllocationError, Option, allocate

LABELS = ("float", "W8A8", "W4A8")


def random_options(layers: int, seed: int, labels: tuple[str, ...] = LABELS) -> dict[str, list[Option]]:
    """Smaller is worse and cheaper, as a rule, with sizes and errors over orders of magnitude."""
    random = np.random.default_rng(seed)
    options = {}
    for i in range(layers):
        size, error = int(10 ** random.uniform(3, 7)), 10 ** random.uniform(-6, -1)
        options[f"layer{i}"] = [
            Option(
                f"layer{i}",
                label,
                int(size * part * random.uniform(0.9, 1.1)),
                error * worse * random.uniform(0.5, 1.5),
                size * price * random.uniform(0.9, 1.1),
            )
            for label, part, worse, price in zip(labels, (4, 1, 0.5), (0, 1, 30), (1, 0.5, 0.55), strict=True)
        ]
    return options


def brute_force(
    options: dict[str, list[Option]], max_bytes: float, max_cost: float, groups: dict[str, str] | None = None
) -> float:
    """Least error of all choices within the budgets."""
    best = math.inf
    for choice in itertools.product(*options.values()):
        labels = {(groups or {}).get(o.layer, f"own {o.layer}"): o.label for o in choice}
        alike = all(labels[(groups or {}).get(o.layer, f"own {o.layer}")] == o.label for o in choice)
        if alike and sum(o.nbytes for o in choice) <= max_bytes and math.fsum(o.cost for o in choice) <= max_cost:
            best = min(best, math.fsum(o.error for o in choice))
    return best


def total(options: dict[str, list[Option]], what: str, pick: Any = min) -> float:
    return math.fsum(pick(getattr(option, what) for option in each) for each in options.values())  # exact, as ours


@given(seed=st.integers(0, 10**6), part=st.floats(0, 1), cost_part=st.one_of(st.none(), st.floats(0, 1)))
@settings(max_examples=25)
def test_eight_layers_of_three_options_as_by_brute_force(seed: int, part: float, cost_part: float | None) -> None:
    options = random_options(8, seed)
    max_bytes = int(total(options, "nbytes") + part * (total(options, "nbytes", max) - total(options, "nbytes")))
    max_cost = None
    if cost_part is not None:
        max_cost = total(options, "cost") + cost_part * (total(options, "cost", max) - total(options, "cost"))
    expected = brute_force(options, max_bytes, max_cost or math.inf)
    if expected == math.inf:
        with pytest.raises(AllocationError):
            allocate(options, parameters=10, max_bytes=max_bytes, max_cost=max_cost)
        return
    found = allocate(options, parameters=10, max_bytes=max_bytes, max_cost=max_cost)
    assert found.error == pytest.approx(expected, rel=1e-9)
    assert found.nbytes == sum(option.nbytes for option in found.chosen.values()) <= max_bytes
    assert found.error == math.fsum(option.error for option in found.chosen.values())
    assert max_cost is None or found.cost <= max_cost
    assert found.bound <= found.error
    assert found.gap <= 1e-6
    assert list(found.chosen) == list(options)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_groups_choose_alike(seed: int) -> None:
    options = random_options(7, seed)
    groups = {"layer0": "qkv", "layer3": "qkv", "layer6": "qkv", "layer1": "kv", "layer2": "kv"}
    max_bytes = int((total(options, "nbytes") + total(options, "nbytes", max)) / 2)
    found = allocate(options, parameters=10, max_bytes=max_bytes, groups=groups)
    assert len({found.chosen[layer].label for layer in ("layer0", "layer3", "layer6")}) == 1
    assert found.chosen["layer1"].label == found.chosen["layer2"].label
    assert found.error == pytest.approx(brute_force(options, max_bytes, math.inf, groups), rel=1e-9)


def test_a_group_named_like_a_layer_is_not_that_layer() -> None:
    options = {name: [Option(name, "a", 1, 2.0), Option(name, "b", 3, 1.0)] for name in ("x", "y", "z")}
    found = allocate(options, parameters=1, max_bytes=5, groups={"y": "x", "z": "x"})
    assert [option.label for option in found.chosen.values()] == ["b", "a", "a"]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_never_worse_than_one_label_for_all(seed: int) -> None:
    options = random_options(120, seed)
    for label in LABELS:
        uniform = [next(o for o in each if o.label == label) for each in options.values()]
        nbytes = sum(option.nbytes for option in uniform)
        found = allocate(options, parameters=nbytes, max_bytes=nbytes)
        assert found.error <= math.fsum(option.error for option in uniform) * (1 + 1e-12)
        assert found.nbytes <= nbytes
        assert found.gap < 1e-3


def test_the_order_of_layers_and_options_does_not_matter() -> None:
    options = random_options(30, 3)
    backwards = {layer: options[layer][::-1] for layer in reversed(options)}
    max_bytes = int(total(options, "nbytes") * 1.7)
    one, two = (allocate(each, parameters=1, max_bytes=max_bytes) for each in (options, backwards))
    assert one.chosen == two.chosen


def test_of_equal_errors_the_smaller_is_taken() -> None:
    options = {"a": [Option("a", "large", 9, 0.5, 1.0), Option("a", "small", 3, 0.5, 1.0)]}
    assert allocate(options, parameters=8, max_bytes=100).chosen["a"].label == "small"


def test_layers_that_tie_are_decided_alike_every_time() -> None:
    options = {name: [Option(name, "a", 1, 1.0), Option(name, "b", 2, 0.0)] for name in "uvwxyz"}
    found = [allocate(options, parameters=1, max_bytes=9).chosen for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert sum(option.label == "b" for option in found[0].values()) == 3


def test_average_bits_count_what_stays_float() -> None:
    # 1000 float parameters in 4000 bytes, and one layer of 3000.
    options = {"a": [Option("a", "W8A8", 3000, 0.1), Option("a", "W4A8", 1500, 0.9)]}
    found = allocate(options, parameters=4000, target_bits=14.0, fixed_bytes=4000)
    assert (found.chosen["a"].label, found.nbytes, found.bits) == ("W8A8", 7000, 14.0)
    found = allocate(options, parameters=4000, target_bits=13.99, fixed_bytes=4000)
    assert (found.chosen["a"].label, found.nbytes, found.bits) == ("W4A8", 5500, 11.0)
    assert allocate(options, parameters=4000, target_bits=14.0, max_bytes=6999, fixed_bytes=4000).nbytes == 5500


def test_a_budget_that_is_too_small_names_the_smallest() -> None:
    options = random_options(9, 1)
    least = int(total(options, "nbytes"))
    with pytest.raises(AllocationError, match=rf"Allow {least + 500} bytes \({8 * (least + 500) / 1000:.3f}"):
        allocate(options, parameters=1000, max_bytes=least + 499, fixed_bytes=500)
    assert allocate(options, parameters=1000, max_bytes=least + 500, fixed_bytes=500).nbytes == least + 500
    cheapest = total(options, "cost")
    with pytest.raises(AllocationError, match=f"Allow a cost of {re.escape(f'{cheapest:g}')}"):
        allocate(options, parameters=1000, max_cost=cheapest * 0.99)


@pytest.mark.parametrize("seed", range(3))
def test_budgets_that_exclude_each_other_name_the_fewest_bytes_at_that_cost(seed: int) -> None:
    options = random_options(7, seed)
    max_cost = total(options, "cost") * 1.001
    within = [c for c in itertools.product(*options.values()) if sum(o.cost for o in c) <= max_cost]
    fewest = min(sum(o.nbytes for o in choice) for choice in within)
    if fewest > total(options, "nbytes"):
        with pytest.raises(AllocationError, match=f"Allow {fewest} bytes"):
            allocate(options, parameters=1, max_bytes=fewest - 1, max_cost=max_cost)
    assert allocate(options, parameters=1, max_bytes=fewest, max_cost=max_cost).nbytes == fewest


@pytest.mark.parametrize(
    "options",
    [
        [],
        [Option("a", "x", 1, math.nan)],
        [Option("a", "x", 1, math.inf)],
        [Option("a", "x", -1, 0.0)],
        [Option("b", "x", 1, 0.0)],
        [Option("a", "x", 1, 0.0), Option("a", "x", 2, 0.0)],
    ],
)
def test_options_that_mean_nothing_are_refused(options: list[Option]) -> None:
    with pytest.raises(AllocationError, match="A layer needs options"):
        allocate({"a": options}, parameters=1, max_bytes=10)


def test_a_group_without_a_common_label_and_no_budget_are_refused() -> None:
    options = {"a": [Option("a", "x", 1, 0.0)], "b": [Option("b", "y", 1, 0.0)]}
    with pytest.raises(AllocationError, match="no option in common"):
        allocate(options, parameters=1, max_bytes=10, groups={"a": "g", "b": "g"})
    with pytest.raises(AllocationError, match="no budget"):
        allocate(options, parameters=1)


def test_no_layers_fit_what_stays_float() -> None:
    assert allocate({}, parameters=10, max_bytes=40, fixed_bytes=40).nbytes == 40
    with pytest.raises(AllocationError, match="Allow 40 bytes"):
        allocate({}, parameters=10, max_bytes=39, fixed_bytes=40)


def test_the_solver_prints_nothing_and_stdout_works_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    options = random_options(800, 0)  # with this one HiGHS prints a line that no option turns off
    found = allocate(options, parameters=1, max_bytes=int(total(options, "nbytes") * 1.6))
    os.write(1, b"after")
    assert capfd.readouterr() == ("after", "")
    assert found.gap <= 1e-9
