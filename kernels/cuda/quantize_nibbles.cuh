// Rows of 4-bit inputs as products of nibbles take them: `qparams.quantize_nibbles` in the layout of nibbles.py.
#pragma once
#include "quantize.cuh"

namespace dcomp {

struct QuantizeNibbles : QuantizeKernel<QuantizeNibblesArguments, 0> {
  static constexpr int kUnit = 32;                         // channels that have a byte for their multiplier
  static constexpr int kUnitsOfStage = 4, kCorrections = 16, kStageBytes = 64;  // of nibble_products.cuh

  static DCOMP_DEVICE void run(const Arguments& a) {
    const int row = blockIdx.x * kQuantizeWarps + threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
    if (row >= a.rows) return;  // a whole warp
    const int blocks = (a.channels + a.block - 1) / a.block;
    const int stages = (blocks + kCorrections - 1) / kCorrections;
    uint8* const corrections = a.codes + static_cast<int64>(row) * a.depth;
    for (int block = blocks + lane; block < stages * kCorrections; block += kWarpLanes) {
      correct(corrections, block, 0, 0);
    }
    const int units = (a.channels + kUnit - 1) / kUnit;
    for (int unit = units + lane; unit < (units + 3) / kUnitsOfStage * kUnitsOfStage; unit += kWarpLanes) {
      store_multiplier(a, row, unit, 0);
    }
    with_inputs(a, [&](auto type, auto is_smooth) {
      const GroupRow<decltype(type), decltype(is_smooth)> groups(a, row);
      const float scale = usable(over_lanes<Larger>(groups.peak()));
      if (lane == 0) store_global(a.scale + row, scale);
      groups.each([&](const GroupGrid& grid, int start, int end) {
        store_group(a, groups, grid, scale, row, start, end, corrections, corrections + stages * kStageBytes);
      });
    });
  }

  template <class Row>
  static DCOMP_DEVICE void store_group(const Arguments& a, const Row& groups, const GroupGrid& grid, float scale,
                                       int row, int start, int end, uint8* corrections, uint8* codes) {
    const int lane = threadIdx.x % kWarpLanes, width = groups.width;
    const float multiplier = grid.multiplier(scale), inverse = divide(1.0f, multiply(multiplier, scale));
    const int whole = to_int(multiplier), zero = to_int(grid.below);
    const int padded = (a.channels + kUnit - 1) / kUnit * kUnit;
    for (int offset = lane % width * kFour; offset < a.group + lane % width * kFour; offset += width * kFour) {
      const int at = start + offset;
      const bool is_mine = offset < a.group && at < padded;
      float v[kFour];
      groups.load(v, at, end);
      uint32 nibbles = 0;
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        const int q = code(v[i], inverse, 0.0f, -grid.below, GroupGrid::kSteps - grid.below) + zero;
        if (!is_mine || at + i >= end) continue;
        nibbles |= static_cast<uint32>(q) << (4 * i);
        sum += q;
      }
      // A float is exact here, and all lanes are: the loop is as long for each of them.
      const int of_block = to_int(over_lanes<Sum>(to_float(sum), a.block / kFour));
      if (!is_mine) continue;
      store_global(reinterpret_cast<uint16*>(codes + at / 2), static_cast<uint16>(nibbles));
      if (at % kUnit == 0) store_multiplier(a, row, at / kUnit, whole);
      if (at % a.block == 0) correct(corrections, at / a.block, whole * zero, whole * of_block);
    }
  }

  static DCOMP_DEVICE void store_multiplier(const Arguments& a, int row, int unit, int multiplier) {
    const int64 word = static_cast<int64>(unit / kUnitsOfStage) * ((a.rows + 3) / 4 * 4) + row;
    store_global(a.multipliers + word * kUnitsOfStage + unit % kUnitsOfStage, static_cast<uint8>(multiplier));
  }

  // What a block is corrected by: the upper part of its sum in the first half of a stage, the lower 7 bits in the
  // second.
  static DCOMP_DEVICE void correct(uint8* corrections, int block, int zero, int sum) {
    uint8* const stage = corrections + block / kCorrections * kStageBytes;
    uint16* const to = reinterpret_cast<uint16*>(stage) + block % kCorrections;
    store_global(to, static_cast<uint16>(zero | sum >> 7 << 8));
    store_global(to + kCorrections, static_cast<uint16>(zero | (sum & 127) << 8));
  }
};

}  // namespace dcomp
