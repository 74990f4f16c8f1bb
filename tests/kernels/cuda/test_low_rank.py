"""Low-rank branches that products add, in the emulator: as good as one product in fp32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcomp.kernels import ops, reference
from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda import driver, rows, self_test
from dcomp.kernels.cuda.self_test import UnusableError
from dcomp.kernels.packing import Stored
from tests.support.emulated_gpu import emulated_gpu, layers_on_the_emulated_gpu


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    try:
        with emulated_gpu():
            yield
    except BuildError as error:
        pytest.skip(str(error))


def operands(count: int, outputs: int, rank: int, seed: int = 0) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    """Return what a product takes and a branch, whose hidden values are of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-127, 128, (count, 40), generator=generator).to(torch.int8)
    stored = Stored(torch.randint(-127, 128, (outputs, 40), generator=generator).to(torch.int8), None)
    hidden = torch.randn(count, rank, generator=generator) * 10.0 ** torch.randint(
        -6, 7, (count, 1), generator=generator
    )
    up = torch.randn(outputs, rank, generator=generator).half()
    return (q, torch.full((count,), 1e-3), stored, torch.full((outputs,), 1e-2), None), (hidden, up)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
def test_any_branch_is_as_exact_as_in_fp32(count, outputs, rank):
    product, (hidden, up) = operands(count, outputs, rank)
    found = rows.linear_a8(*product, branch=(hidden, up))
    plain = rows.linear_a8(*product)
    expected = plain.double() + hidden.double() @ up.double().t()
    terms = plain.double().abs() + hidden.double().abs() @ up.double().abs().t()
    assert bool(((found.double() - expected).abs() <= (2**-20 + rank * 2**-24) * terms).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_values_spoil_their_row_alone(bad):
    product, (hidden, up) = operands(5, 9, 8)
    hidden[2, 3] = bad
    found = rows.linear_a8(*product, branch=(hidden, up))
    assert found.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert not found[2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("up_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("on_gpu", [True, False])
def test_operations_add_the_branch_before_they_round(dtype, up_dtype, on_gpu):
    (q, x_scale, stored, scale, bias), (hidden, up) = operands(6, 10, 7)
    hidden, up = hidden / hidden.abs().amax(1, keepdim=True), up.to(up_dtype)
    given = (q, x_scale, stored.qweight, scale, None, bias, 40, dtype, hidden, up)
    if on_gpu:
        with layers_on_the_emulated_gpu():
            found = ops.linear_a8(*given)
    else:
        found = ops.linear_a8(*given)
        torch.library.opcheck(ops.linear_a8, given)
    expected = reference.add_branch_(reference.linear_a8(q, x_scale, stored.qweight, scale, bias), hidden, up).to(dtype)
    assert found.dtype == dtype
    step = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(found, expected, rtol=step, atol=step)


def test_a_kernel_that_fails_leaves_its_branch_to_torch(monkeypatch):
    product, branch = operands(6, 10, 7)
    kernels = self_test.kernels

    def without_branches(name: str, index: int) -> Any:
        if "low_rank" in name:
            raise UnusableError("it is not right")
        return kernels(name, index)

    expected = rows.linear_a8(*product, branch=branch)
    monkeypatch.setattr(self_test, "kernels", without_branches)
    names, launch = [], driver.launch
    monkeypatch.setattr(driver, "launch", lambda kernel, *rest: (names.append(kernel.name), launch(kernel, *rest)))
    found = rows.linear_a8(*product, branch=branch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert names[-1] == "linear_w8a8_64x64"
