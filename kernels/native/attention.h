// Attention with products of bfloat16 and sums of fp32: blocks of keys with a running maximum, as flash attention.
//
// Keys and values are packed once for a head into pairs along the axis that is summed, which is what both AVX512-BF16
// and AMX multiply. Whatever surrounds the products is the same for both.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "simd.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kPair = 2;         // values that one lane holds
constexpr int64_t kDepth = 32;       // values that one tile holds of what is summed
constexpr int64_t kTileRows = 16;
constexpr float kLog2e = 1.4426950408889634f;

typedef uint32_t Pair;  // two bfloat16, the first one low

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The first `count` of 16 values, and zeros behind them
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFF : count > 0 ? (1u << count) - 1 : 0);
}
inline __m512 some_lanes(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline __m512 some_lanes(const BFloat16* p, int64_t count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void store_halves(void* to, __m512 v) {
  const __m256bh halves = _mm512_cvtneps_pbh(v);
  memcpy(to, &halves, sizeof halves);
}

// 2^x for x <= 0, relative error 1e-4: less than what rounding to bfloat16 costs. No less than 2^-120, since numbers
// below 2^-126 are slow.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-120.0f), x);  // in this order NaN stays
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(5.5008931e-02f);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(2.4221097e-01f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(6.9328293e-01f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Rows of a matrix [rows, width] as bfloat16 [rows, padded], zeros in the padding, `out_stride` from each other.
template <class T>
void to_halves(const T* x, int64_t stride, int64_t rows, int64_t width, BFloat16* out, int64_t out_stride,
               int64_t padded) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      store_halves(out + row * out_stride + i, some_lanes(x + row * stride + i, width - i));
    }
  }
}

// keys [keys, width] -> for each 16 of them a tile [padded / 2, 16] of pairs along the width
template <class T>
void pack_keys(const T* x, int64_t stride, int64_t keys, int64_t width, Pair* out, int64_t padded) {
  BFloat16 rows[kLanes * kDepth];
  for (int64_t first = 0; first < keys; first += kLanes, out += kLanes * padded / kPair) {
    const int64_t some = keys - first < kLanes ? keys - first : kLanes;
    for (int64_t start = 0; start < padded; start += kDepth) {
      memset(rows, 0, sizeof rows);
      to_halves(x + first * stride + start, stride, some, width - start, rows, kDepth, kDepth);
      for (int64_t pair = 0; pair < kDepth / kPair; ++pair) {
        Pair* to = out + (start / kPair + pair) * kLanes;
        for (int64_t key = 0; key < kLanes; ++key) memcpy(to + key, rows + key * kDepth + pair * kPair, sizeof(Pair));
      }
    }
  }
}

// values [keys, width] -> pairs along the keys [padded keys / 2, padded]
template <class T>
void pack_values(const T* x, int64_t stride, int64_t keys, int64_t width, Pair* out, int64_t padded_keys,
                 int64_t padded) {
  for (int64_t key = 0; key < padded_keys; key += kPair) {
    for (int64_t i = 0; i < padded; i += kLanes) {
      const __m512 even = some_lanes(x + key * stride + i, key < keys ? width - i : 0);
      const __m512 odd = some_lanes(x + (key + 1) * stride + i, key + 1 < keys ? width - i : 0);
      const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
      const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
      const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      memcpy(out + key / kPair * padded + i, &pairs, sizeof pairs);
    }
  }
}

// out [32, columns] (+)= a [32, depth] b, where b [depth / 2, 16 columns] are pairs: all of whole tiles.
// `next` is how far 16 columns of b are from the next 16, `stride` how far its rows are from each other.
#ifdef __AMX_BF16__
struct Products {
  static constexpr int64_t kStep = kDepth;

  Products() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.bytes[i] = 64;
      shape.rows[i] = kTileRows;
    }
    _tile_loadconfig(&shape);
  }
  ~Products() { _tile_release(); }

  template <int64_t a_stride>
  static void add(float* out, int64_t out_stride, int64_t columns, const BFloat16* a, int64_t depth, const Pair* b,
                  int64_t stride, int64_t next, bool fresh) {
    const int64_t out_bytes = out_stride * 4, a_bytes = a_stride * 2, b_bytes = stride * 4;
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes, b += 2 * next) {
      float* to = out + column;
      if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        _tile_loadd(0, to, out_bytes);
        _tile_loadd(1, to + kLanes, out_bytes);
        _tile_loadd(2, to + kTileRows * out_stride, out_bytes);
        _tile_loadd(3, to + kTileRows * out_stride + kLanes, out_bytes);
      }
      for (int64_t k = 0; k < depth; k += kDepth) {
        const Pair* from = b + k / kPair * stride;
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(5, a + kTileRows * a_stride + k, a_bytes);
        _tile_loadd(6, from, b_bytes);
        _tile_loadd(7, from + next, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, out_bytes);
      _tile_stored(1, to + kLanes, out_bytes);
      _tile_stored(2, to + kTileRows * out_stride, out_bytes);
      _tile_stored(3, to + kTileRows * out_stride + kLanes, out_bytes);
    }
    if (column < columns) {
      float* to = out + column;
      if (fresh) {
        _tile_zero(0);
        _tile_zero(2);
      } else {
        _tile_loadd(0, to, out_bytes);
        _tile_loadd(2, to + kTileRows * out_stride, out_bytes);
      }
      for (int64_t k = 0; k < depth; k += kDepth) {
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(5, a + kTileRows * a_stride + k, a_bytes);
        _tile_loadd(6, b + k / kPair * stride, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
      _tile_stored(0, to, out_bytes);
      _tile_stored(2, to + kTileRows * out_stride, out_bytes);
    }
  }
};
#else
struct Products {
  static constexpr int64_t kStep = kPair;

  // A few columns of lanes with rows whose sums registers hold
  template <int64_t kColumns, int64_t a_stride>
  static void add_columns(float* out, int64_t out_stride, const BFloat16* a, int64_t depth, const Pair* b,
                          int64_t stride, int64_t next, bool fresh) {
    constexpr int64_t kHeld = 8;
    for (int64_t row = 0; row < 2 * kTileRows; row += kHeld, a += kHeld * a_stride, out += kHeld * out_stride) {
      __m512 sums[kHeld][kColumns];
      for (int64_t r = 0; r < kHeld; ++r) {
        for (int64_t c = 0; c < kColumns; ++c) {
          sums[r][c] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * out_stride + c * kLanes);
        }
      }
      for (int64_t k = 0; k < depth; k += kPair) {
        __m512bh pairs[kColumns], both;
        for (int64_t c = 0; c < kColumns; ++c) memcpy(&pairs[c], b + k / kPair * stride + c * next, sizeof pairs[c]);
        for (int64_t r = 0; r < kHeld; ++r) {
          int32_t pair;
          memcpy(&pair, a + r * a_stride + k, sizeof pair);
          const __m512i spread = _mm512_set1_epi32(pair);
          memcpy(&both, &spread, sizeof both);
          for (int64_t c = 0; c < kColumns; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], both, pairs[c]);
        }
      }
      for (int64_t r = 0; r < kHeld; ++r) {
        for (int64_t c = 0; c < kColumns; ++c) _mm512_storeu_ps(out + r * out_stride + c * kLanes, sums[r][c]);
      }
    }
  }

  template <int64_t a_stride>
  static void add(float* out, int64_t out_stride, int64_t columns, const BFloat16* a, int64_t depth, const Pair* b,
                  int64_t stride, int64_t next, bool fresh) {
    int64_t left = columns / kLanes;
    const auto some = [&](auto count) {
      add_columns<count.value, a_stride>(out, out_stride, a, depth, b, stride, next, fresh);
      left -= count.value;
      out += count.value * kLanes;
      b += count.value * next;
    };
    while (left > 4 || left == 3) some(std::integral_constant<int64_t, 3>());
    while (left > 1) some(std::integral_constant<int64_t, 2>());
    if (left > 0) some(std::integral_constant<int64_t, 1>());
  }
};
#endif

// 32-bit words of packed keys and values of a head
inline int64_t packed_keys(const AttentionHead& head) {
  return round_up(head.keys, kDepth) * round_up(head.width, kDepth) / kPair;
}
inline int64_t packed_values(const AttentionHead& head) {
  return round_up(head.keys, kDepth) * round_up(head.width, kLanes) / kPair;
}

template <class T>
void pack_head(const AttentionHead& head, Pair* keys, Pair* values) {
  pack_keys(static_cast<const T*>(head.k), head.k_stride, head.keys, head.width, keys, round_up(head.width, kDepth));
  pack_values(static_cast<const T*>(head.v), head.v_stride, head.keys, head.width, values,
              round_up(head.keys, kDepth), round_up(head.width, kLanes));
}

constexpr int64_t kQueries = 2 * kTileRows;  // of one block
constexpr int64_t kKeys = 128;              // of one block, at most

// What has been seen of the keys of a row: the largest score, and for each lane the sum of powers below it.
struct RowState {
  __m512 total = _mm512_setzero_ps();
  float highest = -__builtin_inff();
};

// One block of keys becomes probabilities (up to a factor of their row), and what was summed before fits to them.
//
// Maxima are found for all rows first: rows whose powers waited for their own would not overlap.
inline void softmax_block(float* scores, BFloat16* weights, int64_t keys, int64_t padded, float scale, RowState* states,
                          float* sums, int64_t width, int64_t rows) {
  float highest[kQueries];
  for (int64_t row = 0; row < rows; ++row) {
    float* s = scores + row * kKeys;
    for (int64_t key = keys; key < padded; ++key) s[key] = -__builtin_inff();
    __m512 most = _mm512_loadu_ps(s), second = _mm512_loadu_ps(s + kLanes);
    for (int64_t key = kDepth; key < padded; key += kDepth) {
      most = _mm512_max_ps(most, _mm512_loadu_ps(s + key));
      second = _mm512_max_ps(second, _mm512_loadu_ps(s + key + kLanes));
    }
    const float high = _mm512_reduce_max_ps(_mm512_max_ps(most, second)) * scale;
    highest[row] = high > states[row].highest ? high : states[row].highest;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* s = scores + row * kKeys;
    const __m512 shift = _mm512_set1_ps(highest[row]), factor = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < padded; key += kLanes) {
      // Rounded as the highest is: an exact product may be far beyond it where scores are large.
      const __m512 p = power_of_two(_mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(s + key), factor), shift));
      sum = _mm512_add_ps(sum, p);
      store_halves(weights + row * kKeys + key, p);
    }
    RowState& state = states[row];
    if (highest[row] > state.highest) {
      const __m512 less = power_of_two(_mm512_set1_ps(state.highest - highest[row]));
      state.total = _mm512_mul_ps(state.total, less);
      for (int64_t i = 0; i < width; i += kLanes) {
        float* o = sums + row * width + i;
        _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), less));
      }
      state.highest = highest[row];
    }
    state.total = _mm512_add_ps(state.total, sum);
  }
}

template <class T>
void attend_block(const AttentionHead& head, int64_t first, const Pair* keys, const Pair* values) {
  const int64_t depth = round_up(head.width, kDepth), width = round_up(head.width, kLanes);
  const int64_t queries = head.queries - first < kQueries ? head.queries - first : kQueries;
  const float scale = head.scale * kLog2e;
  alignas(64) BFloat16 asked[kQueries * kWidestHead], weights[kQueries * kKeys];
  alignas(64) float scores[kQueries * kKeys], sums[kQueries * kWidestHead];
  RowState states[kQueries];
  for (int64_t row = queries; row < kQueries; ++row) memset(asked + row * kWidestHead, 0, depth * sizeof(BFloat16));
  memset(weights, 0, sizeof weights);
  memset(sums, 0, kQueries * width * sizeof(float));
  to_halves(static_cast<const T*>(head.q) + first * head.q_stride, head.q_stride, queries, head.width, asked,
            kWidestHead, depth);
  Products products;
  for (int64_t key = 0; key < head.keys; key += kKeys) {
    const int64_t some = head.keys - key < kKeys ? head.keys - key : kKeys, padded = round_up(some, kDepth);
    products.add<kWidestHead>(scores, kKeys, padded, asked, round_up(head.width, Products::kStep),
                              keys + key * depth / kPair, kLanes, kLanes * depth / kPair, true);
    softmax_block(scores, weights, some, padded, scale, states, sums, width, queries);
    products.add<kKeys>(sums, width, width, weights, padded, values + key / kPair * width, width, kLanes, false);
  }
  for (int64_t row = 0; row < queries; ++row) {
    float* out = head.out + (first + row) * head.out_stride;
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(states[row].total));
    for (int64_t i = 0; i < head.width; i += kLanes) {
      const __m512 mean = _mm512_mul_ps(_mm512_load_ps(sums + row * width + i), inverse);
      _mm512_mask_storeu_ps(out + i, first_lanes(head.width - i), mean);
    }
  }
}

}  // namespace dcomp::DCOMP_ISA
