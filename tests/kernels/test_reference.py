import itertools

import pytest
import torch

from dcomp.kernels import qparams, reference


def _draw(shape, low, high, seed):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_sum_is_the_int64_sum():
    q, codes = _draw((5, 41), -128, 127, 0), _draw((7, 41), -128, 127, 1)
    y = reference.linear_a8(q.to(torch.int8), torch.ones(5), codes.to(torch.int8), torch.ones(7), None)
    assert torch.equal(y.long(), q @ codes.t())


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [((1, 1), (1, 1), (1, 1), 1), ((2, 1), (0, 3), (1, 2), 2)]
)
def test_a_convolution_is_a_sum_over_taps_with_real_zeros_around(stride, padding, dilation, groups):
    q, codes, zero = _draw((2, 4, 6, 7), 0, 255, 0), _draw((6, 3, 2, 4 // groups), -127, 127, 1), 200
    y = reference.conv2d_a8(
        q.to(torch.uint8), torch.ones(1), torch.tensor([zero]), codes.to(torch.int8), torch.ones(6), None,
        [*stride], [*padding], [*dilation], groups,
    )  # fmt: skip
    expected = torch.zeros(y.shape, dtype=torch.long)
    for n, o, i, j in itertools.product(*map(range, y.shape)):
        for r, s, c in itertools.product(*map(range, codes.shape[1:])):
            row, column = i * stride[0] - padding[0] + r * dilation[0], j * stride[1] - padding[1] + s * dilation[1]
            if 0 <= row < 6 and 0 <= column < 7:
                channel = o // (6 // groups) * (4 // groups) + c
                expected[n, o, i, j] += (q[n, channel, row, column] - zero) * codes[o, r, s, c]
    assert torch.equal(y.long(), expected)
    assert y.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_a_range_for_each_sample_is_that_of_each_sample(groups):
    q, codes = (
        _draw((3, 4, 6, 5), 0, 255, 0).to(torch.uint8),
        _draw((6, 3, 3, 4 // groups), -127, 127, 1).to(torch.int8),
    )
    scale, zero = torch.tensor([0.5, 0.25, 0.1]), torch.tensor([0, 200, 255], dtype=torch.uint8)
    rest = (codes, torch.rand(6), torch.randn(6), [1, 2], [2, 1], [1, 1], groups)
    y = reference.conv2d_a8(q, scale, zero, *rest)
    for n in range(3):
        part = slice(n, n + 1)
        assert torch.equal(y[part], reference.conv2d_a8(q[part], scale[part], zero[part], *rest))
    same = reference.conv2d_a8(q, scale[:1], zero[1:2], *rest)
    assert torch.equal(reference.conv2d_a8(q, scale[:1].expand(3), zero[1:2].expand(3), *rest), same)


def test_scales_and_bias_go_where_they_belong():
    q, codes = torch.tensor([[1], [2]], dtype=torch.int8), torch.tensor([[1], [10], [100]], dtype=torch.int8)
    y = reference.linear_a8(
        q, torch.tensor([1.0, 0.5]), codes, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 2.0])
    )
    assert y.tolist() == [[1, 21, 402], [1, 21, 402]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_only_operations_are_the_float_operations_on_the_dequantized_weight(dtype):
    codes, scale, bias = _draw((6, 3, 3, 4), -127, 127, 1).to(torch.int8), torch.rand(6), torch.randn(6)
    weight = qparams.dequantize_weight(codes, scale).to(dtype)
    x = torch.randn(2, 4, 5, 5).to(dtype)
    y = reference.conv2d_a16(x, codes, scale, bias, [1, 1], [1, 1], [1, 1], 1)
    assert torch.equal(y, torch.nn.functional.conv2d(x, weight.permute(0, 3, 1, 2), bias.to(dtype), padding=1))
    rows = torch.randn(7, 4).to(dtype)
    expected = torch.nn.functional.linear(rows, weight[:, 0, 0], bias.to(dtype))
    assert torch.equal(reference.linear_a16(rows, codes[:, 0, 0], scale, bias), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("size", [(5, 4), (8, 5)])
def test_weights_of_one_input_channel_are_read_right_in_any_layout(groups, stride, size):
    x, canonical = torch.randn(2, groups, *size), torch.randn(2 * groups, 3, 3, 1)
    weight = canonical.permute(0, 3, 1, 2)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, groups=groups)
    for form in (weight, weight.clone(memory_format=torch.channels_last)):
        for inputs in (x, x.clone(memory_format=torch.channels_last)):
            found = reference.float_conv2d(inputs, form, None, stride, 0, 1, groups)
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
