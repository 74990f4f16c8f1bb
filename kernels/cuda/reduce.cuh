// Extremes and sums over lanes, warps and a block. NaN stays NaN, as in torch's amax and amin.
#pragma once
#include "primitives.cuh"

namespace dcomp {

constexpr int kWarpLanes = 32;

struct Larger {
  static DCOMP_DEVICE float of(float a, float b) { return a > b || a != a ? a : b; }
};

struct Smaller {
  static DCOMP_DEVICE float of(float a, float b) { return a < b || a != a ? a : b; }
};

struct Sum {
  static DCOMP_DEVICE float of(float a, float b) { return add(a, b); }
};

// Over neighbouring lanes, `width` of them, a power of two; all lanes of a warp take part and get the result.
template <class Choice>
DCOMP_DEVICE float over_lanes(float value, int width = kWarpLanes) {
  for (int mask = width / 2; mask > 0; mask /= 2) value = Choice::of(shuffle_xor(value, mask), value);
  return value;
}

// Over a block of `kThreads`, through a float of shared memory for each warp; all threads get the result.
template <class Choice, int kThreads>
DCOMP_DEVICE float over_block(float value, float* of_warps) {
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  value = over_lanes<Choice>(value);
  store_shared(of_warps + warp, value, lane == 0);
  barrier();
  return over_lanes<Choice>(load_shared(of_warps + lane % (kThreads / kWarpLanes)));
}

}  // namespace dcomp
