// Products of 8-bit integers where there are neither tiles nor VNNI: exact, unlike the saturating sums of others.
//
// Rows and weights of 8 bits are widened to 16 bits. Weights of 4 bits whose groups are whole blocks of 32 channels
// stay narrow and meet their multipliers in sums, which is twice as fast; rows are unsigned then, signed codes shifted
// by 128. See `products_avx2.h`.
#pragma once
#include <immintrin.h>

#include "outputs.h"
#include "products_avx2.h"
#include "quantize.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kStrip = kStripChannels;
constexpr int64_t kPiece = 512;                  // channels of 32 rows and a strip that stay in the nearest cache
constexpr int64_t kSums = 1 << 15;               // that stay in the second-level cache with codes and pieces
constexpr int64_t kPieceBytes = 2 * kPiece + 64;  // of a row; beside a power of two, which would fill a few sets

inline int64_t depth_of(int64_t channels) { return (channels + kDepthAtOnce - 1) / kDepthAtOnce * kDepthAtOnce; }

inline bool is_narrow(const IntegerWeights& weights) { return weights.group > 0 && weights.group % kNarrowDepth == 0; }

// Bytes of a strip's weights with `channels` input channels, a multiple of 32.
inline int64_t bytes_of(bool narrow, int64_t channels) {
  return narrow ? channels / kNarrowDepth * kNarrowBytes : channels * kStrip * 2;
}

// Bytes of a strip: its weights, tap after tap, and the sums of weights of each output channel as int32.
inline int64_t strip_bytes(const IntegerWeights& weights) {
  return weights.taps * bytes_of(is_narrow(weights), depth_of(weights.channels)) +
         kStrip * static_cast<int64_t>(sizeof(int32_t));
}

// `blocks` of 4 rows with `channels` input channels of a strip, added to sums [4 * blocks, 16].
inline void multiply_piece(bool narrow, const uint8_t* rows, int64_t stride, const int8_t* weights, int64_t channels,
                           int64_t blocks, int32_t* sums) {
  for (int64_t i = 0; i < blocks; ++i, rows += kRowsOfProducts * stride, sums += kRowsOfProducts * kStrip) {
    if (narrow) {
      multiply_narrow(rows, stride, weights, channels / kNarrowDepth, sums);
    } else {
      multiply_wide(reinterpret_cast<const int16_t*>(rows), stride, reinterpret_cast<const int16_t*>(weights),
                    channels / 2, sums);
    }
  }
}

// 8 lines of 8 words become 8 columns.
inline void transpose(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  memcpy(r, t, sizeof r);
}

// Codes of 4 bits, an even number of them, without their multipliers.
inline void spread_int4(const uint8_t* packed, int8_t* codes, int64_t count) {
  const __m128i low = _mm_set1_epi8(15), sign = _mm_set1_epi8(8);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i even = _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(bytes, low), sign), sign);
    const __m128i odd = _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), sign), sign);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i + 16), _mm_unpackhi_epi8(even, odd));
  }
  for (; i < count; i += 2) {
    codes[i] = static_cast<int8_t>(((packed[i / 2] & 15) ^ 8) - 8);
    codes[i + 1] = static_cast<int8_t>(((packed[i / 2] >> 4) ^ 8) - 8);
  }
}

// Codes of 16 output channels, [16, depth], as 32 channels after the other: [8, 16, 4] and room for multipliers.
inline void pack_narrow(const int8_t* codes, int64_t depth, int8_t* strip) {
  for (int64_t k = 0; k < depth; k += kNarrowDepth, strip += kNarrowBytes) {
    for (int half = 0; half < 2; ++half) {
      __m256i words[8];
      for (int i = 0; i < 8; ++i) memcpy(&words[i], codes + (half * 8 + i) * depth + k, sizeof words[i]);
      transpose(words);
      for (int i = 0; i < 8; ++i) memcpy(strip + i * 64 + half * 32, &words[i], sizeof words[i]);
    }
  }
}

// Codes of 16 output channels, [16, depth], as pairs of 16 bits: [depth / 2, 16, 2].
inline void pack_wide(const int8_t* codes, int64_t depth, int8_t* strip) {
  for (int64_t k = 0; k < depth; k += 16) {
    for (int half = 0; half < 2; ++half) {
      __m256i pairs[8];
      for (int i = 0; i < 8; ++i) {
        const int8_t* line = codes + (half * 8 + i) * depth + k;
        pairs[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line)));
      }
      transpose(pairs);
      for (int i = 0; i < 8; ++i) memcpy(strip + (k / 2 + i) * 64 + half * 32, &pairs[i], sizeof pairs[i]);
    }
  }
}

// Sums of a strip's weights: its product with rows of ones.
inline void sum_weights(const IntegerWeights& weights, const int8_t* strip, int32_t (&sums)[kStrip]) {
  const bool narrow = is_narrow(weights);
  alignas(64) uint8_t ones[kPieceBytes];
  for (int64_t i = 0; i < kPieceBytes; ++i) ones[i] = narrow || i % 2 == 0;
  alignas(64) int32_t found[kRowsOfProducts * kStrip] = {};
  const int64_t depth = weights.taps * depth_of(weights.channels);
  for (int64_t start = 0; start < depth; start += kPiece) {
    const int64_t some = depth - start < kPiece ? depth - start : kPiece;
    multiply_piece(narrow, ones, 0, strip + bytes_of(narrow, start), some, 1, found);
  }
  memcpy(sums, found, sizeof sums);
}

// Weights of one strip, `outputs` of its channels.
inline void pack_strip(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int8_t* strip,
                       int8_t* scratch) {
  const bool narrow = is_narrow(weights);
  const int64_t depth = depth_of(stored.channels), tap_bytes = bytes_of(narrow, depth);
  memset(scratch, 0, kStrip * depth);
  for (int64_t tap = 0; tap < weights.taps; ++tap) {
    int8_t* to = strip + tap * tap_bytes;
    for (int64_t channel = 0; channel < outputs; ++channel) {
      const int64_t row = channel * weights.taps + tap;
      int8_t* codes = scratch + channel * depth;
      if (!stored.multiplier) {
        memcpy(codes, static_cast<const int8_t*>(stored.codes) + row * stored.channels, stored.channels);
        continue;
      }
      const uint8_t* packed = static_cast<const uint8_t*>(stored.codes) + row * (stored.groups * stored.group / 2);
      const int8_t* multiplier = stored.multiplier + row * stored.groups;
      if (!narrow) {
        unpack_int4(packed, multiplier, codes, stored.channels, stored.group);
        continue;
      }
      spread_int4(packed, codes, (stored.channels + 1) / 2 * 2);
      if (stored.channels % 2) codes[stored.channels] = 0;
    }
    if (!narrow) {
      pack_wide(scratch, depth, to);
      continue;
    }
    pack_narrow(scratch, depth, to);
    for (int64_t k = 0; k < depth; k += kNarrowDepth) {
      int16_t multipliers[kStrip * 2] = {};
      for (int64_t channel = 0; channel < outputs && k < stored.channels; ++channel) {
        const int64_t row = channel * weights.taps + tap;
        multipliers[2 * channel] = multipliers[2 * channel + 1] =
            stored.multiplier[row * stored.groups + k / weights.group];
      }
      memcpy(to + k / kNarrowDepth * kNarrowBytes + kNarrowDepth * kStrip, multipliers, sizeof multipliers);
    }
  }
  int32_t sums[kStrip];
  sum_weights(weights, strip, sums);
  memcpy(strip + weights.taps * tap_bytes, sums, sizeof sums);
}

// Codes of a row as products take them: 16 bits, or unsigned.
template <bool is_signed>
void take_codes(bool narrow, const uint8_t* from, int64_t channels, uint8_t* to) {
  if (narrow) {
    const __m256i shift = _mm256_set1_epi8(is_signed ? -128 : 0);
    for (int64_t k = 0; k < channels; k += 32) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + k), _mm256_xor_si256(codes, shift));
    }
  } else {
    for (int64_t k = 0; k < channels; k += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      const __m256i wide = is_signed ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * k), wide);
    }
  }
}

// Rows `first` to `last` of one image with strips of which the first is of `channel`: scaled, where they are kept.
//
// A piece of the strips is read from afar once for as many rows as there is room for sums.
template <bool is_signed>
void multiply_rows(const IntegerRows& rows, const IntegerWeights& weights, int64_t first, int64_t last,
                   const int8_t* strips, int64_t count, int64_t channel) {
  const bool narrow = is_narrow(weights);
  const int64_t depth = depth_of(weights.channels), bytes = strip_bytes(weights);
  alignas(64) int32_t zeros[kStripsAtOnce * kStrip];  // what the zero of the codes adds to each sum
  for (int64_t strip = 0; strip < count; ++strip) {
    int32_t* zero = zeros + strip * kStrip;
    memcpy(zero, strips + (strip + 1) * bytes - kStrip * sizeof(int32_t), kStrip * sizeof(int32_t));
    for (int64_t i = 0; i < kStrip; ++i) zero[i] *= is_signed && narrow ? 128 : rows.zero;
  }
  alignas(64) int32_t sums[kSums];  // [rows / 32, count, 32, 16]
  alignas(64) uint8_t codes[kRowsAtOnce * kPieceBytes];
  const int64_t block_sums = count * kRowsAtOnce * kStrip, at_once = kSums / block_sums * kRowsAtOnce;
  for (; first < last; first += at_once) {
    const int64_t some = last - first < at_once ? last - first : at_once;
    const int64_t blocks = (some + kRowsOfProducts - 1) / kRowsOfProducts;  // of 4 rows
    memset(sums, 0, (some + kRowsAtOnce - 1) / kRowsAtOnce * block_sums * sizeof(int32_t));
    for (int64_t at = 0; at < weights.taps * depth;) {
      const int64_t tap = at / depth, start = at % depth, rest = depth - start;
      const int64_t channels = rest < kPiece ? rest : kPiece;
      const uint8_t* from = rows.codes + first * rows.stride + rows.offsets[tap] + start;
      const int8_t* piece = strips + bytes_of(narrow, at);
      for (int64_t block = 0; block < blocks; block += kRowsAtOnce / kRowsOfProducts) {
        const int64_t left = blocks - block;
        const int64_t own = left < kRowsAtOnce / kRowsOfProducts ? left : kRowsAtOnce / kRowsOfProducts;
        for (int64_t r = 0; r < own * kRowsOfProducts; ++r) {
          take_codes<is_signed>(narrow, from + (block * kRowsOfProducts + r) * rows.stride, channels,
                                codes + r * kPieceBytes);
        }
        int32_t* to = sums + block * kRowsOfProducts / kRowsAtOnce * block_sums;
        for (int64_t strip = 0; strip < count; ++strip, to += kRowsAtOnce * kStrip) {
          multiply_piece(narrow, codes, kPieceBytes, piece + strip * bytes, channels, own, to);
        }
      }
      at += channels;
    }
    for (int64_t r = 0; r < some; ++r) {
      const int64_t kept = kept_row(rows, first + r);
      if (kept < 0) continue;
      const int32_t* row = sums + r / kRowsAtOnce * block_sums + r % kRowsAtOnce * kStrip;
      for (int64_t strip = 0; strip < count; ++strip, row += kRowsAtOnce * kStrip) {
        const int64_t begin = channel + strip * kStrip, rest = weights.outputs - begin;
        write_outputs(row, zeros + strip * kStrip, weights, begin, rest < kStrip ? rest : kStrip,
                      rows.scale[rows.scale_for_each ? kept : 0], rows.out + kept * weights.outputs + begin);
      }
    }
  }
}

}  // namespace dcomp::DCOMP_ISA
