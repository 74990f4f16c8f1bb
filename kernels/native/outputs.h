// What becomes of integer sums: scaled, biased and written, a row at a time.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace dcomp::DCOMP_ISA {

// out = bias + ((sums - zeros) * weight_scale) * scale, for `columns` output channels from `begin` on
inline void write_outputs(const int32_t* sums, const int32_t* zeros, const IntegerWeights& weights, int64_t begin,
                          int64_t columns, float scale, float* out) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const int64_t lanes = columns - i;
    Ints sum, zero;
    memcpy(&sum, sums + i, sizeof sum);
    memcpy(&zero, zeros + i, sizeof zero);
    const float* factor = weights.scale + begin + i;
    Floats value = __builtin_convertvector(sum - zero, Floats);
    value = value * (lanes < kLanes ? load_some(factor, lanes) : load(factor)) * scale;
    if (weights.bias) {
      const float* bias = weights.bias + begin + i;
      value = (lanes < kLanes ? load_some(bias, lanes) : load(bias)) + value;
    }
    if (lanes < kLanes) {
      memcpy(out + i, &value, lanes * sizeof(float));
    } else {
      store(out + i, value);
    }
  }
}

// Where a row of an image of rows is written to, counted in kept rows; below zero if it is not kept.
inline int64_t kept_row(const IntegerRows& rows, int64_t row) {
  const int64_t place = row % rows.pitch;
  return place < rows.width ? row / rows.pitch * rows.width + place : -1;
}

}  // namespace dcomp::DCOMP_ISA
