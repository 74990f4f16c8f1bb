"""Attention between integer projections: when it is ours, that it computes the same, and that copies are their own."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dcomp.calibrate.cost import counting_macs
from dcomp.compress.altered_calls import answering
from dcomp.compress.attention import attend_by_kernels
from dcomp.compress.scheme import QScheme
from dcomp.kernels import dispatch, reference
from tests.support.schemes import quantized_form

W8A8 = QScheme(weight_bits=8, group_size=None, input_bits=8, input_granularity="token")
W8A16 = QScheme(weight_bits=8, group_size=None, input_bits=16, input_granularity=None)


class Denoiser(nn.Module):
    """One attention, to itself or to a context."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(query_dim=32, heads=4, dim_head=8)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.attn(x, **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """Shapes of the queries of our attention, which is the definition here, whatever this machine has."""
    seen: list[torch.Size] = []

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.append(q.shape)
        return reference.attention(q, k, v, scale)

    monkeypatch.setitem(dispatch._NATIVE_ROW, ("attention", 8), ("test", run))
    monkeypatch.setattr(dispatch.native, "attention_defect", lambda: None)
    monkeypatch.setattr(dispatch.native, "instruction_set", lambda: "avx2")
    dispatch._choose.cache_clear()
    yield seen
    dispatch._choose.cache_clear()


def denoiser(scheme: QScheme = W8A8) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser().eval()
    for name in ("to_q", "to_k", "to_v"):
        model.attn.set_submodule(name, quantized_form(model.attn.get_submodule(name), scheme))
    return model


@torch.no_grad()
def test_the_attention_of_integer_queries_is_ours_and_computes_the_same(calls: list[torch.Size]) -> None:
    model, x = denoiser(), torch.randn(2, 20, 32)
    expected = model(x)
    attend_by_kernels(model)
    attend_by_kernels(model)  # once is enough
    assert not calls
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    context = torch.randn(2, 30, 32)
    model(x, encoder_hidden_states=context)
    assert calls == [(2, 4, 20, 8)] * 2
    assert type(model.attn).__name__ == "Attention"
    assert isinstance(model.attn, Attention)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "a mask": (denoiser, lambda m: m(torch.randn(2, 20, 32), attention_mask=torch.zeros(2, 1, 20))),
    "few tokens": (denoiser, lambda m: m(torch.randn(2, 15, 32))),
    "float inputs": (lambda: denoiser(W8A16), lambda m: m(torch.randn(2, 20, 32))),
    "float layers": (lambda: Denoiser().eval(), lambda m: m(torch.randn(2, 20, 32))),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_it_is_torchs_with(case: str, calls: list[torch.Size]) -> None:
    make, call = CASES[case]
    model = make()
    attend_by_kernels(model)
    call(model)
    assert not calls


def test_it_is_torchs_with_gradients_fake_execution_and_while_tracing(calls: list[torch.Size]) -> None:
    model, x = denoiser(), torch.randn(2, 20, 32)
    attend_by_kernels(model)
    model.attn.norm_q = nn.LayerNorm(8)  # whose parameters want gradients
    model(x)
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(x)
        model.attn.to_q.execution = "fake"
        model(x)
        assert not calls
        model.attn.to_q.execution = "int"
        model(x)
        assert len(calls) == 1


@torch.no_grad()
def test_it_is_torchs_where_something_stands_in_for_the_layer_and_ours_under_an_adapter(
    calls: list[torch.Size],
) -> None:
    model, x = denoiser(), torch.randn(2, 20, 32)
    attend_by_kernels(model)
    with answering({model.attn.to_q: nn.Linear(32, 32)}):
        model(x)
    assert not calls
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    model(x)
    assert len(calls) == 1


@torch.no_grad()
def test_an_exception_ends_the_detour_and_a_copy_is_its_own(calls: list[torch.Size]) -> None:
    model, x = denoiser(), torch.randn(2, 20, 32)
    attend_by_kernels(model)
    other = copy.deepcopy(model)
    other.attn.to_out[0].weight.zero_()
    other.attn.to_out[0].bias.zero_()
    assert not other(x).any()
    assert model(x).any()
    calls.clear()
    with pytest.raises(dispatch.KernelError):
        model(torch.randn(2, 20, 31))
    torch.nn.functional.scaled_dot_product_attention(*(torch.randn(1, 1, 40, 8) for _ in range(3)))
    assert not calls


@torch.no_grad()
def test_products_are_counted_the_same(calls: list[torch.Size]) -> None:
    model, x = denoiser(), torch.randn(2, 20, 32)
    with counting_macs(model) as before:
        model(x)
    attend_by_kernels(model)
    with counting_macs(model) as after:
        model(x)
    assert calls
    assert after().attention == before().attention == 2 * 2 * 4 * 20 * 20 * 8
