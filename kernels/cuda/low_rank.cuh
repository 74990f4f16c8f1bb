// The low-rank branch of a linear layer, added to the values of a tile: out += hidden @ up^T.
//
// `up` is float16, which tf32 holds exactly. `hidden` is cut into two numbers of tf32, which leave less than 2^-20 of
// it out, so two products on tensor cores are about as good as one in fp32, whatever its range. Fragments come from
// global memory, where all warps of a block find the same ones: a lane takes the neighbours 2 t and 2 t + 1 of each 8
// for the k that the tensor core calls t and t + 4, on both sides.
#pragma once
#include "float_types.cuh"

namespace dcomp {

template <class Tile>
struct LowRankBranch {
  static constexpr int kDepth = 8;  // of a product

  // Values are bits of fp32.
  static DCOMP_DEVICE void add(const LinearArguments& a, int (&values)[Tile::kRowTiles][Tile::kColumnTiles][4], int row,
                               int column, int lane) {
#pragma unroll 1
    for (int k = lane % 4 * 2; k < a.rank; k += kDepth) {
      uint32 up[Tile::kColumnTiles][2];
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const int n = column + j * 8 + lane / 4;
        const uint32 at = static_cast<uint32>(n < a.outputs ? n : 0) * a.rank + k;
        const uint32 both = load_global(reinterpret_cast<const uint32*>(a.up + at));
        up[j][0] = to_bits(from_float16(static_cast<uint16>(both)));
        up[j][1] = to_bits(from_float16(static_cast<uint16>(both >> 16)));
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        uint32 upper[4], lower[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of 16 rows
          const int m = row + i * 16 + half * 8 + lane / 4;
          const uint32 at = static_cast<uint32>(m < a.rows ? m : 0) * a.rank + k;
          const Words<2> both = load_global(reinterpret_cast<const Words<2>*>(a.hidden + at));
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const float value = from_bits(both.word[t]);
            const uint32 bits = to_tf32(value);
            upper[t * 2 + half] = bits;
            lower[t * 2 + half] = to_tf32(dcomp::add(value, -from_bits(bits)));
          }
        }
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
          multiply_add_tf32(values[i][j], lower, up[j]);
          multiply_add_tf32(values[i][j], upper, up[j]);
        }
      }
    }
  }
};

}  // namespace dcomp
