// Attention: scores in integers, softmax in fp32 as blocks of keys pass by, values in float16 with sums in fp32.
//
// A warp has 16 or 32 queries in registers, a block walks along the tiles of keys and values of its head that
// key_value_tiles.cuh made (Dao 2023, FlashAttention-2: running maximum and running sum; Zhang et al. 2024,
// SageAttention: int8 queries and keys). All tiles are alike: a key that is not there has the score -infinity.
#pragma once
#include "key_value_tiles.cuh"

namespace dcomp {

template <int kWidth, int kRowTiles, int kWarps, int kBlocks_>
struct Attention {
  using Arguments = AttentionArguments;
  static constexpr int kThreads = kWarps * 32, kBlocks = kBlocks_, kStages = 2;
  static constexpr int kTileBytes = tile_bytes(kWidth), kSharedBytes = kStages * kTileBytes;
  static constexpr int kDepth = depth_of(kWidth), kSteps = kDepth / 32;
  static constexpr int kWarpQueries = kRowTiles * 16, kQueries = kWarps * kWarpQueries;
  static constexpr int kKeyTiles = kTileKeys / 8, kChannelTiles = kWidth / 8;  // of a tensor core
  // Probabilities are at most 2^8, where float16 has room for the rounding of large scores, and small ones digits.
  static constexpr float kTop = 8.0f;

  // Of the two rows of each tile that a lane has a part of.
  struct Rows {
    float factor[2];                                  // from scores in units of keys to powers of two
    float highest[2] = {kLowest(), kLowest()};        // score so far, in units of keys
    float shift[2] = {kLowest(), kLowest()};          // what is taken off the power of two
    float total[2] = {0.0f, 0.0f};                    // of this lane's keys
    static DCOMP_DEVICE float kLowest() { return from_bits(0xFF800000u); }
  };

  static DCOMP_DEVICE void run(const Arguments& a) {
    const int lane = threadIdx.x % 32;
    const int first = blockIdx.x * kQueries + threadIdx.x / 32 * kWarpQueries;
    const int64 tokens = static_cast<int64>(blockIdx.y / a.heads) * a.queries;
    const uint8* const tiles = a.tiles + static_cast<int64>(blockIdx.y) * a.tile_count * kTileBytes;
    uint8* const shared = shared_memory();
    const auto load_tile = [&](int step) {
      if (step < a.tile_count) {
        constexpr int kCopies = kTileBytes / 16;
#pragma unroll
        for (int i = 0; i < (kCopies + kThreads - 1) / kThreads; ++i) {
          const int chunk = i * kThreads + threadIdx.x;
          const bool part = (i + 1) * kThreads <= kCopies || chunk < kCopies;
          const int64 at = static_cast<int64>(step) * kTileBytes + (part ? chunk * 16 : 0);
          copy_async16(shared + step % kStages * kTileBytes + (part ? chunk * 16 : 0), tiles + at, true, part);
        }
      }
      copy_async_commit();
    };
    load_tile(0);

    uint32 q[kRowTiles][kSteps][4];
    Rows rows[kRowTiles];
    float sums[kRowTiles][kChannelTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      load_queries(a, tokens, first + i * 16 + lane / 4, lane, q[i], rows[i]);
#pragma unroll
      for (auto& tile : sums[i]) {
#pragma unroll
        for (float& sum : tile) sum = 0.0f;
      }
    }
    for (int step = 0; step < a.tile_count; ++step) {
      copy_async_wait<0>();
      barrier();  // all copies of this tile are there, and nobody reads the other one any more
      load_tile(step + 1);
      const uint8* const tile = shared + step % kStages * kTileBytes;
      float p[kRowTiles][kKeyTiles][4];
      multiply_keys(p, q, tile, lane);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) exponentiate(p[i], sums[i], rows[i]);
      multiply_values(sums, p, tile + values_at(kWidth), lane);
    }
    const float* const scale = a.v_scale + static_cast<int64>(blockIdx.y) * kWidth;
#pragma unroll
    for (Rows& some : rows) invert(some);  // all lanes exchange before some of them have nothing to store
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) write(a, tokens, first + i * 16 + lane / 4, lane, sums[i], rows[i], scale);
  }

  // The operands of 16 queries, read where they lie; queries beyond the last one are as the last one.
  static DCOMP_DEVICE void load_queries(const Arguments& a, int64 tokens, int query, int lane, uint32 (&q)[kSteps][4],
                                        Rows& rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int there = query + half * 8 < a.queries ? query + half * 8 : a.queries - 1;
      const int64 row = (tokens + there) * a.heads + blockIdx.y % a.heads;
      rows.factor[half] = multiply(load_global(a.q_scale + row), a.scale);
      const int8* const codes = a.q + row * kDepth + lane % 4 * 4;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        q[step][half] = load_global(reinterpret_cast<const uint32*>(codes + step * 32));
        q[step][half + 2] = load_global(reinterpret_cast<const uint32*>(codes + step * 32 + 16));
      }
    }
  }

  // Scores in units of the query's scale: exact sums of products of codes, times the scale of the key.
  static DCOMP_DEVICE void multiply_keys(float (&p)[kRowTiles][kKeyTiles][4], const uint32 (&q)[kRowTiles][kSteps][4],
                                         const uint8* tile, int lane) {
#pragma unroll
    for (int j = 0; j < kKeyTiles; j += 2) {
      int sums[2][kRowTiles][4];
#pragma unroll
      for (auto& some : sums) {
#pragma unroll
        for (auto& of_rows : some) {
#pragma unroll
          for (int& sum : of_rows) sum = kSumBits;
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Words<4> k = load_shared16(tile + ((j / 2 * kSteps + step) * 32 + lane) * 16);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add_s8(sums[0][i], q[i][step], {k.word[0], k.word[1]});
          multiply_add_s8(sums[1][i], q[i][step], {k.word[2], k.word[3]});
        }
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const Words<4> pairs = load_shared16(tile + pairs_at(kWidth) + ((j + t) * 8 + lane % 4 * 2) * kPairBytes);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int of = e % 2 * 2;
            p[i][j + t][e] = fused_multiply_add(from_bits(static_cast<uint32>(sums[t][i][e])),
                                                from_bits(pairs.word[of]), from_bits(pairs.word[of + 1]));
          }
        }
      }
    }
  }

  // Scores become probabilities, up to a factor of their row, and what was summed before is made to fit to them.
  static DCOMP_DEVICE void exponentiate(float (&p)[kKeyTiles][4], float (&sums)[kChannelTiles][4], Rows& rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = rows.highest[half];
#pragma unroll
      for (auto& tile : p) highest = maximum(maximum(tile[half * 2], tile[half * 2 + 1]), highest);
      highest = maximum(shuffle_xor(highest, 1), highest);
      highest = maximum(shuffle_xor(highest, 2), highest);
      rows.highest[half] = highest;
      const float shift = fused_multiply_add(highest, rows.factor[half], -kTop);
      const float less = power_of_two(add(rows.shift[half], -shift));
      rows.shift[half] = shift;
      float total = multiply(rows.total[half], less);
#pragma unroll
      for (auto& tile : p) {
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; ++e) {
          tile[e] = power_of_two(fused_multiply_add(tile[e], rows.factor[half], -shift));
          total = add(total, tile[e]);
        }
      }
      rows.total[half] = total;
#pragma unroll
      for (auto& tile : sums) {
        tile[half * 2] = multiply(tile[half * 2], less);
        tile[half * 2 + 1] = multiply(tile[half * 2 + 1], less);
      }
    }
  }

  // Sums of two tiles of scores lie in lanes as a product wants its rows.
  static DCOMP_DEVICE void multiply_values(float (&sums)[kRowTiles][kChannelTiles][4],
                                           const float (&p)[kRowTiles][kKeyTiles][4], const uint8* values, int lane) {
#pragma unroll
    for (int j = 0; j < kKeyTiles / 2; ++j) {
      uint32 weights[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* const pair = p[i][j * 2 + r / 2] + r % 2 * 2;
          weights[i][r] = to_float16s(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int c = 0; c < kChannelTiles; c += 2) {
        const Words<4> v = load_shared16(values + ((j * (kWidth / 16) + c / 2) * 32 + lane) * 16);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add_f16(sums[i][c], weights[i], {v.word[0], v.word[1]});
          multiply_add_f16(sums[i][c + 1], weights[i], {v.word[2], v.word[3]});
        }
      }
    }
  }

  // The inverse of a row's total over all lanes takes its place.
  static DCOMP_DEVICE void invert(Rows& rows) {
#pragma unroll
    for (float& total : rows.total) {
      total = add(shuffle_xor(total, 1), total);
      total = add(shuffle_xor(total, 2), total);
      total = divide(1.0f, total);
    }
  }

  static DCOMP_DEVICE void write(const Arguments& a, int64 tokens, int query, int lane,
                                 const float (&sums)[kChannelTiles][4], const Rows& rows, const float* scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int there = query + half * 8;
      if (there >= a.queries) continue;
      const int64 row = (tokens + there) * a.heads + blockIdx.y % a.heads;
#pragma unroll
      for (int c = 0; c < kChannelTiles; ++c) {
        const int channel = c * 8 + lane % 4 * 2;
        if (channel >= a.channels) continue;
        const Words<2> scales = load_global(reinterpret_cast<const Words<2>*>(scale + channel));
        const float first = multiply(multiply(sums[c][half * 2], rows.total[half]), from_bits(scales.word[0]));
        const float second = multiply(multiply(sums[c][half * 2 + 1], rows.total[half]), from_bits(scales.word[1]));
        store_floats(a.out, a.out_type, row * a.channels + channel, first, second, channel + 1 < a.channels,
                     a.channels % 2 == 0);
      }
    }
  }
};

}  // namespace dcomp
