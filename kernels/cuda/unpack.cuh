// Weights of a checkpoint as floats: an integer times the scale of its output channel.
#pragma once
#include "quantize.cuh"

namespace dcomp {

template <bool kInt4>
struct UnpackWeight : QuantizeKernel<UnpackArguments, 0> {
  // A block makes a row at a time, a thread two neighbours, which share a byte of int4 codes.
  static DCOMP_DEVICE void run(const Arguments& a) {
    for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
      const float scale = load_global(a.scale + row / a.taps);
      for (int channel = threadIdx.x * 2; channel < a.channels; channel += kThreads * 2) {
        const bool both = channel + 1 < a.channels;
        int q[2];
        integers(a, row, channel, both, q);
        store_floats(a.out, a.out_type, static_cast<int64>(row) * a.channels + channel,
                     multiply(to_float(q[0]), scale), multiply(to_float(q[1]), scale), both, a.channels % 2 == 0);
      }
    }
  }

  static DCOMP_DEVICE void integers(const Arguments& a, int row, int channel, bool both, int (&q)[2]) {
    if constexpr (kInt4) {
      const int64 bytes = static_cast<int64>(a.groups) * a.group / 2;
      const int byte = load_global(static_cast<const uint8*>(a.qweight) + row * bytes + channel / 2);
      const int multiplier = load_global(a.multiplier + static_cast<int64>(row) * a.groups + channel / a.group);
      q[0] = (((byte & 15) ^ 8) - 8) * multiplier;
      q[1] = (((byte >> 4) ^ 8) - 8) * multiplier;  // groups are even, so it is of the same one
    } else {
      const int8* const codes = static_cast<const int8*>(a.qweight) + static_cast<int64>(row) * a.channels + channel;
      q[0] = load_global(codes);
      q[1] = both ? load_global(codes + 1) : 0;
    }
  }
};

using UnpackInt8 = UnpackWeight<false>;
using UnpackInt4 = UnpackWeight<true>;

}  // namespace dcomp
