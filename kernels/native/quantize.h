// Quantization of activations, and what becomes of integer sums: kernels over rows of raw memory.
//
// The rules are those of `qparams.py`. `Values` point to float or BFloat16, or are `Smoothed`.
#pragma once
#include "simd.h"

namespace dcomp::DCOMP_ISA {

constexpr float kTokenLimit = 127.0f;
// Whatever is beyond this is beyond all codes; within it rounding is exact, and 16 bits hold it with any zero. What is
// far below, or NaN, becomes the least integer there is.
constexpr float kFarBeyondCodes = 1 << 14;

struct Range {
  float low, high;

  // NaN stays NaN.
  void join(float other_low, float other_high) {
    low = other_low < low || other_low != other_low ? other_low : low;
    high = other_high > high || other_high != other_high ? other_high : high;
  }
};

// The smaller and the larger values of each lane, and 0; what is no number is kept beside, where it costs least.
struct Extremes {
  Floats low, high;
  Ints strange;

  void add(Floats v) {
    low = smaller_or_second(v, low);
    high = larger_or_second(v, high);
    strange |= v != v;
  }

  void join(const Extremes& other) {
    add(other.low);
    add(other.high);
    strange |= other.strange;
  }

  // Those of all lanes.
  Range range() const {
    Range all{0.0f, 0.0f};
    for (int64_t k = 0; k < kLanes; ++k) all.join(strange[k] ? __builtin_nanf("") : low[k], high[k]);
    if (all.low != all.low) all.high = all.low;
    return all;
  }
};

// The smallest and the largest of `count` values and 0; NaN if there is one.
template <class Values>
Range range_of(Values x, int64_t count) {
  Extremes first{}, second{};  // two, because one would wait for itself
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    first.add(load(x + i));
    second.add(load(x + i + kLanes));
  }
  for (; i < count; i += kLanes) first.add(count - i < kLanes ? load_some(x + i, count - i) : load(x + i));
  first.join(second);
  return first.range();
}

// The bits of magnitudes; those of NaN are larger than those of all others.
inline Ints magnitude_bits(Floats v) {
  Ints bits;
  memcpy(&bits, &v, sizeof bits);
  return bits & 0x7FFFFFFF;
}

// The largest of all lanes, from bits of magnitudes.
inline float largest_of(Ints magnitudes) {
  const int32_t bits = over_lanes(magnitudes, [](Ints a, Ints b) { return larger(a, b); });
  float found;
  memcpy(&found, &bits, sizeof found);
  return found;
}

// The largest magnitude of `count` values; NaN if there is one.
template <class Values>
float largest_magnitude(Values x, int64_t count) {
  Ints first{}, second{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    first = larger(first, magnitude_bits(load(x + i)));
    second = larger(second, magnitude_bits(load(x + i + kLanes)));
  }
  for (; i < count; i += kLanes) {
    first = larger(first, magnitude_bits(count - i < kLanes ? load_some(x + i, count - i) : load(x + i)));
  }
  return largest_of(larger(first, second));
}

// clamp(rint(v * inverse) + zero, low, high), of uint8 or int8 codes
struct CodesOf {
  float inverse, zero, low, high;

  Floats before_rounding(Floats v) const {
    return smaller_or_second(broadcast(kFarBeyondCodes), v * inverse);
  }

  template <class Whole>
  Whole after_rounding(Whole v) const {
    return clamp(v + broadcast<Whole>(zero), broadcast<Whole>(low), broadcast<Whole>(high));
  }
};

// rint(v * inverse), which is within the codes whatever v is
struct CodesWithin {
  float inverse;

  Floats before_rounding(Floats v) const { return v * inverse; }

  template <class Whole>
  Whole after_rounding(Whole v) const {
    return v;
  }
};

template <class Code>
Bytes bytes_of(const Code& code, Floats v) {
  return to_bytes(to_ints(code.after_rounding(round_to_even(code.before_rounding(v)))));
}

template <class Values, class Code>
void write_codes(Values x, int8_t* codes, int64_t count, Code code) {
  int64_t i = 0;
#ifdef DCOMP_HAS_SHORTS
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    Floats v[4];
    load_each(x + i, v);
    for (Floats& each : v) each = code.before_rounding(each);
    const Shorts first = to_nearest_shorts(v[0], v[1]), second = to_nearest_shorts(v[2], v[3]);
    store_bytes(codes + i, code.after_rounding(first), code.after_rounding(second));
  }
#endif
  for (; i + kLanes <= count; i += kLanes) {
    const Bytes bytes = bytes_of(code, load(x + i));
    memcpy(codes + i, &bytes, sizeof bytes);
  }
  if (i < count) {
    const Bytes bytes = bytes_of(code, load_some(x + i, count - i));
    memcpy(codes + i, &bytes, count - i);
  }
}

inline bool is_finite(float v) { return v - v == 0.0f; }

// The scale of the int8 codes of a row
template <class Values>
float token_scale(Values x, int64_t channels) {
  const float found = largest_magnitude(x, channels) / kTokenLimit;
  return found < kSmallestScale ? 1.0f : found;
}

// int8 codes of a row with its scale; they are 0 if that is not finite
template <class Values>
void token_codes(Values x, int8_t* codes, float scale, int64_t channels) {
  if (!is_finite(scale)) {
    memset(codes, 0, channels);
    return;
  }
  write_codes(x, codes, channels, CodesWithin{1.0f / scale});
}

// uint8 codes within a given range
template <class Values>
void quantize_static(Values x, uint8_t* codes, int64_t count, float scale, float zero) {
  write_codes(x, reinterpret_cast<int8_t*>(codes), count, CodesOf{1.0f / scale, zero, 0.0f, 255.0f});
}

// out = bias + (sums * weight_scale) * x_scale for one row; `sums` may be the memory of `out`
inline void rescale(const int32_t* sums, float* out, float x_scale, const float* weight_scale, const float* bias,
                    int64_t channels) {
  for (int64_t i = 0; i < channels; ++i) {
    int32_t sum;
    memcpy(&sum, sums + i, sizeof sum);
    const float value = (static_cast<float>(sum) * weight_scale[i]) * x_scale;
    out[i] = bias ? bias[i] + value : value;
  }
}

// Two int4 codes of a byte, the low one first, each times the multiplier of its group: int8 (little-endian memory)
inline void unpack_int4(const uint8_t* packed, const int8_t* multiplier, int8_t* codes, int64_t channels,
                        int64_t group) {
  for (int64_t start = 0, g = 0; start < channels; start += group, ++g) {
    const int64_t count = start + group < channels ? group : channels - start;
    const uint16_t factor = static_cast<uint16_t>(multiplier[g]);
    const uint8_t* bytes = packed + start / 2;
    int8_t* out = codes + start;
    for (int64_t i = 0; i < count / 2; ++i) {
      uint16_t pair = static_cast<uint16_t>((bytes[i] | bytes[i] << 4) & 0x0F0F);
      pair = static_cast<uint16_t>(((pair ^ 0x0808) - 0x0808) * factor);  // low + 256 * high, times the factor
      pair = static_cast<uint16_t>(pair + ((pair & 0x80) << 1));          // a negative low one has borrowed 1
      memcpy(out + 2 * i, &pair, 2);
    }
    if (count % 2) out[count - 1] = static_cast<int8_t>((((bytes[count / 2] & 15) ^ 8) - 8) * multiplier[g]);
  }
}

}  // namespace dcomp::DCOMP_ISA
