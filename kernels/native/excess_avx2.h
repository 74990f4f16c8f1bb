// What neighbouring 8-bit weights add up to beyond 128, kept apart, so that products of bytes cannot saturate.
//
// A pair of unsigned codes times a pair of weights fits 16 bits if the weights add up to no more than 128 and no less
// than -128: 255 * 128 < 2^15. One of a hundred pairs of normal weights does not. The first of its two weights gives
// away what is too much, and a product of its own adds that. FBGEMM keeps outliers of weights apart in the same way, for
// sums of 16 bits (Khudia et al. 2021, "FBGEMM: Enabling high-performance low-precision deep learning inference").
#pragma once
#include "kernels.h"
#include "transpose_avx2.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kWord = 4;  // input channels whose codes a 32-bit word holds

struct Excess {
  uint32_t place;         // word of the strip times its output channels, plus the channel
  int8_t weights[kWord];  // that are to be added there
};

// Takes from 8 words of weights what their pairs have too much, and returns it.
inline __m256i take_excess(__m256i* words) {
  const __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), *words);
  const __m256i fitting =
      _mm256_max_epi16(_mm256_min_epi16(sums, _mm256_set1_epi16(128)), _mm256_set1_epi16(-128));
  // Both weights have the sign of what is too much, and none is smaller than it: nothing overflows.
  const __m256i excess = _mm256_and_si256(_mm256_sub_epi16(sums, fitting), _mm256_set1_epi16(255));
  *words = _mm256_sub_epi8(*words, excess);
  return excess;
}

// The excess of a strip: that of a few words is before that of all later ones.
struct ExcessList {
  Excess* first;
  int64_t room, count;

  // Adds what 8 channels from `channel` on have too much in one word, and to the sums of weights; false if it is full.
  bool add(int64_t channel, int64_t word, __m256i excess, int32_t* sums) {
    int32_t weights[8];
    memcpy(weights, &excess, sizeof weights);
    const __m256i none = _mm256_cmpeq_epi32(excess, _mm256_setzero_si256());
    for (int some = ~_mm256_movemask_ps(_mm256_castsi256_ps(none)) & 255; some; some &= some - 1) {
      const int64_t i = __builtin_ctz(some);
      if (count == room) return false;
      Excess& made = first[count++];
      made.place = static_cast<uint32_t>(word * kStripChannels + channel + i);
      memcpy(made.weights, weights + i, sizeof made.weights);
      sums[channel + i] += made.weights[0] + made.weights[2];
    }
    return true;
  }
};

// Codes [32, 4 * words] as columns of words: [words, 32, 4]. Words are a multiple of 8.
inline void turn_codes(const uint8_t* codes, int64_t stride, int64_t words, uint8_t* columns) {
  for (int64_t row = 0; row < kRowsAtOnce; row += 8) {
    for (int64_t word = 0; word < words; word += 8) {
      __m256i lines[8];
      for (int64_t i = 0; i < 8; ++i) memcpy(&lines[i], codes + (row + i) * stride + word * kWord, sizeof lines[i]);
      transpose(lines);
      for (int64_t i = 0; i < 8; ++i) {
        memcpy(columns + ((word + i) * kRowsAtOnce + row) * kWord, &lines[i], sizeof lines[i]);
      }
    }
  }
}

// sums[32][16] += what some excess multiplies with columns, the first of which is that of word `start`
inline void add_excess(const Excess* excess, const Excess* end, int64_t start, const uint8_t* columns, int32_t* sums) {
  constexpr int64_t kParts = kRowsAtOnce / 8;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i found[2][kParts][8] = {};  // of 8 rows, for each of 8 channels
  for (; excess < end; ++excess) {
    int32_t weights;
    memcpy(&weights, excess->weights, sizeof weights);
    const __m256i spread = _mm256_set1_epi32(weights);
    const int64_t word = excess->place / kStripChannels - start, channel = excess->place % kStripChannels;
    const __m256i* column = reinterpret_cast<const __m256i*>(columns + word * kRowsAtOnce * kWord);
    for (int64_t part = 0; part < kParts; ++part) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_load_si256(column + part), spread);
      __m256i& sum = found[channel / 8][part][channel % 8];
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
  }
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t part = 0; part < kParts; ++part) {
      transpose(found[half][part]);
      for (int64_t i = 0; i < 8; ++i) {
        __m256i* to = reinterpret_cast<__m256i*>(sums + (part * 8 + i) * kStripChannels + half * 8);
        _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), found[half][part][i]));
      }
    }
  }
}

}  // namespace dcomp::DCOMP_ISA
