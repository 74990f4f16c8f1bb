// The primitives of cuda/primitives.cuh for the emulator. Compile without contraction of floats.
#pragma once
#include <cmath>

#include "emulator.h"

#define DCOMP_DEVICE inline
#define threadIdx (::dcomp::emulator::machine.thread_index)
#define blockIdx (::dcomp::emulator::machine.block_index)
#define blockDim (::dcomp::emulator::machine.block)
#define gridDim (::dcomp::emulator::machine.grid)

namespace dcomp {

using emulator::machine, emulator::operands, emulator::together, emulator::Operation, emulator::Operands;

inline uint8* shared_memory() { return machine.shared; }

inline void barrier() { emulator::leave(emulator::State::kAtBarrier); }

inline void copy_async16(void* to, const void* from, bool live, bool part = true) {
  Operands& o = operands();
  o.shared = static_cast<uint8*>(to);
  o.global = from;
  o.live = live;
  o.part = part;
  together(Operation::kCopy);
}

inline void copy_async_commit() { machine.threads[machine.current].groups.emplace_back(); }

template <int kPending>
inline void copy_async_wait() {
  emulator::wait_for_copies(machine.current, kPending);
}

inline void load_matrices(uint32 (&r)[4], const uint8* row) {
  operands().shared = const_cast<uint8*>(row);
  const Operands& o = together(Operation::kLoadMatrices);
  for (int i = 0; i < 4; ++i) r[i] = o.out[i];
}

template <class Sum>
inline void multiply_add(Operation operation, Sum (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  Operands& o = operands();
  for (int i = 0; i < 4; ++i) o.in[i] = a[i];
  for (int i = 0; i < 2; ++i) o.in[4 + i] = b[i];
  memcpy(o.in + 6, sums, sizeof sums);
  together(operation);
  memcpy(sums, o.out, sizeof sums);
}

inline void multiply_add_s8(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  multiply_add(Operation::kMultiplyAddS8, sums, a, b);
}

inline void multiply_add_u8(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  multiply_add(Operation::kMultiplyAddU8, sums, a, b);
}

inline void multiply_add_f16(float (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  multiply_add(Operation::kMultiplyAddF16, sums, a, b);
}

inline void multiply_u4(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  multiply_add(Operation::kMultiplyU4, sums, a, b);
}

inline void multiply_u4(int (&sums)[4], const uint32 (&a)[2], uint32 b) {
  const uint32 rows[4] = {a[0], a[1]}, columns[2] = {b};
  multiply_add(Operation::kMultiplyU4Half, sums, rows, columns);
}

inline void multiply_add_tf32(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  multiply_add(Operation::kMultiplyAddTf32, sums, a, b);
}

inline float shuffle_xor(float value, int mask) {
  Operands& o = operands();
  memcpy(&o.in[0], &value, 4);
  o.in[1] = mask;
  together(Operation::kShuffle);
  memcpy(&value, &o.out[0], 4);
  return value;
}

template <class T>
inline T read_shared(const void* p) {
  static_assert(sizeof(T) <= sizeof(Operands::out));
  Operands& o = operands();
  o.shared = const_cast<uint8*>(static_cast<const uint8*>(p));
  o.bytes = sizeof(T);
  o.part = true;
  together(Operation::kLoadShared);
  T value;
  memcpy(&value, o.out, sizeof value);
  return value;
}

inline Words<4> load_shared16(const uint8* p) { return read_shared<Words<4>>(p); }
inline Words<2> load_shared8(const uint8* p) { return read_shared<Words<2>>(p); }
inline uint32 load_shared4(const uint8* p) { return read_shared<uint32>(p); }
inline float load_shared(const float* p) { return read_shared<float>(p); }

inline void store_shared(float* p, float value, bool part = true) {
  Operands& o = operands();
  o.shared = reinterpret_cast<uint8*>(p);
  o.bytes = sizeof value;
  o.part = part;
  memcpy(o.in, &value, sizeof value);
  together(Operation::kStoreShared);
}

template <class T>
inline T load_global(const T* p) {
  emulator::check_global(p, sizeof(T), "read");
  return *p;
}

template <class T>
inline void store_global(T* p, T value) {
  emulator::check_global(p, sizeof(T), "write");
  *p = value;
}

inline uint32 multiply_high(uint32 a, uint32 b) { return static_cast<uint64_t>(a) * b >> 32; }

template <int kByte>
inline uint32 repeat_byte(uint32 word) {
  return (word >> (8 * kByte) & 0xFF) * 0x01010101u;
}

inline uint32 lower_halves(uint32 low, uint32 high) { return (low & 0xFFFF) | high << 16; }

inline int dot(uint32 halves, uint32 bytes, int sum) {
  const int low = static_cast<int16_t>(halves), high = static_cast<int16_t>(halves >> 16);
  return sum + low * static_cast<int>(bytes & 0xFF) + high * static_cast<int>(bytes >> 8 & 0xFF);
}
inline int dot_low(uint32 halves, uint32 bytes, int sum) { return dot(halves, bytes, sum); }
inline int dot_high(uint32 halves, uint32 bytes, int sum) { return dot(halves, bytes >> 16, sum); }

inline float add(float a, float b) { return a + b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float square_root(float a) { return std::sqrt(a); }
inline float to_float(int value) { return static_cast<float>(value); }

inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float power_of_two(float a) {
  const float value = std::exp2(a);
  return value < 0x1p-126f ? 0.0f : value;
}

inline float exponential(float a) { return std::exp(a); }
inline float round_to_even(float a) { return std::nearbyint(a); }
inline float round_up(float a) { return std::ceil(a); }
inline float round_down(float a) { return std::floor(a); }

inline int to_int(float whole) { return whole != whole ? 0 : static_cast<int>(whole); }

inline float from_bits(uint32 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32 to_bits(float value) {
  uint32 bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_float16(uint16 bits) { return emulator::half_of(bits); }

inline uint32 to_bfloat16(float value) {
  const uint32 bits = to_bits(value);
  return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline uint32 to_float16(float value) {
  if (value != value) return 0x7FFF;
  const uint32 bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= to_bits(65520.0f)) return sign | 0x7C00;  // nearer to 2^16 than to the largest
  if (magnitude < to_bits(std::ldexp(1.0f, -14))) {
    return sign | static_cast<uint32>(std::nearbyint(std::ldexp(from_bits(magnitude), 24)));
  }
  return sign | (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
}

inline uint32 to_bfloat16s(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }
inline uint32 to_float16s(float low, float high) { return to_float16(low) | to_float16(high) << 16; }

}  // namespace dcomp
