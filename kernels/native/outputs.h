// What becomes of integer sums: scaled, biased and written, a row at a time.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace dcomp::DCOMP_ISA {

// out = bias + ((sums - zeros) * weight_scale) * scale, for `columns` output channels from `begin` on
inline void write_outputs(const int32_t* sums, const int32_t* zeros, const IntegerWeights& weights, int64_t begin,
                          int64_t columns, float scale, float* out) {
  const float *factor = weights.scale + begin, *bias = weights.bias ? weights.bias + begin : nullptr;
  const auto centred = [&](int64_t i) {
    Ints sum, zero;
    memcpy(&sum, sums + i, sizeof sum);
    memcpy(&zero, zeros + i, sizeof zero);
    return to_floats(sum - zero);
  };
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const Floats value = centred(i) * load(factor + i) * scale;
    store(out + i, bias ? load(bias + i) + value : value);
  }
  if (i < columns) {
    Floats value = centred(i) * load_some(factor + i, columns - i) * scale;
    if (bias) value = load_some(bias + i, columns - i) + value;
    memcpy(out + i, &value, (columns - i) * sizeof(float));
  }
}

// Where a row of an image of rows is written to, counted in kept rows; below zero if it is not kept.
inline int64_t kept_row(const IntegerRows& rows, int64_t row) {
  const int64_t place = row % rows.pitch;
  return place < rows.width ? row / rows.pitch * rows.width + place : -1;
}

}  // namespace dcomp::DCOMP_ISA
