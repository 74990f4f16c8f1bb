"""The block of layers that depend on the timestep alone: what it is cut out of, what it answers, how it resumes."""

import copy
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.calibrate.record import record_calibration_set
from dcomp.calibrate.structure import Role, probe_structure
from dcomp.compress.altered_calls import answering, at_timestep
from dcomp.compress.policy import Treatment, choose_schemes
from dcomp.compress.quantize import quantize_denoiser, rows_of_pass
from dcomp.compress.split import quantized_layers
from dcomp.compress.temporal import plan_features
from dcomp.compress.time_block import (
    OTHERS_WEIGHT,
    _BlockWatch,
    _float_answer,
    _made_up,
    _Timesteps,
    reconstruct_time_block,
    time_weights,
)
from tests.support.sweep import sweep
from tests.support.tiny import FEW_NAMES, NAMES, save_tiny_pipeline

STEPS = 6
UNET = "UNet2DConditionModel"


def make_case(name: str, folder: Path) -> SimpleNamespace:
    """A tiny denoiser in float, and with all layers of time in 4 bits and nothing else quantized."""
    pipeline = open_pipeline(save_tiny_pipeline(name, folder / "model"))
    prompts = ["0" if pipeline.kind == "class" else "a cat"] * 10
    size = 16 if name.startswith("Flux") else None
    settings = Generation(steps=STEPS, batch_size=5, height=size, width=size)
    recorded = record_calibration_set(pipeline, prompts, settings, folder / "calibration")
    call = next(recorded.calls())
    structure = probe_structure(pipeline.denoiser, call.args, call.kwargs)
    names = structure.named(Role.TIME)
    treatment = Treatment(rounding="adaround", group_size=16, directions=0)
    overrides = dict.fromkeys(names, "w4a16")
    decisions = choose_schemes(pipeline.denoiser, structure, "float", overrides=overrides, treatment=treatment)
    schemes = {name: d.scheme for name, d in decisions.items() if d.scheme}
    quantized = copy.deepcopy(pipeline.denoiser)
    quantize_denoiser(quantized, recorded, schemes, None, folder / "work", rows=60)
    rows = rows_of_pass(pipeline.denoiser, recorded, 60, 0)
    weights = time_weights(pipeline.denoiser, structure, list(schemes))
    return SimpleNamespace(
        original=pipeline.denoiser, quantized=quantized, recorded=recorded, structure=structure, rows=rows,
        weights=weights,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SimpleNamespace]:
    return functools.cache(lambda name: make_case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=sweep(NAMES, FEW_NAMES))
def case(request: pytest.FixtureRequest, cases: Callable[[str], SimpleNamespace]) -> SimpleNamespace:
    return cases(request.param)


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in denoiser.state_dict().items()}


@torch.no_grad()
def feature_of(denoiser: nn.Module, case: SimpleNamespace, name: str, t: float) -> Tensor:
    """Output of a layer in a whole run of the denoiser on one row at one timestep, fp64."""
    seen: list[Tensor] = []
    hook = denoiser.get_submodule(name).register_forward_hook(lambda _, __, y: seen.append(y.double()))
    row = case.rows.take([0])
    args, kwargs = at_timestep(denoiser, row.args, row.kwargs, t)
    denoiser(*args, **kwargs)
    hook.remove()
    return seen[0]


def test_the_block_computes_what_it_computed_inside_the_denoiser(case: SimpleNamespace) -> None:
    layers = {name: case.original.get_submodule(name) for name in case.weights}
    watch = _BlockWatch(len(case.rows))
    answer = partial(_float_answer, layers, case.weights)
    watched = watch.watched(answer)
    with torch.no_grad(), answering({layer: partial(watched, name) for name, layer in layers.items()}), watch:
        case.original(*case.rows.args, **case.rows.kwargs)
    assert set(watch.inputs) == set(case.weights)
    for name, y in watch.run(answer).items():
        assert torch.equal(y, watch.outputs[name])
    # Nothing is remembered of that run but how outputs follow from each other.
    doubled = watch.run(lambda name, x: 2 * answer(name, x))
    chained = [name for name in watch.inputs if not torch.equal(doubled[name], 2 * watch.outputs[name])]
    assert len(chained) == len(case.weights) - len([name for name in case.weights if name.endswith("linear_1")])


def test_features_are_those_that_would_be_tables(case: SimpleNamespace, tmp_path: Path) -> None:
    result = reconstruct_time_block(
        copy.deepcopy(case.quantized), case.rows, case.weights, case.recorded.all_timesteps, tmp_path / "block"
    )
    # Found there by zeros in the place of outputs, and judged by the prediction.
    assert set(result.features) == set(plan_features(case.original, case.structure, case.recorded).named("table"))


def test_errors_are_those_of_features_in_the_whole_denoiser(case: SimpleNamespace, tmp_path: Path) -> None:
    denoiser = copy.deepcopy(case.quantized)
    times = case.recorded.all_timesteps
    result = reconstruct_time_block(denoiser, case.rows, case.weights, times, tmp_path / "block")
    assert result.kept
    assert result.final < 0.85 * result.initial
    assert result.held_out_final <= result.held_out_initial
    for model, reported in ((case.quantized, result.initial), (denoiser, result.final)):
        errors = []
        for name in result.features:
            off, whole = 0.0, 0.0
            for t in times:
                y, exact = (feature_of(m, case, name, t) for m in (model, case.original))
                off, whole = off + (y - exact).square().sum(), whole + exact.square().sum()
            errors.append(float(off / whole))
        # Another batch size sums in another order: 1e-6 of a feature, while its error is 1e-3 of it and more.
        assert sum(errors) / len(errors) == pytest.approx(reported, rel=1e-3)


def test_nothing_but_the_block_changes(case: SimpleNamespace, tmp_path: Path) -> None:
    denoiser = copy.deepcopy(case.quantized)
    reconstruct_time_block(denoiser, case.rows, case.weights, case.recorded.all_timesteps, tmp_path / "block")
    before, after = state(case.quantized), state(denoiser)
    assert before.keys() == after.keys()
    changed = {key.rsplit(".", 1)[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed <= set(case.weights)
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith("bias"))
    assert not any("forward" in vars(module) for module in denoiser.modules())
    layers = quantized_layers(denoiser)
    assert all(layer.execution == "int" and layer.clock is denoiser.dcomp_clock for layer in layers.values())


def test_a_finished_block_is_read_and_the_denoiser_does_not_run(
    cases: Callable[[str], SimpleNamespace], tmp_path: Path
) -> None:
    case = cases(UNET)
    arguments = case.rows, case.weights, case.recorded.all_timesteps, tmp_path / "block"
    first, second = copy.deepcopy(case.quantized), copy.deepcopy(case.quantized)
    result = reconstruct_time_block(first, *arguments)

    def refuse(*_: object) -> None:
        raise AssertionError

    hook = second.register_forward_pre_hook(refuse)
    assert reconstruct_time_block(second, *arguments) == result
    hook.remove()
    assert all(torch.equal(value, state(second)[key]) for key, value in state(first).items())
    schemes = [{name: layer.scheme for name, layer in quantized_layers(d).items()} for d in (first, second)]
    assert schemes[0] == schemes[1]


def test_a_block_that_cannot_get_nearer_stays(cases: Callable[[str], SimpleNamespace], tmp_path: Path) -> None:
    case = cases(UNET)
    exact = {name: case.quantized.get_submodule(name).dequantize() for name in case.weights}
    for _ in range(2):  # found out, then read
        denoiser = copy.deepcopy(case.quantized)
        result = reconstruct_time_block(denoiser, case.rows, exact, case.recorded.all_timesteps, tmp_path / "block")
        assert (result.initial, result.held_out_initial, result.kept) == (0, 0, False)
        assert all(torch.equal(value, state(denoiser)[key]) for key, value in state(case.quantized).items())


def test_a_weight_that_makes_up_is_the_optimum_of_error_and_change() -> None:
    torch.manual_seed(0)
    weight, exact = torch.randn(5, 8), torch.randn(20, 8)
    x = exact + 0.1 * torch.randn(20, 8)
    made = _made_up(weight, exact, x)
    held = 0.01 * x.square().sum(0).mean()

    def loss(w: Tensor) -> Tensor:
        return (x @ w.T - exact @ weight.T).square().sum() + held * (w - weight).square().sum()

    w = made.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(w), w)
    (at_start,) = torch.autograd.grad(loss(start := weight.clone().requires_grad_()), start)
    assert gradient.abs().max() <= 1e-5 * at_start.abs().max()  # 1e-7 of each term, many of them
    assert torch.equal(_made_up(weight, exact, exact), weight)
    assert torch.equal(_made_up(weight, torch.zeros(3, 8), torch.zeros(3, 8)), weight)


def test_fewer_inputs_than_channels_are_answered_almost_exactly() -> None:
    torch.manual_seed(0)
    weight, exact = torch.randn(5, 64), torch.randn(20, 64)
    x = exact + 0.1 * torch.randn(20, 64)
    wanted = exact @ weight.T
    before, after = ((x @ w.T - wanted).norm() for w in (weight, _made_up(weight, exact, x)))
    assert after < 0.05 * before


@pytest.mark.parametrize(("deployed", "room"), [(6, 60), (50, 256), (1000, 256), (1, 40), (2, 1), (7, 8)])
def test_timesteps_are_the_deployed_ones_and_others_between(deployed: int, room: int) -> None:
    known = torch.linspace(1, 951, deployed).round().tolist()
    times = _Timesteps.of([*known, *known], room)
    values = times.values.tolist()
    assert len(values) == len(set(values)) <= max(1, room)
    assert all(min(known) <= t <= max(known) and t == round(t) for t in values)
    taken = times.values[times.deployed].tolist()
    assert set(taken) <= set(known)
    assert len(taken) == min(deployed, max(1, room // 2))
    assert torch.equal(times.held_out, times.weights == 0)
    assert not bool((times.held_out & times.deployed).any())
    learned = times.weights[~times.deployed & ~times.held_out]
    if len(learned):
        assert float(learned.sum()) == pytest.approx(OTHERS_WEIGHT * int(times.deployed.sum()))


def test_timesteps_that_are_fractions_stay_fractions() -> None:
    times = _Timesteps.of([1.0, 0.9, 0.5, 0.1], 40)
    assert 0 < float(times.values[~times.deployed].min()) < 1
    assert len(times.values.unique()) == len(times.values) > 30
