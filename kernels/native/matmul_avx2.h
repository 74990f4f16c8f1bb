// Products of 8-bit integers where there are neither tiles nor VNNI: exact, unlike the saturating sums of others.
//
// Weights of 4 bits whose groups are whole blocks of 32 channels stay narrow and meet their multipliers in sums. Other
// weights are bytes, and what would make them saturate is kept apart, see `excess_avx2.h`; where that is too much, or
// there are few rows to multiply with, rows and weights are widened to 16 bits. Against widened ones narrow products are
// 1.9 times as fast, bytes 1.25 times. Rows of bytes are unsigned, signed codes shifted by 128. See `products_avx2.h`.
#pragma once
#include <immintrin.h>

#include "excess_avx2.h"
#include "outputs.h"
#include "products_avx2.h"
#include "quantize.h"
#include "transpose_avx2.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kStrip = kStripChannels;
constexpr int64_t kPiece = 512;                  // channels of 32 rows and a strip that stay in the nearest cache
constexpr int64_t kSums = 1 << 15;               // that stay in the second-level cache with codes and pieces
constexpr int64_t kPieceBytes = 2 * kPiece + 64;  // of a row; beside a power of two, which would fill a few sets
constexpr int64_t kFewRows = 64;                 // for which it is not worth it to look for excess
constexpr int64_t kDepthOfOneExcess = 2;         // input channels of a strip; with more of it, wide products are faster

enum class Layout : int32_t { kWide, kBytes, kNarrow };

// What a strip has behind its weights.
struct alignas(64) StripFacts {
  int32_t sums[kStrip];  // of the weights of each output channel
  Layout layout;
  int32_t excess;  // the length of its list
};

inline int64_t depth_of(int64_t channels) { return (channels + kDepthAtOnce - 1) / kDepthAtOnce * kDepthAtOnce; }

// Input channels of all taps.
inline int64_t depth_of(const IntegerWeights& weights) { return weights.taps * depth_of(weights.channels); }

inline bool is_narrow(const IntegerWeights& weights) { return weights.group > 0 && weights.group % kNarrowDepth == 0; }

// Bytes of a strip's weights with `channels` input channels, a multiple of 32.
inline int64_t bytes_of(Layout layout, int64_t channels) {
  if (layout == Layout::kNarrow) return channels / kNarrowDepth * kNarrowBytes;
  return layout == Layout::kBytes ? channels * kStrip : channels * kStrip * 2;
}

// Bytes of a strip: its weights, tap after tap, and facts. Excess has room where wide weights would go on.
inline int64_t strip_bytes(const IntegerWeights& weights) {
  return bytes_of(is_narrow(weights) ? Layout::kNarrow : Layout::kWide, depth_of(weights)) +
         static_cast<int64_t>(sizeof(StripFacts));
}

inline StripFacts* facts_of(const IntegerWeights& weights, int8_t* strip) {
  return reinterpret_cast<StripFacts*>(strip + strip_bytes(weights)) - 1;
}

inline const StripFacts* facts_of(const IntegerWeights& weights, const int8_t* strip) {
  return reinterpret_cast<const StripFacts*>(strip + strip_bytes(weights)) - 1;
}

inline const Excess* excess_of(const IntegerWeights& weights, const int8_t* strip) {
  return reinterpret_cast<const Excess*>(strip + bytes_of(Layout::kBytes, depth_of(weights)));
}

// `blocks` of 4 rows with `channels` input channels of a strip, added to sums [4 * blocks, 16].
inline void multiply_piece(Layout layout, const uint8_t* rows, int64_t stride, const int8_t* weights, int64_t channels,
                           int64_t blocks, int32_t* sums) {
  for (int64_t i = 0; i < blocks; ++i, rows += kRowsOfProducts * stride, sums += kRowsOfProducts * kStrip) {
    if (layout == Layout::kNarrow) {
      multiply_narrow(rows, stride, weights, channels / kNarrowDepth, sums);
    } else if (layout == Layout::kBytes) {
      multiply_bytes(rows, stride, weights, channels / (kWordsOfRound * kWord), sums);
    } else {
      multiply_wide(reinterpret_cast<const int16_t*>(rows), stride, reinterpret_cast<const int16_t*>(weights),
                    channels / 2, sums);
    }
  }
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

// Codes of 16 output channels, [16, depth], as bytes [depth / 4, 16, 4] whose excess is kept apart; false if there is
// no room for it. The first word is `word`.
inline bool pack_bytes(const int8_t* codes, int64_t depth, int64_t word, int8_t* strip, ExcessList& list,
                       int32_t* sums) {
  for (int64_t k = 0; k < depth; k += 8 * kWord) {
    for (int half = 0; half < 2; ++half) {
      __m256i words[8];
      for (int i = 0; i < 8; ++i) memcpy(&words[i], codes + (half * 8 + i) * depth + k, sizeof words[i]);
      transpose(words);
      for (int i = 0; i < 8; ++i) {
        const __m256i excess = take_excess(&words[i]);
        if (!_mm256_testz_si256(excess, excess) && !list.add(half * 8, word + k / kWord + i, excess, sums)) {
          return false;
        }
        memcpy(strip + (k / kWord + i) * kStrip * kWord + half * 32, &words[i], sizeof words[i]);
      }
    }
  }
  return true;
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

// Adds the sums of a strip's weights: its product with rows of ones.
inline void sum_weights(Layout layout, int64_t depth, const int8_t* strip, int32_t (&sums)[kStrip]) {
  alignas(64) uint8_t ones[kPieceBytes];
  for (int64_t i = 0; i < kPieceBytes; ++i) ones[i] = layout != Layout::kWide || i % 2 == 0;
  alignas(64) int32_t found[kRowsOfProducts * kStrip] = {};
  for (int64_t start = 0; start < depth; start += kPiece) {
    const int64_t some = depth - start < kPiece ? depth - start : kPiece;
    multiply_piece(layout, ones, 0, strip + bytes_of(layout, start), some, 1, found);
  }
  for (int64_t i = 0; i < kStrip; ++i) sums[i] += found[i];
}

// 8-bit codes of one tap of a strip, [outputs, depth], whatever is stored. Behind the channels are zeros already.
inline void read_codes(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int64_t tap,
                       int8_t* codes) {
  for (int64_t channel = 0; channel < outputs; ++channel, codes += depth_of(stored.channels)) {
    const int64_t row = channel * weights.taps + tap;
    if (!stored.multiplier) {
      memcpy(codes, static_cast<const int8_t*>(stored.codes) + row * stored.channels, stored.channels);
    } else {
      const uint8_t* packed = static_cast<const uint8_t*>(stored.codes) + row * (stored.groups * stored.group / 2);
      unpack_int4(packed, stored.multiplier + row * stored.groups, codes, stored.channels, stored.group);
    }
  }
}

// Weights of 4 bits with the multipliers of their groups.
inline void pack_narrow_strip(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int8_t* strip,
                              int8_t* scratch) {
  const int64_t depth = depth_of(stored.channels);
  for (int64_t tap = 0; tap < weights.taps; ++tap, strip += bytes_of(Layout::kNarrow, depth)) {
    for (int64_t channel = 0; channel < outputs; ++channel) {
      const int64_t row = channel * weights.taps + tap;
      int8_t* codes = scratch + channel * depth;
      const uint8_t* packed = static_cast<const uint8_t*>(stored.codes) + row * (stored.groups * stored.group / 2);
      spread_int4(packed, codes, (stored.channels + 1) / 2 * 2);
      if (stored.channels % 2) codes[stored.channels] = 0;
    }
    pack_narrow(scratch, depth, strip);
    for (int64_t k = 0; k < depth; k += kNarrowDepth) {
      int16_t multipliers[kStrip * 2] = {};
      for (int64_t channel = 0; channel < outputs && k < stored.channels; ++channel) {
        const int64_t row = channel * weights.taps + tap;
        multipliers[2 * channel] = multipliers[2 * channel + 1] =
            stored.multiplier[row * stored.groups + k / weights.group];
      }
      memcpy(strip + k / kNarrowDepth * kNarrowBytes + kNarrowDepth * kStrip, multipliers, sizeof multipliers);
    }
  }
}

// Weights of 8 bits, as bytes if their excess has room; false if it has not.
inline bool pack_byte_strip(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int8_t* strip,
                            int8_t* scratch, StripFacts& facts) {
  const int64_t depth = depth_of(stored.channels);
  ExcessList list{const_cast<Excess*>(excess_of(weights, strip)), depth_of(weights) / kDepthOfOneExcess, 0};
  for (int64_t tap = 0; tap < weights.taps; ++tap) {
    read_codes(stored, weights, outputs, tap, scratch);
    int8_t* to = strip + bytes_of(Layout::kBytes, tap * depth);
    if (!pack_bytes(scratch, depth, tap * depth / kWord, to, list, facts.sums)) return false;
  }
  facts.excess = static_cast<int32_t>(list.count);
  return true;
}

// Weights of one strip, `outputs` of its channels.
inline void pack_strip(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int8_t* strip,
                       int8_t* scratch) {
  const int64_t depth = depth_of(stored.channels);
  StripFacts facts{};
  memset(scratch, 0, kStrip * depth);
  if (is_narrow(weights)) {
    facts.layout = Layout::kNarrow;
    pack_narrow_strip(stored, weights, outputs, strip, scratch);
  } else if (weights.rows > kFewRows && pack_byte_strip(stored, weights, outputs, strip, scratch, facts)) {
    facts.layout = Layout::kBytes;
  } else {
    facts = {};
    for (int64_t tap = 0; tap < weights.taps; ++tap) {
      read_codes(stored, weights, outputs, tap, scratch);
      pack_wide(scratch, depth, strip + bytes_of(Layout::kWide, tap * depth));
    }
  }
  sum_weights(facts.layout, depth_of(weights), strip, facts.sums);
  *facts_of(weights, strip) = facts;
}

// Codes of rows as products of 16 bits take them.
template <bool is_signed>
void widen_codes(const uint8_t* from, int64_t stride, int64_t rows, int64_t channels, uint8_t* to) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += kPieceBytes) {
    for (int64_t k = 0; k < channels; k += 16) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      const __m256i wide = is_signed ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * k), wide);
    }
  }
}

// Codes of rows as products of bytes take them: unsigned.
template <bool is_signed>
void copy_codes(const uint8_t* from, int64_t stride, int64_t rows, int64_t channels, uint8_t* to) {
  const __m256i shift = _mm256_set1_epi8(is_signed ? -128 : 0);
  for (int64_t row = 0; row < rows; ++row, from += stride, to += kPieceBytes) {
    for (int64_t k = 0; k < channels; k += 32) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + k), _mm256_xor_si256(codes, shift));
    }
  }
}

// `some` rows of sums [rows / 32, count, 32, 16], scaled, where they are kept.
inline void write_rows(const IntegerRows& rows, const IntegerWeights& weights, int64_t first, int64_t some,
                       const int32_t* sums, const int32_t* zeros, int64_t count, int64_t channel) {
  for (int64_t r = 0; r < some; ++r) {
    const int64_t kept = kept_row(rows, first + r);
    if (kept < 0) continue;
    const int32_t* row = sums + (r / kRowsAtOnce * count * kRowsAtOnce + r % kRowsAtOnce) * kStrip;
    for (int64_t strip = 0; strip < count; ++strip, row += kRowsAtOnce * kStrip) {
      const int64_t begin = channel + strip * kStrip, rest = weights.outputs - begin;
      write_outputs(row, zeros + strip * kStrip, weights, begin, rest < kStrip ? rest : kStrip,
                    rows.scale[rows.scale_for_each ? kept : 0], rows.out + kept * weights.outputs + begin);
    }
  }
}

// Rows `first` to `last` of one image with strips of which the first is of `channel`: scaled, where they are kept.
//
// A piece of the strips is read from afar once for as many rows as there is room for sums.
template <bool is_signed>
void multiply_rows(const IntegerRows& rows, const IntegerWeights& weights, int64_t first, int64_t last,
                   const int8_t* strips, int64_t count, int64_t channel) {
  const int64_t depth = depth_of(weights.channels), bytes = strip_bytes(weights);
  alignas(64) int32_t zeros[kStripsAtOnce * kStrip];  // what the zero of the codes adds to each sum
  const StripFacts* facts[kStripsAtOnce];
  bool are_wide = false, are_bytes = false;
  for (int64_t strip = 0; strip < count; ++strip) {
    facts[strip] = facts_of(weights, strips + strip * bytes);
    const bool is_wide = facts[strip]->layout == Layout::kWide;
    are_wide = are_wide || is_wide;
    are_bytes = are_bytes || !is_wide;
    const int32_t zero = is_signed && !is_wide ? 128 : rows.zero;
    for (int64_t i = 0; i < kStrip; ++i) zeros[strip * kStrip + i] = zero * facts[strip]->sums[i];
  }
  alignas(64) int32_t sums[kSums];  // [rows / 32, count, 32, 16]
  alignas(64) uint8_t wide[kRowsAtOnce * kPieceBytes], codes[kRowsAtOnce * kPieceBytes];
  alignas(64) uint8_t columns[kRowsAtOnce * kPiece];  // the codes, word by word
  const Excess *excess[kStripsAtOnce], *next[kStripsAtOnce];  // that of a piece ends where that of the next begins
  const int64_t block_sums = count * kRowsAtOnce * kStrip, at_once = kSums / block_sums * kRowsAtOnce;
  const int64_t pieces = (depth + kPiece - 1) / kPiece;  // of a tap, about equal
  const int64_t piece = (depth / kDepthAtOnce + pieces - 1) / pieces * kDepthAtOnce;
  for (; first < last; first += at_once) {
    const int64_t some = last - first < at_once ? last - first : at_once;
    const int64_t blocks = (some + kRowsOfProducts - 1) / kRowsOfProducts;  // of 4 rows
    memset(sums, 0, (some + kRowsAtOnce - 1) / kRowsAtOnce * block_sums * sizeof(int32_t));
    for (int64_t strip = 0; strip < count; ++strip) {
      next[strip] = excess_of(weights, strips + strip * bytes);
    }
    for (int64_t at = 0; at < weights.taps * depth;) {
      const int64_t tap = at / depth, start = at % depth, rest = depth - start;
      const int64_t channels = rest < piece ? rest : piece;
      const uint8_t* from = rows.codes + first * rows.stride + rows.offsets[tap] + start;
      bool is_excess = false;
      for (int64_t strip = 0; strip < count; ++strip) {
        const Excess* end = excess_of(weights, strips + strip * bytes) + facts[strip]->excess;
        excess[strip] = next[strip];
        while (next[strip] < end && next[strip]->place < (at + channels) / kWord * kStrip) ++next[strip];
        is_excess = is_excess || excess[strip] < next[strip];
      }
      for (int64_t block = 0; block < blocks; block += kRowsAtOnce / kRowsOfProducts) {
        const int64_t left = blocks - block;
        const int64_t own = left < kRowsAtOnce / kRowsOfProducts ? left : kRowsAtOnce / kRowsOfProducts;
        const uint8_t* own_rows = from + block * kRowsOfProducts * rows.stride;
        if (are_wide) widen_codes<is_signed>(own_rows, rows.stride, own * kRowsOfProducts, channels, wide);
        if (are_bytes) copy_codes<is_signed>(own_rows, rows.stride, own * kRowsOfProducts, channels, codes);
        if (is_excess) turn_codes(codes, kPieceBytes, channels / kWord, columns);
        int32_t* to = sums + block * kRowsOfProducts / kRowsAtOnce * block_sums;
        for (int64_t strip = 0; strip < count; ++strip, to += kRowsAtOnce * kStrip) {
          const Layout layout = facts[strip]->layout;
          multiply_piece(layout, layout == Layout::kWide ? wide : codes, kPieceBytes,
                         strips + strip * bytes + bytes_of(layout, at), channels, own, to);
          if (excess[strip] < next[strip]) add_excess(excess[strip], next[strip], at / kWord, columns, to);
        }
      }
      at += channels;
    }
    write_rows(rows, weights, first, some, sums, zeros, count, channel);
  }
}

}  // namespace dcomp::DCOMP_ISA
