"""Plans: what follows from the table, and files that lie."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcomp.cachequant.guide import PlanGuide
from dcomp.cachequant.plan import Action, CachePlan, PlanError, nearest_call
from dcomp.cachequant.predict import PREDICTORS
from dcomp.cachequant.zones import Zone, ZoneError

ALL = Zone("all", "output", ("",))
DEEP = Zone("deep1", "output", ("up.1.resnets.0",), ("down.1", "mid", "up.0"))
DEEPER = Zone("deep2", "output", ("up.0",), ("down.1.resnets.0", "mid"))
ATTENTION = Zone("attention", "output", ("down.0.attn", "up.1.attn"))
ZONES = (ALL, DEEP, DEEPER, ATTENTION)


def plan_of(*actions: dict[str, Action], places: list[float] | None = None, contexts: int = 1) -> CachePlan:
    timesteps = [900.0 - 10 * i for i in range(len(actions))]
    return CachePlan(ZONES, tuple(timesteps), tuple(places or timesteps), actions, contexts)


def test_zones_lie_within_those_that_skip_all_of_them() -> None:
    around = {zone.name: {other.name for other in ZONES if other.encloses(zone)} for zone in ZONES}
    assert around == {"all": set(), "deep1": {"all"}, "deep2": {"all", "deep1"}, "attention": {"all"}}


def test_a_zone_runs_where_neither_it_nor_one_around_it_is_predicted() -> None:
    plan = plan_of({}, {"deep1": "reuse"}, {}, {"all": "reuse"}, {"attention": "reuse", "deep2": "reuse"})
    computed = {zone.name: [call for call in range(5) if plan.computes(call, zone.name)] for zone in ZONES}
    assert computed == {"all": [0, 1, 2, 4], "deep1": [0, 2, 4], "deep2": [0, 2], "attention": [0, 1, 2]}
    # The prediction of a call whose deep part was predicted is a prediction like any other.
    assert plan.predictions[3]["all"].calls == (2,)
    assert plan.predictions[1]["deep1"].calls == (0,)


def test_predictions_read_the_latest_computed_calls_at_their_places() -> None:
    plan = plan_of({}, {}, {"all": "reuse"}, {"all": "linear"}, {}, {"all": "linear"}, places=[0, 1, 3, 4, 10, 11])
    rows = [row.get("all") for row in plan.predictions]
    assert (rows[2].calls, rows[2].weights) == ((1,), (1.0,))
    assert (rows[3].calls, rows[3].weights) == ((0, 1), pytest.approx((-3, 4)))
    assert (rows[5].calls, rows[5].weights) == ((1, 4), pytest.approx((-1 / 9, 10 / 9)))
    assert plan.last_reads["all"] == {0: 3, 1: 5, 4: 5}


def test_what_is_read_may_be_said_outright() -> None:
    plan = plan_of({}, {"deep1": "reuse"}, {}, {"all": ((0, -0.5), (2, 1.5))}, {"all": "reuse"})
    assert plan.predictions[3]["all"].calls == (0, 2)
    assert plan.predictions[3]["all"].weights == (-0.5, 1.5)
    assert plan.last_reads["all"] == {0: 3, 2: 4}
    assert CachePlan.from_dict(json.loads(plan.to_json())) == plan
    with pytest.raises(PlanError, match="compute 'deep1' before call 2"):
        plan_of({}, {"deep1": "reuse"}, {"deep1": ((0, 0.5), (1, 0.5))})  # call 1 did not compute it


def test_rules_that_count_calls_do_not_look_at_places() -> None:
    plan = plan_of({}, {}, {"all": "taylor1"}, places=[0, 1, 100])
    assert plan.predictions[2]["all"].weights == pytest.approx((-1, 2))


@given(st.data())
def test_a_tensor_is_kept_from_its_call_to_the_last_that_reads_it(data: Any) -> None:
    actions, computed = [], {zone.name: 0 for zone in ZONES}
    for _ in range(data.draw(st.integers(1, 12))):
        names = [name for name in computed if computed[name]]
        row = {}
        for name in data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []:
            fitting = [rule for rule, of in PREDICTORS.items() if of.nodes <= computed[name]]
            row[name] = data.draw(st.sampled_from(fitting))
        actions.append(row)
        probe = plan_of(*actions)
        computed = {name: probe.computed_calls(name) for name in computed}
    plan = plan_of(*actions, contexts=2)
    sizes = {"all": 1, "deep1": 10, "deep2": 100, "attention": 1000}
    # By hand: run through the calls with a store that drops what no later call reads.
    peak = 0
    store: set[tuple[str, int]] = set()
    for call in range(plan.calls):
        store |= {(name, call) for name in sizes if plan.computes(call, name)}
        later = {(name, c) for row in plan.predictions[call:] for name, p in row.items() for c in p.calls}
        store &= later
        peak = max(peak, sum(sizes[name] for name, _ in store))
        assert all((name, c) in store for name, p in plan.predictions[call].items() for c in p.calls)
    assert plan.peak_bytes(sizes) == 2 * peak


def test_a_plan_survives_its_file() -> None:
    plan = plan_of({}, {"deep1": "reuse"}, {}, {"all": "linear", "deep1": "reuse"}, contexts=2)
    assert CachePlan.from_dict(json.loads(plan.to_json())) == plan


def good() -> dict[str, Any]:
    return json.loads(plan_of({}, {}, {"deep1": "linear"}).to_json())


EDITS = {
    "not an object": lambda d: [],
    "a field is missing": lambda d: d.pop("contexts"),
    "a field is unknown": lambda d: d.update(more=1),
    "another version": lambda d: d.update(version=2),
    "no calls": lambda d: d.update(calls=[]),
    "calls are no list": lambda d: d.update(calls={}),
    "a million calls": lambda d: d.update(calls=d["calls"] * 400_000),
    "no contexts": lambda d: d.update(contexts=0),
    "contexts as text": lambda d: d.update(contexts="1"),
    "a million contexts": lambda d: d.update(contexts=10**6),
    "a timestep as text": lambda d: d["calls"][0].update(timestep="900"),
    "a timestep that is not finite": lambda d: d["calls"][0].update(timestep=float("inf")),
    "a truth value as place": lambda d: d["calls"][0].update(place=True),
    "two calls at one place": lambda d: d["calls"][1].update(place=d["calls"][0]["place"]),
    "places that turn round": lambda d: d["calls"][2].update(place=1e6),
    "an unknown key of a call": lambda d: d["calls"][0].update(skip=1),
    "inputs that are rounded a little": lambda d: d["calls"][0].update(unrounded=0.5),
    "inputs that are rounded in one word": lambda d: d["calls"][0].update(unrounded="yes"),
    "predictions as list": lambda d: d["calls"][2].update(predict=["deep1"]),
    "an unknown zone": lambda d: d["calls"][2].update(predict={"deep9": "reuse"}),
    "an unknown predictor": lambda d: d["calls"][2].update(predict={"deep1": "magic"}),
    "a predictor that is no text": lambda d: d["calls"][2].update(predict={"deep1": 1}),
    "a read without a weight": lambda d: d["calls"][2].update(predict={"deep1": [[1]]}),
    "a read of text": lambda d: d["calls"][2].update(predict={"deep1": [["1", 1.0]]}),
    "a read of itself": lambda d: d["calls"][2].update(predict={"deep1": [[2, 1.0]]}),
    "a read of nothing": lambda d: d["calls"][2].update(predict={"deep1": []}),
    "a read of one call twice": lambda d: d["calls"][2].update(predict={"deep1": [[1, 0.5], [1, 0.5]]}),
    "reads out of order": lambda d: d["calls"][2].update(predict={"deep1": [[1, 0.5], [0, 0.5]]}),
    "a thousand reads": lambda d: d["calls"][2].update(predict={"deep1": [[n, 0.0] for n in range(1000)]}),
    "a weight that is no number": lambda d: d["calls"][2].update(predict={"deep1": [[1, "1"]]}),
    "a weight that is not finite": lambda d: d["calls"][2].update(predict={"deep1": [[1, float("nan")]]}),
    "a weight of a million": lambda d: d["calls"][2].update(predict={"deep1": [[0, -1e6], [1, 1e6]]}),
    "a prediction in the first call": lambda d: d["calls"][0].update(predict={"all": "reuse"}),
    "a prediction with too few calls before": lambda d: d["calls"][1].update(predict={"deep1": "linear"}),
    "two zones of one name": lambda d: d["zones"].append(copy.deepcopy(d["zones"][0])),
    "a zone without modules": lambda d: d["zones"][0].update(predicted=[]),
    "a zone of another kind": lambda d: d["zones"][0].update(kind="magic"),
    "a module name that is no text": lambda d: d["zones"][0].update(predicted=[1]),
    "a module name of a megabyte": lambda d: d["zones"][0].update(predicted=["x" * 2**20]),
    "an unknown field of a zone": lambda d: d["zones"][0].update(path="/etc"),
    "a residual zone without streams": lambda d: d["zones"][0].update(kind="residual"),
    "a stream that is code": lambda d: d["zones"][0].update(kind="residual", streams=[[["a.b()", 0]]]),
    "a stream at a place that is far out": lambda d: d["zones"][0].update(kind="residual", streams=[[["x", 10**9]]]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_file_is_refused(edit: str) -> None:
    data = good()
    changed = EDITS[edit](data)
    with pytest.raises((PlanError, ZoneError)):
        CachePlan.from_dict(changed if changed == [] else data)


def test_calls_without_rounding_survive_a_file_and_lie_within_the_plan() -> None:
    plan = replace(plan_of({}, {}, {"deep1": "linear"}), unrounded=frozenset({1}))
    assert CachePlan.from_dict(json.loads(plan.to_json())) == plan
    assert PlanGuide(plan).order(1).unrounded
    assert not PlanGuide(plan).order(0).unrounded
    with pytest.raises(PlanError, match="not rounded"):
        replace(plan, unrounded=frozenset({3}))


def test_calls_are_found_by_their_timesteps() -> None:
    timesteps = [999.0, 500.0, 500.0, 0.0]
    assert nearest_call(timesteps, 999) == 0
    assert nearest_call(timesteps, 500.0001) == 1
    assert nearest_call(timesteps, 500, start=2) == 2
    assert nearest_call(timesteps, 500, start=3) is None
    assert nearest_call(timesteps, 0.0) == 3
    assert nearest_call(timesteps, 750) is None


def test_a_zone_of_which_a_part_is_replaced_has_nothing_to_keep() -> None:
    def chain(name: str, *numbers: int) -> Zone:
        streams = ((("hidden_states", 0),),) * len(numbers)
        return Zone(name, "residual", tuple(f"blocks.{i}" for i in numbers), (), streams)

    parts = Zone("attention", "output", ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn"))
    first, middle, whole = chain("first", 0), chain("middle", 1), chain("whole", 0, 1, 2)
    assert first.silences(parts)
    assert first.silences(whole)
    assert first.silences(first)
    assert not middle.silences(whole)
    assert not parts.silences(whole)
    assert not first.silences(middle)
    assert whole.silences(parts)
    assert whole.silences(middle)
    actions = ({}, {"first": "reuse"}, {"attention": "reuse"})
    plan = CachePlan((first, parts), (3.0, 2.0, 1.0), (0.0, 1.0, 2.0), actions)
    assert plan.predictions[2]["attention"].calls == (0,)
