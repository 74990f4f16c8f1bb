// Integer products in tiles: linear layers and convolutions, with int8 weights or int4 weights in fragment order.
//
// A block makes a tile of rows and columns of the output and walks along K in steps of 64, a stage of shared memory
// each; asynchronous copies run kStages - 1 stages ahead. Where rows come from (`LinearRows`, `ConvPixels`) and how the
// weight is stored (`Int8Weight`, `Int4Weight`) is left to the parts that `Product` is made of.
#pragma once
#include "low_rank.cuh"

namespace dcomp {

constexpr int kStep = 64;                // of K
constexpr int kChunks = kStep / 16;      // 16-byte chunks of a row in a stage
constexpr int kFragmentColumns = 16;     // int4 weights: 16 columns x 64 k lie together,
constexpr int kFragmentBytes = 512;      // 16 bytes a lane,
constexpr int kMultiplierBytes = 64;     // with groups also the multipliers of 16 columns x 2 halves of 32 k

// Where a chunk of a row lies: eight neighbouring rows, as one matrix of ldmatrix reads them, meet all 32 banks.
DCOMP_DEVICE int swizzled(int row, int chunk) { return row * kStep + ((chunk ^ ((row >> 1) & 3)) << 4); }

template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // that a multiprocessor shall hold at least: it bounds the registers
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kRows / kWarpRows * kWarpsAcross * 32;
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;  // tiles of a tensor core
  static constexpr int kRowBytes = kRows * kStep;
  static constexpr int kRowCopies = kRows * kChunks / kThreads;
};

// Rows of int8 activations [M, K].
template <class Tile>
struct LinearRows {
  using Arguments = LinearArguments;
  static constexpr bool kHasBranch = false;
  uint32 row[Tile::kRowCopies];  // bytes from the first one: inputs have fewer than 2^32
  bool live[Tile::kRowCopies];

  DCOMP_DEVICE LinearRows(const Arguments& a, int first_row) {
#pragma unroll
    for (int i = 0; i < Tile::kRowCopies; ++i) {
      const int m = first_row + (i * Tile::kThreads + threadIdx.x) / kChunks;
      live[i] = m < a.rows;
      row[i] = live[i] ? static_cast<uint32>(m) * a.depth : 0;
    }
  }

  DCOMP_DEVICE void load_stage(const Arguments& a, uint8* stage, int step) const {
    const int k = step * kStep + threadIdx.x % kChunks * 16;
#pragma unroll
    for (int i = 0; i < Tile::kRowCopies; ++i) {
      const int chunk = i * Tile::kThreads + threadIdx.x;
      const bool there = live[i] && k < a.depth;
      copy_async16(stage + swizzled(chunk / kChunks, chunk % kChunks), a.x + (there ? row[i] + k : 0), there);
    }
  }

  static DCOMP_DEVICE void multiply_add(int (&sums)[4], const uint32 (&x)[4], const uint32 (&w)[2]) {
    multiply_add_s8(sums, x, w);
  }

  // What turns the sums of a row into values.
  struct Output {
    float scale;
    DCOMP_DEVICE Output(const Arguments& a, int m) : scale(load_global(a.x_scale + m)) {}
    DCOMP_DEVICE int corrected(int sum, int) const { return sum; }
  };

  static DCOMP_DEVICE int weight_sum(const Arguments&, int) { return 0; }
};

// The same of a layer with a low-rank branch.
template <class Tile>
struct LowRankRows : LinearRows<Tile> {
  using LinearRows<Tile>::LinearRows;
  static constexpr bool kHasBranch = true;
};

// Rows of a convolution as a product: the uint8 pixels under the taps of an output pixel, read where they lie.
template <class Tile>
struct ConvPixels {
  using Arguments = ConvArguments;
  static constexpr bool kHasBranch = false;
  static constexpr int kNowhere = -(1 << 24);  // a coordinate that no tap brings into the image
  int origin[Tile::kRowCopies];                // chunk of the first tap, which may lie outside
  int padding[Tile::kRowCopies];               // chunk of the sample's zeros
  int y[Tile::kRowCopies], x[Tile::kRowCopies];

  DCOMP_DEVICE ConvPixels(const Arguments& a, int first_row) {
#pragma unroll
    for (int i = 0; i < Tile::kRowCopies; ++i) {
      const int m = first_row + (i * Tile::kThreads + threadIdx.x) / kChunks;
      const bool live = m < a.rows;
      const uint32 pixel = live ? m : 0, sample = pixel / a.out_pixels, place = pixel % a.out_pixels;
      y[i] = live ? static_cast<int>(place / a.out_width) * a.stride_y - a.padding_y : kNowhere;
      x[i] = static_cast<int>(place % a.out_width) * a.stride_x - a.padding_x;
      origin[i] = ((static_cast<int>(sample) * a.height + (live ? y[i] : 0)) * a.width + x[i]) * (a.channels / 16);
      padding[i] = pixel / a.scale_rows;
    }
  }

  DCOMP_DEVICE void load_stage(const Arguments& a, uint8* stage, int step) const {
    const int k = step * kStep + threadIdx.x % kChunks * 16;
    const int tap = multiply_high(k, a.channels_inverse), tap_y = (tap * a.kernel_width_inverse) >> 16;
    const int dy = tap_y * a.dilation_y, dx = (tap - tap_y * a.kernel_width) * a.dilation_x;
    const int shift = (dy * a.width + dx) * (a.channels / 16) + (k - tap * a.channels) / 16;
    const bool there = k < a.depth;
#pragma unroll
    for (int i = 0; i < Tile::kRowCopies; ++i) {
      const int chunk = i * Tile::kThreads + threadIdx.x;
      const bool inside = static_cast<uint32>(y[i] + dy) < static_cast<uint32>(a.height) &&
                          static_cast<uint32>(x[i] + dx) < static_cast<uint32>(a.width);
      const uint8* const from = (inside ? a.x : a.padding) + 16ll * (inside ? origin[i] + shift : padding[i]);
      uint8* const to = stage + swizzled(chunk / kChunks, chunk % kChunks);
      copy_async16(to, from, there);
    }
  }

  static DCOMP_DEVICE void multiply_add(int (&sums)[4], const uint32 (&x)[4], const uint32 (&w)[2]) {
    multiply_add_u8(sums, x, w);
  }

  struct Output {
    float scale;
    int zero;
    DCOMP_DEVICE Output(const Arguments& a, int m) {
      const uint32 sample = static_cast<uint32>(m) / a.scale_rows;
      scale = load_global(a.x_scale + sample);
      zero = load_global(a.x_zero + sample);
    }
    DCOMP_DEVICE int corrected(int sum, int weight_sum) const { return sum - zero * weight_sum; }
  };

  static DCOMP_DEVICE int weight_sum(const Arguments& a, int n) { return load_global(a.weight_sum + n); }
};

// The weight's part of 16 columns x 64 k in the registers of a warp: two tiles of 8 columns, two halves of 32 k.
struct Fragments {
  uint32 tile[2][2][2];  // [half][tile][register]
};

// int8 [O, K], copied like rows.
template <class Tile>
struct Int8Weight {
  static constexpr int kBytes = Tile::kColumns * kStep;

  template <class Arguments>
  static DCOMP_DEVICE void load_stage(const Arguments& a, uint8* stage, int first_column, int step) {
    const int k = step * kStep + threadIdx.x % kChunks * 16;
#pragma unroll
    for (int i = 0; i < Tile::kColumns * kChunks / Tile::kThreads; ++i) {
      const int chunk = i * Tile::kThreads + threadIdx.x, n = first_column + chunk / kChunks;
      const bool there = n < a.outputs && k < a.depth;
      // Weights have fewer than 2^32 bytes, too: the dispatch table asks.
      const uint8* from = there ? a.weight + static_cast<uint32>(n) * a.depth + k : a.weight;
      copy_async16(stage + swizzled(chunk / kChunks, chunk % kChunks), from, there);
    }
  }

  static DCOMP_DEVICE void fragments(Fragments& to, const uint8* stage, int column, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32 r[4];
      load_half(r, stage, column, half, lane);
      to.tile[half][0][0] = r[0];
      to.tile[half][0][1] = r[1];
      to.tile[half][1][0] = r[2];
      to.tile[half][1][1] = r[3];
    }
  }

  // Both registers of two tiles.
  static DCOMP_DEVICE void load_half(uint32 (&r)[4], const uint8* stage, int column, int half, int lane) {
    load_matrices(r, stage + swizzled(column + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
  }
};

// int4 in fragment order: a lane's 16 bytes hold a word for each tile and half, low nibbles for the first register and
// high nibbles for the second. Made to int8 in registers.
template <class Tile, bool kGrouped>
struct Int4Weight {
  static constexpr int kBlock = kFragmentBytes + (kGrouped ? kMultiplierBytes : 0);
  static constexpr int kBytes = Tile::kColumns / kFragmentColumns * kBlock;

  template <class Arguments>
  static DCOMP_DEVICE void load_stage(const Arguments& a, uint8* stage, int first_column, int step) {
    constexpr int kCopies = kBlock / 16;
    constexpr bool kAll = kBytes / 16 % Tile::kThreads == 0;  // each thread has as many
    const int steps = (a.depth + kStep - 1) / kStep;
#pragma unroll
    for (int i = 0; i < (kBytes / 16 + Tile::kThreads - 1) / Tile::kThreads; ++i) {
      const uint32 chunk = i * Tile::kThreads + threadIdx.x;
      const int n = first_column + chunk / kCopies * kFragmentColumns;
      const bool part = kAll || chunk < kBytes / 16, there = part && n < a.outputs;
      const uint32 block = static_cast<uint32>(n) / kFragmentColumns * steps + step;
      const uint8* const from = there ? a.weight + static_cast<int64>(block) * kBlock + chunk % kCopies * 16 : a.weight;
      copy_async16(stage + chunk * 16, from, there, part);
    }
  }

  static DCOMP_DEVICE void fragments(Fragments& to, const uint8* stage, int column, int lane) {
    const uint8* block = stage + column / kFragmentColumns * kBlock;
    const Words<4> codes = load_shared16(block + lane * 16);
    if constexpr (kGrouped) {
      const Words<2> multipliers = load_shared8(block + kFragmentBytes + lane / 4 * 8);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        scale<0>(to.tile[0][tile], codes.word[tile * 2], multipliers.word[tile]);
        scale<1>(to.tile[1][tile], codes.word[tile * 2 + 1], multipliers.word[tile]);
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // a code in the upper half of a byte is 16 times as much
          const uint32 word = codes.word[tile * 2 + half];
          to.tile[half][tile][0] = (word << 4) & 0xF0F0F0F0u;
          to.tile[half][tile][1] = word & 0xF0F0F0F0u;
        }
      }
    }
  }

  // Nibbles u from 0 to 15 times m, less c: four bytes at once. The word of a column holds m and 128 - c of each half.
  // A byte u * m + 128 - c is 8 at least and 248 at most, so nothing carries, and its upper bit is then turned.
  template <int kHalf>
  static DCOMP_DEVICE void scale(uint32 (&to)[2], uint32 nibbles, uint32 multipliers) {
    const uint32 m = (multipliers >> (kHalf * 16)) & 0xFF, shift = repeat_byte<kHalf * 2 + 1>(multipliers);
    to[0] = ((nibbles & 0x0F0F0F0Fu) * m + shift) ^ 0x80808080u;
    to[1] = (((nibbles >> 4) & 0x0F0F0F0Fu) * m + shift) ^ 0x80808080u;
  }
};

template <class Tile_, template <class> class Rows_, class Weight>
struct Product {
  using Tile = Tile_;
  using Rows = Rows_<Tile>;
  using Arguments = typename Rows::Arguments;
  static constexpr int kThreads = Tile::kThreads, kBlocks = Tile::kBlocks, kStages = Tile::kStages;
  static constexpr int kStageBytes = Tile::kRowBytes + Weight::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  using Sums = int[Tile::kRowTiles][Tile::kColumnTiles][4];

  static DCOMP_DEVICE void run(const Arguments& a) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = blockIdx.y * Tile::kRows, first_column = blockIdx.x * Tile::kColumns;
    const int row = warp / Tile::kWarpsAcross * Tile::kWarpRows;
    const int column = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
    const int steps = (a.depth + kStep - 1) / kStep;
    uint8* const shared = shared_memory();
    const Rows rows(a, first_row);
    const auto load_stage = [&](int step) {
      if (step < steps) {
        uint8* const stage = shared + step % kStages * kStageBytes;
        rows.load_stage(a, stage, step);
        Weight::load_stage(a, stage + Tile::kRowBytes, first_column, step);
      }
      copy_async_commit();  // also an empty one: waiting counts groups
    };

    Sums sums;
    clear(sums);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load_stage(step);
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      barrier();  // all copies of this step are there, and nobody reads the stage of the last one any more
      load_stage(step + kStages - 1);
      multiply_stage(sums, shared + step % kStages * kStageBytes, row, column, lane);
    }
    finish(a, sums, first_row + row, first_column + column, lane);
  }

  static DCOMP_DEVICE void finish(const Arguments& a, Sums& sums, int row, int column, int lane) {
    if constexpr (Rows::kHasBranch) {
      write_with_branch(a, sums, row, column, lane);
    } else {
      write(a, sums, row, column, lane);
    }
  }

  static DCOMP_DEVICE void clear(Sums& sums) {
#pragma unroll
    for (auto& some : sums) {
#pragma unroll
      for (auto& tile : some) {
#pragma unroll
        for (int& sum : tile) sum = 0;
      }
    }
  }

  // Half of a warp's 16 rows.
  static DCOMP_DEVICE void load_rows(uint32 (&x)[4], const uint8* stage, int row, int half, int lane) {
    load_matrices(x, stage + swizzled(row + lane % 16, half * 2 + lane / 16));
  }

  static DCOMP_DEVICE void multiply_stage(Sums& sums, const uint8* stage, int row, int column, int lane) {
    uint32 x[2][Tile::kRowTiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) load_rows(x[half][i], stage, row + i * 16, half, lane);
    }
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; j += 2) {
      Fragments w;
      Weight::fragments(w, stage + Tile::kRowBytes, column + j * 8, lane);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) {
          Rows::multiply_add(sums[i][j + tile], x[0][i], w.tile[0][tile]);
          Rows::multiply_add(sums[i][j + tile], x[1][i], w.tile[1][tile]);
        }
      }
    }
  }

  // What turns the sums of a column into values.
  struct Column {
    float scale, bias;
    int weight_sum;

    DCOMP_DEVICE void load(const Arguments& a, int n) {
      n = n < a.outputs ? n : 0;
      scale = load_global(a.weight_scale + n);
      bias = a.bias ? load_global(a.bias + n) : 0.0f;
      weight_sum = Rows::weight_sum(a, n);
    }

    // bias + (sum * weight_scale) * x_scale
    DCOMP_DEVICE float scaled(const typename Rows::Output& row, int sum) const {
      return add(bias, multiply(multiply(to_float(row.corrected(sum, weight_sum)), scale), row.scale));
    }
  };

  static DCOMP_DEVICE void load_columns(Column (&columns)[Tile::kColumnTiles][2], const Arguments& a, int column,
                                        int lane) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      columns[j][0].load(a, column_of(column, j, lane));
      columns[j][1].load(a, column_of(column, j, lane) + 1);
    }
  }

  static DCOMP_DEVICE void write(const Arguments& a, const Sums& sums, int row, int column, int lane) {
    Column columns[Tile::kColumnTiles][2];
    load_columns(columns, a, column, lane);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles * 2; ++i) {
      const int m = row + i * 8 + lane / 4;
      if (m >= a.rows) continue;
      const typename Rows::Output output(a, m);
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const int n = column_of(column, j, lane);
        if (n >= a.outputs) continue;
        const int* const pair = sums[i / 2][j] + i % 2 * 2;
        const float first = columns[j][0].scaled(output, pair[0]), second = columns[j][1].scaled(output, pair[1]);
        store_floats(a.out, a.out_type, static_cast<int64>(m) * a.outputs + n, first, second, n + 1 < a.outputs,
                     a.outputs % 2 == 0);
      }
    }
  }

  // Sums become values, in the same registers, and the branch is added to these.
  static DCOMP_DEVICE void write_with_branch(const Arguments& a, Sums& sums, int row, int column, int lane) {
    Column columns[Tile::kColumnTiles][2];
    load_columns(columns, a, column, lane);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles * 2; ++i) {
      const int m = row + i * 8 + lane / 4;
      const typename Rows::Output output(a, m < a.rows ? m : 0);
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        int* const pair = sums[i / 2][j] + i % 2 * 2;
#pragma unroll
        for (int k = 0; k < 2; ++k) pair[k] = static_cast<int>(to_bits(columns[j][k].scaled(output, pair[k])));
      }
    }
    LowRankBranch<Tile>::add(a, sums, row, column, lane);
    const bool aligned = a.outputs % 2 == 0;
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles * 2; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        const int m = row + i * 8 + lane / 4, n = column_of(column, j, lane);
        if (m >= a.rows || n >= a.outputs) continue;
        const int* const pair = sums[i / 2][j] + i % 2 * 2;
        store_floats(a.out, a.out_type, static_cast<int64>(m) * a.outputs + n, from_bits(pair[0]), from_bits(pair[1]),
                     n + 1 < a.outputs, aligned);
      }
    }
  }

  static DCOMP_DEVICE int column_of(int column, int tile, int lane) { return column + tile * 8 + lane % 4 * 2; }
};

template <class Tile>
using LinearW8A8 = Product<Tile, LinearRows, Int8Weight<Tile>>;
template <class Tile>
using LinearW4A8 = Product<Tile, LinearRows, Int4Weight<Tile, true>>;
template <class Tile>
using LinearW4A8Channel = Product<Tile, LinearRows, Int4Weight<Tile, false>>;
template <class Tile>
using LinearW8A8LowRank = Product<Tile, LowRankRows, Int8Weight<Tile>>;
template <class Tile>
using LinearW4A8LowRank = Product<Tile, LowRankRows, Int4Weight<Tile, true>>;
template <class Tile>
using LinearW4A8ChannelLowRank = Product<Tile, LowRankRows, Int4Weight<Tile, false>>;
template <class Tile>
using ConvW8A8 = Product<Tile, ConvPixels, Int8Weight<Tile>>;
template <class Tile>
using ConvW4A8 = Product<Tile, ConvPixels, Int4Weight<Tile, true>>;
template <class Tile>
using ConvW4A8Channel = Product<Tile, ConvPixels, Int4Weight<Tile, false>>;

}  // namespace dcomp
