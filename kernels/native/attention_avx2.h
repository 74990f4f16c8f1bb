// Attention with products of 16-bit integers: blocks of keys with a running maximum, as flash attention, whose sums are
// added in fp32.
//
// Queries and keys are rounded to as many bits as sums of their products have room for, each with a scale of its own.
// Probabilities are rounded relative to the largest of their row and block, so that many small ones beside a large one
// are not lost, values relative to the largest of their column and block.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "transpose_avx2.h"
#include "simd.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kQueries = 32;  // of one block
constexpr int64_t kKeys = 64;     // of one block, at most
constexpr int64_t kGroup = 8;     // queries whose maxima and totals fill a register
constexpr int64_t kStripKeys = 16;
constexpr int64_t kStripColumns = 16;
constexpr int64_t kHalfStrip = 8;    // what is left of columns, so that 40 are not multiplied as 48
constexpr int64_t kPairsAtOnce = 4;  // of a round; one was 0.7 to 0.8 as fast at 40 channels
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLargestProbability = 16383.0f, kLargestValue = 2047.0f;  // 64 products of them are below 2^31
constexpr float kLog2OfProbability = 13.9999119f;
constexpr float kNone = 1e-34f;  // numbers that are all smaller are taken for zeros

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class Word>
Word* to_cache_line(Word* words) {
  return reinterpret_cast<Word*>((reinterpret_cast<uintptr_t>(words) + 63) / 64 * 64);
}

// The largest magnitude that codes of queries and keys may have: sums of `width` products of them are below 2^31.
inline float largest_code(int64_t width) {
  const float most = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(2147483648.0f / width))) - 1.0f;
  return most < 32767.0f ? most : 32767.0f;
}

template <class T>
__m256 values_at(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_some(p, count);
}

// Magnitudes as bits, whose order has infinity above all numbers, and NaN above infinity.
inline __m256i magnitude(__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)); }

// What makes codes of values whose largest magnitude is given, and, in `scale`, values of codes: NaN where that is no
// finite number.
inline __m256 to_codes(__m256i largest, float most, __m256* scale) {
  const __m256 size = _mm256_castsi256_ps(largest);
  const __m256 is_number = _mm256_cmp_ps(size, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  const __m256 is_some = _mm256_cmp_ps(size, _mm256_set1_ps(kNone), _CMP_GT_OQ);
  const __m256 nan = _mm256_andnot_ps(is_number, _mm256_set1_ps(__builtin_nanf("")));
  *scale = _mm256_or_ps(_mm256_and_ps(_mm256_div_ps(size, _mm256_set1_ps(most)), is_some), nan);
  return _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(most), size), _mm256_and_ps(is_some, is_number));
}

// Codes of one row, zeros behind them up to 16, and its scale.
template <class T>
float take_row(const T* x, int64_t width, float most, int16_t* codes) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < width; i += kLanes) {
    largest = _mm256_max_epi32(largest, magnitude(values_at(x + i, width - i)));
  }
  largest = _mm256_max_epi32(largest, _mm256_permute2x128_si256(largest, largest, 1));
  largest = _mm256_max_epi32(largest, _mm256_shuffle_epi32(largest, 0x4E));
  largest = _mm256_max_epi32(largest, _mm256_shuffle_epi32(largest, 0xB1));
  __m256 scale;
  const __m256 factor = to_codes(largest, most, &scale);
  for (int64_t i = 0; i < width; i += kStripKeys) {
    const __m256 low = values_at(x + i, width - i);
    const __m256 high = width - i > kLanes ? values_at(x + i + kLanes, width - i - kLanes) : _mm256_setzero_ps();
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(low, factor)),
                                            _mm256_cvtps_epi32(_mm256_mul_ps(high, factor)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permute4x64_epi64(both, 0xD8));
  }
  return _mm256_cvtss_f32(scale);
}

// Packed keys: 0 or NaN, which all scores of the head get, 16 words; a scale for each key; codes, for each 16 keys
// pairs along the width [padded width / 2, 16, 2].
inline int64_t strip_words(const AttentionHead& head) { return round_up(head.width, 16) / 2 * kStripKeys; }
inline int64_t packed_keys(const AttentionHead& head) {
  const int64_t padded = round_up(head.keys, kStripKeys);
  return 32 + padded + padded / kStripKeys * strip_words(head);
}

// Keys behind the last are copies of it.
template <class T>
void pack_keys(const AttentionHead& head, uint32_t* out) {
  const int64_t depth = round_up(head.width, 16), padded = round_up(head.keys, kStripKeys);
  const float most = largest_code(head.width);
  alignas(64) int16_t rows[kStripKeys * kWidestHead];
  float spoiled = 0.0f, *scale = reinterpret_cast<float*>(out) + 16;
  int16_t* strip = reinterpret_cast<int16_t*>(out + 16 + padded);
  for (int64_t first = 0; first < padded; first += kStripKeys, strip += 2 * strip_words(head)) {
    for (int64_t i = 0; i < kStripKeys; ++i) {
      const int64_t key = first + i < head.keys ? first + i : head.keys - 1;
      const float found = take_row(static_cast<const T*>(head.k) + key * head.k_stride, head.width, most,
                                   rows + i * depth);
      spoiled += found * 0.0f;
      scale[first + i] = found == found ? found : 0.0f;
    }
    for (int64_t k = 0; k < depth; k += 16) {
      for (int64_t half = 0; half < kStripKeys; half += 8) {
        __m256i pairs[8];
        for (int64_t i = 0; i < 8; ++i) memcpy(&pairs[i], rows + (half + i) * depth + k, sizeof pairs[i]);
        transpose(pairs);
        for (int64_t i = 0; i < 8; ++i) memcpy(strip + (k / 2 + i) * 32 + half * 2, &pairs[i], sizeof pairs[i]);
      }
    }
  }
  memcpy(out, &spoiled, sizeof spoiled);
}

// Packed values of a block of keys: a scale for each column, which is that of probabilities too, and for each 16
// columns, or the last 8, pairs along the keys [32, 16, 2].
inline int64_t columns_of(const AttentionHead& head) { return round_up(head.width, kHalfStrip); }
inline int64_t block_words(const AttentionHead& head) {
  return round_up(columns_of(head), kStripColumns) + columns_of(head) * kKeys / 2;
}
inline int64_t packed_values(const AttentionHead& head) {
  return 16 + (head.keys + kKeys - 1) / kKeys * block_words(head);
}

template <class T>
void pack_values(const AttentionHead& head, uint32_t* out) {
  const int64_t columns = columns_of(head);
  for (int64_t first = 0; first < head.keys; first += kKeys, out += block_words(head)) {
    const int64_t keys = head.keys - first < kKeys ? head.keys - first : kKeys;
    const T* block = static_cast<const T*>(head.v) + first * head.v_stride;
    uint32_t* codes = out + round_up(columns, kStripColumns);
    for (int64_t i = 0; i < columns; i += kHalfStrip) {
      const int64_t some = head.width - i;
      __m256i largest = _mm256_setzero_si256();
      for (int64_t key = 0; key < keys; ++key) {
        largest = _mm256_max_epi32(largest, magnitude(values_at(block + key * head.v_stride + i, some)));
      }
      __m256 scale;
      const __m256 factor = to_codes(largest, kLargestValue, &scale);
      const __m256 of_both = _mm256_mul_ps(scale, _mm256_set1_ps(1.0f / kLargestProbability));
      _mm256_store_ps(reinterpret_cast<float*>(out) + i, of_both);
      const int64_t start = i / kStripColumns * kStripColumns;
      const int64_t across = columns - start < kStripColumns ? kHalfStrip : kStripColumns;
      uint32_t* to = codes + start * kKeys / 2 + i - start;
      for (int64_t key = 0; key < round_up(keys, kStripKeys); key += 2, to += across) {
        const auto code = [&](int64_t at) {
          if (at >= keys) return _mm256_setzero_si256();
          return _mm256_cvtps_epi32(_mm256_mul_ps(values_at(block + at * head.v_stride + i, some), factor));
        };
        const __m256i both = _mm256_blend_epi16(code(key), _mm256_slli_epi32(code(key + 1), 16), 0xAA);
        memcpy(to, &both, sizeof both);
      }
    }
  }
}

template <class T>
void pack_head(const AttentionHead& head, uint32_t* keys, uint32_t* values) {
  pack_keys<T>(head, to_cache_line(keys));
  pack_values<T>(head, to_cache_line(values));
}

// Sums of rows of a with columns of b, in assembly for the same reason as in `products_avx2.h`. Rows of a lie `stride`
// bytes from each other, b is [pairs, columns, 2].
#define DCOMP_SUMS                                                                          \
  [s0] "=&x"(s[0]), [s1] "=&x"(s[1]), [s2] "=&x"(s[2]), [s3] "=&x"(s[3]), [s4] "=&x"(s[4]), \
      [s5] "=&x"(s[5]), [s6] "=&x"(s[6]), [s7] "=&x"(s[7])
#define DCOMP_ZERO(sum) "vpxor %[" sum "], %[" sum "], %[" sum "]\n"
#define DCOMP_ZEROS                                                   \
  DCOMP_ZERO("s0") DCOMP_ZERO("s1") DCOMP_ZERO("s2") DCOMP_ZERO("s3") \
  DCOMP_ZERO("s4") DCOMP_ZERO("s5") DCOMP_ZERO("s6") DCOMP_ZERO("s7")

// s = a [4 rows] times b [16 columns], four pairs at a time
inline void multiply_strip(const int16_t* a, int64_t stride, const void* b, int64_t pairs, __m256i (&s)[8]) {
  __m256i low, high, one, other;
  int64_t rounds = pairs / kPairsAtOnce;
#define DCOMP_ROW(row, left, right)                \
  "vpbroadcastd " row ", %[other]\n"               \
  "vpmaddwd %[low], %[other], %[one]\n"            \
  "vpmaddwd %[high], %[other], %[other]\n"         \
  "vpaddd %[one], %[" left "], %[" left "]\n"      \
  "vpaddd %[other], %[" right "], %[" right "]\n"
#define DCOMP_PAIR(at, left, right)                \
  "vmovdqa " left "(%[b]), %[low]\n"               \
  "vmovdqa " right "(%[b]), %[high]\n"             \
  DCOMP_ROW(at "(%[a])", "s0", "s1")               \
  DCOMP_ROW(at "(%[a],%[stride])", "s2", "s3")     \
  DCOMP_ROW(at "(%[a],%[stride],2)", "s4", "s5")   \
  DCOMP_ROW(at "(%[a],%[stride3])", "s6", "s7")
  asm volatile(
      DCOMP_ZEROS
      ".p2align 5\n"
      "1:\n"
      DCOMP_PAIR("0", "0", "32")
      DCOMP_PAIR("4", "64", "96")
      DCOMP_PAIR("8", "128", "160")
      DCOMP_PAIR("12", "192", "224")
      "add $256, %[b]\n"
      "add $16, %[a]\n"
      "dec %[rounds]\n"
      "jnz 1b\n"
      : DCOMP_SUMS, [low] "=&x"(low), [high] "=&x"(high), [one] "=&x"(one), [other] "=&x"(other), [a] "+r"(a),
        [b] "+r"(b), [rounds] "+r"(rounds)
      : [stride] "r"(stride), [stride3] "r"(3 * stride)
      : "memory", "cc");
#undef DCOMP_PAIR
#undef DCOMP_ROW
}

// s = a [8 rows] times b [8 columns], four pairs at a time
inline void multiply_half(const int16_t* a, int64_t stride, const void* b, int64_t pairs, __m256i (&s)[8]) {
  __m256i all, one;
  const char* behind = reinterpret_cast<const char*>(a) + 4 * stride;
  int64_t rounds = pairs / kPairsAtOnce;
#define DCOMP_ROW(row, sum)               \
  "vpbroadcastd " row ", %[one]\n"        \
  "vpmaddwd %[all], %[one], %[one]\n"     \
  "vpaddd %[one], %[" sum "], %[" sum "]\n"
#define DCOMP_PAIR(at, of_b)                     \
  "vmovdqa " of_b "(%[b]), %[all]\n"             \
  DCOMP_ROW(at "(%[a])", "s0")                   \
  DCOMP_ROW(at "(%[a],%[stride])", "s1")         \
  DCOMP_ROW(at "(%[a],%[stride],2)", "s2")       \
  DCOMP_ROW(at "(%[a],%[stride3])", "s3")        \
  DCOMP_ROW(at "(%[behind])", "s4")              \
  DCOMP_ROW(at "(%[behind],%[stride])", "s5")    \
  DCOMP_ROW(at "(%[behind],%[stride],2)", "s6")  \
  DCOMP_ROW(at "(%[behind],%[stride3])", "s7")
  asm volatile(
      DCOMP_ZEROS
      ".p2align 5\n"
      "1:\n"
      DCOMP_PAIR("0", "0")
      DCOMP_PAIR("4", "32")
      DCOMP_PAIR("8", "64")
      DCOMP_PAIR("12", "96")
      "add $128, %[b]\n"
      "add $16, %[a]\n"
      "add $16, %[behind]\n"
      "dec %[rounds]\n"
      "jnz 1b\n"
      : DCOMP_SUMS, [all] "=&x"(all), [one] "=&x"(one), [a] "+r"(a), [behind] "+r"(behind), [b] "+r"(b),
        [rounds] "+r"(rounds)
      : [stride] "r"(stride), [stride3] "r"(3 * stride)
      : "memory", "cc");
#undef DCOMP_PAIR
#undef DCOMP_ROW
}
#undef DCOMP_SUMS
#undef DCOMP_ZERO
#undef DCOMP_ZEROS

// 2^x for x <= 14, relative error 3e-6. No less than 2^-120, since numbers below 2^-126 are slow.
inline __m256 power_of_two(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-120.0f));
  const __m256 shifted = _mm256_add_ps(x, _mm256_set1_ps(kRound));
  const __m256 part = _mm256_sub_ps(x, _mm256_sub_ps(shifted, _mm256_set1_ps(kRound)));
  __m256 p = _mm256_set1_ps(9.5828531e-03f);
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(5.5906427e-02f));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(2.4024099e-01f));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(6.9312419e-01f));
  p = _mm256_fmadd_ps(p, part, _mm256_set1_ps(1.0f));
  // The whole part lies in the low bits of `shifted`.
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

// What is known of 8 queries after some blocks of keys.
struct Softmax {
  __m256 factor;   // makes of what `scores` gives scores in units of log 2
  __m256 highest;  // score
  __m256 total;    // of probabilities, in the units of those of the highest score
};

// scores [8, kKeys] up to the scale of queries, and the largest of each
inline __m256 scores_of(const int16_t* asked, int64_t depth, int64_t pairs, const int16_t* strip, int64_t words,
                        const float* scale, int64_t strips, float* scores) {
  __m256 most[kGroup];
  for (int64_t row = 0; row < kGroup; ++row) most[row] = _mm256_set1_ps(-__builtin_inff());
  for (int64_t i = 0; i < strips; ++i, strip += 2 * words) {
    const __m256 left = _mm256_loadu_ps(scale + i * kStripKeys), right = _mm256_loadu_ps(scale + i * kStripKeys + 8);
    for (int64_t first = 0; first < kGroup; first += 4) {
      __m256i sums[8];
      multiply_strip(asked + first * depth, depth * 2, strip, pairs, sums);
      for (int64_t row = 0; row < 4; ++row) {
        const __m256 low = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[2 * row]), left);
        const __m256 high = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[2 * row + 1]), right);
        float* to = scores + (first + row) * kKeys + i * kStripKeys;
        _mm256_store_ps(to, low);
        _mm256_store_ps(to + 8, high);
        most[first + row] = _mm256_max_ps(most[first + row], _mm256_max_ps(low, high));
      }
    }
  }
  __m256i all[kGroup];
  memcpy(all, most, sizeof all);
  transpose(all);
  __m256 found = _mm256_castsi256_ps(all[0]);
  for (int64_t row = 1; row < kGroup; ++row) found = _mm256_max_ps(found, _mm256_castsi256_ps(all[row]));
  return found;
}

// Codes of probabilities [8, kKeys] of scores, relative to the highest of them, and the sum of each row's.
inline __m256i probabilities_of(const float* scores, __m256 factor, __m256 highest, int64_t keys, int16_t* codes) {
  alignas(32) float factors[kGroup], peaks[kGroup];
  _mm256_store_ps(factors, factor);
  _mm256_store_ps(peaks, highest);
  const __m256 most = _mm256_set1_ps(kLog2OfProbability);
  __m256i sums[kGroup];
  for (int64_t row = 0; row < kGroup; ++row) {
    const __m256 times = _mm256_broadcast_ss(factors + row), peak = _mm256_broadcast_ss(peaks + row);
    const auto code = [&](const float* at) {  // the difference first: no score is above the highest then
      const __m256 below = _mm256_sub_ps(_mm256_load_ps(at), peak);
      return _mm256_cvtps_epi32(power_of_two(_mm256_fmadd_ps(below, times, most)));
    };
    __m256i sum = _mm256_setzero_si256();
    for (int64_t key = 0; key < keys; key += kStripKeys) {
      const float* s = scores + row * kKeys + key;
      const __m256i low = code(s), high = code(s + 8);
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + row * kKeys + key), both);
    }
    sums[row] = sum;
  }
  transpose(sums);
  for (int64_t row = 1; row < kGroup; ++row) sums[0] = _mm256_add_epi32(sums[0], sums[row]);
  return sums[0];
}

// out [8, columns] = out * less + codes [8, kKeys] values * share, with a factor of each row
inline void add_values(const int16_t* codes, int64_t keys, const uint32_t* values, int64_t columns, __m256 less,
                       __m256 share, float* out) {
  alignas(32) float kept[kGroup], added[kGroup];
  _mm256_store_ps(kept, less);
  _mm256_store_ps(added, share);
  const float* scale = reinterpret_cast<const float*>(values);
  const uint32_t* strip = values + round_up(columns, kStripColumns);
  const auto add = [&](int64_t row, int64_t column, __m256i sum) {
    float* to = out + row * columns + column;
    const __m256 more = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_load_ps(scale + column));
    const __m256 before = _mm256_mul_ps(_mm256_load_ps(to), _mm256_broadcast_ss(kept + row));
    _mm256_store_ps(to, _mm256_fmadd_ps(more, _mm256_broadcast_ss(added + row), before));
  };
  __m256i sums[8];
  int64_t column = 0;
  for (; column + kStripColumns <= columns; column += kStripColumns, strip += kStripColumns * kKeys / 2) {
    for (int64_t first = 0; first < kGroup; first += 4) {
      multiply_strip(codes + first * kKeys, kKeys * 2, strip, keys / 2, sums);
      for (int64_t i = 0; i < 8; ++i) add(first + i / 2, column + i % 2 * 8, sums[i]);
    }
  }
  if (column < columns) {
    multiply_half(codes, kKeys * 2, strip, keys / 2, sums);
    for (int64_t row = 0; row < kGroup; ++row) add(row, column, sums[row]);
  }
}

// Fetches rows of a matrix that are needed next: heads of a token lie together, so those of one head are far apart.
template <class T>
void fetch_rows(const T* x, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const char *from = reinterpret_cast<const char*>(x + row * stride), *end = from + width * sizeof(T);
    for (; from < end; from += 64) _mm_prefetch(from, _MM_HINT_T0);
    _mm_prefetch(end - 1, _MM_HINT_T0);
  }
}

template <class T>
void attend_block(const AttentionHead& head, int64_t first, const uint32_t* keys, const uint32_t* values) {
  keys = to_cache_line(keys);
  values = to_cache_line(values);
  const int64_t depth = round_up(head.width, 16), columns = columns_of(head), words = strip_words(head);
  const int64_t queries = head.queries - first < kQueries ? head.queries - first : kQueries;
  const int64_t groups = (queries + kGroup - 1) / kGroup;
  alignas(64) int16_t asked[kQueries * kWidestHead], codes[kGroup * kKeys];
  alignas(64) float scores[kGroup * kKeys], sums[kQueries * kWidestHead], factors[kQueries] = {};
  float spoiled[kQueries];  // 0 or NaN
  memset(sums, 0, groups * kGroup * columns * sizeof(float));
  memset(asked + queries * depth, 0, (groups * kGroup - queries) * depth * sizeof(int16_t));
  const float most = largest_code(head.width);
  for (int64_t row = 0; row < queries; ++row) {
    const T* q = static_cast<const T*>(head.q) + (first + row) * head.q_stride;
    const float scale = take_row(q, head.width, most, asked + row * depth);
    factors[row] = scale == scale ? scale * (head.scale * kLog2e) : 0.0f;
    spoiled[row] = scale * 0.0f;
  }
  const int64_t left = head.queries - first - queries;
  fetch_rows(static_cast<const T*>(head.q) + (first + queries) * head.q_stride, head.q_stride,
             left < kQueries ? left : kQueries, head.width);
  fetch_rows(head.out + first * head.out_stride, head.out_stride, queries, head.width);
  Softmax all[kQueries / kGroup];
  for (int64_t i = 0; i < groups; ++i) {
    all[i] = {_mm256_load_ps(factors + i * kGroup), _mm256_set1_ps(-__builtin_inff()), _mm256_setzero_ps()};
  }
  const float* scale = reinterpret_cast<const float*>(keys) + 16;
  const int16_t* strips = reinterpret_cast<const int16_t*>(keys + 16 + round_up(head.keys, kStripKeys));
  for (int64_t key = 0; key < head.keys; key += kKeys, values += block_words(head)) {
    const int64_t some = head.keys - key < kKeys ? head.keys - key : kKeys, padded = round_up(some, kStripKeys);
    for (int64_t i = 0; i < groups; ++i) {
      Softmax& now = all[i];
      const __m256 found = scores_of(asked + i * kGroup * depth, depth, round_up(head.width, 2 * kPairsAtOnce) / 2,
                                     strips + key / kStripKeys * 2 * words, words, scale + key, padded / kStripKeys,
                                     scores);
      __m256i sum = probabilities_of(scores, now.factor, found, padded, codes);
      if (some < padded) {  // copies of the last key do not count
        alignas(32) int32_t copies[kGroup];
        for (int64_t row = 0; row < kGroup; ++row) copies[row] = (padded - some) * codes[row * kKeys + padded - 1];
        sum = _mm256_sub_epi32(sum, _mm256_load_si256(reinterpret_cast<const __m256i*>(copies)));
      }
      const __m256 high = _mm256_mul_ps(found, now.factor);
      const __m256 highest = _mm256_max_ps(high, now.highest);
      const __m256 less = power_of_two(_mm256_sub_ps(now.highest, highest));
      const __m256 share = power_of_two(_mm256_sub_ps(high, highest));
      now.highest = highest;
      now.total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), share, _mm256_mul_ps(now.total, less));
      add_values(codes, padded, values, columns, less, share, sums + i * kGroup * columns);
    }
  }
  float head_spoiled;
  memcpy(&head_spoiled, keys, sizeof head_spoiled);
  for (int64_t row = 0; row < queries; ++row) {
    const Softmax& now = all[row / kGroup];
    alignas(32) float total[kGroup], highest[kGroup];
    _mm256_store_ps(total, now.total);
    _mm256_store_ps(highest, now.highest);
    // Scores beyond fp32 make NaN, as they do in torch.
    const float none = spoiled[row] + head_spoiled + highest[row % kGroup] * 0.0f;
    const __m256 inverse = _mm256_set1_ps(kLargestProbability / total[row % kGroup] + none);
    float* out = head.out + (first + row) * head.out_stride;
    for (int64_t i = 0; i < head.width; i += kLanes) {
      const __m256 mean = _mm256_mul_ps(_mm256_load_ps(sums + row * columns + i), inverse);
      if (head.width - i < kLanes) {
        memcpy(out + i, &mean, (head.width - i) * sizeof(float));
      } else {
        _mm256_storeu_ps(out + i, mean);
      }
    }
  }
}

}  // namespace dcomp::DCOMP_ISA
