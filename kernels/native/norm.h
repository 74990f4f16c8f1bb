// Normalization, activation and rounding in as few passes as there can be: nothing between them reaches memory.
//
// The definitions are those of `reference.py`; means and variances are summed otherwise than torch does, so that a code
// may differ by one where a value lies next to the middle between two.
#pragma once
#include "kernels.h"
#include "quantize.h"

namespace dcomp::DCOMP_ISA {

constexpr int64_t kRowsOfSums = 64;  // that float32 sums before they are added to float64
constexpr int64_t kRowsOfStep = 8;   // that are added while their sums are in registers

// Adds x - shift and its square for each channel of a few rows to `sums`.
template <int64_t kRows, class T>
void add_rows(const T* x, int64_t channels, const float* shift, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Floats sum = load(sums + c), squares = load(sums + channels + c);
    for (int64_t row = 0; row < kRows; ++row) {
      const Floats v = load(x + row * channels + c) - load(shift + c);
      sum += v;
      squares += v * v;
    }
    store(sums + c, sum);
    store(sums + channels + c, squares);
  }
  for (; c < channels; ++c) {
    for (int64_t row = 0; row < kRows; ++row) {
      const float v = load_some(x + row * channels + c, 1)[0] - shift[c];
      sums[c] += v;
      sums[channels + c] += v * v;
    }
  }
}

// Sums of x - shift and of its square for each channel, over rows [rows, channels]; `scratch` holds 2 * channels.
template <class T>
void add_moments(const T* x, int64_t rows, int64_t channels, const float* shift, double* sums, float* scratch) {
  for (int64_t first = 0; first < rows; first += kRowsOfSums) {
    const int64_t last = first + kRowsOfSums < rows ? first + kRowsOfSums : rows;
    memset(scratch, 0, 2 * channels * sizeof(float));
    int64_t row = first;
    for (; row + kRowsOfStep <= last; row += kRowsOfStep) {
      add_rows<kRowsOfStep>(x + row * channels, channels, shift, scratch);
    }
    for (; row < last; ++row) add_rows<1>(x + row * channels, channels, shift, scratch);
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += scratch[i];
  }
}

constexpr float kInfinity = __builtin_inff();
constexpr float kLeastOfSilu = -1.27846454f;  // where it is

template <int kCount>
inline void silu(Floats (&v)[kCount]) {
  Floats power[kCount];
  in_turn<kCount>([&](int k) { power[k] = -v[k]; });
  exp(power);
  in_turn<kCount>([&](int k) { power[k] = reciprocal(1.0f + power[k]); });
  in_turn<kCount>([&](int k) { v[k] *= power[k]; });
}

inline Floats silu(Floats v) {
  Floats one[] = {v};
  silu(one);
  return one[0];
}

// Values of one channel each that are normalized as they are loaded: x * factor + added, through SiLU if it is wanted.
template <bool with_silu, class T>
struct Normalized {
  const T* x;
  const float *factor, *added;

  Normalized operator+(int64_t count) const { return {x + count, factor + count, added + count}; }
};

template <bool with_silu, class T>
Floats load(Normalized<with_silu, T> p) {
  const Floats v = multiply_add(load(p.x), load(p.factor), load(p.added));
  return with_silu ? silu(v) : v;
}

template <int kCount, class T>
void load_each(Normalized<true, T> p, Floats (&v)[kCount]) {
  load_each(Normalized<false, T>{p.x, p.factor, p.added}, v);
  silu(v);
}

template <bool with_silu, class T>
Floats load_some(Normalized<with_silu, T> p, int64_t count) {
  const Floats v = multiply_add(load_some(p.x, count), load_some(p.factor, count), load_some(p.added, count));
  return with_silu ? silu(v) : v;  // of 0 it is 0
}

// The extremes of SiLU from those of its inputs: it falls up to one place and rises from there, below 0 up to it.
struct ExtremesOfSilu {
  Extremes rising{};  // and 0
  Floats falling = broadcast(-kInfinity);  // the last one

  void add(Floats v) {
    const Ints falls = v < kLeastOfSilu;
    const Floats last = falls ? v : broadcast(-kInfinity);
    falling = larger_or_second(last, falling);
    rising.add(falls ? Floats{} : v);
  }

  Range range() const {
    Extremes found{};
    found.strange = rising.strange;
    found.add(silu(rising.low));
    found.add(silu(rising.high));
    found.add(falling > -kInfinity ? silu(falling) : Floats{});
    return found.range();
  }
};

// The smallest and the largest normalized value, and 0; NaN if there is one.
template <bool with_silu, class T>
Range normalized_range(const T* x, int64_t rows, int64_t channels, const float* factor, const float* added) {
  std::conditional_t<with_silu, ExtremesOfSilu, Extremes> found{};
  for (int64_t place = 0; place < rows * channels; place += channels) {
    const Normalized<false, T> row{x + place, factor, added};
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) found.add(load(row + c));
    if (c < channels) found.add(load_some(row + c, channels - c));
  }
  return found.range();
}

// uint8 codes of normalized values within a range
template <bool with_silu, class T>
void normalized_codes(const T* x, uint8_t* codes, int64_t rows, int64_t channels, const float* factor,
                      const float* added, float scale, float zero) {
  for (int64_t place = 0; place < rows * channels; place += channels) {
    quantize_static(Normalized<with_silu, T>{x + place, factor, added}, codes + place, channels, scale, zero);
  }
}

// The sum of what `of` makes of `count` values; lanes beyond the last one hold `beyond`, of which it must make 0.
template <class T, class Of>
float sum_over(const T* x, int64_t count, Of of, float beyond = 0.0f) {
  Floats first{}, second{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    first += of(load(x + i));
    second += of(load(x + i + kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) first += of(load(x + i));
  if (i < count) {
    Floats v = load_some(x + i, count - i);
    for (int64_t k = count - i; k < kLanes; ++k) v[k] = beyond;
    second += of(v);
  }
  first += second;
  float sum = 0.0f;
  for (int64_t k = 0; k < kLanes; ++k) sum += first[k];
  return sum;
}

// int8 codes of a normalized row and its scale: ((x - mean) / deviation * weight + bias) * (1 + gain) + shift, where
// all four may be missing. `scratch` holds a row.
template <class T>
void layer_norm_token(const T* x, int8_t* codes, float* scale, int64_t channels, const LayerNorm& norm,
                      const float* gain, const float* shift, float* scratch) {
  const float count = static_cast<float>(channels);
  const float mean = sum_over(x, channels, [](Floats v) { return v; }) / count;
  const float variance = sum_over(x, channels, [=](Floats v) { return (v - mean) * (v - mean); }, mean) / count;
  const float factor = 1.0f / __builtin_sqrtf(variance + norm.eps);
  const auto value = [&](auto of) {
    Floats v = (of(x) - mean) * factor;
    if (norm.weight) v = v * of(norm.weight);
    if (norm.bias) v = v + of(norm.bias);
    if (gain) v = v * (1.0f + of(gain));
    return shift ? v + of(shift) : v;
  };
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(scratch + c, value([=](auto* p) { return load(p + c); }));
  if (c < channels) {
    const Floats v = value([=](auto* p) { return load_some(p + c, channels - c); });
    memcpy(scratch + c, &v, (channels - c) * sizeof(float));
  }
  *scale = token_scale(scratch, channels);
  token_codes(scratch, codes, *scale, channels);
}

}  // namespace dcomp::DCOMP_ISA
