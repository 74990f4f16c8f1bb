"""Scores, errors and choices of cuts, on denoisers in which something is planted that nobody needs."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp import UsageError
from dcomp.calibrate.pipeline import prediction_of
from dcomp.compress.pruning.choose import ChoiceError, Constraints
from dcomp.compress.pruning.costs import Saving
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.importance import Subject, going_order, widths
from dcomp.compress.pruning.masks import learn_masks
from dcomp.compress.pruning.options import altered, errors_of, list_options
from dcomp.compress.pruning.prune import METHODS, additivity, proposals, score
from tests.compress.pruning.conftest import costs_of
from tests.support.sweep import sweep
from tests.support.tiny import NAMES

DIT = "DiTTransformer2DModel"
BLOCK = "transformer_blocks.1"
Make = Callable[..., Subject]


def digest(denoiser: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


def silence(denoiser: Any) -> None:
    """Let a block add nothing to its stream."""
    block = denoiser.get_submodule(BLOCK)
    for layer in (block.attn1.to_out[0], block.ff.net[2]):
        layer.weight.data.zero_()
        layer.bias.data.zero_()


def repeat(denoiser: Any) -> None:
    """Make head 2 a copy of head 0, with larger weights behind it, and head 1 small."""
    block = denoiser.get_submodule(BLOCK)
    head = 16
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        layer.weight.data[2 * head : 3 * head] = layer.weight.data[:head]
        layer.bias.data[2 * head : 3 * head] = layer.bias.data[:head]
    block.attn1.to_out[0].weight.data[:, 2 * head : 3 * head] *= 3
    block.attn1.to_v.weight.data[head : 2 * head] *= 0.9


@pytest.mark.parametrize("name", sweep(NAMES, ["UNet2DModel"]))
def test_every_method_saves_what_was_asked_for_and_touches_nothing(
    name: str, make_subject: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(learn_masks.__kwdefaults__, "iterations", 8)  # of a choice that nobody looks at
    subject = make_subject(name)
    before, training = digest(subject.denoiser), [m.training for m in subject.denoiser.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    costs = costs_of(subject)
    needed = Saving(costs.whole.parameters // 5, 0)
    for method in METHODS:
        best, *_ = proposals(subject, score(subject, costs, method).problem, needed, method)
        left = sum(p.numel() for p in best.denoiser.parameters())
        assert costs.whole.parameters - left >= needed.parameters
        assert costs.of(best.chosen.cuts, subject.units).parameters >= needed.parameters
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in subject.denoiser.state_dict().items())
    assert [m.training for m in subject.denoiser.modules()] == training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.denoiser.modules())
    assert not any(p.requires_grad for p in subject.denoiser.parameters())


def test_a_silent_block_goes_first(make_subject: Make) -> None:
    subject = make_subject(DIT, silence)
    costs = costs_of(subject)
    scored = score(subject, costs, "reconstruction")
    errors = {(o.site, o.label): o.error for found in scored.problem.options.values() for o in found}
    assert errors[BLOCK, "gone"] < 1e-7
    assert errors[f"{BLOCK}.ff", "gone"] < 1e-7 < errors["transformer_blocks.0.ff", "gone"]
    best, *_ = proposals(subject, scored.problem, Saving(costs.parts[BLOCK].parameters, 0), "reconstruction")
    assert best.chosen.cuts == CutList(frozenset({BLOCK}))
    assert float(errors_of(subject, best.denoiser).max()) < 1e-9
    with pytest.raises(ChoiceError, match="at most"):
        [*proposals(subject, scored.problem, costs.whole, "reconstruction")]


def test_copies_go_first_and_are_made_up_for(make_subject: Make) -> None:
    subject = make_subject(DIT, repeat)
    order = going_order(METHODS["reconstruction"].scorer(subject)[f"{BLOCK}.attn1:heads"])
    assert order[0] in (0, 2)
    assert going_order(METHODS["magnitude"].scorer(subject)[f"{BLOCK}.attn1:heads"])[0] == 1  # which nothing else does
    kept = tuple(i for i in range(4) if i != order[0])
    cuts = CutList(kept={f"{BLOCK}.attn1:heads": kept})
    plain = float(errors_of(subject, altered(subject, cuts, made_up=False)).sum())
    assert float(errors_of(subject, altered(subject, cuts)).sum()) < 0.1 * plain


@pytest.mark.parametrize("name", sweep(NAMES, [DIT, "FluxTransformer2DModel"]))
def test_what_stays_makes_up_for_what_goes(name: str, make_subject: Make) -> None:
    subject = make_subject(name)
    draw = random.Random(0)
    kept = {
        group.name: tuple(sorted(draw.sample(range(group.members), -(-group.members // 2))))
        for group in subject.units.groups.values()
    }
    parts = [part.name for part in subject.units.parts.values() if part.kind == "feed_forward"]
    for cuts in (CutList(kept=kept), *([CutList(frozenset(parts[:1]))] if parts else [])):
        plain = float(errors_of(subject, altered(subject, cuts, made_up=False)).sum())
        assert float(errors_of(subject, altered(subject, cuts)).sum()) < plain


def test_a_changed_layer_is_found_behind_blocks_that_are_gone(make_subject: Make) -> None:
    subject = make_subject("PixArtTransformer2DModel")
    cuts = CutList(frozenset({"transformer_blocks.0"}), {"transformer_blocks.1.ff:channels": tuple(range(0, 288, 2))})
    small, plain = (altered(subject, cuts, made_up=made_up) for made_up in (True, False))
    changed = [name for name, p in small.named_parameters() if not torch.equal(p, plain.get_parameter(name))]
    assert changed == ["transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.ff.net.2.bias"]


def test_errors_are_those_of_the_guided_prediction(make_subject: Make) -> None:
    subject = make_subject("UNet2DConditionModel")
    assert subject.guidance is not None
    assert float(errors_of(subject, subject.denoiser).max()) < 1e-9
    small = altered(subject, CutList(frozenset({"mid_block.attentions.0"})))
    rows = subject.rows
    with torch.no_grad():
        made = prediction_of(small(*rows.args, **rows.kwargs))
    guided = [x[0::2] + subject.guidance * (x[1::2] - x[0::2]) for x in (made, rows.outputs)]
    error = guided[0] - guided[1]
    steps = len(rows.timesteps.unique())
    along = (error * guided[1]).flatten(1).sum(1).square() / guided[1].flatten(1).square().sum(1)
    expected = (error.flatten(1).square().sum(1) + (steps - 1) * along).mean() / error[0].numel()
    by_step = errors_of(subject, small)
    counts = torch.tensor([float((rows.timesteps[0::2] == t).sum()) for t in rows.timesteps.unique().flip(0)])
    assert float((by_step * counts).sum() / counts.sum()) == pytest.approx(float(expected), rel=1e-4)


def test_pins_and_multiples_are_kept_to(make_subject: Make) -> None:
    subject = make_subject(DIT)
    costs = costs_of(subject)
    pinned = frozenset({BLOCK, f"{BLOCK}.ff"})
    options = list_options(subject, costs, METHODS["magnitude"].scorer(subject), round_to=32)
    assert [o.label for o in options[f"{BLOCK}.ff"]] == ["192 of 256", "128 of 256", "64 of 256", "gone"]
    assert [o.label for o in options[f"{BLOCK}.attn1"]] == ["2 of 4", "gone"]  # 32 channels are two heads
    problem = score(subject, costs, "magnitude", constraints=Constraints(pinned)).problem
    best, *_ = proposals(subject, problem, Saving(costs.whole.parameters // 10, 0), "magnitude")
    assert not pinned & {o.site for o in best.chosen.options}
    inner = Constraints(frozenset({f"{BLOCK}.ff"}))
    able = {o.site for o in score(subject, costs, "magnitude", constraints=inner).problem.able()}
    assert BLOCK not in able  # with the block its feed-forward would go
    assert f"{BLOCK}.attn1" in able


@pytest.mark.parametrize(
    ("members", "parts", "multiple", "found"),
    [(8, (0.75, 0.5, 0.25), 1, [6, 4, 2]), (3, (0.9, 0.5), 1, [2]), (8, (0.75, 0.1), 4, [4]), (1, (0.5,), 1, [])],
)
def test_widths(members: int, parts: tuple[float, ...], multiple: int, found: list[int]) -> None:
    assert widths(members, parts, multiple) == found


def test_sums_of_errors_are_compared_with_errors_of_sums(make_subject: Make) -> None:
    subject = make_subject(DIT)
    found = additivity(subject, score(subject, costs_of(subject), "reconstruction"), count=6)
    assert found.count == 6
    assert found.correlation is not None
    assert 0.1 < found.ratio < 10


def test_an_unknown_method_and_a_denoiser_without_units_are_refused(make_subject: Make) -> None:
    subject = make_subject(DIT)
    with pytest.raises(UsageError, match="no pruning method 'best'"):
        score(subject, costs_of(subject), "best")
    plain = Subject(nn.Sequential(nn.Linear(3, 3)), type(subject.units)({}, {}), subject.rows)
    with pytest.raises(UsageError, match="Nothing in this denoiser"):
        score(plain, costs_of(subject), "magnitude")
