// Floats of a layer's own type, read as fp32 and written from it.
#pragma once
#include "primitives.cuh"

namespace dcomp {

struct Float32 {
  using Stored = float;
  static DCOMP_DEVICE float widen(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16;
  static DCOMP_DEVICE float widen(uint16 bits) { return from_bits(static_cast<uint32>(bits) << 16); }
};

struct Float16 {
  using Stored = uint16;
  static DCOMP_DEVICE float widen(uint16 bits) { return from_float16(bits); }
};

// The part of a value that tf32 holds.
DCOMP_DEVICE uint32 to_tf32(float value) { return to_bits(value) & 0xFFFFE000u; }

// Calls `work` with an object of the type that `type` names, whose loops then do not ask again.
template <class Work>
DCOMP_DEVICE void with_type(int type, Work work) {
  if (type == kFloat32) {
    work(Float32{});
  } else if (type == kBFloat16) {
    work(BFloat16{});
  } else {
    work(Float16{});
  }
}

// Two neighbours, or the first of them alone; at once if pairs are aligned.
DCOMP_DEVICE void store_floats(void* out, int type, int64 index, float first, float second, bool both, bool aligned) {
  if (type == kFloat32) {
    float* const to = static_cast<float*>(out) + index;
    if (aligned) {
      store_global(reinterpret_cast<Words<2>*>(to), Words<2>{{to_bits(first), to_bits(second)}});
    } else {
      store_global(to, first);
      if (both) store_global(to + 1, second);
    }
  } else {
    uint16* const to = static_cast<uint16*>(out) + index;
    const uint32 pair = type == kBFloat16 ? to_bfloat16s(first, second) : to_float16s(first, second);
    if (aligned) {
      store_global(reinterpret_cast<uint32*>(to), pair);
    } else {
      store_global(to, static_cast<uint16>(pair));
      if (both) store_global(to + 1, static_cast<uint16>(pair >> 16));
    }
  }
}

}  // namespace dcomp
