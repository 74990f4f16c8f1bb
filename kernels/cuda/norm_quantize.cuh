// Norms whose results are quantized at once: GroupNorm and SiLU before a convolution, LayerNorm and modulation before a
// linear layer. Means and variances are found in two passes, so that they lose nothing to cancellation.
#pragma once
#include "quantize.cuh"

namespace dcomp {

constexpr int kMostGroups = 256;  // of GroupNorm

DCOMP_DEVICE float inverse_deviation(float variance, float epsilon) {
  return divide(1.0f, square_root(add(variance, epsilon)));
}

// The pixels of a sample that a block of `parts` takes.
struct PixelSlice {
  int first, end;

  DCOMP_DEVICE PixelSlice(const GroupNormArguments& a, int part) {
    const int size = (a.pixels + a.parts - 1) / a.parts;
    first = part * size < a.pixels ? part * size : a.pixels;
    end = first + size < a.pixels ? first + size : a.pixels;
  }
};

// Mean and squared distances of each group in a block's pixels; a warp takes a group at a time.
struct GroupNormMoments : QuantizeKernel<GroupNormArguments, 0> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    const int64 part = static_cast<int64>(blockIdx.y) * a.parts + blockIdx.x;
    const PixelSlice slice(a, blockIdx.x);
    const int width = a.channels / a.groups;
    const float count = to_float((slice.end - slice.first) * width);
    for (int group = warp; group < a.groups; group += kQuantizeWarps) {
      const float mean = count > 0.0f ? divide(sum_of(a, slice, group, [](float x) { return x; }), count) : 0.0f;
      const float squares = sum_of(a, slice, group, [&](float x) {
        const float distance = add(x, -mean);
        return multiply(distance, distance);
      });
      if (lane == 0) {
        float* const to = a.moments + (part * a.groups + group) * 2;
        store_global(to, mean);
        store_global(to + 1, squares);
      }
    }
  }

  template <class Term>
  static DCOMP_DEVICE float sum_of(const Arguments& a, const PixelSlice& slice, int group, Term term) {
    const int width = a.channels / a.groups, lane = threadIdx.x % kWarpLanes;
    float sum = 0.0f;
    with_type(a.x_type, [&](auto type) {
      using Type = decltype(type);
      const auto* const x = static_cast<const typename Type::Stored*>(a.x) +
                            static_cast<int64>(blockIdx.y) * a.pixels * a.channels + group * width;
      int pixel = slice.first + lane / width, channel = lane % width;
      while (pixel < slice.end) {
        sum = add(sum, term(Type::widen(load_global(x + static_cast<int64>(pixel) * a.channels + channel))));
        pixel += kWarpLanes / width;
        channel += kWarpLanes % width;
        if (channel >= width) {
          channel -= width;
          pixel += 1;
        }
      }
    });
    return over_lanes<Sum>(sum);
  }
};

// What comes after the moments: the norm of a block's pixels, of which a mode makes a range or codes.
template <class Mode>
struct GroupNorm : QuantizeKernel<GroupNormArguments, 2 * kMostGroups + 2 * kQuantizeWarps> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    float* const means = reinterpret_cast<float*>(shared_memory());
    float* const deviations = means + kMostGroups;  // their inverses
    for (int group = threadIdx.x / kWarpLanes; group < a.groups; group += kQuantizeWarps) {
      combine(a, group, means + group, deviations + group);
    }
    barrier();
    Mode mode(a);
    with_type(a.x_type, [&](auto type) { normalize<decltype(type)>(a, mode, means, deviations); });
    mode.finish(a, means + 2 * kMostGroups);
  }

  // Mean and variance of a group from those of all parts.
  static DCOMP_DEVICE void combine(const Arguments& a, int group, float* mean_of_group, float* deviation_of_group) {
    const int lane = threadIdx.x % kWarpLanes, width = a.channels / a.groups;
    const float* const moments = a.moments + (static_cast<int64>(blockIdx.y) * a.parts * a.groups + group) * 2;
    const float count = multiply(to_float(a.pixels), to_float(width));
    const auto over_parts = [&](auto term) {
      float sum = 0.0f;
      for (int part = lane; part < a.parts; part += kWarpLanes) {
        const PixelSlice slice(a, part);
        const float* const of_part = moments + static_cast<int64>(part) * a.groups * 2;
        sum = add(sum, term(to_float((slice.end - slice.first) * width), load_global(of_part), of_part + 1));
      }
      return over_lanes<Sum>(sum);
    };
    const float mean = divide(over_parts([](float n, float mean, const float*) { return multiply(n, mean); }), count);
    const float squares = over_parts([&](float n, float part_mean, const float* of_part) {
      const float distance = add(part_mean, -mean);
      return add(load_global(of_part), multiply(n, multiply(distance, distance)));
    });
    store_shared(mean_of_group, mean, lane == 0);
    store_shared(deviation_of_group, inverse_deviation(divide(squares, count), a.epsilon), lane == 0);
  }

  template <class Type>
  static DCOMP_DEVICE void normalize(const Arguments& a, Mode& mode, const float* means, const float* deviations) {
    const PixelSlice slice(a, blockIdx.x);
    const int64 all = static_cast<int64>(a.pixels) * a.channels, end = static_cast<int64>(slice.end) * a.channels;
    const Floats<Type> x(a.x, blockIdx.y * all, all, a.channels);
    const uint32 width = a.channels / a.groups, inverse_width = width > 1 ? 0xFFFFFFFFu / width + 1 : 0;
    const int ahead = kThreads * kFour % a.channels;
    int channel = threadIdx.x * kFour % a.channels;
    // All threads go round equally often: they read shared memory together.
    for (int64 first = static_cast<int64>(slice.first) * a.channels; first < end; first += kThreads * kFour) {
      const int64 at = first + threadIdx.x * kFour;
      float v[kFour];
      x.load(v, at, end);
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        int c = channel + i;
        while (c >= a.channels) c -= a.channels;
        const uint32 group = width > 1 ? multiply_high(c, inverse_width) : c;
        const float centred = add(v[i], -load_shared(means + group));
        float y = multiply(centred, load_shared(deviations + group));
        if (a.weight) y = add(multiply(y, load_global(a.weight + c)), load_global(a.bias + c));
        v[i] = a.silu ? divide(y, add(1.0f, exponential(-y))) : y;
      }
      if (at < end) mode.take(a, v, at, end);
      channel += ahead;
      if (channel >= a.channels) channel -= a.channels;
    }
  }
};

struct NormRange {
  Range range;

  explicit DCOMP_DEVICE NormRange(const GroupNormArguments&) {}

  DCOMP_DEVICE void take(const GroupNormArguments&, const float (&v)[kFour], int64 at, int64 end) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (at + i < end) range.widen(v[i]);
    }
  }

  DCOMP_DEVICE void finish(const GroupNormArguments& a, float* shared) {
    range.store(a.ranges, static_cast<int64>(blockIdx.y) * a.parts + blockIdx.x, shared);
  }
};

DCOMP_DEVICE void store_norm(const GroupNormArguments& a, const int (&q)[kFour], int64 at, int64 end) {
  store_codes(a.codes + static_cast<int64>(blockIdx.y) * a.pixels * a.channels, q, at, end);
}

struct NormStatic {
  float inverse, zero;

  explicit DCOMP_DEVICE NormStatic(const GroupNormArguments& a)
      : inverse(divide(1.0f, load_global(a.scale))), zero(to_float(load_global(a.zero))) {}

  DCOMP_DEVICE void take(const GroupNormArguments& a, const float (&v)[kFour], int64 at, int64 end) {
    int q[kFour];
#pragma unroll
    for (int i = 0; i < kFour; ++i) q[i] = code(v[i], inverse, zero, 0.0f, kSampleSteps);
    store_norm(a, q, at, end);
  }

  DCOMP_DEVICE void finish(const GroupNormArguments&, float*) {}
};

struct NormSample {
  SampleGrid grid;

  explicit DCOMP_DEVICE NormSample(const GroupNormArguments& a) : grid(range_of(a)) {
    grid.store(a.scale, a.zero, blockIdx.y);
  }

  static DCOMP_DEVICE Range range_of(const GroupNormArguments& a) {
    Range range;
    range.load(a.ranges + static_cast<int64>(blockIdx.y) * a.parts * 2, a.parts);
    return range;
  }

  DCOMP_DEVICE void take(const GroupNormArguments& a, const float (&v)[kFour], int64 at, int64 end) {
    int q[kFour];
#pragma unroll
    for (int i = 0; i < kFour; ++i) q[i] = grid.code_of(v[i]);
    store_norm(a, q, at, end);
  }

  DCOMP_DEVICE void finish(const GroupNormArguments&, float*) {}
};

using GroupNormRange = GroupNorm<NormRange>;
using GroupNormStatic = GroupNorm<NormStatic>;
using GroupNormSample = GroupNorm<NormSample>;

struct LayerNormToken : QuantizeKernel<LayerNormArguments, 0> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int row = blockIdx.x * kQuantizeWarps + threadIdx.x / kWarpLanes;
    if (row >= a.rows) return;  // a whole warp
    with_type(a.x_type, [&](auto type) { quantize_row<decltype(type)>(a, row); });
  }

  template <class Type>
  static DCOMP_DEVICE void quantize_row(const Arguments& a, int row) {
    const int channels = a.channels;
    const Floats<Type> x(a.x, static_cast<int64>(row) * channels, channels, channels);
    const float count = to_float(channels);
    const auto sum_of = [&](auto term) {
      float sum = 0.0f;
      for (int at = threadIdx.x % kWarpLanes * kFour; at < channels; at += kWarpLanes * kFour) {
        float v[kFour];
        x.load(v, at);
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          if (at + i < channels) sum = add(sum, term(v[i]));
        }
      }
      return over_lanes<Sum>(sum);
    };
    const float mean = divide(sum_of([](float value) { return value; }), count);
    const float squares = sum_of([&](float value) {
      const float distance = add(value, -mean);
      return multiply(distance, distance);
    });
    const float inverse = inverse_deviation(divide(squares, count), a.epsilon);

    const int64 gained = a.gain ? static_cast<int64>(row / a.gain_rows) * channels : 0;
    const Floats<Float32> weight(a.weight, 0, channels, channels), bias(a.bias, 0, channels, channels);
    const Floats<Float32> gain(a.gain, gained, channels, channels), shift(a.shift, gained, channels, channels);
    // Beyond the channels all parts of the product are 0.
    const auto value = [&](int at, float(&v)[kFour]) {
      float other[kFour], further[kFour];
      x.load(v, at);
#pragma unroll
      for (int i = 0; i < kFour; ++i) v[i] = at + i < channels ? multiply(add(v[i], -mean), inverse) : 0.0f;
      if (a.weight) {
        weight.load(other, at);
        bias.load(further, at);
#pragma unroll
        for (int i = 0; i < kFour; ++i) v[i] = add(multiply(v[i], other[i]), further[i]);
      }
      if (a.gain) {
        gain.load(other, at);
        shift.load(further, at);
#pragma unroll
        for (int i = 0; i < kFour; ++i) v[i] = add(multiply(v[i], add(1.0f, other[i])), further[i]);
      }
    };
    const float scale = token_scale(token_peak(channels, value));
    if (threadIdx.x % kWarpLanes == 0) store_global(a.scale + row, scale);
    store_token(a.codes + static_cast<int64>(row) * a.depth, a.depth, scale, value);
  }
};

}  // namespace dcomp
