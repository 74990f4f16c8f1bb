// What each instruction set offers: one table of functions, filled by `isa.cpp`.
#pragma once
#include <cstdint>

namespace dcomp {

enum class Float : int { kFloat32, kBFloat16 };

constexpr int64_t kWidestHead = 256;  // channels of a head of attention
constexpr int64_t kMostLanes = 16;    // floats of the widest vectors
constexpr float kSmallestScale = 1.17549435e-38f;  // the inverse of anything smaller may be infinite

// One head of attention: matrices [rows, width] whose rows are `stride` values from each other.
struct AttentionHead {
  const void *q, *k, *v;
  float* out;
  int64_t queries, keys, width, q_stride, k_stride, v_stride, out_stride;
  float scale;
};

// How an instruction set works on attention; without `block` it does not.
struct Attention {
  int64_t (*packed_keys)(const AttentionHead& head);  // 32-bit words
  int64_t (*packed_values)(const AttentionHead& head);
  void (*pack)(Float kind, const AttentionHead& head, uint32_t* keys, uint32_t* values);
  int64_t rows;  // queries of one block
  void (*block)(Float kind, const AttentionHead& head, int64_t first, const uint32_t* keys, const uint32_t* values);
};

// Rows of stored weights: int8 [rows, channels], or packed int4 with a multiplier for each group of channels.
struct PackedRows {
  const void* codes;
  const int8_t* multiplier;  // [rows, groups], or none
  int64_t channels, groups, group;
};

// What becomes of sums with a weight [outputs, taps, channels].
struct IntegerWeights {
  const float *scale, *bias;  // [outputs]; a bias may be missing
  int64_t outputs, taps, channels;
  int64_t group;  // channels that share a multiplier; 0 where there is none
  int64_t rows;   // that it is multiplied with: how it is packed may depend on them
};

// Rows of codes, `stride` bytes from each other: those of one image, `pitch` of them a line, of which `width` are kept.
struct IntegerRows {
  const uint8_t* codes;
  const int64_t* offsets;  // bytes from a row to each tap
  const float* scale;      // of each kept row, or of all
  float* out;              // [kept rows, outputs]
  int64_t stride, pitch, width;
  int32_t zero;  // of unsigned codes
  bool scale_for_each;
};

constexpr int64_t kStripChannels = 16;  // output channels that are packed together, see `matmul_*.h`
constexpr int64_t kStripsAtOnce = 16;   // at most
constexpr int64_t kRowsAtOnce = 32;     // that are read, and
constexpr int64_t kDepthAtOnce = 64;    // bytes of each, whatever there is

// How an instruction set multiplies integers: strips of weights are packed, and rows multiplied with some of them.
// Scratch memory of packing has a row of codes for each channel of a strip, in whole depths.
struct Matmul {
  int64_t (*strip_bytes)(const IntegerWeights& weights);
  void (*pack)(const PackedRows& stored, const IntegerWeights& weights, int64_t outputs, int8_t* strip,
               int8_t* scratch);
  void (*rows)(bool is_signed, const IntegerRows& rows, const IntegerWeights& weights, int64_t first, int64_t last,
               const int8_t* strips, int64_t count, int64_t channel);
};

// What a layer norm multiplies with and adds, [channels] each; both may be missing.
struct LayerNorm {
  const float *weight, *bias;
  float eps;
};

// How an instruction set normalizes and rounds. Rows are [rows, channels] of one sample; see `norm.h`.
struct Norm {
  void (*moments)(Float kind, const void* x, int64_t first, int64_t last, int64_t channels, const float* shift,
                  double* sums, float* scratch);
  void (*range)(Float kind, bool silu, const void* x, int64_t first, int64_t last, int64_t channels,
                const float* factor, const float* added, float* low, float* high);
  void (*codes)(Float kind, bool silu, const void* x, uint8_t* codes, int64_t first, int64_t last, int64_t channels,
                const float* factor, const float* added, float scale, float zero);
  void (*tokens)(Float kind, const void* x, int8_t* codes, float* scale, int64_t first, int64_t last, int64_t channels,
                 const LayerNorm& norm, const float* gain, const float* shift, float* scratch);
};

// Float inputs, and what each channel is multiplied by, which may be missing: [channels], or, for values that are taken
// from anywhere in rows of channels, repeated to `channels + kSmoothedAtOnce`.
struct Inputs {
  Float kind;
  const void* x;
  const float* smooth;
  int64_t channels;
};

constexpr int64_t kSmoothedAtOnce = 1024;

// How an instruction set makes images of groups, a row at a time; see `quantize_group.h`.
struct Groups {
  float (*grids)(const Inputs& inputs, int64_t row, int64_t group, float* step, float* below);
  void (*image)(const Inputs& inputs, int8_t* image, int64_t row, int64_t group, const float* step, const float* below,
                float scale);
};

struct Kernels {
  void (*token_rows)(const Inputs& inputs, int8_t* codes, float* scale, int64_t first, int64_t last);
  void (*range)(const Inputs& inputs, int64_t first, int64_t last, float* low, float* high);
  void (*codes)(const Inputs& inputs, uint8_t* codes, int64_t first, int64_t last, float scale, float zero);
  void (*rescale_rows)(const int32_t* sums, float* out, const float* x_scale, int64_t rows_of_scale,
                       const float* weight_scale, const float* bias, int64_t first, int64_t last, int64_t channels);
  void (*unpack_rows)(const uint8_t* packed, const int8_t* multiplier, int8_t* codes, int64_t first, int64_t last,
                      int64_t channels, int64_t groups, int64_t group);
  Groups groups;
  Norm norm;
  Matmul matmul;
  Attention attention;
};

namespace generic {
extern const Kernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

}  // namespace dcomp
