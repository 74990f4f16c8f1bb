"""A pack is made once, is never that of another weight, and dies with its own."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dcomp.kernels.packs import Packs


def in_place(weight: Tensor) -> Tensor:
    return weight.add_(1)


def swapped_data(weight: Tensor) -> Tensor:
    address = weight.data_ptr()
    weight.data = weight.data.clone()
    for number in range(50):  # give the allocator a chance to hand the first address out again
        weight.data = torch.full((3, 4), float(number))
        if weight.data_ptr() == address:
            break
    return weight


def shifted_within_storage(weight: Tensor) -> Tensor:
    storage = torch.cat([weight.flatten(), weight.flatten().neg()])
    weight.data = storage[:12].view(3, 4)
    weight.data = storage[12:].view(3, 4)
    return weight


@pytest.mark.parametrize("change", [in_place, swapped_data, shifted_within_storage, torch.clone])
def test_a_changed_weight_has_another_pack(change: Callable[[Tensor], Tensor]) -> None:
    packs: Packs[Tensor] = Packs()
    weight = torch.arange(12.0).view(3, 4)
    packs.get(weight, "double", lambda: 2 * weight)
    weight = change(weight)
    assert torch.equal(packs.get(weight, "double", lambda: 2 * weight), 2 * weight)


def test_a_pack_is_made_once_for_each_key_and_dies_with_its_weight() -> None:
    packs: Packs[Tensor] = Packs()
    weight = torch.arange(12.0).view(3, 4)
    made = []

    def make() -> Tensor:
        made.append(torch.ones(2))
        return made[-1]

    assert packs.get(weight, "double", make) is packs.get(weight, "double", make)
    packs.get(weight, "again", make)
    assert len(made) == len(packs.of(weight)) == 2
    assert len(packs) == 1
    del weight
    gc.collect()
    assert len(packs) == 0


def test_another_tensor_that_a_pack_is_made_of_may_change() -> None:
    packs: Packs[Tensor] = Packs()
    weight, factor = torch.arange(12.0).view(3, 4), torch.tensor(2.0)
    packs.get(weight, "product", lambda: weight * factor, factor)
    factor.fill_(3)
    assert torch.equal(packs.get(weight, "product", lambda: weight * factor, factor), weight * 3)


def test_views_share_the_life_of_their_base_and_are_told_apart() -> None:
    packs: Packs[Tensor] = Packs()
    weight = torch.arange(24.0).view(2, 3, 4).clone()
    made = []

    def doubled(view: Tensor) -> Tensor:
        def make() -> Tensor:
            made.append(view)
            return 2 * view

        return packs.get(view, "double", make)

    for _ in range(2):  # views of the second round are other objects
        for view in (weight[0], weight[1], weight.flatten(1), weight.flatten(0, 1)):
            assert torch.equal(doubled(view), 2 * view)
    assert len(made) == 4
    assert len(packs) == 1
    weight.mul_(-1)
    assert torch.equal(doubled(weight[1]), 2 * weight[1])


def test_a_weight_without_a_version_cannot_be_kept() -> None:
    with torch.inference_mode():
        weight = torch.ones(2)
    assert not Packs.can_keep(weight)
    assert Packs.can_keep(torch.ones(2))
