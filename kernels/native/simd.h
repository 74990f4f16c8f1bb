// Vectors in g++'s own vector types: one source for every instruction set, which compiler flags choose.
//
// They are as wide as registers, because g++ 12 makes comparisons and conversions of wider ones value by value.
//
// Each file that includes this is compiled once for each instruction set, into the namespace DCOMP_ISA.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace dcomp::DCOMP_ISA {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

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
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
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

// Values that are multiplied by the factor of their channel as they are loaded.
template <class T>
struct Smoothed {
  const T* x;
  const float* factor;

  Smoothed operator+(int64_t count) const { return {x + count, factor + count}; }
};

template <class T>
inline Smoothed<T> smoothed(const T* x, const float* factor) {
  return {x, factor};
}

// A few vectors, one behind the other
template <int kCount, class Values>
inline void load_each(Values p, Floats (&v)[kCount]) {
  for (int k = 0; k < kCount; ++k) v[k] = load(p + k * kLanes);
}

template <class T>
inline Floats load(Smoothed<T> p) {
  return load(p.x) * load(p.factor);
}

template <class T>
inline Floats load_some(Smoothed<T> p, int64_t count) {
  return load_some(p.x, count) * load_some(p.factor, count);
}

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// The low bytes of all values.
inline Bytes to_bytes(Ints v) {
#ifdef __AVX512F__
  return __builtin_convertvector(v, Bytes);
#else
  typedef int8_t AllBytes __attribute__((vector_size(sizeof(Ints))));
  AllBytes places{};
  for (int64_t i = 0; i < kLanes; ++i) places[i] = static_cast<int8_t>(4 * i);
  const AllBytes moved = __builtin_shuffle(reinterpret_cast<AllBytes>(v), places);
  Bytes low;
  memcpy(&low, &moved, sizeof low);
  return low;
#endif
}

template <class Vector = Floats>
inline Vector broadcast(float value) {
  return Vector{} + static_cast<std::remove_reference_t<decltype(Vector{}[0])>>(value);
}

// NaN stays NaN, as in torch's amax.
inline Floats larger(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// Of each lane the smaller or the larger one, the second where one is NaN. g++ 12 would compare and then choose.
template <class Vector>
inline Vector smaller_or_second(Vector a, Vector b) {
  return a < b ? a : b;
}
template <class Vector>
inline Vector larger_or_second(Vector a, Vector b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
inline Floats smaller_or_second(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
inline Floats larger_or_second(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Floats smaller_or_second(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
inline Floats larger_or_second(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
#endif

// NaN stays NaN.
template <class Vector>
inline Vector clamp(Vector v, Vector low, Vector high) {
  return smaller_or_second(high, larger_or_second(low, v));
}

inline Floats round_to_even(Floats v) { return (v + kRound) - kRound; }

inline Ints to_ints(Floats v) { return __builtin_convertvector(v, Ints); }

#ifdef __AVX2__
#define DCOMP_HAS_SHORTS  // with which bytes are made of four vectors at once
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));

// Whole numbers nearest to values of small magnitude, ties to even; each 16 bytes of the register hold some of both.
inline Shorts to_nearest_shorts(Floats first, Floats second) {
#ifdef __AVX512F__
  return (Shorts)_mm512_packs_epi32(_mm512_cvtps_epi32((__m512)first), _mm512_cvtps_epi32((__m512)second));
#else
  return (Shorts)_mm256_packs_epi32(_mm256_cvtps_epi32((__m256)first), _mm256_cvtps_epi32((__m256)second));
#endif
}

// The low bytes of four vectors that two calls of `to_nearest_shorts` have joined.
inline void store_bytes(int8_t* to, Shorts first, Shorts second) {
  first &= 255;
  second &= 255;
#ifdef __AVX512F__
  const __m512i bytes = _mm512_packus_epi16((__m512i)first, (__m512i)second);
  constexpr Ints kPlaces = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const __m512i ordered = _mm512_permutexvar_epi32((__m512i)kPlaces, bytes);
#else
  const __m256i bytes = _mm256_packus_epi16((__m256i)first, (__m256i)second);
  constexpr Ints kPlaces = {0, 4, 1, 5, 2, 6, 3, 7};
  const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, (__m256i)kPlaces);
#endif
  memcpy(to, &ordered, sizeof ordered);
}
#endif

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// a * b + c, rounded once where the processor can
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// 1 / v to 2 ulp for finite v from 1 on, or 0 where that is below normal numbers: an estimate and a step of Newton's
// method
inline Floats reciprocal(Floats v) {
#if defined(__AVX512F__)
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)v);
#elif defined(__AVX2__)
  const Floats guess = (Floats)_mm256_rcp_ps((__m256)v);
#else
  return 1.0f / v;
#endif
#ifdef __AVX2__
  return multiply_add(guess, multiply_add(-guess, v, broadcast(1.0f)), guess);
#endif
}

// What `choose` leaves of all lanes, from those that lie `distance` apart on.
template <int64_t distance = kLanes / 2, class Vector, class Choose>
inline auto over_lanes(Vector v, Choose choose) {
  Ints places{};
  for (int64_t i = 0; i < kLanes; ++i) places[i] = static_cast<int32_t>(i ^ distance);
  v = choose(__builtin_shuffle(v, places), v);
  if constexpr (distance > 1) {
    return over_lanes<distance / 2>(v, choose);
  } else {
    return v[0];
  }
}

// Calls what(k) for a few vectors, whose steps come in turns then: one alone would wait for itself most of the time.
template <int kCount, class What>
inline void in_turn(What what) {
  for (int k = 0; k < kCount; ++k) what(k);
}

// e^x to 2 ulp: 2^n times a polynomial of what is left of x (Cephes, expf)
template <int kCount>
inline void exp(Floats (&x)[kCount]) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kFactors[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f};
  Floats shifted[kCount], p[kCount];
  in_turn<kCount>([&](int k) { x[k] = clamp(x[k], broadcast(-87.0f), broadcast(88.0f)); });
  in_turn<kCount>([&](int k) { shifted[k] = multiply_add(x[k], broadcast(kLog2e), broadcast(kRound)); });
  in_turn<kCount>([&](int k) { x[k] = multiply_add(shifted[k] - kRound, broadcast(-kLn2High), x[k]); });
  in_turn<kCount>([&](int k) { x[k] = multiply_add(shifted[k] - kRound, broadcast(-kLn2Low), x[k]); });
  in_turn<kCount>([&](int k) { p[k] = broadcast(kFactors[0]); });
  for (int i = 1; i < 6; ++i) {
    in_turn<kCount>([&](int k) { p[k] = multiply_add(p[k], x[k], broadcast(kFactors[i])); });
  }
  in_turn<kCount>([&](int k) { p[k] = multiply_add(p[k], x[k] * x[k], x[k] + 1.0f); });
  in_turn<kCount>([&](int k) {
    Ints power;  // n lies in the low bits of `shifted`
    memcpy(&power, &shifted[k], sizeof power);
    power = (power + 127) << 23;
    Floats scale;
    memcpy(&scale, &power, sizeof scale);
    x[k] = p[k] * scale;
  });
}

}  // namespace dcomp::DCOMP_ISA
