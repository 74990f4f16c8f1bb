// The only place where a kernel meets PTX, its warp, shared memory, global memory or the rounding of floats.
//
// These are the bodies for the device, which need no header of CUDA; emulator/primitives.h holds those for the host.
// Kernels use nothing else of the kind, so that the emulator sees all they do.
#pragma once
#include "arguments.h"

namespace dcomp {

// What a thread loads or stores at once.
template <int kWords>
struct alignas(4 * kWords) Words {
  uint32 word[kWords];
};

}  // namespace dcomp

#ifdef DCOMP_EMULATOR
#include "../emulator/primitives.h"
#else
#define DCOMP_DEVICE __device__ __forceinline__

namespace dcomp {

// Shared memory, 128-byte aligned, as large as the launch says.
DCOMP_DEVICE uint8* shared_memory() {
  extern __shared__ __align__(128) uint8 dcomp_shared[];
  return dcomp_shared;
}

DCOMP_DEVICE uint32 shared_address(const void* p) { return static_cast<uint32>(__cvta_generic_to_shared(p)); }

DCOMP_DEVICE void barrier() { __syncthreads(); }

// Starts to copy 16 bytes from global to shared memory; zeros instead if not `live`, nothing if not `part`.
DCOMP_DEVICE void copy_async16(void* to, const void* from, bool live, bool part = true) {
  if (part) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(live ? 16 : 0)
                 : "memory");
  }
}

// Closes the group of copies that were started since the last call.
DCOMP_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups are unfinished.
template <int kPending>
DCOMP_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16 bits, whose rows of 16 bytes the lanes point to, eight lanes a matrix.
DCOMP_DEVICE void load_matrices(uint32 (&r)[4], const uint8* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// sums += a (16x32, int8) * b (32x8, int8)
DCOMP_DEVICE void multiply_add_s8(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums += a (16x32, uint8) * b (32x8, int8)
DCOMP_DEVICE void multiply_add_u8(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums += a (16x16, float16) * b (16x8, float16)
DCOMP_DEVICE void multiply_add_f16(float (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums = a (16x64, 0 to 15) * b (64x8, -8 to 7). Only tensor cores of compute capability 8.0 to 8.9 have it.
DCOMP_DEVICE void multiply_u4(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(0));
}

// The same of half the depth: a is 16x32, its upper rows in the first register, b is 32x8.
DCOMP_DEVICE void multiply_u4(int (&sums)[4], const uint32 (&a)[2], uint32 b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
               : "=r"(sums[0]), "=r"(sums[1]), "=r"(sums[2]), "=r"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(b), "r"(0));
}

// sums += a (16x8, tf32) * b (8x8, tf32); sums are bits of fp32, and the low 13 bits of each value are 0.
DCOMP_DEVICE void multiply_add_tf32(int (&sums)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The value of the lane whose number differs by the bits of `mask`.
DCOMP_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

DCOMP_DEVICE Words<4> load_shared16(const uint8* p) {
  Words<4> v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(shared_address(p)));
  return v;
}

DCOMP_DEVICE Words<2> load_shared8(const uint8* p) {
  Words<2> v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "r"(shared_address(p)));
  return v;
}

DCOMP_DEVICE uint32 load_shared4(const uint8* p) { return *reinterpret_cast<const uint32*>(p); }

// All lanes of a warp take part in these two; those that are no `part` store nothing.
DCOMP_DEVICE float load_shared(const float* p) { return *p; }
DCOMP_DEVICE void store_shared(float* p, float value, bool part = true) {
  if (part) *p = value;
}

template <class T>
DCOMP_DEVICE T load_global(const T* p) {
  return *p;
}

template <class T>
DCOMP_DEVICE void store_global(T* p, T value) {
  *p = value;
}

DCOMP_DEVICE uint32 multiply_high(uint32 a, uint32 b) { return __umulhi(a, b); }

// Byte `kByte` of a word, four times.
template <int kByte>
DCOMP_DEVICE uint32 repeat_byte(uint32 word) {
  return __byte_perm(word, 0, kByte * 0x1111);
}

// The lower halves of two words, the first one low.
DCOMP_DEVICE uint32 lower_halves(uint32 low, uint32 high) { return __byte_perm(low, high, 0x5410); }

// sum + two signed halves of a word times bytes 0 and 1, or 2 and 3, of another.
DCOMP_DEVICE int dot_low(uint32 halves, uint32 bytes, int sum) {
  int result;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(halves), "r"(bytes), "r"(sum));
  return result;
}

DCOMP_DEVICE int dot_high(uint32 halves, uint32 bytes, int sum) {
  int result;
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(halves), "r"(bytes), "r"(sum));
  return result;
}

// Each rounded by itself, never fused with another operation.
DCOMP_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DCOMP_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DCOMP_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DCOMP_DEVICE float square_root(float a) { return __fsqrt_rn(a); }
DCOMP_DEVICE float to_float(int value) { return __int2float_rn(value); }

// a * b + c, rounded once
DCOMP_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The larger one; NaN only if both are.
DCOMP_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

// 2^a to 2 ulp; 0 below 2^-126.
DCOMP_DEVICE float power_of_two(float a) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(a));
  return value;
}

DCOMP_DEVICE float exponential(float a) { return expf(a); }
DCOMP_DEVICE float round_to_even(float a) { return rintf(a); }
DCOMP_DEVICE float round_up(float a) { return ceilf(a); }
DCOMP_DEVICE float round_down(float a) { return floorf(a); }

// Of a whole number; NaN becomes 0.
DCOMP_DEVICE int to_int(float whole) { return __float2int_rn(whole); }

DCOMP_DEVICE float from_bits(uint32 bits) { return __uint_as_float(bits); }
DCOMP_DEVICE uint32 to_bits(float value) { return __float_as_uint(value); }

DCOMP_DEVICE float from_float16(uint16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Two values in a word, the first one low; ties to even.
DCOMP_DEVICE uint32 to_bfloat16s(float low, float high) {
  uint32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DCOMP_DEVICE uint32 to_float16s(float low, float high) {
  uint32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace dcomp
#endif
