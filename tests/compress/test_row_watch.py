from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dcomp.compress.row_watch import Reading, Rows, RowWatch


class Model(nn.Module):
    """Two producers, a norm and a linear layer of two halves, and a reader whose input is made of them."""

    def __init__(self, make: Callable[["Model", Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.pair, self.read = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 4)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.make(self, x))


def watched(make: Callable[[Model, Tensor], Tensor]) -> RowWatch:
    torch.manual_seed(0)
    model, watch = Model(make), RowWatch()
    with torch.no_grad(), watch.watching(model):
        model(torch.randn(2, 3, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return watch


def rows_read(watch: RowWatch) -> tuple[Rows, ...] | None:
    (reading,) = watch.readings["read"]
    return reading and reading.rows


def halves(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = model.pair(x).chunk(2, dim=-1)
    return first, second


NORM = Rows("norm", 0, 8)
FIRST, SECOND = Rows("pair", 0, 8), Rows("pair", 8, 16)


def plus_one(rows: Rows) -> Rows:
    return Rows(rows.module, rows.start, rows.stop, 1.0)


FOLLOWED: dict[str, tuple[Callable[[Model, Tensor], Tensor], tuple[Rows, ...]]] = {
    "a norm": (lambda m, x: m.norm(x), (NORM,)),
    "a dropout": (lambda m, x: functional.dropout(m.norm(x), 0.5, training=False), (NORM,)),
    "shapes": (lambda m, x: m.norm(x).transpose(1, 2).unflatten(1, (2, 4)).flatten(1, 2).permute(0, 2, 1), (NORM,)),
    "a piece": (lambda m, x: halves(m, x)[1], (SECOND,)),
    "split in sizes": (lambda m, x: m.pair(x).split([8, 8], dim=-1)[0], (FIRST,)),
    "rows of a batch": (lambda m, x: m.norm(x).chunk(2, dim=0)[1], (NORM,)),
    "a product": (lambda m, x: m.norm(x) * x.sigmoid() * 3, (NORM,)),
    "attention": (lambda m, x: functional.scaled_dot_product_attention(x, x, m.norm(x)), (NORM,)),
    "named attention": (lambda m, x: functional.scaled_dot_product_attention(x, x, value=m.norm(x)), (NORM,)),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_copies_and_products_are_followed(case: str) -> None:
    make, rows = FOLLOWED[case]
    watch = watched(make)
    assert rows_read(watch) == rows
    assert not watch.spoiled & set(rows)


def test_a_layer_gates_one_half_by_the_other() -> None:
    def gated(model: Model, x: Tensor) -> Tensor:
        value, gate = halves(model, x)
        return value * functional.gelu(gate)

    watch = watched(gated)
    assert rows_read(watch) == (FIRST,)
    assert watch.spoiled == {SECOND}


@pytest.mark.parametrize("shift_first", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_scale_and_shift_are_told_apart(shift_first: bool, wrapped: bool) -> None:
    def modulated(model: Model, x: Tensor) -> Tensor:
        one, two = halves(model, x[:, 0])
        shift, scale = (one, two) if shift_first else (two, one)
        factor = 1 + scale[:, None] if wrapped else scale.unsqueeze(1) + 1
        return functional.layer_norm(x, (8,)) * factor + shift[:, None]

    watch = watched(modulated)
    assert rows_read(watch) == ((FIRST, plus_one(SECOND)) if shift_first else (plus_one(FIRST), SECOND))
    assert not watch.spoiled


NOT_FOLLOWED: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "an activation": lambda m, x: functional.silu(m.norm(x)),
    "a residual": lambda m, x: m.norm(x) + x,
    "a constant": lambda m, x: m.norm(x) * x + 1,
    "a concatenation": lambda m, x: torch.cat([m.norm(x)[..., :4], x[..., :4]], dim=-1),
    "a quotient": lambda m, x: x / m.norm(x),
    "a product with itself": lambda m, x: m.norm(x) * m.norm(x),
    "keys of an attention": lambda m, x: functional.scaled_dot_product_attention(x, m.norm(x), x),
    "another norm": lambda m, x: functional.layer_norm(m.norm(x), (8,)),
}


@pytest.mark.parametrize("case", NOT_FOLLOWED)
def test_everything_else_spoils(case: str) -> None:
    watch = watched(NOT_FOLLOWED[case])
    assert rows_read(watch) is None
    assert NORM in watch.spoiled


def test_what_is_changed_in_place_is_no_longer_what_it_was() -> None:
    watch = watched(lambda m, x: m.norm(x).add_(x))
    assert rows_read(watch) is None
    assert watch.spoiled == {NORM}


def test_a_second_reader_that_is_no_layer_spoils() -> None:
    def stored(model: Model, x: Tensor) -> Tensor:
        y = model.norm(x)
        model.other = y + x
        return y

    watch = watched(stored)
    assert rows_read(watch) == (NORM,)
    assert watch.spoiled == {NORM}


def test_a_module_that_runs_twice_is_spoiled() -> None:
    watch = watched(lambda m, x: m.norm(m.norm(x)))
    assert rows_read(watch) == (NORM,)
    assert NORM in watch.spoiled


def test_layers_that_read_one_tensor_have_equal_readings() -> None:
    def two(model: Model, x: Tensor) -> Tensor:
        y = model.norm(x)
        model.pair(y)
        return y

    watch = watched(two)
    assert watch.readings["pair"] == watch.readings["read"] == [Reading((NORM,), 0)]
    # A copy of it is another tensor, made of the same rows.

    def copied(model: Model, x: Tensor) -> Tensor:
        y = model.norm(x)
        model.pair(y.clone())
        return y

    watch = watched(copied)
    (one,), (other,) = watch.readings["pair"], watch.readings["read"]
    assert one is not None
    assert other is not None
    assert one.rows == other.rows
    assert one.tensor != other.tensor
