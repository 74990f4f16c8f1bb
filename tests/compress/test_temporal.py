import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcomp import DcompError
from dcomp.calibrate.calibration_set import CalibrationSet, RecordedCall
from dcomp.calibrate.clock import StepClock
from dcomp.calibrate.pipeline import Generation, open_pipeline, prediction_of
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.structure import Role, Structure, probe_structure
from dcomp.compress.loader import attach_clock
from dcomp.compress.manifest import CheckpointError
from dcomp.compress.scheme import QScheme
from dcomp.compress.temporal import (
    FeatureChoice,
    FeaturePlan,
    FeatureReport,
    Variant,
    cache_features,
    choose_features,
    disturbance,
    plan_features,
)
from dcomp.compress.time_table import (
    MAX_ROWS,
    Absent,
    FeatureError,
    TimeTable,
    empty_table,
    from_config,
    to_config,
)
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, denoiser_inputs, save_tiny_pipeline, tiny_denoiser

STEPS = 3
UNET, DIT, FLUX, PIXART = (
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
)
W8 = QScheme(8)

_UNET_FORMS = (
    {
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.1.resnets.0.time_emb_proj",
        "mid_block.resnets.0.time_emb_proj",
        "mid_block.resnets.1.time_emb_proj",
        "up_blocks.0.resnets.0.time_emb_proj",
        "up_blocks.0.resnets.1.time_emb_proj",
        "up_blocks.1.resnets.0.time_emb_proj",
        "up_blocks.1.resnets.1.time_emb_proj",
    },
    {"time_embedding.linear_1", "time_embedding.linear_2"},
)
_TEXT_EMBED_FORMS = (
    {"time_text_embed.timestep_embedder.linear_2"},
    {"time_text_embed.timestep_embedder.linear_1"},
)
# Written by hand from the architectures: layers that become tables, and layers that only those read.
FORMS: dict[str, tuple[set[str], set[str]]] = {
    "UNet2DModel": _UNET_FORMS,
    "UNet2DConditionModel": _UNET_FORMS,
    "UNet2DConditionModel-linear": _UNET_FORMS,
    "DiTTransformer2DModel": (
        {
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
            "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2",
        },
        {
            "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
            "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1",
        },
    ),
    "PixArtTransformer2DModel": (
        {"adaln_single.emb.timestep_embedder.linear_2", "adaln_single.linear"},
        {"adaln_single.emb.timestep_embedder.linear_1"},
    ),
    "SD3Transformer2DModel": _TEXT_EMBED_FORMS,
    "FluxTransformer2DModel": _TEXT_EMBED_FORMS,
}


@dataclass(frozen=True)
class Case:
    """A tiny pipeline's denoiser with what is known of it."""

    name: str
    original: nn.Module
    calibration: CalibrationSet
    structure: Structure
    plan: FeaturePlan

    def denoiser(self) -> nn.Module:
        return copy.deepcopy(self.original)

    def cached(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, FeatureReport]:
        denoiser = self.denoiser()
        return denoiser, cache_features(denoiser, self.plan, self.calibration.all_timesteps, dtype)


def make_case(name: str, folder: Path) -> Case:
    pipeline = open_pipeline(save_tiny_pipeline(name, folder / "model"))
    size = 16 if name == FLUX else None
    prompts = {"class": ["0", "207"], "text": ["a cat", "two dogs"]}.get(pipeline.kind, ["", ""])
    settings = Generation(steps=STEPS, batch_size=2, height=size, width=size)
    calibration = record_calibration_set(pipeline, prompts, settings, folder / "calibration")
    call = next(calibration.calls())
    structure = probe_structure(pipeline.denoiser, call.args, call.kwargs)
    return Case(
        name, pipeline.denoiser, calibration, structure, plan_features(pipeline.denoiser, structure, calibration)
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return functools.cache(lambda name: make_case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=sweep(NAMES, FEW_NAMES))
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@torch.no_grad()
def predict(denoiser: nn.Module, call: RecordedCall, timestep: Any = None) -> Tensor:
    kwargs, args = dict(call.kwargs), list(call.args)
    if timestep is not None:
        if "timestep" in kwargs:
            kwargs["timestep"] = timestep
        else:
            args[1] = timestep
    return prediction_of(denoiser(*args, **kwargs))


def tables_of(denoiser: nn.Module) -> dict[str, TimeTable]:
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, TimeTable)}


def small_table(dtype: torch.dtype = torch.float32) -> TimeTable:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [-5.0, 0.0]], dtype=dtype)
    return TimeTable(torch.tensor([900.0, 500.0, 100.0]), values, in_features=7, clock=StepClock())


def test_tables_and_absent_layers_are_exactly_those_of_the_architecture(case: Case) -> None:
    assert (set(case.plan.named("table")), set(case.plan.named("absent"))) == FORMS[case.name]
    assert case.plan.kept == {}
    assert set(case.plan.features) == case.structure.named(Role.TIME)


def test_planning_changes_nothing(case: Case) -> None:
    denoiser = case.denoiser()
    before = {name: list(vars(module)) for name, module in denoiser.named_modules()}
    plan = plan_features(denoiser, case.structure, case.calibration)
    choose_features(denoiser, plan, dict.fromkeys(plan.features, W8), case.calibration.all_timesteps)
    assert {name: list(vars(module)) for name, module in denoiser.named_modules()} == before
    assert not any(module._forward_hooks for module in denoiser.modules())
    assert disturbance(denoiser, case.calibration.calls()) == 0


def first_rows(denoiser: nn.Module, names: set[str], call: RecordedCall) -> tuple[Tensor, bool]:
    """The prediction with the first row of each layer's output in place of all, and whether they were equal before.

    Elementwise kernels round the last few numbers of a tensor another way, so that equal rows can differ in a bit
    where the width does not fill the processor's vectors.
    """
    equal = []

    def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        equal.append(bool((y == y[:1]).all()))
        return y[:1].expand_as(y).contiguous()

    hooks = [denoiser.get_submodule(name).register_forward_hook(hook) for name in names]
    prediction = predict(denoiser, call)
    for handle in hooks:
        handle.remove()
    return prediction, all(equal)


def test_fp32_tables_give_the_same_predictions_in_every_bit_without_a_call_of_a_time_layer(case: Case) -> None:
    denoiser = case.denoiser()
    called: list[str] = []
    for name in case.structure.named(Role.TIME):
        denoiser.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    report = cache_features(denoiser, case.plan, case.calibration.all_timesteps, torch.float32)
    called.clear()
    exact = []
    for call in case.calibration.calls():
        got = predict(denoiser, call)
        expected, equal_rows = first_rows(case.original, FORMS[case.name][0], call)
        assert torch.equal(got, expected)
        assert torch.equal(got, call.output) or not equal_rows
        assert (got - call.output).abs().max() <= 1e-6 * call.output.abs().max()
        exact.append(equal_rows)
    assert called == []
    assert report.disturbance <= (0 if all(exact) else 1e-6 * report.peak)
    if case.name != FLUX:  # 72 channels, two samples, an activation in between
        assert all(exact)


def test_one_sample_is_the_same_in_every_bit_for_any_width(cases: Callable[[str], Case]) -> None:
    args, kwargs = denoiser_inputs(FLUX, batch=1)
    denoiser = cases(FLUX).denoiser()
    call = RecordedCall(args, kwargs, torch.empty(0), 0, 0, 0, 0.501, ())
    expected = predict(denoiser, call)
    report = cache_features(denoiser, replace(cases(FLUX).plan, calls=(call,)), [0.501], torch.float32)
    assert report.disturbance == 0
    assert torch.equal(predict(denoiser, call), expected)


def test_weights_of_time_layers_leave_the_state_dict(case: Case) -> None:
    denoiser, report = case.cached(torch.float16)
    state, before = denoiser.state_dict(), case.original.state_dict()
    tables, absent = FORMS[case.name]
    expected = {key for key in before if key.rpartition(".")[0] not in tables | absent}
    assert set(state) == expected | {f"{name}.{leaf}" for name in tables for leaf in ("timesteps", "values")}
    held = sum(state[f"{name}.{leaf}"].nbytes for name in tables for leaf in ("timesteps", "values"))
    gone = sum(before[f"{name}.{leaf}"].nbytes for name in tables | absent for leaf in ("weight", "bias"))
    widths = [case.original.get_submodule(name).out_features for name in tables]
    assert held == report.nbytes == case.plan.nbytes(torch.float16) == sum(STEPS * (2 * o + 4) for o in widths)
    assert gone == report.layer_bytes == case.plan.layer_bytes
    assert (set(report.tables), set(report.absent), report.rows) == (tables, absent, STEPS)


def test_fp16_tables_round_each_value_to_fp16_and_the_prediction_moves_by_about_that(case: Case) -> None:
    (exact, _), (rounded, report) = case.cached(), case.cached(torch.float16)
    for name, table in tables_of(exact).items():
        assert torch.equal(tables_of(rounded)[name].values, table.values.half())
    # Half a unit in the last place is 2^-11 of a value; measured: these networks pass on at most 0.12 of it.
    assert 0 < report.disturbance <= 2**-11 * report.peak
    assert report.disturbance == disturbance(rounded, case.plan.calls)


def test_another_batch_size_agrees_to_rounding_of_fp32(case: Case) -> None:
    denoiser, _ = case.cached()
    args, kwargs = denoiser_inputs(case.name, batch=3)
    t = case.calibration.all_timesteps[1]
    call = RecordedCall(args, kwargs, torch.empty(0), 0, 0, 0, t, ())
    told = torch.tensor(t) if case.name.startswith("UNet") else torch.full((3,), t)
    got, expected = predict(denoiser, call, told), predict(case.original, call, told)
    assert (got - expected).abs().max() <= 4e-6 * expected.abs().max()


def test_a_row_that_is_wrong_changes_its_own_step_alone(case: Case) -> None:
    denoiser, _ = case.cached()
    before = [predict(denoiser, call) for call in case.calibration.calls()]
    wrong = 1
    for table in tables_of(denoiser).values():
        table.values[wrong] *= 100
    for call, prediction in zip(case.calibration.calls(), before, strict=True):
        same = torch.equal(predict(denoiser, call), prediction)
        assert same == (call.timestep != case.calibration.all_timesteps[wrong])


def test_unseen_timesteps_of_any_form_are_answered(case: Case) -> None:
    denoiser, _ = case.cached()
    call = case.plan.calls[0]
    above, below = case.calibration.all_timesteps[:2]
    for t in ((above + below) / 2, above * 10, -1.0):
        for told in (t, torch.tensor(t), torch.full((len(call.output),), t)):
            if case.name.startswith("UNet") or (isinstance(told, Tensor) and told.ndim):
                assert bool(torch.isfinite(predict(denoiser, call, told)).all())


def test_unseen_timesteps_are_counted(case: Case) -> None:
    denoiser, _ = case.cached()
    clock = attach_clock(denoiser, None)
    for call in case.calibration.calls():
        predict(denoiser, call)
    assert (clock.unseen, clock.max_distance) == (0, 0.0)
    call = case.plan.calls[0]
    above, below = case.calibration.all_timesteps[:2]
    told = torch.full((len(call.output),), (3 * above + below) / 4)
    predict(denoiser, call, told)
    assert clock.unseen == 1
    assert clock.max_distance == pytest.approx((above - below) / 4, rel=1e-5)


def test_samples_with_timesteps_of_their_own_get_their_own_rows(case: Case) -> None:
    denoiser, _ = case.cached()
    call = case.plan.calls[0]
    times = case.calibration.all_timesteps
    mixed = torch.tensor([times[i % STEPS] for i in range(len(call.output))])
    got = predict(denoiser, call, mixed)
    for i in range(len(mixed)):
        # All samples at the timestep of one: the same batch shape, so the same sums.
        assert torch.equal(got[i], predict(denoiser, call, mixed[i].expand(len(mixed)))[i])
    expected = predict(case.original, call, mixed)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_denoiser_with_tables_survives_copy_state_dict_and_a_change_of_dtype(cases: Callable[[str], Case]) -> None:
    denoiser, _ = cases(UNET).cached()
    twin = copy.deepcopy(denoiser)
    call = cases(UNET).plan.calls[-1]
    assert torch.equal(predict(twin, call), predict(denoiser, call))
    assert next(iter(tables_of(twin).values())).clock is twin.dcomp_clock is not denoiser.dcomp_clock

    predict(twin, call)  # has read its timesteps
    twin.load_state_dict({key: value * 0.5 for key, value in twin.state_dict().items()})
    table = next(iter(tables_of(twin).values()))
    assert table._known() == table.timesteps.tolist() == [t / 2 for t in cases(UNET).calibration.all_timesteps]

    denoiser.to(torch.bfloat16)
    assert {b.dtype for table in tables_of(denoiser).values() for b in table.buffers()} == {torch.float32}


def test_tables_use_the_clock_that_the_denoiser_has(cases: Callable[[str], Case]) -> None:
    for passed in (True, False):
        denoiser, clock = cases(UNET).denoiser(), StepClock()
        clock.attach(denoiser)
        if not passed:
            denoiser.dcomp_clock = clock
        hooks = len(denoiser._forward_pre_hooks)
        cache_features(denoiser, cases(UNET).plan, [1.0], clock=clock if passed else None)
        assert all(table.clock is clock for table in tables_of(denoiser).values())
        assert len(denoiser._forward_pre_hooks) == hooks


def test_a_table_is_linear_between_rows_and_constant_outside() -> None:
    table = small_table()
    expected = {
        900.0: [1, 2], 901.0: [1, 2], math.inf: [1, 2], 700.0: [2, 4], 500.0: [3, 6],
        200.0: [-3, 1.5], 100.0: [-5, 0], 99.0: [-5, 0], -math.inf: [-5, 0],
    }  # fmt: skip
    for t, row in expected.items():
        table.clock.read(t)
        for shape in ((7,), (3, 7), (2, 5, 7)):
            y = table(torch.zeros(shape))
            assert y.shape == (*shape[:-1], 2)
            assert bool((y == torch.tensor(row)).all()), t


def test_rows_of_a_mixed_batch_go_to_the_first_axis() -> None:
    table = small_table(torch.float16)
    table.clock.read(torch.tensor([100.0, 700.0, 900.0]))
    expected = torch.tensor([[-5.0, 0.0], [2.0, 4.0], [1.0, 2.0]])
    assert torch.equal(table(torch.zeros(3, 7)), expected)
    assert torch.equal(table(torch.zeros(3, 4, 7)), expected[:, None].expand(3, 4, 2))
    assert table(torch.zeros(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for x in (torch.zeros(2, 7), torch.zeros(7)):
        with pytest.raises(FeatureError, match="told 3 timesteps"):
            table(x)


def test_a_table_of_one_row_answers_every_timestep() -> None:
    table = TimeTable(torch.tensor([5.0]), torch.tensor([[1.0]]), 1, StepClock())
    for t in (4, 5, 6.5):
        table.clock.read(t)
        assert table(torch.zeros(2, 1)).tolist() == [[1.0], [1.0]]


def test_a_timestep_told_as_a_double_hits_its_row_exactly() -> None:
    values = torch.tensor([[1.0], [1e30]])
    table = TimeTable(torch.tensor([0.9, 0.1]), values, 1, StepClock())
    for t, row in ((0.9, 0), (0.1, 1)):
        table.clock.read(t)  # neither is a number of fp32
        assert torch.equal(table(torch.zeros(1, 1)), values[row : row + 1])


def test_an_answer_is_no_view_of_the_table() -> None:
    table = small_table()
    table.clock.read(500)
    table(torch.zeros(1, 7)).mul_(9)
    table(torch.zeros(7)).mul_(9)
    assert table.values[1].tolist() == [3, 6]


def test_a_table_without_a_timestep_is_refused() -> None:
    table = small_table()
    with pytest.raises(FeatureError, match="does not know the timestep"):
        table(torch.zeros(1, 7))
    table.clock = None
    with pytest.raises(FeatureError, match="clock"):
        table(torch.zeros(1, 7))


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1000, width=32), min_size=2, max_size=6, unique=True), st.floats(-10, 1010, width=32))
def test_a_lookup_is_that_of_linear_interpolation(timesteps: list[float], t: float) -> None:
    known = sorted(timesteps, reverse=True)
    values = torch.arange(len(known), dtype=torch.float32)[:, None] ** 2
    table = TimeTable(torch.tensor(known), values, 1, StepClock())
    table.clock.read(t)
    expected = values[-1].item() if t <= known[-1] else values[0].item()
    for i in range(len(known) - 1):
        if known[i + 1] <= t <= known[i]:
            part = (known[i] - t) / (known[i] - known[i + 1])
            expected = (1 - part) * i**2 + part * (i + 1) ** 2
    assert table(torch.zeros(1, 1)).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_absent_answers_zeros_of_the_width() -> None:
    y = Absent(7, 3)(torch.ones(2, 5, 7, dtype=torch.float16))
    assert (y.shape, y.dtype, y.abs().sum().item()) == ((2, 5, 3), torch.float16, 0)
    assert not Absent(7, 3).state_dict()


def test_a_layer_with_several_outputs_at_one_timestep_stays(cases: Callable[[str], Case]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.conv = nn.Linear(1, 4), nn.Conv2d(1, 4, 1)
            self.per_token, self.plain = nn.Linear(1, 4), nn.Linear(4, 4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            t = timestep.float().view(-1, 1)
            tokens = self.per_token(t[:, None] * torch.tensor([[1.0], [2.0]])).sum(1)
            shift = self.shared(t) - self.shared(t + 1) + self.conv(t[:, :, None, None])[..., 0, 0] + tokens
            return sample + self.plain(shift)

    denoiser = Twice().requires_grad_(False)
    args = (torch.ones(2, 4), torch.tensor([3.0, 3.0]))
    structure = probe_structure(denoiser, args, {})
    assert structure.named(Role.TIME) == {"shared", "conv", "per_token", "plain"}

    class OneCall:
        all_timesteps = (3.0, 2.0)

        def __len__(self) -> int:
            return 1

        def calls(self, device: object) -> list[RecordedCall]:
            return [RecordedCall(args, {}, denoiser(*args), 0, 0, 0, 3.0, ())]

    plan = plan_features(denoiser, structure, OneCall())
    several = "has several outputs at one timestep"
    assert plan.kept == {"shared": several, "per_token": several, "conv": "Conv2d is no float linear layer"}
    assert plan.named("table") == ["plain"]
    assert cache_features(denoiser, plan, (3.0, 2.0), torch.float32).disturbance == 0


def test_layers_that_somebody_else_keeps_are_kept_and_what_they_read_is_no_longer_absent(
    cases: Callable[[str], Case],
) -> None:
    case = cases(UNET)
    kept = {"mid_block.resnets.0.time_emb_proj": "because"}
    plan = plan_features(case.original, case.structure, case.calibration, keep=kept)
    assert plan.kept == kept
    assert plan.named("absent") == ["time_embedding.linear_1"]
    assert "time_embedding.linear_2" in plan.named("table")
    denoiser = case.denoiser()
    assert cache_features(denoiser, plan, case.calibration.all_timesteps, torch.float32).disturbance == 0


def test_bytes_are_those_of_the_schemes(cases: Callable[[str], Case]) -> None:
    case = cases(UNET)
    plan = plan_features(
        case.original, case.structure, case.calibration, timesteps=range(50), schemes={"time_embedding.linear_2": W8}
    )
    layers = {name: case.original.get_submodule(name) for name in plan.features}
    for name, feature in plan.features.items():
        o, i = layers[name].weight.shape
        expected = o * i + 4 * o + 4 * o if name == "time_embedding.linear_2" else 4 * (o * i + o)
        assert feature.layer_bytes >= expected  # int8 rows are padded
        assert feature.layer_bytes <= expected + 63 * o
        assert feature.rows == (50 if name in FORMS[UNET][0] else 0)
        assert feature.nbytes(torch.float32) == feature.rows * 4 * (o + 1)


@pytest.mark.parametrize("timesteps", [[], [math.nan], [math.inf], range(MAX_ROWS + 1), [1e39]])
def test_unusable_timesteps_are_refused_before_anything_changes(timesteps: Any, cases: Callable[[str], Case]) -> None:
    denoiser = cases(UNET).denoiser()
    with pytest.raises(FeatureError, match="timesteps"):
        cache_features(denoiser, cases(UNET).plan, timesteps)
    assert not tables_of(denoiser)


def test_what_cannot_be_a_table_is_refused_before_anything_changes(cases: Callable[[str], Case]) -> None:
    case = cases(UNET)
    denoiser = case.denoiser()
    with pytest.raises(FeatureError, match="bfloat16"):
        cache_features(denoiser, case.plan, [1.0], torch.bfloat16)
    denoiser.mid_block.resnets[0].time_emb_proj.weight.mul_(1e8)
    with pytest.raises(FeatureError, match="does not fit"):
        cache_features(denoiser, case.plan, [1.0], torch.float16)
    assert not tables_of(denoiser)
    cache_features(denoiser, case.plan, [1.0], torch.float32)
    with pytest.raises(FeatureError, match="no float linear layer"):
        cache_features(denoiser, case.plan, [1.0])


def test_the_chosen_form_is_never_worse_than_either(case: Case) -> None:
    schemes = dict.fromkeys(case.plan.features, W8)
    times = case.calibration.all_timesteps
    for dtype in (torch.float16, torch.float32):
        plan, choices = choose_features(case.original, case.plan, schemes, times, dtype)
        assert plan == case.plan  # 8 bits are coarser than the 11 of fp16
        assert set(choices) == FORMS[case.name][0]
        for name, choice in choices.items():
            assert choice.chosen.error <= min(choice.table.error, choice.quantized.error)
            assert choice.table.nbytes == case.plan.features[name].nbytes(dtype)
            assert (choice.table.error == 0) == (dtype == torch.float32)
            assert choice.quantized.error > 0


def test_errors_are_those_of_brute_force(cases: Callable[[str], Case]) -> None:
    case, name = cases(PIXART), "adaln_single.linear"
    times = case.calibration.all_timesteps
    embedder, layer = case.original.adaln_single, case.original.adaln_single.linear
    batch = len(case.plan.calls[0].output)
    halved = copy.deepcopy(layer)
    halved.weight.mul_(0.5)
    halved.bias.zero_()
    _, choices = choose_features(case.original, case.plan, {name: W8}, times, quantize=lambda *_: halved)
    exact, other = [], []
    for t in times:
        emb = embedder.emb(torch.full((batch,), int(t)), None, None, batch, torch.float32)
        exact.append(layer(nn.functional.silu(emb))[0].double())
        other.append(halved(nn.functional.silu(emb))[0].double())
    a, b = torch.stack(exact), torch.stack(other)
    assert choices[name].quantized.error == pytest.approx((a - b).square().sum().item(), rel=1e-4)
    assert choices[name].table.error == pytest.approx((a.half().double() - a).square().sum().item(), rel=1e-3)
    cosine = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert choices[name].quantized.cosine == pytest.approx(cosine.mean().item(), rel=1e-4)


def test_a_table_that_overflows_loses_and_what_it_reads_is_no_longer_absent(cases: Callable[[str], Case]) -> None:
    case, name = cases(UNET), "mid_block.resnets.0.time_emb_proj"
    denoiser = case.denoiser()
    denoiser.get_submodule(name).weight.mul_(1e8)
    schemes, times = dict.fromkeys(case.plan.features, W8), case.calibration.all_timesteps
    plan, choices = choose_features(denoiser, case.plan, schemes, times, torch.float16)
    assert (choices[name].form, choices[name].table.error) == ("quantized", math.inf)
    assert set(plan.kept) == {name}
    assert plan.named("absent") == ["time_embedding.linear_1"]
    assert choices["time_embedding.linear_2"].form == "table"
    cache_features(denoiser, plan, times, torch.float16)
    assert type(denoiser.get_submodule(name)) is nn.Linear


@given(*[st.sampled_from([0.0, 1e-9, 1.0, math.inf])] * 4)
def test_the_smaller_error_wins_then_the_smaller_cosine_distance(a: float, b: float, c: float, d: float) -> None:
    choice = FeatureChoice(Variant(a, min(b, 2.0), 1), Variant(c, min(d, 2.0), 2))
    assert choice.chosen.error == min(a, c)
    if a == c:
        assert choice.chosen.cosine == min(b, d, 2.0)
        assert choice.form == ("table" if min(b, 2.0) <= min(d, 2.0) else "quantized")


def test_config_and_tensors_make_the_same_denoiser_again(case: Case) -> None:
    denoiser, _ = case.cached(torch.float16)
    config = json.loads(json.dumps(to_config(denoiser)))
    tables, absent = FORMS[case.name]
    assert config == {
        **dict.fromkeys(absent, "absent"),
        **{
            name: {"rows": STEPS, "width": case.original.get_submodule(name).out_features, "dtype": "float16"}
            for name in tables
        },
    }
    with torch.device("meta"):
        twin = case.denoiser().to("meta")
        from_config(twin, config)
    assert all(tensor.is_meta for tensor in twin.state_dict().values())
    real = case.denoiser()
    from_config(real, config)
    real.load_state_dict(denoiser.state_dict())
    assert to_config(real) == config
    clock = StepClock()
    clock.attach(real)
    for table in tables_of(real).values():
        table.check()
        table.clock = clock
    for call in case.plan.calls:
        assert torch.equal(predict(real, call), predict(denoiser, call))


@pytest.mark.parametrize(
    "entry",
    [
        None, "Absent", "table", [], 3, {}, {"rows": 3, "width": 64},
        {"rows": 3, "width": 64, "dtype": "float16", "x": 1},
        *({"rows": rows, "width": 64, "dtype": "float16"} for rows in (0, -1, MAX_ROWS + 1, 10**30, True, 3.0)),
        *({"rows": 3, "width": width, "dtype": "float16"} for width in (0, 63, 65, 64.0, "64", 10**30, None)),
        *({"rows": 3, "width": 64, "dtype": dtype} for dtype in ("float64", "int8", "", None, [], {}, "__class__")),
    ],
)  # fmt: skip
def test_hostile_entries_are_refused_with_a_remedy(entry: Any) -> None:
    assert isinstance(empty_table("a", nn.Linear(2, 64), {"rows": 3, "width": 64, "dtype": "float16"}), TimeTable)
    with pytest.raises(CheckpointError) as error:
        empty_table("a", nn.Linear(2, 64), entry)
    assert isinstance(error.value, DcompError)
    assert error.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        None, [], "absent", {"": "absent"}, {"nothing.here": "absent"}, {3: "absent"}, {"x" * 10**6: "absent"},
        {"conv_in": "absent"}, {"time_embedding": "absent"}, {"time_embedding.linear_1.weight": "absent"},
        {str(i): "absent" for i in range(100_001)},
    ],
)  # fmt: skip
def test_hostile_configs_are_refused_and_nothing_is_replaced(config: Any) -> None:
    denoiser = tiny_denoiser(UNET)
    if isinstance(config, dict):
        config = {"time_embedding.linear_1": "absent", **config}
    with pytest.raises(CheckpointError) as error:
        from_config(denoiser, config)
    assert len(str(error.value)) < 400
    assert to_config(denoiser) == {}


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("timesteps", [1.0, 2.0, 3.0]), ("timesteps", [3.0, 3.0, 1.0]), ("timesteps", [3.0, math.nan, 1.0]),
        ("timesteps", [math.inf, 2.0, 1.0]), ("values", [[0.0, math.nan]] * 3), ("values", [[0.0, math.inf]] * 3),
    ],
)  # fmt: skip
def test_damaged_tables_are_found(leaf: str, value: list[Any]) -> None:
    table = small_table()
    table.check()
    table._buffers[leaf] = torch.tensor(value)
    with pytest.raises(CheckpointError, match="damaged"):
        table.check()
