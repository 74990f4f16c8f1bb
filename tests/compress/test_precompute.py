import copy
import functools
import inspect
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.calibration_set import RecordedCall
from dcomp.calibrate.pipeline import prediction_of
from dcomp.calibrate.safetensors_file import read_safetensors_header
from dcomp.calibrate.structure import Role, probe_structure
from dcomp.compress.checkpoint import ManifestFields, write_checkpoint
from dcomp.compress.layer_files import LayerFiles
from dcomp.compress.loader import load
from dcomp.compress.manifest import CheckpointError
from dcomp.compress.precompute import (
    Precomputed,
    Precomputer,
    keep_plan,
    plan_of,
    plan_precompute,
    precompute,
)
from tests.support.quantized import quantized_pipeline, replace_layer
from tests.support.tiny import XL, denoiser_inputs, save_tiny_pipeline, tiny_denoiser

DIT, SD3, FLUX = "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
CONDITIONS = {
    XL: ("added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"),
    DIT: ("class_labels",),
    SD3: ("pooled_projections",),
    FLUX: ("guidance", "pooled_projections"),
}


@dataclass(frozen=True)
class Case:
    """A tiny denoiser, a call of it, and the plan that was made of that."""

    name: str
    original: nn.Module
    kwargs: dict[str, Any]
    plan: Precomputed

    def denoiser(self) -> nn.Module:
        return copy.deepcopy(self.original)


def bound(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """The arguments of a call by name, without the timestep."""
    args, kwargs = denoiser_inputs(name, batch, seed)
    names = inspect.signature(tiny_denoiser(name).forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs, "timestep": None}


def told(name: str, t: float, batch: int = 2) -> Tensor:
    return torch.full((batch,), t / 1000 if name == FLUX else t)


@functools.cache
def case_of(name: str) -> Case:
    denoiser, kwargs = tiny_denoiser(name).eval(), bound(name)
    kwargs["timestep"] = told(name, 900.0)
    structure = probe_structure(denoiser, (), kwargs)
    call = RecordedCall((), kwargs, torch.empty(2), 0, 0, 0, 900.0, ("cond",))
    times = [float(told(name, t)[0]) for t in TIMES]
    return Case(name, denoiser, kwargs, plan_precompute(denoiser, structure, call, times))


@pytest.fixture(params=[XL, DIT, SD3, FLUX])
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@torch.no_grad()
def predict(denoiser: nn.Module, case: Case, t: float, **changed: Any) -> Tensor:
    kwargs = {**case.kwargs, **changed}
    batch = len(next(iter(kwargs.values())))
    return prediction_of(denoiser(**{**kwargs, "timestep": told(case.name, t, batch)}))


def picture(denoiser: nn.Module, case: Case, times: tuple[float, ...] = TIMES, **changed: Any) -> list[Tensor]:
    return [predict(denoiser, case, t, **changed) for t in times]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(bool((a - b).abs().max() <= 1e-5 * b.abs().max()) for a, b in zip(one, other, strict=True))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def counted(made: Precomputer) -> Iterator[Counter[str]]:
    """Count how often each layer really computes."""
    runs: Counter[str] = Counter()
    compute = made._compute

    def run(name: str, x: Tensor) -> Tensor:
        runs[name] += 1
        return compute(name, x)

    vars(made)["_compute"] = run
    yield runs
    del vars(made)["_compute"]


def test_the_layers_are_those_of_timestep_and_conditions(case: Case) -> None:
    structure = probe_structure(case.original, (), case.kwargs)
    assert structure.named(Role.MODULATION)
    assert set(case.plan.layers) == structure.named(Role.TIME, Role.MODULATION)
    assert case.plan.conditions == CONDITIONS[case.name]
    assert case.plan.timesteps == tuple(float(told(case.name, t)[0]) for t in TIMES)


def test_predictions_stay_and_layers_run_twice_a_picture(case: Case) -> None:
    expected, denoiser = picture(case.original, case), case.denoiser()
    made = Precomputer(denoiser, case.plan)
    with counted(made) as runs:
        assert close(picture(denoiser, case), expected)
    assert (made.computed, made.served, made.failure) == (1, len(TIMES) - 1, None)
    calls = {name: facts.calls for name, facts in probe_structure(case.original, (), case.kwargs).layers.items()}
    assert runs == {name: 2 * calls[name] for name in case.plan.layers}
    assert close(picture(denoiser, case), expected)
    assert made.computed == 2


def test_rows_with_equal_conditions_are_computed_once_and_go_to_the_right_samples() -> None:
    case = case_of(DIT)
    labels = torch.tensor([5, 2, 5, 5, 2])
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = picture(case.original, case, hidden_states=latents, class_labels=labels)
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    assert close(picture(denoiser, case, hidden_states=latents, class_labels=labels), expected)
    (window,) = made._picture.windows.values()
    assert {len(outputs) for outputs in window.outputs.values()} == {4 * 2}


def test_guidance_contexts_one_after_the_other_are_told_apart() -> None:
    case = case_of(SD3)
    others = {**bound(SD3, seed=3)}
    del others["timestep"]

    def both(denoiser: nn.Module) -> list[Tensor]:
        return [predict(denoiser, case, t, **changed) for t in TIMES for changed in ({}, others)]

    expected, denoiser = both(case.original), case.denoiser()
    made = Precomputer(denoiser, case.plan)
    assert close(both(denoiser), expected)
    assert (made.computed, made.served) == (2, 2 * (len(TIMES) - 1))


def test_conditions_that_change_at_every_step_are_never_computed_ahead() -> None:
    case, labels = case_of(DIT), [torch.tensor([n, n + 20]) for n in range(5)]
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    for t, label in zip(TIMES, labels, strict=True):
        expected = predict(case.original, case, t, class_labels=label)
        assert torch.equal(predict(denoiser, case, t, class_labels=label), expected)
    assert (made.computed, made.served) == (0, 0)


def test_a_condition_that_changes_in_the_middle_is_a_new_one() -> None:
    case, label = case_of(DIT), torch.tensor([7, 8])
    denoiser = case.denoiser()
    Precomputer(denoiser, case.plan)
    for t in TIMES[:2]:
        predict(denoiser, case, t)
    for t in TIMES[2:]:
        expected = predict(case.original, case, t, class_labels=label)
        assert close([predict(denoiser, case, t, class_labels=label)], [expected])


def test_timesteps_that_were_not_foreseen_are_computed_as_ever_and_foreseen_the_next_time() -> None:
    case, other = case_of(DIT), (950.0, 650.0, 350.0, 50.0)
    expected, denoiser = picture(case.original, case, other), case.denoiser()
    made = Precomputer(denoiser, case.plan)
    assert same(picture(denoiser, case, other), expected)
    assert (made.computed, made.served) == (0, 0)
    assert close(picture(denoiser, case, other), expected)
    assert (made.computed, made.served) == (1, 3)


def test_a_picture_that_starts_late_is_served_as_well() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    assert close(picture(denoiser, case, TIMES[2:]), picture(case.original, case, TIMES[2:]))
    assert (made.computed, made.served) == (1, 2)


def test_calls_that_are_no_picture_are_computed_as_ever() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    assert same(picture(denoiser, case, TIMES[::-1]), picture(case.original, case, TIMES[::-1]))  # time runs forward
    for _ in range(3):
        assert torch.equal(predict(denoiser, case, 950.0), predict(case.original, case, 950.0))
    mixed = {**case.kwargs, "timestep": torch.tensor([500.0, 300.0])}
    with torch.no_grad():
        assert torch.equal(prediction_of(denoiser(**mixed)), prediction_of(case.original(**mixed)))
    assert (made.computed, made.served) == (0, 0)


def test_gradients_are_computed_as_ever() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser().requires_grad_(True)
    made = Precomputer(denoiser, case.plan)
    for t in TIMES:
        prediction_of(denoiser(**{**case.kwargs, "timestep": told(DIT, t)})).sum().backward()
    assert (made.computed, made.served) == (0, 0)
    assert all(denoiser.get_parameter(f"{name}.weight").grad is not None for name in case.plan.layers)


def test_arguments_that_calibration_did_not_see_are_left_alone() -> None:
    case = case_of(FLUX)
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    others = {"joint_attention_kwargs": {"unknown": torch.zeros(2, 8)}}
    assert same(picture(denoiser, case, **others), picture(case.original, case, **others))
    assert (made.computed, made.served) == (0, 0)
    assert close(picture(denoiser, case), picture(case.original, case))
    assert made.served == len(TIMES) - 1


def test_layers_of_the_timestep_alone_are_left_to_tables() -> None:
    denoiser, kwargs = tiny_denoiser("UNet2DModel").eval(), bound("UNet2DModel") | {"timestep": torch.tensor([900.0])}
    structure = probe_structure(denoiser, (), kwargs)
    assert structure.named(Role.TIME)
    call = RecordedCall((), kwargs, torch.empty(2), 0, 0, 0, 900.0, ("cond",))
    assert plan_precompute(denoiser, structure, call, TIMES).layers == ()


@pytest.mark.parametrize(("held", "computed", "served"), [(1, 0, 0), (2, 2, 4), (3, 1, 3), (100, 1, 4)])
def test_no_more_features_are_held_than_the_limit_allows(held: int, computed: int, served: int) -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    width = sum(denoiser.get_submodule(name).out_features for name in case.plan.layers)
    made.limit = held * 2 * width * 4  # two conditions in fp32
    assert close(picture(denoiser, case), picture(case.original, case))
    assert (made.computed, made.served) == (computed, served)  # one timestep that is left over is not worth a run


class Peeking(nn.Module):
    """Looks at the values of what it is given, as a few models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if float(x.sum()) > -1e9 else x


def test_a_model_that_looks_at_its_latents_is_computed_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    denoiser.pos_embed = nn.Sequential(Peeking(), denoiser.pos_embed)  # type: ignore[assignment]
    vars(denoiser.pos_embed)["height"] = vars(denoiser.pos_embed)["width"] = 4
    expected = picture(denoiser, case)
    structure = probe_structure(denoiser, (), case.kwargs)
    call = RecordedCall((), case.kwargs, torch.empty(2), 0, 0, 0, 900.0, ("cond",))
    assert plan_precompute(denoiser, structure, call, TIMES).layers == ()
    made = Precomputer(denoiser, case.plan)
    assert same(picture(denoiser, case), expected)
    assert (made.computed, made.served) == (0, 0)
    assert made.failure is not None
    assert made.failure in caplog.text


def test_a_layer_that_reads_the_latents_after_all_is_left_out() -> None:
    case = case_of(DIT)
    structure = probe_structure(case.original, (), case.kwargs)
    wrong = copy.deepcopy(structure)
    name = "transformer_blocks.0.attn1.to_q"
    facts = copy.copy(structure.layers[name])
    object.__setattr__(facts, "role", Role.MODULATION)
    wrong.layers[name] = facts
    call = RecordedCall((), case.kwargs, torch.empty(2), 0, 0, 0, 900.0, ("cond",))
    assert plan_precompute(case.original, wrong, call, TIMES).layers == ()


def test_a_copy_serves_itself_and_detaching_leaves_no_trace() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    plain = [set(vars(module)) for module in denoiser.modules()]
    made = Precomputer(denoiser, case.plan)
    twin = copy.deepcopy(denoiser)
    for layer in case.plan.layers:
        nn.init.zeros_(denoiser.get_parameter(f"{layer}.weight"))
    assert close(picture(twin, case), picture(case.original, case))
    assert made.served == 0
    made.detach()
    made.detach()
    assert [set(vars(module)) for module in denoiser.modules()] == plain
    assert not denoiser._forward_hooks
    assert len(denoiser._forward_pre_hooks) == len(case.original._forward_pre_hooks)


def test_compiled_blocks_are_computed_as_ever() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    made = Precomputer(denoiser, case.plan)
    denoiser.transformer_blocks[0].compile(backend="eager")
    assert close(picture(denoiser, case), picture(case.original, case))
    assert (made.computed, made.served) == (0, 0)


@pytest.mark.parametrize("target", ["norm1.linear", "timestep_embedder.linear_2"])
def test_adapters_of_the_layers_and_of_those_before_them_are_heard(target: str) -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, denoiser)
    adapted, linear = copy.deepcopy(denoiser), nn.Linear
    layers = [n if type(denoiser.get_submodule(n)) is linear else f"{n}.base_layer" for n in case.plan.layers]
    plan = replace(case.plan, layers=tuple(layers))
    made = Precomputer(denoiser, plan)
    expected = picture(adapted, case)
    assert not close(expected, picture(case.original, case))
    assert close(picture(denoiser, case), expected)
    assert made.served == len(TIMES) - 1


def test_integer_layers_are_served_too_and_others_are_not_run_ahead() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    layers = [name for name in case.plan.layers if "norm1.linear" in name]
    for name in (*layers, "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"):
        replace_layer(denoiser, name, 8)
    plain = copy.deepcopy(denoiser)
    made = Precomputer(denoiser, case.plan)
    found, expected = picture(denoiser, case), picture(plain, case)
    # Another sum may move an 8-bit code of an input.
    assert all(bool((a - b).norm() <= 0.02 * b.norm()) for a, b in zip(found, expected, strict=True))
    assert made.served == len(TIMES) - 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    pipeline = quantized_pipeline(save_tiny_pipeline(DIT, folder / "source"))
    keep_plan(pipeline.denoiser, case_of(DIT).plan)
    write_checkpoint(pipeline, folder / "out", ManifestFields(recipe={}))
    return folder / "out"


def test_the_plan_is_part_of_the_checkpoint(written: Path, tmp_path: Path) -> None:
    denoiser = load(written).transformer
    assert plan_of(denoiser) == case_of(DIT).plan
    denoiser.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert Precomputed.from_dict(config["precomputed"]) == case_of(DIT).plan


def test_offloaded_layers_give_the_same_bits_and_take_no_memory(written: Path) -> None:
    case, plan = case_of(DIT), case_of(DIT).plan
    plain, kept, empty = (load(written, ahead=ahead).transformer for ahead in ("off", "on", "offload"))
    before = sum(t.nbytes for t in (*kept.parameters(), *kept.buffers()))
    own = sum(
        t.nbytes for n in plan.layers for t in (*kept.get_submodule(n).parameters(), *kept.get_submodule(n).buffers())
    )
    assert sum(t.nbytes for t in (*empty.parameters(), *empty.buffers())) == before - own < before
    pictures = [picture(denoiser, case) for denoiser in (plain, kept, empty)]
    assert same(pictures[1], pictures[2])
    assert torch.equal(pictures[0][0], pictures[2][0])
    assert nbytes(empty) == before - own
    with pytest.raises(UsageError, match="stay in the files"):
        empty.state_dict()


def test_what_the_recipe_says_is_done_unless_told_otherwise(written: Path, tmp_path: Path) -> None:
    pipeline = quantized_pipeline(save_tiny_pipeline(DIT, tmp_path / "source"))
    keep_plan(pipeline.denoiser, replace(case_of(DIT).plan, ahead="offload"))
    write_checkpoint(pipeline, tmp_path / "out", ManifestFields(recipe={}))
    told, untold, plain = load(tmp_path / "out", ahead="off"), load(tmp_path / "out"), load(written)
    assert nbytes(untold.transformer) < nbytes(told.transformer) == nbytes(plain.transformer)
    older = {key: value for key, value in case_of(DIT).plan.to_dict().items() if key != "ahead"}
    assert Precomputed.from_dict(older).ahead == "off"


def test_offloaded_layers_come_back(written: Path) -> None:
    denoiser, header = (
        load(written).transformer,
        read_safetensors_header(next((written / "transformer").glob("*.saf*"))),
    )
    stored = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    made = precompute(denoiser, [header])
    picture(denoiser, case_of(DIT))
    made.detach()
    found = denoiser.state_dict()
    assert found.keys() == stored.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in stored.items()
    )


def test_files_that_change_under_an_offloaded_denoiser_are_refused(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "copy"))
    denoiser = load(folder, ahead="offload").transformer
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    name = f"{case_of(DIT).plan.layers[0]}.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match="can be read no longer"):
        predict(denoiser, case_of(DIT), 900.0)
    file.unlink()
    with pytest.raises(CheckpointError, match="can be read no longer"):
        predict(denoiser, case_of(DIT), 900.0)


def test_offloading_needs_the_files_of_the_layers(written: Path) -> None:
    with pytest.raises(CheckpointError, match="in no weight file"):
        LayerFiles(load(written).transformer, case_of(DIT).plan.layers, [])


def test_wrong_use_is_explained(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in the way 'always'"):
        load(written, ahead="always")  # type: ignore[arg-type]
    pipeline = quantized_pipeline(save_tiny_pipeline("UNet2DModel", tmp_path / "source"))
    write_checkpoint(pipeline, tmp_path / "out", ManifestFields(recipe={}))
    with pytest.raises(UsageError, match="can be computed ahead"):
        load(tmp_path / "out", ahead="on")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": ["transformer_blocks.9.norm1.linear"]},
        {"layers": ["pos_embed.proj"]},
        {"layers": [1]},
        {"layers": "norm1"},
        {"conditions": ["c"] * 101},
        {"timesteps": [1.0, 2.0]},
        {"timesteps": [float("nan")]},
        {"timesteps": [True, "1"]},
        {"ahead": "always"},
        {"unknown": 1},
    ],
)
def test_an_impossible_plan_is_refused(change: dict[str, Any]) -> None:
    data = {**case_of(DIT).plan.to_dict(), **change}
    with pytest.raises(CheckpointError):
        keep_plan(tiny_denoiser(DIT), Precomputed.from_dict(data))
    assert Precomputed.from_dict(json.loads(json.dumps(case_of(DIT).plan.to_dict()))) == case_of(DIT).plan


def test_a_layer_that_answers_differently_within_one_call_is_left_out() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    one, other = denoiser.transformer_blocks
    other.norm1.linear = one.norm1.linear  # now one layer reads what two embedders give
    other.norm1.emb.class_embedder.embedding_table.weight.data.mul_(2)
    structure = probe_structure(denoiser, (), case.kwargs)
    call = RecordedCall((), case.kwargs, torch.empty(2), 0, 0, 0, 900.0, ("cond",))
    plan = plan_precompute(denoiser, structure, call, TIMES)
    assert set(case.plan.layers) - set(plan.layers) == {f"transformer_blocks.{i}.norm1.linear" for i in (0, 1)}
    expected, made = picture(denoiser, case), Precomputer(denoiser, plan)
    assert close(picture(denoiser, case), expected)
    assert made.served == len(TIMES) - 1


def test_a_step_that_a_cache_plan_skips_leaves_the_others_right() -> None:
    case = case_of(DIT)
    denoiser = case.denoiser()
    Precomputer(denoiser, case.plan)
    expected = []
    for model in (case.denoiser(), denoiser):
        block = model.transformer_blocks[0]
        forward, kept = block.forward, {}

        def skipped(*args: Any, model: Any = None, forward: Any = forward, kept: Any = kept, **kwargs: Any) -> Tensor:
            kept.setdefault("first", None)
            if kept["first"] is None:
                kept["first"] = forward(*args, **kwargs)
            return kept["first"]

        block.forward = skipped  # block 0 runs at the first step alone; its embedder is read again at the end
        expected.append(picture(model, case))
    assert close(expected[1], expected[0])
