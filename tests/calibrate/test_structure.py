from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.structure import LayerFacts, Role, Structure, StructureError, is_layer, probe_structure
from tests.support.tiny import NAMES, XL, denoiser_inputs, tiny_denoiser

UNET_RESNETS = (
    "down_blocks.0.resnets.0",
    "down_blocks.1.resnets.0",
    "mid_block.resnets.0",
    "mid_block.resnets.1",
    "up_blocks.0.resnets.0",
    "up_blocks.0.resnets.1",
    "up_blocks.1.resnets.0",
    "up_blocks.1.resnets.1",
)
UNET_TIME = {"time_embedding.linear_1", "time_embedding.linear_2", *(f"{r}.time_emb_proj" for r in UNET_RESNETS)}
UNET_CROSS_ATTENTION = (
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "mid_block.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.1.transformer_blocks.0",
)
UNET_CONCATENATIONS = {
    f"up_blocks.{i}.resnets.{j}.{layer}": boundaries
    for (i, j), boundaries in {(0, 0): (64,), (0, 1): (64,), (1, 0): (64,), (1, 1): (32,)}.items()
    for layer in ("conv1", "conv_shortcut")
}
UNET_SHORTCUTS = {name for name in UNET_CONCATENATIONS if name.endswith("conv_shortcut")}
UNET_TEXT = {f"{block}.attn2.{kv}" for block in UNET_CROSS_ATTENTION for kv in ("to_k", "to_v")}
UNET_CONDITION: dict[str, Any] = {
    Role.INPUT: {"conv_in"},
    Role.OUTPUT: {"conv_out"},
    Role.TIME: UNET_TIME,
    Role.TEXT: UNET_TEXT,
    Role.SHORTCUT: UNET_SHORTCUTS,
    "concatenations": UNET_CONCATENATIONS,
    "blocks": {*UNET_RESNETS, *UNET_CROSS_ATTENTION},
}


def embedder(prefix: str) -> set[str]:
    return {f"{prefix}.linear_1", f"{prefix}.linear_2"}


# Written by hand from the architectures. Roles that are not named have no layers.
EXPECTED: dict[str, dict[Any, Any]] = {
    "UNet2DModel": {
        **UNET_CONDITION,
        Role.TEXT: set(),
        "blocks": {
            *UNET_RESNETS,
            *(f"{place}.attentions.{i}" for place, i in (
                ("down_blocks.1", 0), ("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1),
            )),
        },
    },
    "UNet2DConditionModel": UNET_CONDITION,
    "UNet2DConditionModel-linear": UNET_CONDITION,
    "DiTTransformer2DModel": {
        Role.INPUT: {"pos_embed.proj"},
        Role.OUTPUT: {"proj_out_2"},
        Role.TIME: {
            *embedder("transformer_blocks.0.norm1.emb.timestep_embedder"),
            *embedder("transformer_blocks.1.norm1.emb.timestep_embedder"),
        },
        Role.MODULATION: {"transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.linear", "proj_out_1"},
        "blocks": {"transformer_blocks.0", "transformer_blocks.1"},
        "tied": {
            tuple(f"transformer_blocks.{i}.norm1.emb.timestep_embedder.{linear}" for i in (0, 1))
            for linear in ("linear_1", "linear_2")
        },
        "called twice": embedder("transformer_blocks.0.norm1.emb.timestep_embedder"),
    },
    "PixArtTransformer2DModel": {
        Role.INPUT: {"pos_embed.proj"},
        Role.OUTPUT: {"proj_out"},
        Role.TIME: {*embedder("adaln_single.emb.timestep_embedder"), "adaln_single.linear"},
        Role.TEXT: {
            *embedder("caption_projection"),
            *(f"transformer_blocks.{i}.attn2.{kv}" for i in (0, 1) for kv in ("to_k", "to_v")),
        },
        "blocks": {"transformer_blocks.0", "transformer_blocks.1"},
    },
    "SD3Transformer2DModel": {
        Role.INPUT: {"pos_embed.proj"},
        Role.OUTPUT: {"proj_out"},
        Role.TIME: embedder("time_text_embed.timestep_embedder"),
        Role.TEXT: {"context_embedder"},
        Role.MODULATION: {
            *embedder("time_text_embed.text_embedder"),
            *(f"transformer_blocks.{i}.{norm}.linear" for i in (0, 1) for norm in ("norm1", "norm1_context")),
            "norm_out.linear",
        },
        "blocks": {"transformer_blocks.0", "transformer_blocks.1"},
    },
    "FluxTransformer2DModel": {
        Role.INPUT: {"x_embedder"},
        Role.OUTPUT: {"proj_out"},
        Role.TIME: embedder("time_text_embed.timestep_embedder"),
        Role.TEXT: {"context_embedder"},
        Role.MODULATION: {
            *embedder("time_text_embed.text_embedder"),
            *embedder("time_text_embed.guidance_embedder"),
            "transformer_blocks.0.norm1.linear",
            "transformer_blocks.0.norm1_context.linear",
            "single_transformer_blocks.0.norm.linear",
            "single_transformer_blocks.1.norm.linear",
            "norm_out.linear",
        },
        Role.SHORTCUT: {f"single_transformer_blocks.{i}.proj_out" for i in (0, 1)},
        "concatenations": {f"single_transformer_blocks.{i}.proj_out": (72,) for i in (0, 1)},
        "blocks": {"transformer_blocks.0", "single_transformer_blocks.0", "single_transformer_blocks.1"},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def probed(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Structure]:
    denoiser = tiny_denoiser(request.param)
    args, kwargs = denoiser_inputs(request.param)
    return request.param, denoiser, probe_structure(denoiser, args, kwargs)


def test_every_layer_has_its_role(probed: tuple[str, nn.Module, Structure]) -> None:
    name, denoiser, structure = probed
    for role in (Role.INPUT, Role.OUTPUT, Role.TIME, Role.TEXT, Role.MODULATION, Role.SHORTCUT, Role.UNUSED):
        assert structure.named(role) == EXPECTED[name].get(role, set()), role
    assert set(structure.layers) == {n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    kinds = {"conv2d": nn.Conv2d, "linear": nn.Linear}
    assert all(isinstance(denoiser.get_submodule(n), kinds[f.kind]) for n, f in structure.layers.items())
    assert all((f.role is Role.CONV) <= (f.kind == "conv2d") for f in structure.layers.values())


def test_concatenations_are_found_with_their_boundaries(probed: tuple[str, nn.Module, Structure]) -> None:
    name, _, structure = probed
    found = {layer: facts.boundaries for layer, facts in structure.layers.items() if facts.boundaries}
    assert found == EXPECTED[name].get("concatenations", {})


def test_dependences_agree_with_roles(probed: tuple[str, nn.Module, Structure]) -> None:
    name, _, structure = probed
    depends = {layer: facts.depends for layer, facts in structure.layers.items()}
    assert {n for n, d in depends.items() if d == {"time"}} == EXPECTED[name][Role.TIME]
    (output,) = EXPECTED[name][Role.OUTPUT]
    groups = {"time", "latents"}
    groups |= {"text"} if EXPECTED[name].get(Role.TEXT) else set()
    groups |= {"condition"} if EXPECTED[name].get(Role.MODULATION) else set()
    assert depends[output] == groups
    (first,) = EXPECTED[name][Role.INPUT]
    assert depends[first] == {"latents"}


def test_blocks_are_the_repeated_units_in_order_of_execution(probed: tuple[str, nn.Module, Structure]) -> None:
    name, _, structure = probed
    assert set(structure.blocks) == EXPECTED[name]["blocks"]
    order = [
        next(b for b in structure.blocks if n.startswith(f"{b}."))
        for n in structure.layers
        if n.startswith(structure.blocks)
    ]
    assert list(dict.fromkeys(order)) == list(structure.blocks)


def test_equal_copies_and_repeated_calls_are_found(probed: tuple[str, nn.Module, Structure]) -> None:
    name, _, structure = probed
    assert set(structure.tied) == EXPECTED[name].get("tied", set())
    assert {n for n, f in structure.layers.items() if f.calls != 1} == EXPECTED[name].get("called twice", set())


def test_queries_keys_and_values_share_their_input(probed: tuple[str, nn.Module, Structure]) -> None:
    _, _, structure = probed
    attentions = [n.removesuffix("to_q") for n in structure.layers if n.endswith("to_q")]
    assert attentions
    for attention in attentions:
        query, key, value = (structure.layers[f"{attention}to_{part}"].shared_input for part in "qkv")
        assert key is not None
        assert key == value
        assert (query == key) == (structure.layers[f"{attention}to_k"].role is not Role.TEXT)
    alone = [f for f in structure.layers.values() if f.role in (Role.INPUT, Role.OUTPUT)]
    assert all(f.shared_input is None for f in alone)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel"])
def test_batch_and_mode_do_not_matter_and_the_model_is_left_as_it_was(name: str) -> None:
    denoiser = tiny_denoiser(name)
    results = []
    for batch, training in ((1, False), (3, True)):
        denoiser.train(training)
        next(denoiser.children()).eval()
        modes = [module.training for module in denoiser.modules()]
        hooks = [len(module._forward_hooks) for module in denoiser.modules()]
        args, kwargs = denoiser_inputs(name, batch)
        results.append(probe_structure(denoiser, args, kwargs))
        assert modes == [module.training for module in denoiser.modules()]
        assert hooks == [len(module._forward_hooks) for module in denoiser.modules()]
    assert results[0] == results[1]


def test_arguments_may_come_by_position_or_by_name_and_time_as_a_number() -> None:
    denoiser = tiny_denoiser("UNet2DConditionModel")
    (latents, _), kwargs = denoiser_inputs("UNet2DConditionModel")
    text = kwargs["encoder_hidden_states"]
    first = probe_structure(denoiser, (latents, 0, text), {})
    for time in (999, 3.5, torch.tensor([7, 7])):
        assert (
            probe_structure(denoiser, (), {"sample": latents, "timestep": time, "encoder_hidden_states": text}) == first
        )


def test_global_conditions_turn_time_layers_into_modulation() -> None:
    args, kwargs = denoiser_inputs(XL)
    structure = probe_structure(tiny_denoiser(XL), args, kwargs)
    assert structure.named(Role.TIME) == embedder("time_embedding")
    assert structure.named(Role.MODULATION) == {
        *embedder("add_embedding"),
        *(name for name in structure.layers if name.endswith("time_emb_proj")),
    }
    # The pooled text and the sizes are concatenated too, but no latents are in there.
    assert all(".resnets." in name for name, facts in structure.layers.items() if facts.boundaries)
    assert structure.layers["add_embedding.linear_1"].depends == {"condition"}


class Toy(nn.Module):
    """The smallest thing that is called like a denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.classes, self.label = nn.Embedding(1, 4), nn.Linear(4, 4)
        self.branch = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None) -> Tensor:
        hidden = self.first(2 * sample.flatten(1) - 1) + timestep
        if class_labels is not None:
            hidden = hidden + self.label(self.classes(class_labels))
        self.branch(torch.ones(1, 4))
        return self.last(hidden)


def test_unused_and_constant_layers_are_described_too() -> None:
    layers = probe_structure(Toy(), (torch.randn(2, 4), 5), {}).layers
    assert layers["spare"] == LayerFacts("spare", "linear", Role.UNUSED, frozenset())
    assert list(layers)[-2:] == ["spare", "label"]
    assert layers["branch"] == LayerFacts("branch", "linear", Role.LINEAR, frozenset(), calls=1)
    assert layers["first"].role is Role.INPUT
    assert layers["last"] == LayerFacts("last", "linear", Role.OUTPUT, frozenset({"time", "latents"}), calls=1)


def test_a_class_table_with_one_row_cannot_be_varied() -> None:
    facts = probe_structure(Toy(), (torch.randn(2, 4), 5), {"class_labels": torch.tensor([0, 0])}).layers
    assert facts["label"].depends == set()


def test_a_layer_behind_a_closed_gate_depends_on_what_it_reads() -> None:
    toy = Toy()
    nn.init.zeros_(toy.last.weight)
    assert probe_structure(toy, (torch.randn(2, 4), 5), {}).layers["last"].depends == {"time", "latents"}


class Noisy(Toy):
    def forward(self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None) -> Tensor:
        return self.last(self.first(sample) + torch.rand(1))


def test_a_random_denoiser_is_refused_by_the_name_of_the_first_layer_that_varies() -> None:
    with pytest.raises(StructureError, match=r"repeated \(last\)"):
        probe_structure(Noisy(), (torch.randn(2, 4), 5), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "problem"),
    [
        ((), {}, "missing a required argument"),
        ((torch.randn(2, 4), 5), {"nonsense": 1}, "nonsense"),
        (("text", 5), {}, "`sample` is not a batch of latents"),
        ((torch.tensor([1, 2]), 5), {}, "`sample` is not a batch of latents"),
        ((torch.randn(0, 4), 5), {}, "`sample` is not a batch of latents"),
        ((torch.randn(2, 4), None), {}, "no argument `timestep`"),
    ],
)
def test_calls_that_do_not_fit_are_refused(args: Any, kwargs: Any, problem: str) -> None:
    with pytest.raises(StructureError, match=problem):
        probe_structure(Toy(), args, kwargs)


def test_subclasses_that_may_compute_something_else_are_no_layers() -> None:
    class Special(nn.Linear):
        pass

    assert is_layer(nn.Linear(1, 1))
    assert is_layer(nn.Conv2d(1, 1, 1))
    assert not is_layer(Special(1, 1))
    assert not is_layer(nn.Conv1d(1, 1, 1))
