// From floats to codes of a byte, four neighbours at a time: the arithmetic of kernels/qparams.py to the last bit.
#pragma once
#include "float_types.cuh"

namespace dcomp {

constexpr float kTokenLimit = 127.0f;
constexpr float kSampleSteps = 255.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // the inverse of anything smaller may be infinite
constexpr int kFour = 4;

DCOMP_DEVICE float usable(float scale) { return scale < kSmallestScale ? 1.0f : scale; }

// NaN stays NaN.
DCOMP_DEVICE float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// NaN becomes 0.
DCOMP_DEVICE int code(float x, float inverse, float zero, float low, float high) {
  return to_int(clamp(add(round_to_even(multiply(x, inverse)), zero), low, high));
}

// Memory of a row or of a whole tensor: four neighbours are loaded and stored at once where all fours are aligned.
template <class Type>
struct Floats {
  using Stored = typename Type::Stored;
  using Four = Words<sizeof(Stored)>;
  const Stored* values;
  int64 count;
  bool aligned;

  DCOMP_DEVICE Floats(const void* x, int64 first, int64 count, int64 row)
      : values(static_cast<const Stored*>(x) + first),
        count(count),
        aligned(row % kFour == 0 && reinterpret_cast<int64>(x) % static_cast<int64>(sizeof(Four)) == 0) {}

  // Four values from `at` on, which is a multiple of four; zeros beyond `end`.
  DCOMP_DEVICE void load(float (&v)[kFour], int64 at, int64 end) const {
    if (aligned && at + kFour <= end) {
      const Four four = load_global(reinterpret_cast<const Four*>(values + at));
      unfold(v, four);
      return;
    }
#pragma unroll
    for (int i = 0; i < kFour; ++i) v[i] = at + i < end ? Type::widen(load_global(values + at + i)) : 0.0f;
  }

  DCOMP_DEVICE void load(float (&v)[kFour], int64 at) const { load(v, at, count); }

  static DCOMP_DEVICE void unfold(float (&v)[kFour], const Words<4>& four) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) v[i] = from_bits(four.word[i]);
  }

  static DCOMP_DEVICE void unfold(float (&v)[kFour], const Words<2>& four) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) v[i] = Type::widen(static_cast<uint16>(four.word[i / 2] >> (i % 2 * 16)));
  }
};

// Stores codes of a byte from `at` on, which is a multiple of four, but none beyond `end`.
template <class Byte>
DCOMP_DEVICE void store_codes(Byte* codes, const int (&q)[kFour], int64 at, int64 end) {
  if (at + kFour <= end && reinterpret_cast<int64>(codes + at) % kFour == 0) {
    const uint32 word = (q[0] & 0xFFu) | (q[1] & 0xFFu) << 8 | (q[2] & 0xFFu) << 16 | (q[3] & 0xFFu) << 24;
    store_global(reinterpret_cast<uint32*>(codes + at), word);
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (at + i < end) store_global(codes + at + i, static_cast<Byte>(q[i]));
  }
}

}  // namespace dcomp
