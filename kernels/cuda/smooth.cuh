// Factors of channels, by which values are multiplied while they are read. Loops are compiled with and without them.
#pragma once
#include "codes.cuh"

namespace dcomp {

template <bool kThere>
struct Smooth {
  static constexpr bool there = kThere;
};

// Calls `work` with the type of inputs, as `with_type` does, and with whether there are factors.
template <class Arguments, class Work>
DCOMP_DEVICE void with_inputs(const Arguments& a, Work work) {
  with_type(a.x_type, [&](auto type) {
    if (a.smooth) {
      work(type, Smooth<true>{});
    } else {
      work(type, Smooth<false>{});
    }
  });
}

DCOMP_DEVICE void multiply_fours(float (&v)[kFour], const float (&factor)[kFour]) {
#pragma unroll
  for (int i = 0; i < kFour; ++i) v[i] = multiply(v[i], factor[i]);
}

// Of rows of channels, whose fours begin at multiples of four within a `row`.
template <class Smooth>
struct RowSmooth {
  const Floats<Float32> factors;

  DCOMP_DEVICE RowSmooth(const float* smooth, int channels, int row) : factors(smooth, 0, channels, row) {}

  DCOMP_DEVICE void apply(float (&v)[kFour], int at, int end) const {
    if constexpr (Smooth::there) {
      float factor[kFour];
      factors.load(factor, at, end);
      multiply_fours(v, factor);
    }
  }
};

// Of memory in which each C neighbours are channels: a thread walks through it in equal strides.
template <class Smooth>
struct WalkSmooth {
  const Floats<Float32> factors;
  int channel = 0, ahead = 0;

  DCOMP_DEVICE WalkSmooth(const float* smooth, int channels, int64 first, int64 stride)
      : factors(smooth, 0, channels, channels) {
    if constexpr (Smooth::there) {
      channel = static_cast<int>(first % channels);
      ahead = static_cast<int>(stride % channels);
    }
  }

  // Of the next four.
  DCOMP_DEVICE void apply(float (&v)[kFour]) {
    if constexpr (Smooth::there) {
      const int channels = static_cast<int>(factors.count);
      float factor[kFour];
      if (factors.aligned) {
        factors.load(factor, channel);
      } else {
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          int c = channel + i;
          while (c >= channels) c -= channels;
          factor[i] = load_global(factors.values + c);
        }
      }
      multiply_fours(v, factor);
      channel += ahead;
      if (channel >= channels) channel -= channels;
    }
  }
};

}  // namespace dcomp
