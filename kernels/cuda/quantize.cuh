// Quantization of activations: a static range, a range of each sample, a scale of each token, grids of groups.
//
// Each follows the function of its name in kernels/qparams.py to the last bit.
#pragma once
#include "reduce.cuh"
#include "smooth.cuh"

namespace dcomp {

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarpLanes;

// What all kernels of this file and of norms have in common: blocks whose threads meet in little shared memory, if any.
// As many blocks at a time are asked of the compiler as it makes room for without factors of channels; a multiprocessor
// that takes fewer threads does not mind.
template <class Arguments_, int kFloats, int kBlocks_ = 1>
struct QuantizeKernel {
  using Arguments = Arguments_;
  static constexpr int kThreads = kQuantizeThreads, kBlocks = kBlocks_;
  static constexpr int kSharedBytes = kFloats * sizeof(float);
};

// Where a thread's fours begin, when `parts` blocks share a sample.
DCOMP_DEVICE int64 first_of_part() {
  return (static_cast<int64>(blockIdx.x) * kQuantizeThreads + threadIdx.x) * kFour;
}
DCOMP_DEVICE int64 stride_of_parts(int parts) { return static_cast<int64>(parts) * kQuantizeThreads * kFour; }

struct QuantizeStatic : QuantizeKernel<QuantizeStaticArguments, 0, 8> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const float inverse = divide(1.0f, load_global(a.scale)), zero = to_float(load_global(a.zero));
    with_inputs(a, [&](auto type, auto is_smooth) {
      const Floats<decltype(type)> x(a.x, 0, a.count, kFour);
      const int64 stride = stride_of_parts(gridDim.x);
      WalkSmooth<decltype(is_smooth)> smooth(a.smooth, a.channels, first_of_part(), stride);
      for (int64 at = first_of_part(); at < a.count; at += stride) {
        float v[kFour];
        int q[kFour];
        x.load(v, at);
        smooth.apply(v);
#pragma unroll
        for (int i = 0; i < kFour; ++i) q[i] = code(v[i], inverse, zero, 0.0f, kSampleSteps);
        store_codes(a.codes, q, at, a.count);
      }
    });
  }
};

struct Range {
  float low = 0.0f, high = 0.0f;  // 0 is in every range

  DCOMP_DEVICE void widen(float value) {
    low = Smaller::of(value, low);
    high = Larger::of(value, high);
  }

  // Writes the range of a block; two floats of shared memory for each warp.
  DCOMP_DEVICE void store(float* ranges, int64 part, float* shared) {
    low = over_block<Smaller, kQuantizeThreads>(low, shared);
    high = over_block<Larger, kQuantizeThreads>(high, shared + kQuantizeWarps);
    if (threadIdx.x == 0) {
      store_global(ranges + part * 2, low);
      store_global(ranges + part * 2 + 1, high);
    }
  }

  // The range of all parts of a sample, in each lane.
  DCOMP_DEVICE void load(const float* ranges, int parts) {
    const int lane = threadIdx.x % kWarpLanes;
    for (int part = lane; part < parts; part += kWarpLanes) {
      low = Smaller::of(load_global(ranges + part * 2), low);
      high = Larger::of(load_global(ranges + part * 2 + 1), high);
    }
    low = over_lanes<Smaller>(low);
    high = over_lanes<Larger>(high);
  }
};

// `sample_range` of qparams.
struct SampleGrid {
  float scale, inverse, zero;

  explicit DCOMP_DEVICE SampleGrid(const Range& range) {
    // Divided first: the width of a range of finite values may be infinite.
    scale = usable(add(divide(range.high, kSampleSteps), -divide(range.low, kSampleSteps)));
    inverse = divide(1.0f, scale);
    zero = to_float(to_int(round_to_even(multiply(-range.low, inverse))));
  }

  DCOMP_DEVICE int code_of(float value) const { return code(value, inverse, zero, 0.0f, kSampleSteps); }

  DCOMP_DEVICE void store(float* scales, uint8* zeros, int sample) const {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      store_global(scales + sample, scale);
      store_global(zeros + sample, static_cast<uint8>(to_int(zero)));
    }
  }
};

struct SampleRange : QuantizeKernel<QuantizeSampleArguments, 2 * kQuantizeWarps> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int sample = blockIdx.y;
    Range range;
    with_inputs(a, [&](auto type, auto is_smooth) {
      const Floats<decltype(type)> x(a.x, sample * a.count, a.count, a.count);
      WalkSmooth<decltype(is_smooth)> smooth(a.smooth, a.channels, first_of_part(), stride_of_parts(a.parts));
      for (int64 at = first_of_part(); at < a.count; at += stride_of_parts(a.parts)) {
        float v[kFour];
        x.load(v, at);
        smooth.apply(v);
#pragma unroll
        for (int i = 0; i < kFour; ++i) range.widen(v[i]);
      }
    });
    range.store(a.ranges, static_cast<int64>(sample) * a.parts + blockIdx.x,
                reinterpret_cast<float*>(shared_memory()));
  }
};

struct QuantizeSample : QuantizeKernel<QuantizeSampleArguments, 0> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int sample = blockIdx.y;
    Range range;
    range.load(a.ranges + static_cast<int64>(sample) * a.parts * 2, a.parts);
    const SampleGrid grid(range);
    grid.store(a.scale, a.zero, sample);
    with_inputs(a, [&](auto type, auto is_smooth) {
      const Floats<decltype(type)> x(a.x, sample * a.count, a.count, a.count);
      WalkSmooth<decltype(is_smooth)> smooth(a.smooth, a.channels, first_of_part(), stride_of_parts(a.parts));
      for (int64 at = first_of_part(); at < a.count; at += stride_of_parts(a.parts)) {
        float v[kFour];
        int q[kFour];
        x.load(v, at);
        smooth.apply(v);
#pragma unroll
        for (int i = 0; i < kFour; ++i) q[i] = grid.code_of(v[i]);
        store_codes(a.codes + sample * a.count, q, at, a.count);
      }
    });
  }
};

// The scale of a token whose largest magnitude is given.
DCOMP_DEVICE float token_scale(float peak) { return usable(divide(peak, kTokenLimit)); }

// A row of int8 codes of a warp: `value(at, v)` gives four values from `at` on, zeros beyond the channels.
template <class Values>
DCOMP_DEVICE void store_token(int8* codes, int depth, float scale, Values value) {
  const float inverse = divide(1.0f, scale);
  for (int at = threadIdx.x % kWarpLanes * kFour; at < depth; at += kWarpLanes * kFour) {
    float v[kFour];
    int q[kFour];
    value(at, v);
#pragma unroll
    for (int i = 0; i < kFour; ++i) q[i] = code(v[i], inverse, 0.0f, -kTokenLimit, kTokenLimit);
    store_codes(codes, q, at, depth);
  }
}

// The largest magnitude of the values of a row, in each lane.
template <class Values>
DCOMP_DEVICE float token_peak(int channels, Values value) {
  float peak = 0.0f;
  for (int at = threadIdx.x % kWarpLanes * kFour; at < channels; at += kWarpLanes * kFour) {
    float v[kFour];
    value(at, v);
#pragma unroll
    for (int i = 0; i < kFour; ++i) peak = Larger::of(v[i] < 0.0f ? -v[i] : v[i], peak);
  }
  return over_lanes<Larger>(peak);
}

// What a warp does of a row that has a scale of its own; `Arguments` have the fields of quantize_token or more.
struct TokenRow {
  template <class Type, class Smooth, class Arguments>
  static DCOMP_DEVICE void store(const Arguments& a, int row) {
    const Floats<Type> x(a.x, static_cast<int64>(row) * a.channels, a.channels, a.channels);
    const RowSmooth<Smooth> smooth(a.smooth, a.channels, a.channels);
    const auto value = [&](int at, float(&v)[kFour]) {
      x.load(v, at);
      smooth.apply(v, at, a.channels);
    };
    const float scale = token_scale(token_peak(a.channels, value));
    if (threadIdx.x % kWarpLanes == 0) store_global(a.scale + row, scale);
    store_token(a.codes + static_cast<int64>(row) * a.depth, a.depth, scale, value);
  }
};

struct QuantizeToken : QuantizeKernel<QuantizeTokenArguments, 0> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int row = blockIdx.x * kQuantizeWarps + threadIdx.x / kWarpLanes;
    if (row >= a.rows) return;  // a whole warp
    with_inputs(a, [&](auto type, auto is_smooth) { TokenRow::store<decltype(type), decltype(is_smooth)>(a, row); });
  }
};

// Of `qparams.group_grids` and what follows from them.
struct GroupGrid {
  static constexpr float kSteps = 15.0f, kReach = 0.97f, kSlack = 0.2f;
  float step, below;

  DCOMP_DEVICE GroupGrid(float low, float high) {
    // Divided first: the width of a range of finite values may be infinite.
    step = add(divide(high, kSteps), -divide(low, kSteps));
    const float ratio = divide(-low, step < kSmallestScale ? kSmallestScale : step);
    below = to_float(to_int(clamp(round_to_even(ratio), 0.0f, kSteps)));
    step = multiply(step, kReach);
  }

  DCOMP_DEVICE float limit() const {
    const float above = kSteps - below;
    return round_down(divide(kTokenLimit, below > above ? below : above));
  }

  DCOMP_DEVICE float multiplier(float scale) const {
    const float wanted = round_up(add(divide(step, scale), -kSlack));
    return clamp(wanted, 1.0f, limit());
  }
};

// Walks over the groups of a row: as many neighbouring lanes share a group as have fours of it.
template <class Type, class Smooth>
struct GroupRow {
  const Floats<Type> x;
  const RowSmooth<Smooth> smooth;
  const int group, channels, width;  // of the group, of the row, lanes that share a group

  template <class Arguments>
  DCOMP_DEVICE GroupRow(const Arguments& a, int64 row)
      : x(a.x, row * a.channels, a.channels, a.channels % kFour == 0 ? a.group : 1),
        smooth(a.smooth, a.channels, a.group),
        group(a.group),
        channels(a.channels),
        width(lanes(a.group)) {}

  static DCOMP_DEVICE int lanes(int group) {
    int width = 1;
    while (width < kWarpLanes && width * kFour < group) width *= 2;
    return width;
  }

  DCOMP_DEVICE void load(float (&v)[kFour], int at, int end) const {
    x.load(v, at, end);
    smooth.apply(v, at, end);
  }

  // Calls `work` with a grid and the bounds of its group, as channels.
  template <class Work>
  DCOMP_DEVICE void each(Work work) const {
    const int lane = threadIdx.x % kWarpLanes, across = kWarpLanes / width;
    for (int first = 0; first < channels; first += across * group) {
      const int start = first + lane / width * group;
      const int end = start + group < channels ? start + group : channels;
      float low = 0.0f, high = 0.0f;
      for (int at = start + lane % width * kFour; at < end; at += width * kFour) {
        float v[kFour];
        load(v, at, end);
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          low = Smaller::of(v[i], low);
          high = Larger::of(v[i], high);
        }
      }
      low = over_lanes<Smaller>(low, width);
      high = over_lanes<Larger>(high, width);
      work(GroupGrid(low, high), start, end);
    }
  }

  // The outer scale that the row calls for, before zeros get 1; of the groups of this lane.
  DCOMP_DEVICE float peak() const {
    float peak = 0.0f;
    each([&](const GroupGrid& grid, int, int) { peak = Larger::of(divide(grid.step, grid.limit()), peak); });
    return peak;
  }

  // Writes the image of the row, and zeros from the channels up to `depth`.
  DCOMP_DEVICE void store_image(int8* codes, int depth, float scale) const {
    const int lane = threadIdx.x % kWarpLanes;
    each([&](const GroupGrid& grid, int start, int end) {
      const float multiplier = grid.multiplier(scale), inverse = divide(1.0f, multiply(multiplier, scale));
      for (int at = start + lane % width * kFour; at < end; at += width * kFour) {
        float v[kFour];
        int q[kFour];
        load(v, at, end);
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          q[i] = code(v[i], inverse, 0.0f, -grid.below, GroupGrid::kSteps - grid.below) * to_int(multiplier);
        }
        store_codes(codes, q, at, end);
      }
    });
    for (int at = channels + lane; at < depth; at += kWarpLanes) store_global(codes + at, static_cast<int8>(0));
  }
};

struct GroupPeak : QuantizeKernel<QuantizeGroupArguments, kQuantizeWarps, 6> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int sample = blockIdx.y, warp = threadIdx.x / kWarpLanes;
    float peak = 0.0f;
    with_inputs(a, [&](auto type, auto is_smooth) {
      for (int row = blockIdx.x * kQuantizeWarps + warp; row < a.rows; row += a.parts * kQuantizeWarps) {
        const GroupRow<decltype(type), decltype(is_smooth)> groups(a, static_cast<int64>(sample) * a.rows + row);
        peak = Larger::of(groups.peak(), peak);
      }
    });
    peak = over_block<Larger, kThreads>(peak, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) store_global(a.peaks + static_cast<int64>(sample) * a.parts + blockIdx.x, peak);
  }
};

struct QuantizeGroup : QuantizeKernel<QuantizeGroupArguments, 0, 5> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int sample = blockIdx.y, warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    float peak = 0.0f;
    for (int part = lane; part < a.parts; part += kWarpLanes) {
      peak = Larger::of(load_global(a.peaks + static_cast<int64>(sample) * a.parts + part), peak);
    }
    const float scale = usable(over_lanes<Larger>(peak));
    if (blockIdx.x == 0 && threadIdx.x == 0) store_global(a.scale + sample, scale);
    with_inputs(a, [&](auto type, auto is_smooth) {
      for (int row = blockIdx.x * kQuantizeWarps + warp; row < a.rows; row += a.parts * kQuantizeWarps) {
        const int64 place = static_cast<int64>(sample) * a.rows + row;
        GroupRow<decltype(type), decltype(is_smooth)>(a, place).store_image(a.codes + place * a.depth, a.depth, scale);
      }
    });
  }
};

// Like TokenRow, of groups; the second reading of a row finds it in the cache.
struct GroupTokenRow {
  template <class Type, class Smooth, class Arguments>
  static DCOMP_DEVICE void store(const Arguments& a, int row) {
    const GroupRow<Type, Smooth> groups(a, row);
    const float scale = usable(over_lanes<Larger>(groups.peak()));
    if (threadIdx.x % kWarpLanes == 0) store_global(a.scale + row, scale);
    groups.store_image(a.codes + static_cast<int64>(row) * a.depth, a.depth, scale);
  }
};

struct QuantizeGroupToken : QuantizeKernel<QuantizeGroupArguments, 0, 6> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int row = blockIdx.x * kQuantizeWarps + threadIdx.x / kWarpLanes;
    if (row >= a.rows) return;  // with all of its lanes
    with_inputs(a, [&](auto type, auto is_smooth) {
      GroupTokenRow::store<decltype(type), decltype(is_smooth)>(a, row);
    });
  }
};

}  // namespace dcomp
