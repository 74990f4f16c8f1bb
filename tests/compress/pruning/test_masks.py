"""Learned masks: their gradients through whole trajectories, and what they find."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.pipeline import Generation, open_pipeline
from dcomp.compress.pruning.cut import cut_copy
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.importance import Subject, learned
from dcomp.compress.pruning.masks import calls_again, gate, learn_masks, masked
from dcomp.compress.pruning.units import find_units, parameters_of_member
from tests.compress.pruning.test_cut import some
from tests.support.sweep import sweep
from tests.support.tiny import NAMES, denoiser_inputs, save_tiny_pipeline, tiny_denoiser

Make = Callable[..., Subject]


@pytest.mark.parametrize("name", sweep(NAMES, ["UNet2DConditionModel", "FluxTransformer2DModel"]))
def test_gradients_of_a_trajectory_are_those_of_all_of_it_at_once(name: str, tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline(name, tmp_path / "source"), torch_dtype=torch.float64)
    units = find_units(pipeline.denoiser)
    pipeline.denoiser.requires_grad_(False)
    sizes = {"height": 16, "width": 16} if pipeline.kind == "text" else {}
    settings, prompts = Generation(steps=3, **sizes), ["1" if pipeline.kind == "class" else "a cat"]
    logits = {
        group: torch.linspace(-1, 2, units.groups[group].members, dtype=torch.float64, requires_grad=True)
        for group in [*units.groups][:4]
    }

    def gradients(again: bool) -> list[Tensor]:
        noise = torch.Generator().manual_seed(3)
        gates = {
            group: gate(logit, torch.rand(len(logit), generator=noise, dtype=torch.float64))
            for group, logit in logits.items()
        }
        with masked(pipeline.denoiser, units.groups, gates), calls_again(pipeline.denoiser) if again else nullcontext():
            latents = pipeline.run(prompts, [0], settings, gradients=True).latents
            weights = torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).view(latents.shape)
            return [*torch.autograd.grad((latents * weights).sum(), [*logits.values()])]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert float(other.abs().max()) > 0


def test_what_is_kept_for_the_way_back_does_not_grow_with_what_a_call_does(tmp_path: Path) -> None:
    pipeline = open_pipeline(save_tiny_pipeline("UNet2DModel", tmp_path / "source"))
    pipeline.denoiser.requires_grad_(False)
    units = find_units(pipeline.denoiser)
    name = next(iter(units.groups))

    def saved(steps: int, again: bool) -> int:
        gates = {name: torch.ones(units.groups[name].members, requires_grad=True)}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            masked(pipeline.denoiser, units.groups, gates),
            calls_again(pipeline.denoiser) if again else nullcontext(),
        ):
            pipeline.run([""], [0], Generation(steps=steps), gradients=True)
        return sum(sizes.values())

    assert saved(8, again=True) < 0.2 * saved(8, again=False)


@pytest.mark.parametrize("name", sweep(NAMES, ["SD3Transformer2DModel"]))
def test_closed_and_open_gates_are_cuts(name: str) -> None:
    denoiser, (args, kwargs) = tiny_denoiser(name), denoiser_inputs(name)
    units = find_units(denoiser)
    kept = some(units, 3)
    logits = {group: torch.full((units.groups[group].members,), -20.0) for group in kept}
    for group, members in kept.items():
        logits[group][[*members]] = 20.0
    gates = {group: gate(logit, torch.rand(len(logit))) for group, logit in logits.items()}
    assert all({*values.tolist()} <= {0.0, 1.0} for values in gates.values())
    with torch.no_grad(), masked(denoiser, units.groups, gates):
        expected = denoiser(*args, **kwargs)[0]
    with torch.no_grad():
        found = cut_copy(denoiser, CutList(kept=kept))(*args, **kwargs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_nobody_needs_is_closed_first(make_subject: Make) -> None:
    def silence(denoiser: Any) -> None:
        denoiser.get_submodule("transformer_blocks.1.ff.net.2").weight.data[:, :128] = 0

    subject = make_subject("DiTTransformer2DModel", silence)
    group = "transformer_blocks.1.ff:channels"
    groups = {group: subject.units.groups[group]}
    weights = {group: parameters_of_member(subject.denoiser, groups[group])}
    assert subject.latents is not None
    subject.denoiser.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in subject.denoiser.state_dict().items()}
    found = learn_masks(subject.denoiser, groups, weights, subject.latents, 2, iterations=12)[group]
    again = learn_masks(subject.denoiser, groups, weights, subject.latents, 2, iterations=12)[group]
    assert torch.equal(found, again)
    assert float(found[:128].mean()) < float(found[128:].mean())
    assert float(found.min()) > 0
    assert float(found.max()) < 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.denoiser.state_dict().items())
    assert not subject.denoiser._forward_hooks
    assert all(not module._forward_pre_hooks for module in subject.denoiser.modules())
    assert isinstance(subject.denoiser, nn.Module)


def test_members_that_stay_as_open_count_as_what_they_cost(make_subject: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_subject("DiTTransformer2DModel")
    openness = {name: torch.linspace(0.2, 0.9, group.members) for name, group in subject.units.groups.items()}
    monkeypatch.setattr("dcomp.compress.pruning.importance.learn_masks", lambda *_, **__: openness)
    for name, scores in learned(subject).items():
        group = subject.units.groups[name]
        torch.testing.assert_close(scores / parameters_of_member(subject.denoiser, group), openness[name])
