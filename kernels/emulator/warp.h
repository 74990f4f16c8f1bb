// What 32 lanes do together, with the fragment layouts that the PTX ISA gives for mma and ldmatrix.
#pragma once
#include "memory.h"

namespace dcomp::emulator {

using Lanes = Thread*;  // 32 threads

inline int byte_of(uint32_t word, int i) { return (word >> (8 * i)) & 0xFF; }
inline int signed_byte_of(uint32_t word, int i) { return static_cast<int8_t>(byte_of(word, i)); }

inline float half_of(uint32_t word) {
  const uint32_t sign = (word & 0x8000u) << 16, exponent = word >> 10 & 31, fraction = word & 0x3FF;
  const uint32_t bits = sign | (exponent + (exponent == 31 ? 224 : 112)) << 23 | fraction << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  if (exponent == 0) value = (sign ? -1.0f : 1.0f) * fraction * 0x1p-24f;
  return value;
}

// in: four registers of a, two of b, four sums.
inline void multiply_add(Lanes lanes, bool is_signed) {
  int a[16][32], b[8][32];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* in = lanes[lane].operands.in;
    const int group = lane / 4, k = lane % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[group + r % 2 * 8][r / 2 * 16 + k + i] = is_signed ? signed_byte_of(in[r], i) : byte_of(in[r], i);
      }
      for (int r = 0; r < 2; ++r) b[group][r * 16 + k + i] = signed_byte_of(in[4 + r], i);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Operands& operands = lanes[lane].operands;
    for (int i = 0; i < 4; ++i) {
      const int *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      uint32_t sum = operands.in[6 + i];
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(row[k] * column[k]);
      operands.out[i] = sum;
    }
  }
  machine.counts.products += 1;
}

// Of float16, summed in float64 and rounded once; in: four registers of a, two of b, four sums.
inline void multiply_add_f16(Lanes lanes) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* in = lanes[lane].operands.in;
    const int group = lane / 4, k = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][r / 2 * 8 + k + i] = half_of(in[r] >> (16 * i));
      for (int r = 0; r < 2; ++r) b[group][r * 8 + k + i] = half_of(in[4 + r] >> (16 * i));
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Operands& operands = lanes[lane].operands;
    for (int i = 0; i < 4; ++i) {
      const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      float before;
      memcpy(&before, &operands.in[6 + i], sizeof before);
      double sum = before;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(row[k]) * column[k];
      const float after = static_cast<float>(sum);
      memcpy(&operands.out[i], &after, sizeof after);
    }
  }
  machine.counts.products += 1;
}

// in: a register of a for each 8 rows x 32 k, then one of b for each 32 k; eight nibbles each, the lowest first.
inline void multiply_nibbles(Lanes lanes, int halves) {
  int a[16][64] = {}, b[8][64] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* in = lanes[lane].operands.in;
    const int group = lane / 4, k = lane % 4 * 8;
    for (int i = 0; i < 8; ++i) {
      for (int r = 0; r < 2 * halves; ++r) a[group + r % 2 * 8][r / 2 * 32 + k + i] = in[r] >> (4 * i) & 15;
      for (int r = 0; r < halves; ++r) b[group][r * 32 + k + i] = ((in[4 + r] >> (4 * i) & 15) ^ 8) - 8;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      int sum = 0;
      for (int k = 0; k < 64; ++k) sum += row[k] * column[k];
      lanes[lane].operands.out[i] = sum;
    }
  }
  machine.counts.products += 1;
}

inline float tf32_of(uint32_t bits) {
  if (bits & 0x1FFF) fail("a value of tf32 has more digits");
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// in: four registers of a, two of b, four sums. Products and their sum with one of these are rounded once.
inline void multiply_add_tf32(Lanes lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* in = lanes[lane].operands.in;
    for (int r = 0; r < 4; ++r) a[lane / 4 + r % 2 * 8][lane % 4 + r / 2 * 4] = tf32_of(in[r]);
    for (int r = 0; r < 2; ++r) b[lane / 4][lane % 4 + r * 4] = tf32_of(in[4 + r]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Operands& operands = lanes[lane].operands;
    for (int i = 0; i < 4; ++i) {
      const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      float value;
      memcpy(&value, &operands.in[6 + i], sizeof value);
      double sum = value;
      for (int k = 0; k < 8; ++k) sum += static_cast<double>(row[k]) * column[k];
      value = static_cast<float>(sum);
      memcpy(&operands.out[i], &value, sizeof value);
    }
  }
  machine.counts.products += 1;
}

inline void load_matrices(Lanes lanes, int first_thread) {
  const uint8_t* rows[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    rows[lane] = lanes[lane].operands.shared;
    note_read(rows[lane], 16, first_thread + lane);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      memcpy(&lanes[lane].operands.out[matrix], rows[matrix * 8 + lane / 4] + lane % 4 * 4, 4);
    }
  }
  count_wavefronts(rows, 16);
  machine.counts.matrix_loads += 1;
}

inline void access_shared(Lanes lanes, int first_thread, bool is_store) {
  const uint8_t* at[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    Operands& operands = lanes[lane].operands;
    if (!operands.part) continue;
    at[lane] = operands.shared;
    if (is_store) {
      note_write(operands.shared, operands.bytes, first_thread + lane);
      memcpy(operands.shared, operands.in, operands.bytes);
    } else {
      note_read(operands.shared, operands.bytes, first_thread + lane);
      memcpy(operands.out, operands.shared, operands.bytes);
    }
  }
  count_wavefronts(at, lanes[0].operands.bytes);
  machine.counts.shared_accesses += 1;
}

inline void copy(Lanes lanes, int first_thread) {
  const uint8_t* to[kWarp] = {};
  const void* from[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    const Operands& operands = lanes[lane].operands;
    if (!operands.part) continue;
    to[lane] = operands.shared;
    if (operands.live) {
      from[lane] = operands.global;
      check_global(from[lane], 16, "read");
    }
    start_copy(operands.shared, from[lane], first_thread + lane);
  }
  count_wavefronts(to, 16);
  count_sectors(from, 16);
  machine.counts.copies += 1;
}

// in: the value, the mask.
inline void shuffle(Lanes lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t mask = lanes[lane].operands.in[1];
    if (mask >= kWarp) fail("a shuffle reaches beyond its warp");
    lanes[lane].operands.out[0] = lanes[lane ^ mask].operands.in[0];
  }
  machine.counts.shuffles += 1;
}

inline void run_operation(int warp) {
  const int first_thread = warp * kWarp;
  const Lanes lanes = &machine.threads[first_thread];
  const Operation operation = lanes[0].operation;
  for (int lane = 1; lane < kWarp; ++lane) {
    if (lanes[lane].operation != operation) fail("warp " + std::to_string(warp) + " diverged: lanes at two operations");
  }
  switch (operation) {
    case Operation::kMultiplyAddS8: return multiply_add(lanes, true);
    case Operation::kMultiplyAddU8: return multiply_add(lanes, false);
    case Operation::kMultiplyAddF16: return multiply_add_f16(lanes);
    case Operation::kMultiplyU4: return multiply_nibbles(lanes, 2);
    case Operation::kMultiplyU4Half: return multiply_nibbles(lanes, 1);
    case Operation::kMultiplyAddTf32: return multiply_add_tf32(lanes);
    case Operation::kLoadMatrices: return load_matrices(lanes, first_thread);
    case Operation::kLoadShared: return access_shared(lanes, first_thread, false);
    case Operation::kStoreShared: return access_shared(lanes, first_thread, true);
    case Operation::kCopy: return copy(lanes, first_thread);
    case Operation::kShuffle: return shuffle(lanes);
    case Operation::kNone: fail("no operation");
  }
}

}  // namespace dcomp::emulator
