import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

from dcomp.kernels import dispatch, onednn, ops, reference
from dcomp.kernels.cuda import loaded
from dcomp.kernels.packing import pack_weight

needs_vnni = pytest.mark.skipif(onednn.defect() is not None, reason=str(onednn.defect()))
fast_rows = ["auto", "cpu"] if onednn.defect() is None else ["auto"]  # of products


def _weight(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[0], generator=generator) + 0.01
    if bits == 8:
        return pack_weight(torch.randint(-127, 128, shape, generator=generator), scale)
    groups = (*shape[:-1], -(-shape[-1] // 8))
    codes = torch.randint(-8, 8, shape, generator=generator)
    return pack_weight(codes, scale, torch.randint(1, 16, groups, generator=generator), group_size=8)


def _stored(packed):
    return packed.qweight, packed.scale, packed.multiplier


def _linear(bits, bias=True):
    packed = _weight((11, 21), bits)
    q = torch.randint(-127, 128, (5, 21), dtype=torch.int8)
    return q, torch.rand(5) + 0.1, *_stored(packed), torch.randn(11) if bias else None, 21


def _linear_a4(bits):
    _, _, *weight = _linear(bits)
    return torch.randn(5, 21), 8, *weight


def _conv(bits, groups=1, bias=True, samples=1):
    packed = _weight((6, 3, 2, 12 // groups), bits)
    q = torch.randint(0, 256, (2, 12, 7, 6), dtype=torch.uint8)
    ranges = (torch.tensor([0.1, 0.3])[:samples], torch.tensor([100, 7], dtype=torch.uint8)[:samples])
    return q, *ranges, *_stored(packed), torch.randn(6) if bias else None, [1, 2], [1, 0], [1, 1], groups


def _all_calls():
    calls = [
        (
            ops.quantize_static,
            (torch.randn(2, 3, 4, 5), torch.tensor([0.1]), torch.tensor([9], dtype=torch.uint8)),
        ),
        (ops.quantize_token, (torch.randn(4, 5),)),
        (ops.quantize_sample, (torch.randn(2, 3, 4, 5),)),
        (ops.quantize_sample, (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),)),
        (ops.quantize_group, (torch.randn(2, 3, 21), 8)),
        (ops.quantize_group, (torch.randn(2, 3, 21), 8, torch.rand(21))),
        (ops.quantize_token, (torch.randn(4, 5), torch.rand(5))),
        (ops.quantize_sample, (torch.randn(2, 3, 4, 5), torch.rand(3))),
        (
            ops.quantize_static,
            (torch.randn(2, 3, 4, 5), torch.tensor([0.1]), torch.tensor([9], dtype=torch.uint8), torch.rand(3)),
        ),
        (ops.quantize_low_rank, (torch.randn(4, 21), torch.randn(3, 21).half())),
        (ops.quantize_low_rank, (torch.randn(4, 21).to(torch.bfloat16), torch.randn(3, 21).half(), 8, torch.rand(21))),
        (ops.conv2d_a8, _conv(8, samples=2)),
        (ops.layer_norm_quantize, (torch.randn(2, 3, 8), *torch.randn(2, 8), *torch.randn(2, 2, 8), 1e-5)),
        (ops.layer_norm_quantize, (torch.randn(2, 3, 8), None, None, None, None, 1e-5)),
    ]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, static = torch.randn(2, 6, 4, 5).contiguous(memory_format=memory_format), _conv(8)[1:3]
        norm = (x, 2, *torch.randn(2, 6), 1e-5, True)
        calls += [(ops.group_norm_quantize, (*norm, *ranges)) for ranges in (static, (None, None))]
    for bits in (8, 4):
        _, _, *weight = _linear(bits)
        calls += [(ops.linear_a8, _linear(bits)), (ops.linear_a16, (torch.randn(2, 5, 21), *weight))]
        calls.append((ops.linear_a4, _linear_a4(bits)))
        _, _, _, *weight = _conv(bits)
        calls += [(ops.conv2d_a8, _conv(bits)), (ops.conv2d_a16, (torch.randn(2, 12, 7, 6), *weight))]
    _, _, _, *weight = _conv(8, groups=2, bias=False)
    calls += [(ops.conv2d_a8, _conv(8, groups=2, bias=False)), (ops.linear_a8, _linear(8, bias=False))]
    calls.append((ops.attention, (*torch.randn(3, 2, 4, 20, 8), 0.3)))
    return calls


@pytest.mark.parametrize("call", range(len(_all_calls())))
def test_operations_are_registered_as_torch_demands(call):
    operation, arguments = _all_calls()[call]
    torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("operation", "make"),
    [
        (ops.linear_a4, _linear_a4),
        (ops.linear_a8, _linear),
        (ops.conv2d_a8, _conv),
        (ops.conv2d_a8, partial(_conv, samples=2)),
    ],
)
def test_all_rows_give_the_same_result(bits, operation, make):
    arguments = make(bits)
    results = {}
    for backend in (*fast_rows, "emulated"):
        with dispatch.use_backend(backend):
            results[backend] = operation(*arguments)
    for row in fast_rows:
        assert torch.allclose(results[row], results["emulated"], rtol=1e-6, atol=1e-5 * float(results["auto"].std()))
        assert results[row].stride() == results["emulated"].stride()


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (ops.quantize_sample, (torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),)),
        (ops.quantize_token, (torch.randn(3, 40),)),
        (ops.quantize_group, (torch.randn(3, 4, 21).to(torch.bfloat16), 8)),
        (ops.quantize_sample, (torch.randn(3, 4, 5, 6), torch.rand(4))),
        (ops.quantize_token, (torch.randn(3, 40), torch.rand(40))),
        (ops.quantize_group, (torch.randn(3, 4, 21).to(torch.bfloat16), 8, torch.rand(21))),
        (ops.quantize_low_rank, (torch.randn(3, 40), torch.randn(5, 40).half(), None, torch.rand(40))),
        (ops.quantize_low_rank, (torch.randn(3, 40), torch.randn(5, 40).half(), 16)),
    ],
)
def test_all_rows_give_the_same_codes_and_scales(operation, arguments):
    with dispatch.use_backend("emulated"):
        expected = operation(*arguments)
    for backend in ("auto", "cpu"):
        with dispatch.use_backend(backend):
            results = operation(*arguments)
        for found, plain in zip(results, expected, strict=True):
            assert torch.equal(found, plain)
            assert found.stride() == plain.stride()


@pytest.mark.parametrize(
    ("operation", "make"), [(ops.linear_a4, _linear_a4), (ops.linear_a8, _linear), (ops.conv2d_a8, _conv)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_products_are_rounded_once_to_the_dtype_that_is_asked_for(operation, make, dtype):
    arguments = make(8)
    torch.library.opcheck(operation, (*arguments, dtype))
    assert torch.equal(operation(*arguments, dtype), operation(*arguments).to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_operations_are_the_definition_on_the_int8_image(bits):
    q, x_scale, qweight, scale, multiplier, bias, in_features = _linear(bits)
    codes = _weight((11, 21), bits).codes()
    with dispatch.use_backend("emulated"):
        found = ops.linear_a8(q, x_scale, qweight, scale, multiplier, bias, in_features)
    assert torch.equal(found, reference.linear_a8(q, x_scale, codes, scale, bias))


def test_4_bit_inputs_are_made_an_int8_image_where_nothing_takes_them_as_they_are():
    x, group, qweight, scale, multiplier, bias, in_features = _linear_a4(4)
    choice = dispatch.choose("linear_a4", bits=4)
    product = dispatch.choose("linear_a8", bits=4)
    assert choice.row == product.row
    quantizer = dispatch.choose("quantize_group").row
    assert choice.reason == f"quantize_group by {quantizer}, linear_a8 by {product.row}"
    image, x_scale = ops.quantize_group(x.unsqueeze(1), group)
    weight = (qweight, scale, multiplier, bias, in_features)
    assert torch.equal(ops.linear_a4(x, group, *weight), ops.linear_a8(image.squeeze(1), x_scale, *weight))


def test_grouped_convolutions_are_emulated_and_say_so():
    choice = dispatch.choose("conv2d_a8", groups=2)
    assert choice.row == "emulated"
    assert "grouped" in choice.reason
    q, x_scale, x_zero, qweight, scale, _, bias, *shape = _conv(8, groups=3)
    expected = reference.conv2d_a8(q, x_scale, x_zero, qweight, scale, bias, *shape)
    assert torch.equal(ops.conv2d_a8(q, x_scale, x_zero, qweight, scale, None, bias, *shape), expected)


def test_sums_that_could_overflow_are_emulated_and_exact():
    inner = onednn.MAX_REDUCTION + 1
    choice = dispatch.choose("linear_a8", reduction=inner)
    assert choice.row == "emulated"
    assert "overflow" in choice.reason
    inner = 140_000  # 127 * 127 * 140,000 is above 2^31
    q, packed = torch.full((1, inner), 127, dtype=torch.int8), pack_weight(torch.full((2, inner), 127), torch.ones(2))
    y = ops.linear_a8(q, torch.ones(1), packed.qweight, packed.scale, None, None, inner)
    assert y.tolist() == [[torch.tensor(127.0 * 127 * inner).item()] * 2]


def test_the_largest_allowed_sum_does_not_overflow():
    q = torch.full((1, onednn.MAX_REDUCTION, 1, 1), 255, dtype=torch.uint8)
    packed = pack_weight(torch.full((2, 1, 1, onednn.MAX_REDUCTION), 127), torch.ones(2))
    assert dispatch.choose("conv2d_a8", reduction=onednn.MAX_REDUCTION).row != "emulated"
    shape = ([1, 1], [0, 0], [1, 1], 1)
    static = (torch.ones(1), torch.zeros(1, dtype=torch.uint8))
    for row in fast_rows:
        with dispatch.use_backend(row):
            y = ops.conv2d_a8(q, *static, packed.qweight, packed.scale, None, None, *shape)
        assert y.flatten().tolist() == [torch.tensor(255.0 * 127 * onednn.MAX_REDUCTION).item()] * 2


def test_demanding_a_row_that_cannot_run_is_an_error():
    with dispatch.use_backend("cpu"), pytest.raises(dispatch.KernelError, match="grouped"):
        dispatch.choose("conv2d_a8", groups=2)
    with pytest.raises(dispatch.KernelError), dispatch.use_backend("toaster"):
        pass
    with dispatch.use_backend("cuda"), pytest.raises(dispatch.KernelError, match="does not run on cpu"):
        dispatch.choose("linear_a8")
    with dispatch.use_backend("native"), pytest.raises(dispatch.KernelError, match="does not run on cuda"):
        dispatch.choose("linear_a8", device="cuda")
    with dispatch.use_backend("native"), pytest.raises(dispatch.KernelError, match="no kernel of our own"):
        dispatch.choose("linear_a16")


def test_a_demanded_row_ends_with_its_block_and_stays_in_its_thread():
    seen = []
    with dispatch.use_backend("emulated"):
        assert dispatch.choose("quantize_token").row == "emulated"
        thread = threading.Thread(target=lambda: seen.append(dispatch.choose("quantize_token").row))
        thread.start()
        thread.join()
    assert seen == [dispatch.choose("quantize_token").row]
    assert seen != ["emulated"]


def test_every_operation_and_format_is_explained_for_every_device():
    lines = dispatch.explain()
    assert {line["operation"] for line in lines} == set(dispatch.OPERATIONS)
    assert {(line["format"]) for line in lines} == {"any", "W8A4", "W4A4", "W8A8", "W4A8", "W8A16", "W4A16"}
    assert len({(line["operation"], line["format"], line["device"]) for line in lines}) == len(lines) == 36
    assert all(line["reason"] for line in lines)
    unfit = loaded.defect(0)
    for line in lines:
        if line["device"] == "cuda" and line["operation"] == "attention":
            assert line["row"] == "torch"
            assert "not measured against torch's on a GPU yet; use_backend('cuda') runs them" in line["reason"]
        elif line["device"] == "cuda" and unfit is not None:
            assert line["row"] == ("torch" if line["operation"].endswith("a16") else "emulated")
            assert unfit in line["reason"]


def test_backward_through_an_operation_is_refused():
    _, _, *weight = _linear(8)
    y = ops.linear_a16(torch.randn(2, 21, requires_grad=True), *weight)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


def test_importing_probes_nothing():
    code = (
        "import torch; torch._int_mm = None\n"
        "from dcomp.kernels import dispatch, onednn\n"
        "print(onednn.defect.cache_info().currsize, dispatch._choose.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]
