"""Recovery of pruned denoisers: what is learned, what is kept, and what it takes to go on after a kill."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.cachequant.tensors import leaves
from dcomp.compress.pruning import recovery
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.features import FeatureLoss
from dcomp.compress.pruning.importance import Subject
from dcomp.compress.pruning.options import altered
from dcomp.compress.pruning.recovery import RecoveryError, guided_rows, recover, typical_error
from tests.support.sweep import sweep
from tests.support.tiny import NAMES

DIT = "DiTTransformer2DModel"
CUTS = CutList(frozenset({"transformer_blocks.1.attn1"}), {"transformer_blocks.1.ff:channels": tuple(range(64))})
Make = Callable[..., Subject]


def digest(denoiser: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


def same(denoiser: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def loss_of(subject: Subject, student: nn.Module, **options: Any) -> FeatureLoss:
    return FeatureLoss(subject.denoiser, student, subject.units, subject.rows)


@pytest.mark.parametrize("learned", ["full", "lora", "norms"])
def test_held_out_trajectories_get_nearer(learned: Any, make_subject: Make) -> None:
    subject = make_subject(DIT, rows=96)
    teacher, student = digest(subject.denoiser), altered(subject, CUTS)
    before, names = digest(student), [name for name, _ in student.named_parameters()]
    rate = {"full": 3e-4, "lora": 1e-3, "norms": 3e-3}[learned]
    result = recover(student, subject.rows, learned=learned, iterations=120, lr=rate)
    assert result.after < 0.5 * result.before
    assert result.best > 0
    assert same(subject.denoiser, teacher)
    assert [name for name, _ in student.named_parameters()] == names
    assert not any(p.requires_grad for p in student.parameters())
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    if learned == "norms":
        assert all(before[name].dim() == 1 for name in changed)
    if learned == "lora":
        linear = {f"{name}.weight" for name, module in student.named_modules() if isinstance(module, nn.Linear)}
        assert changed <= linear
        for name in changed:
            assert int(torch.linalg.matrix_rank(student.get_parameter(name) - before[name], rtol=0.02)) <= recovery.RANK


def test_wrong_targets_help_nobody(make_subject: Make) -> None:
    subject = make_subject(DIT, rows=96)
    outputs = subject.rows.outputs[torch.randperm(len(subject.rows), generator=torch.Generator().manual_seed(1))]
    right, wrong = (
        recover(altered(subject, CUTS), rows, iterations=60, lr=3e-4)
        for rows in (subject.rows, replace(subject.rows, outputs=outputs))
    )
    assert right.after < 0.5 * right.before
    assert wrong.after > 0.5 * wrong.before


def test_one_trajectory_that_is_lost_does_not_decide() -> None:
    whose = torch.tensor([7, 7, 3, 9, 9, 3])
    errors = torch.tensor([0.5, 1.5, 2.0, 0.125, 0.125, 6.0], dtype=torch.float64)  # means 1, 4 and 1/8
    assert typical_error(errors, whose) == pytest.approx((1 * 4 / 8) ** (1 / 3))
    better = errors * torch.where(whose == 3, 2.0, 0.5)  # the worst is twice as bad, both others half
    assert better.mean() > errors.mean()
    assert typical_error(better, whose) == pytest.approx(typical_error(errors, whose) * 0.5 ** (1 / 3))


@pytest.mark.parametrize("name", sweep(NAMES, ["UNet2DConditionModel", "SD3Transformer2DModel"]))
def test_features_of_stages_are_compared(name: str, make_subject: Make) -> None:
    subject = make_subject(name)
    same_model = altered(subject, CutList())
    with loss_of(subject, same_model).listening() as found, torch.no_grad():
        batch = subject.rows.take([0, 1])
        same_model(*batch.args, **batch.kwargs)
    features = loss_of(subject, same_model)
    assert len(features.taps) == {"UNet2DModel": 5, "UNet2DConditionModel": 5, "FluxTransformer2DModel": 3}.get(
        name, 5 if name.startswith("UNet") else 2
    )
    assert float(features.loss(found, torch.tensor([0, 1]))) < 1e-4  # bfloat16
    cut = [part.name for part in subject.units.parts.values() if part.kind in ("feed_forward", "resnet")]
    student = altered(subject, CutList(frozenset(cut)))
    features = loss_of(subject, student)
    with features.listening() as found, torch.no_grad():
        student(*batch.args, **batch.kwargs)
    first = float(features.loss(found, torch.tensor([0, 1])))
    assert first > 1e-4
    assert float(features.loss(found, torch.tensor([0, 1]))) == first  # from the cache
    # A hundred times larger on both sides is the same.
    scaled = [100 * tensor for tensor in found]
    features._cache = {n: [100 * tensor for tensor in tensors] for n, tensors in features._cache.items()}
    assert float(features.loss(scaled, torch.tensor([0, 1]))) == pytest.approx(first, rel=0.02)


def test_blocks_that_are_gone_have_no_taps(make_subject: Make) -> None:
    subject = make_subject("PixArtTransformer2DModel")
    student = altered(subject, CutList(frozenset({"transformer_blocks.0"})))
    assert loss_of(subject, student).taps == (("transformer_blocks.1", "transformer_blocks.0"),)


def test_recovery_with_features(make_subject: Make) -> None:
    subject = make_subject(DIT, rows=96)
    student = altered(subject, CUTS)
    features = loss_of(subject, student)

    def distance() -> float:
        batch = subject.rows.take([0, 1])
        with features.listening() as found, torch.no_grad():
            student(*batch.args, **batch.kwargs)
        return float(features.loss(found, torch.tensor([0, 1])))

    first = distance()
    result = recover(student, subject.rows, features=features, iterations=100, lr=3e-4)
    assert result.after < 0.5 * result.before
    assert distance() < 0.8 * first


@pytest.mark.parametrize(("features", "rate"), [(False, 3e-4), (True, 3e-4), (False, None)])
def test_a_killed_run_ends_with_the_same_bits(
    features: bool, rate: float | None, make_subject: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recovery.RATES, "full", 0.03)  # without a rate of its own it begins again, before step 17
    subject = make_subject(DIT, rows=96)

    def run(file: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> nn.Module:
        student = altered(subject, CUTS)
        found = loss_of(subject, student) if features else None
        options: dict[str, Any] = {"iterations": 60, "lr": rate, "snapshot": file, "progress": progress}
        recover(student, subject.rows, features=found, **options)
        return student

    def stop(_: str, done: int, total: int) -> None:
        if done == 17:
            raise KeyboardInterrupt

    expected = digest(run(tmp_path / "one"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcomp.compress.learning_run.SNAPSHOT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "two", stop)
        seen: list[int] = []
        again = run(tmp_path / "two", lambda _, done, total: seen.append(done))
    assert seen[0] in (16, 17)
    assert same(again, expected)


def test_a_run_that_diverges_stops_and_leaves_the_best(make_subject: Make) -> None:
    subject = make_subject(DIT)
    student = altered(subject, CUTS)
    before = digest(student)
    result = recover(student, subject.rows, iterations=200, lr=3.0)
    assert result.ending == "diverged"
    assert result.iterations < 200
    assert result.best == 0
    assert result.after == result.before
    assert same(student, before)


def test_steps_that_are_too_large_are_made_smaller(make_subject: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recovery.RATES, "full", 0.03)
    subject = make_subject(DIT, rows=96)
    result = recover(altered(subject, CUTS), subject.rows, iterations=60)
    assert result.ending != "diverged"
    assert result.after < 0.8 * result.before
    student = altered(subject, CUTS)
    at_that_rate = recover(student, subject.rows, iterations=60, lr=0.03)
    assert at_that_rate.after > result.after


def test_a_run_that_gets_no_better_ends(make_subject: Make) -> None:
    subject = make_subject(DIT)
    student = altered(subject, CutList())  # nothing was lost
    result = recover(student, subject.rows, iterations=200, lr=1e-4)
    assert result.ending in ("no better", "diverged")
    assert result.iterations < 200


def test_what_cannot_be_learned_is_refused(make_subject: Make) -> None:
    subject = make_subject("UNet2DModel")
    student = altered(subject, CutList())
    with pytest.raises(RecoveryError, match="float32"):
        recover(student.double(), subject.rows, iterations=1)
    with pytest.raises(RecoveryError, match="nothing that could be learned"):
        recover(nn.Sequential(nn.Linear(3, 3)), subject.rows, learned="lora", iterations=1)


def test_rows_that_learn_guidance_have_the_condition_and_the_guided_prediction(make_subject: Make) -> None:
    rows = make_subject("UNet2DConditionModel", rows=12).rows
    assert rows.pairs is not None
    learned = guided_rows(rows, 3.0)
    assert learned.pairs is None
    assert len(learned) == len(rows.pairs)
    for place, (without, with_condition) in enumerate(rows.pairs.tolist()):
        own = rows.take([with_condition])
        one = learned.take([place])
        wanted = rows.outputs[without] + 3.0 * (rows.outputs[with_condition] - rows.outputs[without])
        torch.testing.assert_close(one.outputs[0], wanted)
        assert torch.equal(one.timesteps, own.timesteps)
        assert torch.equal(one.trajectories, own.trajectories)
        pairs = zip(leaves((one.args, one.kwargs)), leaves((own.args, own.kwargs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("guidance", [None, 0.5, 1.0])
def test_without_two_contexts_there_is_no_guidance_to_learn(guidance: float | None, make_subject: Make) -> None:
    rows = make_subject("UNet2DConditionModel", rows=4).rows
    with pytest.raises(RecoveryError, match="no guidance to learn"):
        guided_rows(rows, guidance)
    with pytest.raises(RecoveryError, match="no guidance to learn"):
        guided_rows(replace(rows, pairs=None), 3.0)
