// Grids of groups of channels: `quantize_group` of qparams.py, a row at a time.
//
// Steps, and how many of them lie below 0, are arrays with a value for each group and zeros up to `kMostLanes`.
#pragma once
#include "quantize.h"

namespace dcomp::DCOMP_ISA {

constexpr float kCodeSteps = 15.0f, kReach = 0.97f, kSlack = 0.2f;

// The smallest and the largest of `count` values and 0, but for NaN, which is told to `strange`.
template <class Values>
Range range_of_group(Values x, int64_t count, Ints& strange) {
  Extremes found{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) found.add(load(x + i));
  if (i < count) found.add(load_some(x + i, count - i));
  strange |= found.strange;
  return {over_lanes(found.low, [](Floats a, Floats b) { return smaller_or_second(a, b); }),
          over_lanes(found.high, [](Floats a, Floats b) { return larger_or_second(a, b); })};
}

// The largest multiplier with which all codes of a group stay within 127.
inline Floats group_limits(Floats below) {
  const Floats above = kCodeSteps - below;
  return to_floats(to_ints(kTokenLimit / (below > above ? below : above)));
}

// Writes the grids of a row, and returns the outer scale that it calls for, before zeros get 1; if the row has NaN, that,
// and grids of the rest.
template <class Values>
float group_grids(Values x, int64_t channels, int64_t group, float* step, float* below) {
  Ints strange{};
  for (int64_t start = 0, g = 0; start < channels; start += group, ++g) {
    const Range range = range_of_group(x + start, group < channels - start ? group : channels - start, strange);
    step[g] = range.high;
    below[g] = range.low;
  }
  Ints peak{};  // bits of NaN are larger than those of all others
  for (int64_t g = 0; g * group < channels; g += kLanes) {
    const Floats high = load(step + g), low = load(below + g);
    // Divided first: the width of a range of finite values may be infinite.
    const Floats steps = high / kCodeSteps - low / kCodeSteps;
    Floats count = round_to_even(-low / larger(steps, broadcast(kSmallestScale)));
    count = count == count ? clamp(count, broadcast(0.0f), broadcast(kCodeSteps)) : broadcast(0.0f);
    store(step + g, steps * kReach);
    store(below + g, count);
    peak = larger(peak, magnitude_bits(steps * kReach / group_limits(count)));
  }
  return over_lanes(strange, [](Ints a, Ints b) { return a | b; }) ? __builtin_nanf("") : largest_of(peak);
}

// clamp(rint(v * inverse), -below, 15 - below) * multiplier: finite values are hardly beyond, so that rounding is exact
struct ImageOf {
  float inverse, below, multiplier;

  Floats before_rounding(Floats v) const { return v * inverse; }

  template <class Whole>
  Whole after_rounding(Whole v) const {
    return clamp(v, broadcast<Whole>(-below), broadcast<Whole>(kCodeSteps - below)) * broadcast<Whole>(multiplier);
  }
};

template <class Values>
void write_group_image(Values x, int8_t* image, int64_t channels, int64_t group, const float* step,
                       const float* below, float scale) {
  if (!is_finite(scale)) {
    memset(image, 0, channels);
    return;
  }
  for (int64_t first = 0; first * group < channels; first += kLanes) {
    const Floats wanted = load(step + first) / scale - kSlack, whole = to_floats(to_ints(wanted));
    const Floats multiplier =
        clamp(whole < wanted ? whole + 1.0f : whole, broadcast(1.0f), group_limits(load(below + first)));
    const Floats inverse = 1.0f / (multiplier * scale);
    for (int64_t k = 0; k < kLanes && (first + k) * group < channels; ++k) {
      const int64_t start = (first + k) * group, count = group < channels - start ? group : channels - start;
      write_codes(x + start, image + start, count, ImageOf{inverse[k], below[first + k], multiplier[k]});
    }
  }
}

}  // namespace dcomp::DCOMP_ISA
