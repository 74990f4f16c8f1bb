import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcomp.kernels.packing import PackedWeight, PackingError, int8_image, pack_int4, pack_weight, storage, unpack_int4


def _codes(shape, low, high, seed):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@settings(max_examples=60)
@given(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 40), st.integers(0, 2**31))
def test_unpacking_inverts_packing(out, taps, pairs, seed):
    codes = _codes((out, *taps, 2 * pairs), -8, 7, seed)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


@settings(max_examples=40)
@given(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_inverts_unpacking(out, taps, pairs, seed):
    stored = torch.randint(
        0, 256, (out, *taps, pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    assert torch.equal(pack_int4(unpack_int4(stored)), stored)


def test_every_byte_unpacks_to_its_two_nibbles():
    stored = torch.arange(256).to(torch.uint8).view(1, 256)
    expected = torch.stack([stored.int() & 15, stored.int() >> 4], -1).view(1, 512)
    assert torch.equal(unpack_int4(stored).int(), torch.where(expected > 7, expected - 16, expected))


def test_every_code_times_every_multiplier_is_exact():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(codes, codes).view(1, -1)  # both nibbles take every value beside every other
    for multiplier in [m for m in range(-15, 16) if m]:
        packed = pack_weight(pairs, torch.ones(1), torch.full((1, 512 // 64), multiplier), group_size=64)
        assert torch.equal(packed.codes().int(), pairs.int() * multiplier)


def test_a_weight_of_many_blocks_unpacks_like_its_rows():
    codes, multiplier = _codes((700, 1024), -8, 7, 1), _codes((700, 16), 1, 15, 2)
    packed = pack_weight(codes, torch.ones(700), multiplier, group_size=64)
    rows = [int8_image(packed.qweight[i : i + 1], packed.multiplier[i : i + 1], 1024) for i in (0, 255, 256, 699)]
    expected = codes.int() * multiplier.int().repeat_interleave(64, 1)
    assert torch.equal(packed.codes().int(), expected)
    assert torch.equal(torch.cat(rows).int(), expected[[0, 255, 256, 699]])


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.sampled_from([(), (1, 1), (2, 3)]),
    st.integers(1, 70),
    st.sampled_from([2, 8, 64]),
    st.integers(0, 99),
)
def test_a_group_never_crosses_taps_and_padding_is_cut_off(out, taps, channels, group, seed):
    groups = -(-channels // group)
    codes, multiplier = _codes((out, *taps, channels), -8, 7, seed), _codes((out, *taps, groups), 1, 15, seed)
    scale = torch.rand(out) + 0.1
    packed = pack_weight(codes, scale, multiplier, group_size=group)
    expected = codes.int() * multiplier.int().repeat_interleave(group, -1)[..., :channels]
    assert torch.equal(packed.codes().int(), expected)
    assert packed.codes().is_contiguous()
    assert torch.equal(packed.dequantize(), expected.float() * scale.view(-1, *[1] * (expected.ndim - 1)))
    assert packed.qweight.shape == (out, *taps, groups * group // 2)


def test_int4_linear_layout_has_golden_bytes():
    codes = torch.tensor([[0, 1, -1, 7, -8, 3], [1, 2, 3, 4, 5, 6]], dtype=torch.int8)
    packed = pack_weight(codes, torch.ones(2), torch.tensor([[1, -2], [3, 15]]), group_size=4)
    assert packed.qweight.tolist() == [[0x10, 0x7F, 0x38, 0x00], [0x21, 0x43, 0x65, 0x00]]
    assert packed.multiplier.tolist() == [[1, -2], [3, 15]]
    assert packed.codes().tolist() == [[0, 1, -1, 7, 16, -6], [3, 6, 9, 12, 75, 90]]
    assert packed.nbytes == 8 + 4 + 8


def test_int4_convolution_layout_has_golden_bytes():
    codes = torch.arange(-6, 6, dtype=torch.int8).view(1, 2, 2, 3)  # O, Kh, Kw, I
    packed = pack_weight(codes, torch.ones(1), torch.ones(1, 2, 2, 2, dtype=torch.int8), group_size=2)
    assert packed.qweight.tolist() == [[[[0xBA, 0x0C], [0xED, 0x0F]], [[0x10, 0x02], [0x43, 0x05]]]]


def test_int8_layout_is_the_codes_themselves():
    codes = torch.tensor([[-127, 0, 127]], dtype=torch.int8)
    packed = pack_weight(codes, torch.tensor([0.5]))
    assert packed.qweight.tolist() == [[-127, 0, 127]]
    assert packed.codes().data_ptr() == packed.qweight.data_ptr()
    assert packed.dequantize().tolist() == [[-63.5, 0.0, 63.5]]


def test_four_bits_take_four_bits():
    packed = pack_weight(_codes((64, 256), -8, 7, 0), torch.ones(64), _codes((64, 4), 1, 15, 0), group_size=64)
    assert packed.nbytes == 64 * 256 // 2 + 64 * 4 + 64 * 4


@pytest.mark.parametrize(
    ("codes", "multiplier", "group"),
    [
        (torch.tensor([[-128, 0]]), None, None),
        (torch.tensor([[8, 0]]), torch.tensor([[1]]), 2),
        (torch.tensor([[1, 0]]), torch.tensor([[0]]), 2),
        (torch.tensor([[1, 0]]), torch.tensor([[16]]), 2),
        (torch.tensor([[1, 0]]), torch.tensor([[1, 1]]), 2),
        (torch.tensor([[1, 0]]), torch.tensor([[1]]), 3),
        (torch.tensor([[1, 0]]), torch.tensor([[1]]), None),
        (torch.tensor([[1, 0]]), None, 2),
        (torch.tensor([[1.0, 0.0]]), None, None),
    ],
)
def test_impossible_codes_are_refused(codes, multiplier, group):
    with pytest.raises(PackingError):
        pack_weight(codes, torch.ones(1), multiplier, group_size=group)


def test_buffers_of_another_shape_or_dtype_are_refused():
    good = pack_weight(_codes((3, 8), -127, 127, 0), torch.ones(3))
    for qweight, scale, channels in (
        (good.qweight[:2], good.scale, 8),
        (good.qweight, good.scale.double(), 8),
        (good.qweight, good.scale, 7),
        (good.qweight.to(torch.uint8), good.scale, 8),
        (good.qweight.flatten(), good.scale, 8),
    ):
        with pytest.raises(PackingError):
            PackedWeight(qweight, scale, None, 8, None, channels)


def test_storage_needs_no_memory():
    shape, dtype = storage(1 << 20, (3, 3), 1 << 20, 4, 64)["qweight"]
    assert (shape, dtype) == ((1 << 20, 3, 3, 1 << 19), torch.uint8)
