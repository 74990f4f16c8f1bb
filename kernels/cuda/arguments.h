// What each kernel takes: one struct, by value. Python mirrors them in arguments.py.
//
// Pointers come first, then integers of 64 bits, then what has 32 bits; only the end may be padded. All tensors are
// dense. A float tensor of a layer has the type that `FloatType` names; all other floats are fp32.
//
// M rows, O outputs, K depth: the channels of all taps, padded to a multiple of 16 by the host. N samples, P pixels of
// a sample, C channels.
#pragma once

namespace dcomp {

using int8 = signed char;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

enum FloatType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// linear_*; grid (ceil(O / columns), ceil(M / rows of a tile))
struct LinearArguments {
  const int8* x;              // [M, K]; of w4a4 K is the bytes of a row, see nibbles.py
  const uint8* weight;        // int8 [O, K]; or fragments, see packing.py
  const float* x_scale;       // [M]
  const float* weight_scale;  // [O]; of w4a8_channel: times multiplier / 16
  const float* bias;          // [O], or null
  void* out;                  // [M, O]
  const uint8* x_multipliers;       // of w4a4, else null; see nibbles.py
  const uint8* weight_multipliers;  // likewise
  const float* hidden;              // [M, rank] of a low-rank branch, or null
  const uint16* up;                 // float16 [O, rank], likewise
  int rows, outputs, depth;   // M, O, K
  int out_type;
  int corrections;            // of w4a4: steps before those of codes, else 0
  int rank;                   // a multiple of 8, 0 without a branch
};

// conv_w8a8_*, conv_w4a8_*, conv_w4a8_channel_*; grid as of linear layers, where a row is a pixel of the output
struct ConvArguments {
  const uint8* x;             // [N, height, width, C]; C is a multiple of 16, of 32 for w4a8
  const uint8* padding;       // [N or 1, 16], 16 times the zero; what taps beyond the image read
  const uint8* weight;        // int8 [O, kernel height, kernel width, C]; or fragments, see packing.py
  const int* weight_sum;      // [O], of the integers that are multiplied: of w4a8_channel, 16 times those of the codes
  const float* x_scale;       // [N or 1]
  const uint8* x_zero;        // [N or 1]
  const float* weight_scale;  // [O]; of w4a8_channel: times multiplier / 16
  const float* bias;          // [O], or null
  void* out;                  // [N, output height, output width, O]
  int rows, outputs, depth;   // M = N * output height * output width, O, K = kernel height * kernel width * C
  int out_type;
  int height, width, channels;
  int out_pixels, out_width;  // output height * output width, output width
  int scale_rows;             // rows that share scale and zero: out_pixels, or M if there is one for all
  int kernel_width;
  int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  uint32 channels_inverse;      // 2^32 / C, rounded up; K * C is below 2^32
  uint32 kernel_width_inverse;  // 2^16 / kernel width, rounded up
};

// quantize_static; any grid, each thread takes every so many elements
struct QuantizeStaticArguments {
  const void* x;        // [count]
  uint8* codes;         // [count]
  const float* scale;   // [1]
  const uint8* zero;    // [1]
  const float* smooth;  // [C], which neighbours are multiplied by, or null
  int64 count;
  int channels;         // C
  int x_type;
};

// sample_range, then quantize_sample; both with grid (parts, N)
struct QuantizeSampleArguments {
  const void* x;        // [N, count]
  uint8* codes;         // [N, count]
  float* scale;         // [N], written
  uint8* zero;          // [N], written
  const float* smooth;  // [C], which neighbours are multiplied by, or null
  float* ranges;        // [N, parts, 2], scratch: the lowest and the highest value of each part
  int64 count;          // elements of a sample
  int channels;         // C
  int parts;
  int x_type;
};

// quantize_token; grid ceil(M / 8): a warp a row
struct QuantizeTokenArguments {
  const void* x;        // [M, C]
  const float* smooth;  // [C], which rows are multiplied by, or null
  int8* codes;          // [M, K], 0 beyond C
  float* scale;         // [M], written
  int rows, channels, depth;
  int x_type;
};

// group_peak, then quantize_group; both with grid (parts, N). Or quantize_group_token alone, of samples that are a row:
// N is 1, there is a scale for each of the rows, no peak and no part; grid ceil(rows / 8): a warp a row
struct QuantizeGroupArguments {
  const void* x;        // [N, rows, C]
  const float* smooth;  // [C], which rows are multiplied by, or null
  int8* codes;          // [N, rows, K], 0 beyond C
  float* scale;         // [N], written
  float* peaks;         // [N, parts], scratch: the outer scale that each part of the rows calls for
  int rows, channels, depth;
  int group;            // channels that share a grid, at most C
  int parts;
  int x_type;
};

// quantize_nibbles; grid ceil(M / 8): a warp a row
struct QuantizeNibblesArguments {
  const void* x;        // [M, C]
  const float* smooth;  // [C], which rows are multiplied by, or null
  uint8* codes;        // [M, K], see nibbles.py
  uint8* multipliers;  // [C / 128 rounded up, M rounded up to 4, 4]
  float* scale;        // [M], written
  int rows, channels, depth;
  int group;           // channels that share a grid: a multiple of `block`, perhaps more than C
  int block;           // channels that share a correction: 32 or 64
  int x_type;
};

// low_rank_token, low_rank_group; grid ceil(M / 32)
struct LowRankArguments {
  const void* x;        // [M, C]
  const float* smooth;  // [C], which rows are multiplied by before they are rounded, or null
  const uint16* down;   // [rank, C], float16; meets rows that are not smoothed
  int8* codes;          // [M, K], 0 beyond C
  float* scale;         // [M], written
  float* hidden;        // [M, rank], written
  int rows, channels, depth;
  int group;            // of low_rank_group: channels that share a grid, at most C
  int rank;
  int x_type;
};

// unpack_int8, unpack_int4; any grid
struct UnpackArguments {
  const void* qweight;      // int8 [O, taps, C]; or uint8 [O, taps, groups * group / 2]
  const int8* multiplier;   // [O, taps, groups], null for 8 bits
  const float* scale;       // [O]
  void* out;                // [O, taps, C]
  int rows, taps;           // O * taps, taps
  int channels, groups, group;
  int out_type;
};

// group_norm_moments, then group_norm_static; or group_norm_moments, group_norm_range, group_norm_sample: all with grid
// (parts, N)
struct GroupNormArguments {
  const void* x;        // [N, P, C]
  const float* weight;  // [C], or null with `bias`
  const float* bias;    // [C]
  float* moments;       // [N, parts, groups, 2], scratch: mean and sum of squared distances from it, of a part's pixels
  float* ranges;        // [N, parts, 2], scratch of a sample's range; null for static
  uint8* codes;         // [N, P, C]
  float* scale;         // [N], written; static: [1], read
  uint8* zero;          // [N], written; static: [1], read
  int pixels, channels, groups;  // at most 256 groups
  float epsilon;
  int silu;             // not 0: SiLU comes after the norm
  int parts;
  int x_type;
};

// layer_norm_token; grid ceil(M / 8): a warp a row
struct LayerNormArguments {
  const void* x;        // [M, C]
  const float* weight;  // [C], or null with `bias`
  const float* bias;    // [C]
  const float* gain;    // [M / gain_rows, C], or null with `shift`: y * (1 + gain) + shift
  const float* shift;   // like gain
  int8* codes;          // [M, K], 0 beyond C
  float* scale;         // [M], written
  int rows, channels, depth;
  int gain_rows;        // neighbouring rows that share gain and shift
  float epsilon;
  int x_type;
};

// key_value_moments; grid (parts, B * H). Then key_value_tiles; grid (ceil(M / 64), B * H). B samples, H heads of C
// channels, M tokens
struct KeyValueArguments {
  const void* k;   // [B, M, H, C]
  const void* v;   // [B, M, H, C]
  float* moments;  // [B * H, parts, 2, C], scratch: shares of the mean of keys, and the largest magnitude of values
  uint8* tiles;    // [B * H, ceil(M / 64), bytes of a tile], see packing.py
  float* v_scale;  // [B * H, width], written
  int keys, heads, channels;
  int width;       // C padded to that of an attention kernel
  int parts;
  int x_type;      // of both
};

// attention_*; grid (ceil(N / queries of a block), B * H). N queries, C channels of a head
struct AttentionArguments {
  const int8* q;         // [B, N, H, K], K is the kernel's width padded to 32
  const float* q_scale;  // [B, N, H]
  const uint8* tiles;    // as key_value_tiles wrote them for the kernel's width
  const float* v_scale;  // likewise
  void* out;             // [B, N, H, C]
  int queries, heads, channels;
  int tile_count;        // of a head
  int out_type;
  float scale;           // of scores, times log2(e)
};

}  // namespace dcomp
