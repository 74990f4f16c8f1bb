// Products of 8-bit integers: rows of activations with strips of 16 output channels, sums of int32, scaled at the end.
//
// A lane of AMX sums four products, so weights are laid out in tiles: 16 rows, each with 4 consecutive input channels
// of 16 output channels. A convolution is the same with several taps, each at an offset
// from a row of the padded image; rows that would begin beyond the right edge are computed and dropped.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "outputs.h"
#include "quantize.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kStrip = kStripChannels;
constexpr int64_t kTileDepth = kDepthAtOnce;  // input channels of a tile
constexpr int64_t kTileBytes = kStrip * kTileDepth;
constexpr int64_t kBlock = kRowsAtOnce;       // rows, and output channels, that are multiplied at once
constexpr int64_t kWord = 4;                  // input channels that a lane sums

typedef int32_t StripSums __attribute__((vector_size(4 * kStrip)));

inline int64_t steps_of(int64_t channels) { return (channels + kTileDepth - 1) / kTileDepth; }

// Bytes of a strip: its tiles, tap after tap, and the sums of weights of each output channel as int32.
inline int64_t strip_bytes(const IntegerWeights& weights) {
  return weights.taps * steps_of(weights.channels) * kTileBytes + kStrip * static_cast<int64_t>(sizeof(int32_t));
}

// 16 lines of 16 words become 16 columns.
#ifdef __AVX512F__
inline void transpose(int8_t* tile) {
  __m512i r[kStrip], t[kStrip];
  memcpy(r, tile, sizeof r);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // r[4 g + i] holds the columns i, i + 4, i + 8 and i + 12 of the lines 4 g to 4 g + 3
    const __m512i even = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  memcpy(tile, t, sizeof t);
}
#else
inline void transpose(int8_t* tile) {
  int32_t rows[kStrip * kStrip], columns[kStrip * kStrip];
  memcpy(rows, tile, sizeof rows);
  for (int64_t i = 0; i < kStrip; ++i) {
    for (int64_t k = 0; k < kStrip; ++k) columns[i * kStrip + k] = rows[k * kStrip + i];
  }
  memcpy(tile, columns, sizeof columns);
}
#endif

// Sums of the 16 columns of a tile.
inline StripSums sums_of(const int8_t* tile) {
  typedef int16_t Shorts __attribute__((vector_size(64)));
  Shorts pairs{}, line;
  for (int64_t i = 0; i < kStrip; ++i) {
    memcpy(&line, tile + i * kTileDepth, sizeof line);
    pairs += (line >> 8) + (line << 8 >> 8);
  }
  const StripSums both = reinterpret_cast<StripSums>(pairs);
  return (both >> 16) + (both << 16 >> 16);
}

// Weights of one strip, `outputs` of its channels, as tiles. `scratch` is that of `Matmul`.
inline void pack_strip(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int8_t* strip,
                       int8_t* scratch) {
  const int64_t steps = steps_of(stored.channels), taps = weights.taps;
  for (int64_t row = 0; row < kStrip * taps; ++row) {
    // A tile has a line for each output channel until it is transposed.
    int8_t* line = strip + row % taps * steps * kTileBytes + row / taps * kTileDepth;
    const int8_t* codes = scratch;
    const int64_t some = row / taps < outputs ? stored.channels : 0;
    if (some && stored.multiplier) {
      unpack_int4(static_cast<const uint8_t*>(stored.codes) + row * (stored.groups * stored.group / 2),
                  stored.multiplier + row * stored.groups, scratch, stored.channels, stored.group);
    } else {
      codes = static_cast<const int8_t*>(stored.codes) + row * stored.channels;
    }
    for (int64_t start = 0; start < steps * kTileDepth; start += kTileDepth, line += kTileBytes) {
      if (some - start >= kTileDepth) {
        memcpy(line, codes + start, kTileDepth);
      } else {
        memset(line, 0, kTileDepth);
        if (some > start) memcpy(line, codes + start, some - start);
      }
    }
  }
  StripSums sums{};
  for (int64_t tile = 0; tile < taps * steps; ++tile, strip += kTileBytes) {
    transpose(strip);
    sums += sums_of(strip);
  }
  memcpy(strip, &sums, sizeof sums);
}

// Sums of 32 rows with two strips, [32, 32]. Rows are `stride` bytes from each other, `offsets` is where taps begin.
#ifdef __AMX_INT8__
struct IntegerProducts {
  IntegerProducts() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; ++i) {
      shape.bytes[i] = kTileDepth;
      shape.rows[i] = 16;
    }
    _tile_loadconfig(&shape);
  }
  ~IntegerProducts() { _tile_release(); }

  template <bool is_signed>
  static void sum(const uint8_t* a, int64_t stride, const int64_t* offsets, int64_t taps, int64_t steps,
                  const int8_t* b, int64_t next, int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* from = a + offsets[tap];
      for (int64_t step = 0; step < steps; ++step, from += kTileDepth, b += kTileBytes) {
        _tile_loadd(4, from, stride);
        _tile_loadd(6, b, kTileDepth);
        _tile_loadd(7, b + next, kTileDepth);
        _tile_loadd(5, from + 16 * stride, stride);
        if (is_signed) {
          _tile_dpbssd(0, 4, 6);
          _tile_dpbssd(1, 4, 7);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        } else {
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
      }
    }
    constexpr int64_t kBytes = kBlock * sizeof(int32_t);
    _tile_stored(0, sums, kBytes);
    _tile_stored(1, sums + kStrip, kBytes);
    _tile_stored(2, sums + 16 * kBlock, kBytes);
    _tile_stored(3, sums + 16 * kBlock + kStrip, kBytes);
  }
};
#else
struct IntegerProducts {
  template <bool is_signed>
  static void sum(const uint8_t* a, int64_t stride, const int64_t* offsets, int64_t taps, int64_t steps,
                  const int8_t* b, int64_t next, int32_t* sums) {
    memset(sums, 0, kBlock * kBlock * sizeof(int32_t));
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t k = 0; k < steps * kTileDepth; ++k) {
        const int8_t* word = b + (tap * steps * kTileDepth + k) / kWord * kStrip * kWord + k % kWord;
        for (int64_t row = 0; row < kBlock; ++row) {
          const uint8_t code = a[row * stride + offsets[tap] + k];
          const int32_t value = is_signed ? static_cast<int8_t>(code) : code;
          for (int64_t i = 0; i < kBlock; ++i) {
            sums[row * kBlock + i] += value * word[i / kStrip * next + i % kStrip * kWord];
          }
        }
      }
    }
  }
};
#endif

// Rows `first` to `last` of one image with strips of which the first is of `channel`: scaled, where they are kept.
template <bool is_signed>
void multiply_rows(const IntegerRows& rows, const IntegerWeights& weights, int64_t first, int64_t last,
                   const int8_t* strips, int64_t count, int64_t channel) {
  const int64_t steps = steps_of(weights.channels), bytes = strip_bytes(weights);
  alignas(64) int32_t sums[kBlock * kBlock];
  alignas(64) int32_t zeros[kStripsAtOnce * kStrip];  // what the zero of the codes adds to each sum
  IntegerProducts products;
  for (int64_t strip = 0; strip < count; ++strip) {
    int32_t* zero = zeros + strip * kStrip;
    memcpy(zero, strips + (strip + 1) * bytes - kStrip * sizeof(int32_t), kStrip * sizeof(int32_t));
    for (int64_t i = 0; i < kStrip; ++i) zero[i] *= rows.zero;
  }
  for (int64_t row = first; row < last; row += kBlock) {
    const int64_t some = last - row < kBlock ? last - row : kBlock;
    for (int64_t strip = 0; strip < count; strip += 2) {
      const int64_t next = strip + 1 < count ? bytes : 0;  // an odd last one is multiplied twice
      products.template sum<is_signed>(rows.codes + row * rows.stride, rows.stride, rows.offsets, weights.taps, steps,
                                       strips + strip * bytes, next, sums);
      const int64_t begin = channel + strip * kStrip, rest = weights.outputs - begin;
      const int64_t columns = next == 0 || rest < kBlock ? (rest < kBlock ? rest : kStrip) : kBlock;
      for (int64_t r = 0; r < some; ++r) {
        const int64_t kept = kept_row(rows, row + r);
        if (kept < 0) continue;
        write_outputs(sums + r * kBlock, zeros + strip * kStrip, weights, begin, columns,
                      rows.scale[rows.scale_for_each ? kept : 0], rows.out + kept * weights.outputs + begin);
      }
    }
  }
}

}  // namespace dcomp::DCOMP_ISA
