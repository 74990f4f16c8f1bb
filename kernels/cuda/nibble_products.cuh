// Products of 4-bit inputs and 4-bit weights on tensor cores that take nibbles, in exact integers: the sums of
// `linear_w4a8` to the last bit.
//
// An input is (code - zero) * m and a weight q * w, with a zero and multipliers for each block of 32 or 64 channels. A
// tensor core sums code * q over a block; two sums at a time are then multiplied by m * w and added up. What the zeros
// take away, sum of (m * zero) * (w * sum of q) over blocks, is a small product of its own, of int8 numbers that rows
// of inputs and weights begin with. nibbles.py says how rows lie in memory and why no w is negative.
//
// A stage is 64 bytes of a row: 128 channels, or corrections of 16 blocks.
#pragma once
#include "products.cuh"

namespace dcomp {

template <class Tile_, int kBlock, template <class> class Rows_>
struct NibbleProduct {
  using Tile = Tile_;
  using Rows = Rows_<Tile>;
  using Weight = Int8Weight<Tile>;
  using Int8Product = Product<Tile, Rows_, Weight>;
  using Arguments = LinearArguments;
  using Sums = typename Int8Product::Sums;
  static constexpr int kThreads = Tile::kThreads, kBlocks = Tile::kBlocks, kStages = Tile::kStages;
  static constexpr int kBlocksOfStage = 2 * kStep / kBlock;
  static constexpr int kPairBytes = 4 * kBlocksOfStage;  // multipliers of two columns in a stage, a word for each block
  static constexpr int kRowMultipliers = Tile::kRowBytes + Weight::kBytes;
  static constexpr int kColumnMultipliers = kRowMultipliers + 4 * Tile::kRows;
  static constexpr int kStageBytes = kColumnMultipliers + Tile::kColumns / 2 * kPairBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  // A thread's 16 bytes of the multipliers of a stage, those of rows and behind them those of columns.
  struct Multipliers {
    static constexpr int kOfRows = Tile::kRows / 4, kAll = kOfRows + Tile::kColumns / 2 * kPairBytes / 16;
    static_assert(kAll <= kThreads);
    const uint8* from;
    int64 stride;  // of a step
    bool part, there;

    DCOMP_DEVICE Multipliers(const Arguments& a, int first_row, int first_column) {
      const int chunk = threadIdx.x;
      const bool is_row = chunk < kOfRows;
      const int64 at = is_row ? first_row * 4ll + chunk * 16 : first_column / 2ll * kPairBytes + (chunk - kOfRows) * 16;
      stride = is_row ? (a.rows + 3) / 4 * 16ll : (a.outputs + 3) / 4 * (2ll * kPairBytes);
      part = chunk < kAll;
      there = part && at < stride;
      from = (is_row ? a.x_multipliers : a.weight_multipliers) + (there ? at : 0);
    }

    DCOMP_DEVICE void load_stage(uint8* stage, int step) const {
      copy_async16(stage + kRowMultipliers + threadIdx.x * 16, from + step * stride, there, part && step >= 0);
    }
  };

  static DCOMP_DEVICE void run(const Arguments& a) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = blockIdx.y * Tile::kRows, first_column = blockIdx.x * Tile::kColumns;
    const int row = warp / Tile::kWarpsAcross * Tile::kWarpRows;
    const int column = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
    const int steps = (a.depth + kStep - 1) / kStep;
    uint8* const shared = shared_memory();
    const Rows rows(a, first_row);
    const Multipliers multipliers(a, first_row, first_column);
    const auto load_stage = [&](int step) {
      if (step < steps) {
        uint8* const stage = shared + step % kStages * kStageBytes;
        rows.load_stage(a, stage, step);
        Weight::load_stage(a, stage + Tile::kRowBytes, first_column, step);
        multipliers.load_stage(stage, step - a.corrections);
      }
      copy_async_commit();  // also an empty one: waiting counts groups
    };
    const auto next_stage = [&](int step) {
      copy_async_wait<kStages - 2>();
      barrier();  // all copies of this step are there, and nobody reads the stage of the last one any more
      load_stage(step + kStages - 1);
      return shared + step % kStages * kStageBytes;
    };

    Sums sums;
    Int8Product::clear(sums);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load_stage(step);
    int step = 0;
    for (; step < a.corrections; ++step) correct(sums, next_stage(step), row, column, lane);
    for (; step < steps; ++step) multiply_stage(sums, next_stage(step), row, column, lane);
    Int8Product::finish(a, sums, first_row + row, first_column + column, lane);
  }

  // A stage of corrections: its first half counts 128 times.
  static DCOMP_DEVICE void correct(Sums& sums, const uint8* stage, int row, int column, int lane) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; j += 2) {
      Fragments w;
      Weight::fragments(w, stage + Tile::kRowBytes, column + j * 8, lane);
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        uint32 x[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) Int8Product::load_rows(x[half], stage, row + i * 16, half, lane);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          int high[4] = {0, 0, 0, 0};
          multiply_add_s8(high, x[0], w.tile[0][tile]);
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i][j + tile][k] += high[k] * 128;
          multiply_add_s8(sums[i][j + tile], x[1], w.tile[1][tile]);
        }
      }
    }
  }

  // Two blocks at a time: the halves of a stage, or of a half.
  static DCOMP_DEVICE void multiply_stage(Sums& sums, const uint8* stage, int row, int column, int lane) {
    constexpr int kHalves = kBlock / 32;
#pragma unroll 1  // all at once would take more registers than there are
    for (int pair = 0; pair < kBlocksOfStage / 2; ++pair) {
      uint32 w[Tile::kColumnTiles / 2][kHalves][4];
      Words<2> factors[Tile::kColumnTiles];
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const int columns = (column + j * 8) / 2 + lane % 4;
        factors[j] = load_shared8(stage + kColumnMultipliers + columns * kPairBytes + pair * 8);
        if (j % 2) continue;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          Weight::load_half(w[j / 2][half], stage + Tile::kRowBytes, column + j * 8, pair + half, lane);
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        uint32 x[kHalves][4], m[2][2];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          Int8Product::load_rows(x[half], stage, row + i * 16, pair + half, lane);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of 16 rows
          const uint32 word = load_shared4(stage + kRowMultipliers + (row + i * 16 + half * 8 + lane / 4) * 4);
          m[half][0] = word >> (pair * 16) & 0xFF;
          m[half][1] = word >> (pair * 16 + kBlock / 4) & 0xFF;
        }
#pragma unroll
        for (int j = 0; j < Tile::kColumnTiles; ++j) {
          int block[2][4];
          multiply_blocks(block, x, w[j / 2], j % 2 * 2);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32 both = m[half][0] * factors[j].word[0] + m[half][1] * factors[j].word[1];
            int* const two = sums[i][j] + half * 2;
            two[0] = dot_low(lower_halves(block[0][half * 2], block[1][half * 2]), both, two[0]);
            two[1] = dot_high(lower_halves(block[0][half * 2 + 1], block[1][half * 2 + 1]), both, two[1]);
          }
        }
      }
    }
  }

  // The sums of two blocks of a tile, whose columns' registers begin at `first`.
  template <int kHalves>
  static DCOMP_DEVICE void multiply_blocks(int (&sums)[2][4], const uint32 (&x)[kHalves][4],
                                           const uint32 (&w)[kHalves][4], int first) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      if constexpr (kHalves == 2) {
        const uint32 columns[2] = {w[block][first], w[block][first + 1]};
        multiply_u4(sums[block], x[block], columns);
      } else {
        const uint32 rows[2] = {x[0][block * 2], x[0][block * 2 + 1]};
        multiply_u4(sums[block], rows, w[0][first + block]);
      }
    }
  }
};

template <class Tile>
using LinearW4A4Group64 = NibbleProduct<Tile, 64, LinearRows>;
template <class Tile>
using LinearW4A4Group32 = NibbleProduct<Tile, 32, LinearRows>;
template <class Tile>
using LinearW4A4Group64LowRank = NibbleProduct<Tile, 64, LowRankRows>;
template <class Tile>
using LinearW4A4Group32LowRank = NibbleProduct<Tile, 32, LowRankRows>;

}  // namespace dcomp
