"""The emulator itself: its operations against plain arithmetic, and each failure that it must report."""

import ctypes
import shutil

import pytest
import torch

from dcomp.kernels.cuda.tiles import ENTRIES
from dcomp.kernels.emulator.build import FOLDERS, KERNELS, library_file
from tests.support.emulated import Emulator, EmulatorError, emulator, of_all_workers

# Each kernel does one thing; `in` and `out` are [32] words or more.
PROBES = """
#include "primitives.cuh"
namespace dcomp {
struct ProbeArguments {
  const uint32* in;
  uint32* out;
  int count;
  int unused;
};
template <int kThreads_, int kSharedBytes_>
struct Probe {
  using Arguments = ProbeArguments;
  static constexpr int kThreads = kThreads_, kBlocks = 1, kSharedBytes = kSharedBytes_;
};
struct Products : Probe<32, 0> {  // in: a and b as [32][6] registers; out: signed and unsigned sums, [32][8]
  static void run(const Arguments& a) {
    const int lane = threadIdx.x;
    uint32 x[4], w[2];
    for (int i = 0; i < 4; ++i) x[i] = load_global(a.in + lane * 6 + i);
    for (int i = 0; i < 2; ++i) w[i] = load_global(a.in + lane * 6 + 4 + i);
    int of_signed[4] = {1, 2, 3, 4}, of_unsigned[4] = {};
    multiply_add_s8(of_signed, x, w);
    multiply_add_u8(of_unsigned, x, w);
    for (int i = 0; i < 4; ++i) store_global(a.out + lane * 8 + i, static_cast<uint32>(of_signed[i]));
    for (int i = 0; i < 4; ++i) store_global(a.out + lane * 8 + 4 + i, static_cast<uint32>(of_unsigned[i]));
  }
};
struct Halves : Probe<32, 0> {  // in: a and b as [32][6] registers; out: sums, [32][4]
  static void run(const Arguments& a) {
    uint32 x[4], w[2];
    for (int i = 0; i < 4; ++i) x[i] = load_global(a.in + threadIdx.x * 6 + i);
    for (int i = 0; i < 2; ++i) w[i] = load_global(a.in + threadIdx.x * 6 + 4 + i);
    float sums[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    multiply_add_f16(sums, x, w);
    for (int i = 0; i < 4; ++i) store_global(a.out + threadIdx.x * 4 + i, to_bits(sums[i]));
  }
};
struct Powers : Probe<32, 0> {  // out: power of two, product and sum rounded once, larger one
  static void run(const Arguments& a) {
    const float value = from_bits(load_global(a.in + threadIdx.x));
    store_global(a.out + threadIdx.x * 3, to_bits(power_of_two(value)));
    store_global(a.out + threadIdx.x * 3 + 1, to_bits(fused_multiply_add(value, value, -1.0f)));
    store_global(a.out + threadIdx.x * 3 + 2, to_bits(maximum(value, 1.0f)));
  }
};
struct Nibbles : Probe<32, 0> {  // in: a and b as [32][6] registers; out: sums of all k, of the first half, [32][8]
  static void run(const Arguments& a) {
    const int lane = threadIdx.x;
    uint32 x[4], w[2];
    for (int i = 0; i < 4; ++i) x[i] = load_global(a.in + lane * 6 + i);
    for (int i = 0; i < 2; ++i) w[i] = load_global(a.in + lane * 6 + 4 + i);
    int whole[4], half[4];
    const uint32 first[2] = {x[0], x[1]};
    multiply_u4(whole, x, w);
    multiply_u4(half, first, w[0]);
    for (int i = 0; i < 4; ++i) store_global(a.out + lane * 8 + i, static_cast<uint32>(whole[i]));
    for (int i = 0; i < 4; ++i) store_global(a.out + lane * 8 + 4 + i, static_cast<uint32>(half[i]));
  }
};
struct Tf32 : Probe<32, 0> {  // in: a and b as [32][6] registers; out: sums plus 1, 2, 3, 4, as floats, [32][4]
  static void run(const Arguments& a) {
    const int lane = threadIdx.x;
    uint32 x[4], w[2];
    for (int i = 0; i < 4; ++i) x[i] = load_global(a.in + lane * 6 + i);
    for (int i = 0; i < 2; ++i) w[i] = load_global(a.in + lane * 6 + 4 + i);
    int sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = static_cast<int>(to_bits(i + 1.0f));
    multiply_add_tf32(sums, x, w);
    for (int i = 0; i < 4; ++i) store_global(a.out + lane * 4 + i, static_cast<uint32>(sums[i]));
  }
};
struct Dots : Probe<32, 0> {  // in: two words; out: their dot products and lower halves
  static void run(const Arguments& a) {
    const uint32 x = load_global(a.in), y = load_global(a.in + 1);
    if (threadIdx.x) return;
    store_global(a.out, static_cast<uint32>(dot_low(x, y, 7)));
    store_global(a.out + 1, static_cast<uint32>(dot_high(x, y, 7)));
    store_global(a.out + 2, lower_halves(x, y));
  }
};
struct Matrices : Probe<32, 512> {  // in: 512 bytes; out: [32][4]
  static void run(const Arguments& a) {
    uint8* const at = shared_memory() + threadIdx.x * 16;
    copy_async16(at, reinterpret_cast<const uint8*>(a.in) + threadIdx.x * 16, true);
    copy_async_commit();
    copy_async_wait<0>();
    barrier();
    uint32 r[4];
    load_matrices(r, at);
    for (int i = 0; i < 4; ++i) store_global(a.out + threadIdx.x * 4 + i, r[i]);
  }
};
struct Floats16 : Probe<32, 0> {  // out: bfloat16 low, float16 high of each float, and float16 back as a float
  static void run(const Arguments& a) {
    for (int i = threadIdx.x; i < a.count; i += 32) {
      const float value = from_bits(load_global(a.in + i));
      const uint32 half = to_float16s(value, 0.0f) & 0xFFFF;
      store_global(a.out + i * 2, (to_bfloat16s(0.0f, value) >> 16) | half << 16);
      store_global(a.out + i * 2 + 1, to_bits(from_float16(static_cast<uint16>(half))));
    }
  }
};
struct Race : Probe<64, 256> {  // one warp reads what the other wrote
  static void run(const Arguments& a) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    store_shared(shared + threadIdx.x, 1.0f);
    if (a.count) barrier();
    store_global(a.out + threadIdx.x, to_bits(load_shared(shared + (threadIdx.x + 32) % 64)));
  }
};
struct Unwritten : Probe<32, 256> {
  static void run(const Arguments& a) {
    store_global(a.out + threadIdx.x, to_bits(load_shared(reinterpret_cast<float*>(shared_memory()))));
  }
};
struct Unwaited : Probe<32, 1024> {
  static void run(const Arguments& a) {
    copy_async16(shared_memory() + threadIdx.x * 16, a.in, true);
    copy_async_commit();
    copy_async16(shared_memory() + 512 + threadIdx.x * 16, a.in, false);
    copy_async_commit();
    if (a.count == 0) copy_async_wait<0>();
    if (a.count == 1) copy_async_wait<1>();
    const Words<4> words = load_shared16(shared_memory() + (a.count == 1 ? 512 : 0) + threadIdx.x * 16);
    store_global(a.out + threadIdx.x, words.word[0]);
  }
};
struct Unfinished : Probe<32, 512> {
  static void run(const Arguments& a) {
    copy_async16(shared_memory() + threadIdx.x * 16, a.in, true);
    copy_async_commit();
  }
};
struct Beyond : Probe<32, 128> {  // shared memory
  static void run(const Arguments& a) {
    store_shared(reinterpret_cast<float*>(shared_memory()) + threadIdx.x + a.count, 1.0f);
  }
};
struct Outside : Probe<32, 0> {  // global memory
  static void run(const Arguments& a) { store_global(a.out + threadIdx.x + a.count, 7u); }
};
struct Misaligned : Probe<32, 0> {
  static void run(const Arguments& a) { load_global(reinterpret_cast<const Words<4>*>(a.in + a.count)); }
};
struct Apart : Probe<32, 0> {  // lanes at two operations
  static void run(const Arguments& a) {
    if (threadIdx.x < 16 || !a.count) {
      shuffle_xor(1.0f, 1);
    } else {
      load_shared(reinterpret_cast<float*>(shared_memory()));
    }
  }
};
struct Away : Probe<32, 0> {  // a lane is missing
  static void run(const Arguments& a) {
    if (threadIdx.x != 5 || !a.count) shuffle_xor(1.0f, 1);
  }
};
struct Gone : Probe<64, 0> {  // a warp returns before a barrier
  static void run(const Arguments& a) {
    if (threadIdx.x >= 32 && a.count) return;
    barrier();
  }
};
struct Banks : Probe<32, 4096> {  // neighbours are `count` words apart
  static void run(const Arguments& a) {
    store_shared(reinterpret_cast<float*>(shared_memory()) + threadIdx.x * a.count, 1.0f);
  }
};
struct Order : Probe<128, 0> {  // each thread writes over what those before it wrote
  static void run(const Arguments& a) { store_global(a.out, threadIdx.x / 32); }
};
struct Large : Probe<32, 64 << 10> {
  static void run(const Arguments&) {}
};
}  // namespace dcomp
"""
SHAPES = {  # threads, bytes of shared memory
    "Products": (32, 0),
    "Halves": (32, 0),
    "Powers": (32, 0),
    "Nibbles": (32, 0),
    "Tf32": (32, 0),
    "Dots": (32, 0),
    "Matrices": (32, 512),
    "Floats16": (32, 0),
    "Race": (64, 256),
    "Unwritten": (32, 256),
    "Unwaited": (32, 1024),
    "Unfinished": (32, 512),
    "Beyond": (32, 128),
    "Outside": (32, 0),
    "Misaligned": (32, 0),
    "Apart": (32, 0),
    "Away": (32, 0),
    "Gone": (64, 0),
    "Banks": (32, 4096),
    "Order": (128, 0),
    "Large": (32, 64 << 10),
}


class ProbeArguments(ctypes.Structure):
    _fields_ = [("in", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_int), ("unused", ctypes.c_int)]


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """The emulator with the probes for kernels."""
    folder = tmp_path_factory.mktemp("probes")
    for name in FOLDERS:
        shutil.copytree(KERNELS / name, folder / name)
    (folder / "cuda" / "kernels.cu").write_text(PROBES)
    entries = [f"{name}, {name}" for name in SHAPES]
    libraries = of_all_workers(tmp_path_factory)
    return Emulator(library_file(libraries, kernels=folder, entries=entries, optimize="-O1"))


def run(probes, name, given=None, count=0, words=64):
    """Run a probe on a tensor of any type; return `words` words."""
    out = torch.zeros(words, dtype=torch.int32)
    given = torch.zeros(64, dtype=torch.int32) if given is None else given
    threads, shared_memory = SHAPES[name]
    probes.run(name, (1, 1), threads, shared_memory, ProbeArguments, **{"in": given}, out=out, count=count)
    return out


def test_products_have_the_fragments_of_the_ptx_isa(probes):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (16, 32), generator=generator)
    b = torch.randint(-128, 128, (8, 32), generator=generator)
    registers = torch.zeros(32, 6, 4, dtype=torch.uint8)
    for lane in range(32):
        row, k = lane // 4, lane % 4 * 4
        # a0: (row, k), a1: (row + 8, k), a2: (row, k + 16), a3: (row + 8, k + 16); b0: (k, row), b1: (k + 16, row)
        for i, (down, right) in enumerate([(0, 0), (8, 0), (0, 16), (8, 16)]):
            registers[lane, i] = a[row + down, k + right : k + right + 4].to(torch.uint8)
        for i, right in enumerate([0, 16]):
            registers[lane, 4 + i] = b[row, k + right : k + right + 4].to(torch.int8).view(torch.uint8)
    out = run(probes, "Products", registers, words=256).view(32, 2, 4)
    for which, values in enumerate([a.to(torch.uint8).view(torch.int8).long(), a]):
        sums = values @ b.t()
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            expected = sums[[row, row, row + 8, row + 8], [column, column + 1, column, column + 1]]
            start = torch.tensor([1, 2, 3, 4]) * (1 - which)
            assert torch.equal(out[lane, which].long(), expected + start)


def test_products_of_float16_have_the_fragments_of_the_ptx_isa(probes):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2048, 2049, (rows, 16), generator=generator) for rows in (16, 8))
    a[3] *= 0
    registers = torch.zeros(32, 6, 2, dtype=torch.float16)
    for lane in range(32):
        row, k = lane // 4, lane % 4 * 2
        # a0: (row, k), a1: (row + 8, k), a2: (row, k + 8), a3: (row + 8, k + 8); b0: (k, row), b1: (k + 8, row)
        for i, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            registers[lane, i] = a[row + down, k + right : k + right + 2].half() * 2.0**-24  # subnormal, most of them
        for i, right in enumerate([0, 8]):
            registers[lane, 4 + i] = b[row, k + right : k + right + 2].half()
    registers[20, 3, 1] = torch.nan  # row 13 alone
    out = run(probes, "Halves", registers, words=128).view(torch.float32).view(32, 4)
    sums = (a @ b.t()).double() * 2.0**-24
    sums[13] = torch.nan
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        expected = sums[[row, row, row + 8, row + 8], [column, column + 1, column, column + 1]] + torch.arange(1, 5)
        torch.testing.assert_close(out[lane], expected.float(), rtol=0, atol=0, equal_nan=True)


def test_powers_of_two_and_what_is_rounded_once(probes):
    values = torch.tensor([0.0, 8.0, -3.0, 0.5, -126.0, -127.0, 127.5, 200.0, -torch.inf, torch.nan, 1 + 2.0**-12])
    values = torch.nn.functional.pad(values, (0, 32 - len(values)))
    powers, fused, larger = run(probes, "Powers", values, words=96).view(torch.float32).view(32, 3).unbind(1)
    expected = values.double().exp2().float()
    expected = torch.where(expected < torch.finfo().tiny, 0.0, expected)
    torch.testing.assert_close(powers, expected, rtol=2.0**-22, atol=0, equal_nan=True)
    torch.testing.assert_close(fused, (values.double() ** 2 - 1).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(larger, values.nan_to_num(1.0, neginf=-9.0).clamp(min=1.0))


def test_products_of_nibbles_have_the_fragments_of_the_ptx_isa(probes):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 16, (16, 64), generator=generator)
    b = torch.randint(-8, 8, (8, 64), generator=generator)
    places = torch.arange(8) * 4
    registers = torch.zeros(32, 6, dtype=torch.int64)
    for lane in range(32):
        row, k = lane // 4, lane % 4 * 8
        # a0: (row, k), a1: (row + 8, k), a2: (row, k + 32), a3: (row + 8, k + 32); b0: (k, row), b1: (k + 32, row)
        for i, (down, right) in enumerate([(0, 0), (8, 0), (0, 32), (8, 32)]):
            registers[lane, i] = (a[row + down, k + right : k + right + 8] << places).sum()
        for i, right in enumerate([0, 32]):
            registers[lane, 4 + i] = ((b[row, k + right : k + right + 8] & 15) << places).sum()
    out = run(probes, "Nibbles", registers.to(torch.int32), words=256).view(32, 2, 4)
    for which, depth in enumerate((64, 32)):
        sums = a[:, :depth] @ b[:, :depth].t()
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            expected = sums[[row, row, row + 8, row + 8], [column, column + 1, column, column + 1]]
            assert torch.equal(out[lane, which].long(), expected)


def test_products_of_tf32_have_the_fragments_of_the_ptx_isa(probes):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-512, 512, (count, 8), generator=generator).float() for count in (16, 8))
    registers = torch.zeros(32, 6)
    for lane in range(32):
        row, k = lane // 4, lane % 4
        # a0: (row, k), a1: (row + 8, k), a2: (row, k + 4), a3: (row + 8, k + 4); b0: (k, row), b1: (k + 4, row)
        of_a = [a[row, k], a[row + 8, k], a[row, k + 4], a[row + 8, k + 4]]
        registers[lane] = torch.stack([*of_a, b[row, k], b[row, k + 4]])
    bits = registers.view(torch.int32)
    out = run(probes, "Tf32", bits, words=128).view(torch.float32).view(32, 4)
    sums = a @ b.t()
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        expected = sums[[row, row, row + 8, row + 8], [column, column + 1, column, column + 1]]
        assert torch.equal(out[lane], expected + torch.tensor([1.0, 2.0, 3.0, 4.0]))
    bits[7, 2] |= 1
    with pytest.raises(EmulatorError, match="tf32 has more digits"):
        run(probes, "Tf32", bits, words=128)


def test_signed_halves_meet_unsigned_bytes(probes):
    given = torch.tensor([-7680 & 0xFFFF | 6720 << 16, 225 | 1 << 8 | 15 << 16 | 255 << 24]).to(torch.int32)
    found = run(probes, "Dots", torch.cat([given, torch.zeros(62, dtype=torch.int32)]))[:3].tolist()
    low = 255 << 24 | 15 << 16 | 1 << 8 | 225
    assert found[:2] == [7 - 7680 * 225 + 6720, 7 - 7680 * 15 + 6720 * 255]
    assert found[2] & 0xFFFFFFFF == (-7680 & 0xFFFF) | (low & 0xFFFF) << 16


def test_matrices_are_spread_as_in_the_ptx_isa(probes):
    rows = torch.arange(128, dtype=torch.int32)  # 32 rows of four words
    out = run(probes, "Matrices", rows, words=128).view(32, 4)
    for lane in range(32):
        assert out[lane].tolist() == [(8 * i + lane // 4) * 4 + lane % 4 for i in range(4)]


def test_floats_of_16_bits_round_like_torch(probes):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    small = torch.randn(4096, generator=generator) * 2.0 ** torch.randint(-30, 17, (4096,), generator=generator)
    edges = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, -65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, torch.inf])
    values = torch.cat([bits.view(torch.float32), small, edges])
    out = run(probes, "Floats16", values, len(values), 2 * len(values)).view(-1, 2)
    halves = out[:, 0].contiguous().view(torch.int16).view(-1, 2)
    is_number = ~values.isnan()
    assert torch.equal(halves[:, 0][is_number], values.bfloat16().view(torch.int16)[is_number])
    assert torch.equal(halves[:, 1][is_number], values.half().view(torch.int16)[is_number])
    assert halves[:, 0].contiguous().view(torch.bfloat16)[~is_number].isnan().all()
    back = out[:, 1].contiguous().view(torch.float32)
    assert torch.equal(back[is_number], values.half().float()[is_number])
    assert back[~is_number].isnan().all()


# probe, the count with which it fails, and with which it does not, and why
FAILURES = [
    ("Race", 0, 1, "race|nobody has written"),
    ("Unwaited", 2, 0, "before its copy was waited for"),
    ("Unwaited", 1, 0, "before its copy was waited for"),
    ("Beyond", 1, 0, "out of bounds"),
    ("Beyond", -1, 0, "out of bounds"),
    ("Outside", 33, 0, "outside all buffers"),
    ("Misaligned", 2, 4, "misaligned"),
    ("Apart", 1, 0, "diverged"),
    ("Away", 1, 0, "diverged"),
    ("Gone", 1, 0, "returned before a barrier"),
]


@pytest.mark.parametrize(("name", "bad", "good", "why"), FAILURES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_failures_are_reported(probes, name, bad, good, why, seed):
    probes.seed(seed)
    with pytest.raises(EmulatorError, match=why):
        run(probes, name, count=bad)
    run(probes, name, count=good)


@pytest.mark.parametrize(
    ("name", "why"), [("Unwritten", "nobody has written"), ("Unfinished", "returned before its copies")]
)
def test_what_is_always_wrong_is_reported(probes, name, why):
    with pytest.raises(EmulatorError, match=why):
        run(probes, name)


@pytest.mark.parametrize(("apart", "wavefronts"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (0, 1)])
def test_wavefronts_are_counted(probes, apart, wavefronts):
    probes.counts()
    if apart == 0:  # all lanes write the same word
        with pytest.raises(EmulatorError, match="race"):
            run(probes, "Banks", count=apart)
        return
    run(probes, "Banks", count=apart)
    counts = probes.counts()
    assert (counts["wavefronts"], counts["ideal_wavefronts"]) == (wavefronts, 1)


def test_the_seed_orders_warps(probes):
    last = set()
    for seed in range(64):
        probes.seed(seed)
        last.add(int(run(probes, "Order")[0]))
    assert last == {0, 1, 2, 3}
    probes.seed(0)
    assert int(run(probes, "Order")[0]) == 3


def test_a_launch_unlike_the_kernel_is_refused():
    name, entry = next(iter(ENTRIES.items()))
    for threads, shared_memory, why in (
        (entry.threads // 2, entry.shared_memory, "blocks of"),
        (entry.threads, entry.shared_memory - 16, "bytes of shared memory"),
    ):
        with pytest.raises(EmulatorError, match=why):
            emulator().run(name, (1, 1), threads, shared_memory, ProbeArguments)


def test_much_shared_memory_must_be_asked_for(probes):
    function, arguments = ctypes.c_void_p(), ProbeArguments()
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    probes.library.cuModuleGetFunction(ctypes.byref(function), None, b"Large")
    launch = (function, 1, 1, 1, 32, 1, 1, 64 << 10, None, parameters, None)
    assert probes.library.cuLaunchKernel(*launch) == 1
    assert b"not asked for" in probes.library.emulator_error()
    assert probes.library.cuFuncSetAttribute(function, 8, 1 << 20) == 1
    assert probes.library.cuFuncSetAttribute(function, 8, 64 << 10) == 0
    assert probes.library.cuLaunchKernel(*launch) == 0


def test_unknown_kernels_are_not_found():
    function = ctypes.c_void_p()
    assert emulator().library.cuModuleGetFunction(ctypes.byref(function), None, b"nothing") == 500


def test_tables_of_python_and_of_the_source_agree():
    for name, entry in ENTRIES.items():
        function = ctypes.c_void_p()
        assert emulator().library.cuModuleGetFunction(ctypes.byref(function), None, name.encode()) == 0
        with pytest.raises(EmulatorError, match="no grid"):
            emulator().run(name, (0, 1), entry.threads, entry.shared_memory, ProbeArguments)
