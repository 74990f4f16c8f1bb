// All kernels: the one file that is compiled, for the device as for the emulator.
#include "attention.cuh"
#include "nibble_products.cuh"
#include "quantize_low_rank.cuh"
#include "norm_quantize.cuh"
#include "products.cuh"
#include "quantize.cuh"
#include "quantize_nibbles.cuh"
#include "unpack.cuh"

namespace dcomp {

//                   rows, columns, of a warp, stages, blocks
template <int kStages>
using Tile256x128 = Tile<256, 128, 64, 64, kStages, 1>;  // fewest reads of shared memory, for sm_80 and sm_90
template <int kStages>
using Tile128x128 = Tile<128, 128, 64, 32, kStages, 2>;
template <int kStages>
using Tile64x64 = Tile<64, 64, 32, 32, kStages, 4>;  // for few rows or columns
using Nibbles128x128 = Tile<128, 128, 64, 32, 3, 1>;  // sums of blocks take registers too

}  // namespace dcomp

// Name and kernel of each entry point. A build may give a shorter list, as tests of a single one do.
#ifndef DCOMP_ENTRIES
#define DCOMP_ENTRIES(ENTRY)                                                            \
  ENTRY(linear_w8a8_256x128, LinearW8A8<Tile256x128<3>>)                                \
  ENTRY(linear_w8a8_128x128, LinearW8A8<Tile128x128<3>>)                                \
  ENTRY(linear_w8a8_64x64, LinearW8A8<Tile64x64<3>>)                                    \
  ENTRY(linear_w4a8_256x128, LinearW4A8<Tile256x128<4>>)                                \
  ENTRY(linear_w4a8_128x128, LinearW4A8<Tile128x128<3>>)                                \
  ENTRY(linear_w4a8_64x64, LinearW4A8<Tile64x64<3>>)                                    \
  ENTRY(linear_w4a8_channel_256x128, LinearW4A8Channel<Tile256x128<4>>)                 \
  ENTRY(linear_w4a8_channel_128x128, LinearW4A8Channel<Tile128x128<4>>)                 \
  ENTRY(linear_w4a8_channel_64x64, LinearW4A8Channel<Tile64x64<3>>)                     \
  ENTRY(linear_w4a4_group64_256x128, LinearW4A4Group64<Tile256x128<3>>)                 \
  ENTRY(linear_w4a4_group64_128x128, LinearW4A4Group64<Nibbles128x128>)                 \
  ENTRY(linear_w4a4_group64_64x64, LinearW4A4Group64<Tile64x64<3>>)                     \
  ENTRY(linear_w4a4_group32_128x128, LinearW4A4Group32<Nibbles128x128>)                 \
  ENTRY(linear_w4a4_group32_64x64, LinearW4A4Group32<Tile64x64<3>>)                     \
  ENTRY(linear_w8a8_low_rank_128x128, LinearW8A8LowRank<Tile128x128<3>>)                \
  ENTRY(linear_w8a8_low_rank_64x64, LinearW8A8LowRank<Tile64x64<3>>)                    \
  ENTRY(linear_w4a8_low_rank_128x128, LinearW4A8LowRank<Tile128x128<3>>)                \
  ENTRY(linear_w4a8_low_rank_64x64, LinearW4A8LowRank<Tile64x64<3>>)                    \
  ENTRY(linear_w4a8_channel_low_rank_128x128, LinearW4A8ChannelLowRank<Tile128x128<4>>) \
  ENTRY(linear_w4a8_channel_low_rank_64x64, LinearW4A8ChannelLowRank<Tile64x64<3>>)     \
  ENTRY(linear_w4a4_group64_low_rank_128x128, LinearW4A4Group64LowRank<Nibbles128x128>) \
  ENTRY(linear_w4a4_group64_low_rank_64x64, LinearW4A4Group64LowRank<Tile64x64<3>>)     \
  ENTRY(linear_w4a4_group32_low_rank_128x128, LinearW4A4Group32LowRank<Nibbles128x128>) \
  ENTRY(linear_w4a4_group32_low_rank_64x64, LinearW4A4Group32LowRank<Tile64x64<3>>)     \
  ENTRY(conv_w8a8_256x128, ConvW8A8<Tile256x128<3>>)                                    \
  ENTRY(conv_w8a8_128x128, ConvW8A8<Tile128x128<3>>)                                    \
  ENTRY(conv_w8a8_64x64, ConvW8A8<Tile64x64<3>>)                                        \
  ENTRY(conv_w4a8_256x128, ConvW4A8<Tile256x128<4>>)                                    \
  ENTRY(conv_w4a8_128x128, ConvW4A8<Tile128x128<3>>)                                    \
  ENTRY(conv_w4a8_64x64, ConvW4A8<Tile64x64<3>>)                                        \
  ENTRY(conv_w4a8_channel_256x128, ConvW4A8Channel<Tile256x128<4>>)                     \
  ENTRY(conv_w4a8_channel_128x128, ConvW4A8Channel<Tile128x128<4>>)                     \
  ENTRY(conv_w4a8_channel_64x64, ConvW4A8Channel<Tile64x64<3>>)                         \
  ENTRY(attention_48, Attention<48, 2, 4, 2>)                                           \
  ENTRY(attention_64, Attention<64, 2, 4, 2>)                                           \
  ENTRY(attention_80, Attention<80, 1, 8, 1>)                                           \
  ENTRY(attention_128, Attention<128, 1, 8, 1>)                                         \
  ENTRY(attention_160, Attention<160, 1, 8, 1>)                                         \
  ENTRY(key_value_moments, KeyValueMoments)                                             \
  ENTRY(key_value_tiles, KeyValueTiles)                                                 \
  ENTRY(quantize_static, QuantizeStatic)                                                \
  ENTRY(sample_range, SampleRange)                                                      \
  ENTRY(quantize_sample, QuantizeSample)                                                \
  ENTRY(quantize_token, QuantizeToken)                                                  \
  ENTRY(group_peak, GroupPeak)                                                          \
  ENTRY(quantize_group, QuantizeGroup)                                                  \
  ENTRY(quantize_group_token, QuantizeGroupToken)                                       \
  ENTRY(low_rank_token, LowRankToken)                                                   \
  ENTRY(low_rank_group, LowRankGroup)                                                   \
  ENTRY(quantize_nibbles, QuantizeNibbles)                                              \
  ENTRY(unpack_int8, UnpackInt8)                                                        \
  ENTRY(unpack_int4, UnpackInt4)                                                        \
  ENTRY(group_norm_moments, GroupNormMoments)                                           \
  ENTRY(group_norm_range, GroupNormRange)                                               \
  ENTRY(group_norm_static, GroupNormStatic)                                             \
  ENTRY(group_norm_sample, GroupNormSample)                                             \
  ENTRY(layer_norm_token, LayerNormToken)
#endif

#ifndef DCOMP_EMULATOR
#define DCOMP_ENTRY(name, ...)                                                                                     \
  extern "C" __global__ void __launch_bounds__(dcomp::__VA_ARGS__::kThreads, dcomp::__VA_ARGS__::kBlocks)          \
      name(const dcomp::__VA_ARGS__::Arguments arguments) {                                                        \
    dcomp::__VA_ARGS__::run(arguments);                                                                            \
  }
using namespace dcomp;
DCOMP_ENTRIES(DCOMP_ENTRY)
#endif
