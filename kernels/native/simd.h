// Vectors of 16 floats in g++'s own vector types: one source for every instruction set, which compiler flags choose.
//
// Each file that includes this is compiled once for each instruction set, into the namespace DCOMP_ISA.
#pragma once
#include <cstdint>
#include <cstring>

namespace dcomp::DCOMP_ISA {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

// Adding and subtracting this rounds to a whole number, ties to even, if the magnitude is below 2^22.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

struct BFloat16 {
  uint16_t bits;
};

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const BFloat16* p) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  Ints bits = __builtin_convertvector(halves, Ints) << 16;
  Floats v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// The first `count` values, and zeros behind them.
template <class T>
inline Floats load_some(const T* p, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline void store_bytes(int8_t* p, Ints v) {
  Bytes bytes = __builtin_convertvector(v, Bytes);
  memcpy(p, &bytes, sizeof bytes);
}

inline void store_some_bytes(int8_t* p, Ints v, int64_t count) {
  Bytes bytes = __builtin_convertvector(v, Bytes);
  memcpy(p, &bytes, count);
}

inline Floats broadcast(float value) { return Floats{} + value; }

// NaN stays NaN, as in torch's amax and amin.
inline Floats larger(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }
inline Floats smaller(Floats a, Floats b) { return (a < b) | (a != a) ? a : b; }

inline Floats clamp(Floats v, float low, float high) {
  v = v < low ? broadcast(low) : v;
  return v > high ? broadcast(high) : v;
}

inline Floats round_to_even(Floats v) { return (v + kRound) - kRound; }

inline Ints to_ints(Floats v) { return __builtin_convertvector(v, Ints); }

}  // namespace dcomp::DCOMP_ISA
