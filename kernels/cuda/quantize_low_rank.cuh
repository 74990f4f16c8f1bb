// Codes of rows, and in the same kernel the first half of a low-rank branch of them: hidden = x @ down^T.
//
// Codes are those of `quantize_token` or `quantize_group`. Products are those of tensor cores in tf32, which holds
// float16, bfloat16 and so `down` exactly; inputs of fp32 are two values of tf32. Sums are fp32.
#pragma once
#include "quantize.cuh"

namespace dcomp {

constexpr int kLowRankRows = 32;     // of a block
constexpr int kLowRankColumns = 32;  // of hidden that a block finds at once
constexpr int kLowRankSums = kLowRankRows * kLowRankColumns;
constexpr int kRowTiles = kLowRankRows / 16, kColumnTiles = kLowRankColumns / 8;

template <class RowCodes>
struct LowRank : QuantizeKernel<LowRankArguments, kQuantizeWarps * kLowRankSums, 2> {
  static DCOMP_DEVICE void run(const LowRankArguments& a) {
    const int first_row = blockIdx.x * kLowRankRows, warp = threadIdx.x / kWarpLanes;
    with_inputs(a, [&](auto type, auto is_smooth) {
      for (int i = warp; i < kLowRankRows; i += kQuantizeWarps) {
        if (first_row + i < a.rows) RowCodes::template store<decltype(type), decltype(is_smooth)>(a, first_row + i);
      }
    });
    with_type(a.x_type, [&](auto type) {
      for (int first = 0; first < a.rank; first += kLowRankColumns) multiply_rows<decltype(type)>(a, first_row, first);
    });
  }

  // Some columns of hidden: each warp sums over channels of its own, then all warps are summed.
  template <class Type>
  static DCOMP_DEVICE void multiply_rows(const LowRankArguments& a, int first_row, int first) {
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    int sums[kRowTiles][kColumnTiles][4] = {};  // bits of fp32
    // A lane holds four neighbours of a row for two products of eight channels; which eight these are does not matter.
    for (int at = warp * 16; at < a.channels; at += kQuantizeWarps * 16) {
      const int channel = at + lane % 4 * kFour;
      float x[kRowTiles][2][kFour], down[kColumnTiles][kFour];
#pragma unroll
      for (int i = 0; i < kRowTiles * 2; ++i) {
        load_row<Type>(x[i / 2][i % 2], a.x, first_row + i * 8 + lane / 4, a.rows, channel, a.channels);
      }
#pragma unroll
      for (int i = 0; i < kColumnTiles; ++i) {
        load_row<Float16>(down[i], a.down, first + i * 8 + lane / 4, a.rank, channel, a.channels);
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int k = 0; k < kFour; k += 2) {
          const float values[4] = {x[i][0][k], x[i][1][k], x[i][0][k + 1], x[i][1][k + 1]};
          add_products(sums[i], values, down, k);
          if constexpr (sizeof(typename Type::Stored) == sizeof(float)) {
            float rest[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) rest[j] = add(values[j], -from_bits(to_tf32(values[j])));
            add_products(sums[i], rest, down, k);
          }
        }
      }
    }
    store_sums(a, sums, first_row, first);
  }

  static DCOMP_DEVICE void add_products(int (&sums)[kColumnTiles][4], const float (&x)[4],
                                        const float (&down)[kColumnTiles][kFour], int k) {
    const uint32 left[4] = {to_tf32(x[0]), to_tf32(x[1]), to_tf32(x[2]), to_tf32(x[3])};
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      const uint32 right[2] = {to_bits(down[i][k]), to_bits(down[i][k + 1])};
      multiply_add_tf32(sums[i], left, right);
    }
  }

  // Zeros beyond the rows and the channels.
  template <class Type>
  static DCOMP_DEVICE void load_row(float (&v)[kFour], const void* matrix, int row, int rows, int at, int channels) {
    const Floats<Type> values(matrix, static_cast<int64>(row) * channels, channels, channels);
    values.load(v, at, row < rows ? channels : 0);
  }

  static DCOMP_DEVICE void store_sums(const LowRankArguments& a, const int (&sums)[kRowTiles][kColumnTiles][4],
                                      int first_row, int first) {
    float* const shared = reinterpret_cast<float*>(shared_memory());
    const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    barrier();  // all sums of the columns before are read
#pragma unroll
    for (int i = 0; i < kLowRankSums / kWarpLanes; ++i) {
      const float sum = from_bits(sums[i / 4 / kColumnTiles][i / 4 % kColumnTiles][i % 4]);
      store_shared(shared + warp * kLowRankSums + i * kWarpLanes + lane, sum);
    }
    barrier();
    for (int i = warp; i < kLowRankSums / kWarpLanes; i += kQuantizeWarps) {
      float sum = 0.0f;
#pragma unroll
      for (int other = 0; other < kQuantizeWarps; ++other) {
        sum = add(sum, load_shared(shared + other * kLowRankSums + i * kWarpLanes + lane));
      }
      const int row = first_row + i / 4 / kColumnTiles * 16 + i % 4 / 2 * 8 + lane / 4;
      const int column = first + i / 4 % kColumnTiles * 8 + lane % 4 * 2 + i % 2;
      if (row < a.rows && column < a.rank) store_global(a.hidden + static_cast<int64>(row) * a.rank + column, sum);
    }
  }
};

using LowRankToken = LowRank<TokenRow>;
using LowRankGroup = LowRank<GroupTokenRow>;

}  // namespace dcomp
