// AVX-512 and AMX on processors that have AVX2: what the kernels use of them, in plain C++.
//
// Included before all else by `avx512_compiler.py`, which leaves out the flags that these stand for. Instructions are
// those of Intel's manual; tiles that no configuration was loaded for end the process.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace emulated {

typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef int64_t Longs __attribute__((vector_size(64), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), may_alias));

template <class To, class From>
To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Of>
__m512 each(Of of) {
  __m512 v;
  for (int i = 0; i < 16; ++i) v[i] = of(i);
  return v;
}

inline float widened(uint16_t half) { return as<float>(static_cast<uint32_t>(half) << 16); }

// To bfloat16, ties to even; what is below normal numbers is 0.
inline uint16_t narrowed(float value) {
  const uint32_t bits = as<uint32_t>(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 64);
  if ((bits & 0x7F800000) == 0) return static_cast<uint16_t>(bits >> 31 << 15);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float pair_added(float sum, uint32_t a, uint32_t b) {
  sum = __builtin_fmaf(widened(a >> 16), widened(b >> 16), sum);
  return __builtin_fmaf(widened(static_cast<uint16_t>(a)), widened(static_cast<uint16_t>(b)), sum);
}

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return each([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
inline __m512 max(__m512 a, __m512 b) {
  return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 min(__m512 a, __m512 b) {
  return each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline __m512 set1(float value) { return __m512{} + value; }
inline __m512i set1(int32_t value) { return as<__m512i>(Ints{} + value); }
inline __m512 load(const void* p) {
  __m512 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(void* p, __m512 v) { memcpy(p, &v, sizeof v); }
inline __m512 load_some(__mmask16 mask, const float* p) {
  return each([&](int i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
inline void store_some(float* p, __mmask16 mask, __m512 v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) p[i] = v[i];
  }
}
inline __m256i load_some_halves(__mmask16 mask, const void* p) {
  Halves v{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(reinterpret_cast<char*>(&v) + 2 * i, static_cast<const char*>(p) + 2 * i, 2);
  }
  return as<__m256i>(v);
}
inline __m512i widen_halves(__m256i v) { return as<__m512i>(__builtin_convertvector(as<Halves>(v), Ints)); }
inline __m256bh to_halves(__m512 v) {
  Halves halves;
  for (int i = 0; i < 16; ++i) halves[i] = narrowed(v[i]);
  return as<__m256bh>(halves);
}
inline __m512 dot_halves(__m512 sums, __m512bh a, __m512bh b) {
  const Ints x = as<Ints>(a), y = as<Ints>(b);
  return each([&](int i) { return pair_added(sums[i], x[i], y[i]); });
}
inline float sum_of(__m512 v) {
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
}
inline float largest_of(__m512 v) {
  float most = v[0];
  for (int i = 1; i < 16; ++i) most = most > v[i] ? most : v[i];
  return most;
}
inline __m512 rounded(__m512 v) {
  return each([&](int i) { return __builtin_nearbyintf(v[i]); });
}
inline __m512 scaled(__m512 v, __m512 power) {
  return each([&](int i) { return v[i] * __builtin_exp2f(__builtin_floorf(power[i])); });
}

// In each 16 bytes: words `first` and on of both, or pairs of words, in turn.
template <class Vector>
__m512i unpacked(__m512i a, __m512i b, int first) {
  const Vector x = as<Vector>(a), y = as<Vector>(b);
  constexpr int kCount = sizeof(Vector) / sizeof(x[0]), kLane = kCount / 4;
  Vector v{};
  for (int i = 0; i < kCount; ++i) {
    const int from = i / kLane * kLane + first + i % kLane / 2;
    v[i] = i % 2 ? y[from] : x[from];
  }
  return as<__m512i>(v);
}

// Integers nearest to values, ties to even; the least one for what is beyond all.
inline __m512i to_integers(__m512 v) {
  Ints whole{};
  for (int i = 0; i < 16; ++i) {
    whole[i] = v[i] >= -2147483648.0f && v[i] < 2147483648.0f ? static_cast<int32_t>(__builtin_nearbyintf(v[i]))
                                                               : INT32_MIN;
  }
  return as<__m512i>(whole);
}

// In each 16 bytes: the integers of a, then those of b, each of half the bits, as near as these come to it.
template <class Narrow, class Wide>
__m512i packed(__m512i a, __m512i b) {
  typedef Wide Wides __attribute__((vector_size(64), may_alias));
  typedef Narrow Narrows __attribute__((vector_size(64), may_alias));
  constexpr int64_t kCount = 64 / sizeof(Narrow), kLane = kCount / 4, kLow = std::numeric_limits<Narrow>::min(),
                    kHigh = std::numeric_limits<Narrow>::max();
  const Wides x = as<Wides>(a), y = as<Wides>(b);
  Narrows v{};
  for (int64_t i = 0; i < kCount; ++i) {
    const int64_t from = i / kLane * (kLane / 2) + i % (kLane / 2);
    const int64_t value = i % kLane < kLane / 2 ? x[from] : y[from];
    v[i] = static_cast<Narrow>(value < kLow ? kLow : value > kHigh ? kHigh : value);
  }
  return as<__m512i>(v);
}
inline __m512i ordered(__m512i places, __m512i v) {
  const Ints from = as<Ints>(places), x = as<Ints>(v);
  Ints to{};
  for (int i = 0; i < 16; ++i) to[i] = x[from[i] & 15];
  return as<__m512i>(to);
}
// The real one is off by 2^-14 at most: so is this.
inline __m512 near_reciprocal(__m512 v) {
  return each([&](int i) { return (1.0f / v[i]) * (1.0f + 0x1p-15f); });
}

// Sixteen bytes each: two of a, then two of b.
inline __m512i shuffled(__m512i a, __m512i b, int places) {
  char from[2][64], to[64];
  memcpy(from[0], &a, 64);
  memcpy(from[1], &b, 64);
  for (int i = 0; i < 4; ++i) memcpy(to + 16 * i, from[i / 2] + 16 * (places >> 2 * i & 3), 16);
  return as<__m512i>(to);
}

struct Tiles {
  bool ready;
  uint8_t bytes[8][16][64];
};

inline thread_local Tiles all_tiles;

inline uint8_t (&tile(int which))[16][64] {
  if (!all_tiles.ready) abort();
  return all_tiles.bytes[which];
}

// Only whole tiles are used.
inline void load_config(const void* p) {
  uint8_t config[64];
  memcpy(config, p, sizeof config);
  if (config[0] != 1) abort();
  for (int i = 0; i < 8; ++i) {
    if (config[16 + 2 * i] != 64 || config[48 + i] != 16) abort();
  }
  memset(&all_tiles, 0, sizeof all_tiles);
  all_tiles.ready = true;
}
inline void release() { all_tiles.ready = false; }
inline void zero(int which) { memset(tile(which), 0, sizeof all_tiles.bytes[0]); }
inline void load_tile(int which, const void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) memcpy(tile(which)[row], static_cast<const char*>(p) + row * stride, 64);
}
inline void store_tile(int which, void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) memcpy(static_cast<char*>(p) + row * stride, tile(which)[row], 64);
}

// sums [16, 16] += a [16, 16 words] b [16 words, 16], where `add` adds the product of two words
template <class Sum, class Add>
void multiply_tiles(int sums, int a, int b, Add add) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      Sum sum;
      memcpy(&sum, &tile(sums)[row][4 * column], 4);
      for (int k = 0; k < 16; ++k) sum = add(sum, &tile(a)[row][4 * k], &tile(b)[k][4 * column]);
      memcpy(&tile(sums)[row][4 * column], &sum, 4);
    }
  }
}

template <class Left>
void multiply_bytes(int sums, int a, int b) {
  multiply_tiles<int32_t>(sums, a, b, [](int32_t sum, const uint8_t* x, const uint8_t* y) {
    for (int i = 0; i < 4; ++i) sum += static_cast<Left>(x[i]) * static_cast<int8_t>(y[i]);
    return sum;
  });
}

inline void multiply_halves(int sums, int a, int b) {
  multiply_tiles<float>(sums, a, b, [](float sum, const uint8_t* x, const uint8_t* y) {
    uint32_t left, right;
    memcpy(&left, x, 4);
    memcpy(&right, y, 4);
    return pair_added(sum, left, right);
  });
}

}  // namespace emulated

#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_max_ps emulated::max
#define _mm512_min_ps emulated::min
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_set1_ps(value) emulated::set1(static_cast<float>(value))
#define _mm512_set1_epi32(value) emulated::set1(static_cast<int32_t>(value))
#define _mm512_setzero_ps() (__m512{})
#define _mm512_load_ps emulated::load
#define _mm512_loadu_ps emulated::load
#define _mm512_storeu_ps emulated::store
#define _mm512_maskz_loadu_ps emulated::load_some
#define _mm512_mask_storeu_ps emulated::store_some
#define _mm256_maskz_loadu_epi16 emulated::load_some_halves
#define _mm512_cvtepu16_epi32 emulated::widen_halves
#define _mm512_cvtneps_pbh emulated::to_halves
#define _mm512_dpbf16_ps emulated::dot_halves
#define _mm512_castsi512_ps(v) emulated::as<__m512>(v)
#define _mm512_cvtss_f32(v) ((v)[0])
#define _mm512_slli_epi32(v, by) emulated::as<__m512i>(emulated::as<emulated::Ints>(v) << (by))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_reduce_add_ps emulated::sum_of
#define _mm512_reduce_max_ps emulated::largest_of
#define _mm512_roundscale_ps(v, how) emulated::rounded(v)
#define _mm512_scalef_ps emulated::scaled
#define _mm512_cvtps_epi32 emulated::to_integers
#define _mm512_packs_epi32 emulated::packed<int16_t, int32_t>
#define _mm512_packus_epi16 emulated::packed<uint8_t, int16_t>
#define _mm512_permutexvar_epi32 emulated::ordered
#define _mm512_rcp14_ps emulated::near_reciprocal
#define _mm512_unpacklo_epi32(a, b) emulated::unpacked<emulated::Ints>(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::unpacked<emulated::Ints>(a, b, 2)
#define _mm512_unpacklo_epi64(a, b) emulated::unpacked<emulated::Longs>(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emulated::unpacked<emulated::Longs>(a, b, 1)
#define _mm512_shuffle_i32x4 emulated::shuffled
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbssd emulated::multiply_bytes<int8_t>
#define _tile_dpbusd emulated::multiply_bytes<uint8_t>
#define _tile_dpbf16ps emulated::multiply_halves

// What the flags would have defined, which the compiler's own headers must not see.
#ifdef DCOMP_EMULATE_AVX512F
#define __AVX512F__ 1
#endif
#ifdef DCOMP_EMULATE_AVX512BF16
#define __AVX512BF16__ 1
#endif
#ifdef DCOMP_EMULATE_AMX
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#endif

// The system and the processor say that all is there.
#define syscall(...) 0
#define __builtin_cpu_supports(name) 1
