// `torch.ops.dcomp_native.*` on torch's stable ABI: arguments checked, work cut for torch's own threads.
//
// Outputs are given, so that nothing is allocated here. Callers are in `rows.py`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dcomp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

struct InstructionSet {
  const char* name;
  const Kernels& kernels;
  bool (*is_here)();
};

#ifdef __x86_64__
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Registers of tiles must be asked for, once for a process.
bool has_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool always() { return true; }

const InstructionSet kInstructionSets[] = {  // the best first
#ifdef __x86_64__
    {"amx", amx::kernels, has_amx},
    {"avx512bf16", avx512bf16::kernels, has_avx512bf16},
    {"avx512", avx512::kernels, has_avx512},
    {"avx2", avx2::kernels, has_avx2},
#endif
    {"generic", generic::kernels, always},
};

// The best instruction set of this processor, or the best of those from the one on that DCOMP_INSTRUCTION_SET names
const InstructionSet& best_instruction_set() {
  const char* named = std::getenv("DCOMP_INSTRUCTION_SET");
  bool allowed = named == nullptr;
  for (const InstructionSet& set : kInstructionSets) {
    allowed = allowed || std::string(named) == set.name;
    if (allowed && set.is_here()) return set;
  }
  return *(std::end(kInstructionSets) - 1);
}

const InstructionSet& chosen() {
  static const InstructionSet& best = best_instruction_set();
  return best;
}

const Kernels& kernels() { return chosen().kernels; }

void demand(bool holds, const char* what) { STD_TORCH_CHECK(holds, "dcomp_native: ", what); }

Float kind_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  demand(type == ScalarType::Float || type == ScalarType::BFloat16, "inputs are float32 or bfloat16");
  demand(x.dim() == 2 && x.is_contiguous(), "inputs are a matrix without gaps");
  return type == ScalarType::Float ? Float::kFloat32 : Float::kBFloat16;
}

template <class T>
T* memory(const Tensor& tensor, ScalarType type, int64_t count, const char* what) {
  demand(tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous(), what);
  return static_cast<T*>(tensor.data_ptr());
}

int64_t grain(int64_t elements_of_one) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_of_one)); }

// x [M, I] -> codes int8 [M, I], scale fp32 [M]
void quantize_token(Tensor x, Tensor codes, Tensor scale) {
  const Float kind = kind_of(x);
  const int64_t rows = x.size(0), channels = x.size(1);
  const void* values = x.data_ptr();
  int8_t* bytes = memory<int8_t>(codes, ScalarType::Char, rows * channels, "codes are int8 like x");
  float* scales = memory<float>(scale, ScalarType::Float, rows, "scale is fp32 [M]");
  torch::stable::parallel_for(0, rows, grain(channels), [&](int64_t first, int64_t last) {
    kernels().token_rows(kind, values, bytes, scales, first, last, channels);
  });
}

// x [N, L] -> the smallest and largest value of each row and 0: fp32 [2, N]
void range(Tensor x, Tensor found) {
  const Float kind = kind_of(x);
  const int64_t samples = x.size(0), length = x.size(1);
  const void* values = x.data_ptr();
  float* out = memory<float>(found, ScalarType::Float, 2 * samples, "ranges are fp32 [2, N]");
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(64, length / kGrain));
  const int64_t part = (length + parts - 1) / parts;
  std::vector<float> low(samples * parts), high(samples * parts);
  torch::stable::parallel_for(0, samples * parts, grain(part), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t start = i % parts * part, stop = std::min(length, start + part), row = i / parts * length;
      low[i] = high[i] = 0.0f;
      if (start < stop) kernels().range(kind, values, row + start, row + stop, &low[i], &high[i]);
    }
  });
  for (int64_t i = 0; i < samples * parts; ++i) {
    float& lowest = out[i / parts];
    float& highest = out[samples + i / parts];
    if (i % parts == 0) lowest = highest = 0.0f;
    if (low[i] < lowest || low[i] != low[i]) lowest = low[i];
    if (high[i] > highest || high[i] != high[i]) highest = high[i];
  }
}

// x [N, L], scale fp32 [N], zero uint8 [N] -> codes uint8 [N, L]
void quantize_static(Tensor x, Tensor scale, Tensor zero, Tensor codes) {
  const Float kind = kind_of(x);
  const int64_t samples = x.size(0), length = x.size(1);
  const void* values = x.data_ptr();
  const float* scales = memory<float>(scale, ScalarType::Float, samples, "scale is fp32 [N]");
  const uint8_t* zeros = memory<uint8_t>(zero, ScalarType::Byte, samples, "zero is uint8 [N]");
  uint8_t* bytes = memory<uint8_t>(codes, ScalarType::Byte, samples * length, "codes are uint8 like x");
  torch::stable::parallel_for(0, samples * length, kGrain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t sample = first / length, stop = std::min(last, (sample + 1) * length);
      kernels().codes(kind, values, bytes, first, stop, scales[sample], zeros[sample]);
      first = stop;
    }
  });
}

// sums int32 [M, O] in the memory of out fp32 [M, O] -> bias + (sums * weight_scale) * x_scale
void rescale(Tensor out, Tensor x_scale, Tensor weight_scale, std::optional<Tensor> bias) {
  demand(out.dim() == 2, "out is a matrix");
  const int64_t rows = out.size(0), channels = out.size(1), scales = x_scale.numel();
  float* values = memory<float>(out, ScalarType::Float, rows * channels, "out is fp32 [M, O]");
  const float* weights = memory<float>(weight_scale, ScalarType::Float, channels, "weight_scale is fp32 [O]");
  const float* added = bias ? memory<float>(*bias, ScalarType::Float, channels, "bias is fp32 [O]") : nullptr;
  const float* inputs = memory<float>(x_scale, ScalarType::Float, scales, "x_scale is fp32");
  demand(scales > 0 && rows % scales == 0, "rows are shared evenly by scales");
  const int64_t rows_of_scale = std::max<int64_t>(1, rows / scales);
  torch::stable::parallel_for(0, rows, grain(channels), [&](int64_t first, int64_t last) {
    kernels().rescale_rows(reinterpret_cast<const int32_t*>(values), values, inputs, rows_of_scale, weights, added,
                           first, last, channels);
  });
}

// packed uint8 [R, G * group / 2], multiplier int8 [R, G] -> codes int8 [R, I]
void unpack_int4(Tensor packed, Tensor multiplier, Tensor codes) {
  demand(packed.dim() == 2 && multiplier.dim() == 2 && codes.dim() == 2, "weights are matrices");
  const int64_t rows = codes.size(0), channels = codes.size(1), groups = multiplier.size(1);
  demand(groups > 0 && packed.size(1) * 2 % groups == 0, "groups share a row evenly");
  const int64_t group = packed.size(1) * 2 / groups;
  demand(group % 2 == 0 && channels <= groups * group, "groups are even and hold all channels");
  const uint8_t* bytes = memory<uint8_t>(packed, ScalarType::Byte, rows * groups * group / 2, "packed is uint8");
  const int8_t* factors = memory<int8_t>(multiplier, ScalarType::Char, rows * groups, "multiplier is int8 [R, G]");
  int8_t* out = memory<int8_t>(codes, ScalarType::Char, rows * channels, "codes are int8 [R, I]");
  torch::stable::parallel_for(0, rows, grain(channels), [&](int64_t first, int64_t last) {
    kernels().unpack_rows(bytes, factors, out, first, last, channels, groups, group);
  });
}

constexpr int64_t kBytesAtOnce = 1 << 19;  // of rows, and of strips, that stay in the cache of a core

// A stored weight: int8 [O, T, I], or uint8 [O, T, G * group / 2] with multiplier int8 [O, T, G].
PackedRows stored(const Tensor& qweight, const std::optional<Tensor>& multiplier, int64_t channels) {
  demand(qweight.dim() == 3 && qweight.is_contiguous() && channels > 0, "weights are [O, T, I]");
  PackedRows rows{qweight.data_ptr(), nullptr, channels, 1, channels};
  if (!multiplier) {
    demand(qweight.scalar_type() == ScalarType::Char && qweight.size(2) == channels, "codes are int8 [O, T, I]");
    return rows;
  }
  demand(qweight.scalar_type() == ScalarType::Byte && multiplier->dim() == 3, "packed is uint8, multiplier [O, T, G]");
  rows.groups = multiplier->size(2);
  demand(rows.groups > 0 && qweight.size(2) * 2 % rows.groups == 0, "groups share a row evenly");
  rows.group = qweight.size(2) * 2 / rows.groups;
  demand(rows.group % 2 == 0 && channels <= rows.groups * rows.group, "groups are even and hold all channels");
  rows.multiplier = memory<int8_t>(*multiplier, ScalarType::Char, qweight.size(0) * qweight.size(1) * rows.groups,
                                   "multiplier is int8 [O, T, G]");
  return rows;
}

// Packs strips `first` to `last` of a weight.
void pack(const PackedRows& rows, const IntegerWeights& weights, int64_t first, int64_t last, int8_t* strips) {
  const int64_t bytes = kernels().matmul.strip_bytes(weights.taps, weights.channels);
  const int64_t row_bytes = rows.multiplier ? rows.groups * rows.group / 2 : rows.channels;
  std::vector<int8_t> scratch(rows.channels);
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t channel = strip * kStripChannels, before = channel * weights.taps;
    PackedRows own = rows;
    own.codes = static_cast<const char*>(rows.codes) + before * row_bytes;
    if (rows.multiplier) own.multiplier = rows.multiplier + before * rows.groups;
    kernels().matmul.pack(own, std::min(kStripChannels, weights.outputs - channel), weights.taps,
                          strips + (strip - first) * bytes, scratch.data());
  }
}

// Multiplies rows of images with a weight. Each task packs the strips that it needs, or all are packed before.
void multiply(bool is_signed, const std::vector<IntegerRows>& images, const PackedRows& stored,
              const IntegerWeights& weights, int64_t rows) {
  if (rows == 0 || images.empty() || weights.outputs == 0) return;
  const int64_t bytes = kernels().matmul.strip_bytes(weights.taps, weights.channels);
  const int64_t count = (weights.outputs + kStripChannels - 1) / kStripChannels;
  const int64_t fitting_strips = kBytesAtOnce / bytes / 2 * 2, fitting = kBytesAtOnce / images[0].stride;
  const int64_t part = std::min(kStripsAtOnce, std::max<int64_t>(2, fitting_strips));
  const int64_t block = std::min<int64_t>(512, std::max(kRowsAtOnce, fitting / kRowsAtOnce * kRowsAtOnce));
  const int64_t blocks = (rows + block - 1) / block, parts = (count + part - 1) / part, each = images.size() * blocks;
  const std::unique_ptr<int8_t[]> all(each > 1 ? new int8_t[count * bytes] : nullptr);
  if (all) {
    torch::stable::parallel_for(0, count, grain(bytes), [&](int64_t first, int64_t last) {
      pack(stored, weights, first, last, all.get() + first * bytes);
    });
  }
  const int64_t products = std::min(rows, block) * part * kStripChannels * weights.taps * weights.channels;
  const int64_t at_once = std::max<int64_t>(1, (int64_t{1} << 22) / products);
  torch::stable::parallel_for(0, each * parts, at_once, [&](int64_t first, int64_t last) {
    const std::unique_ptr<int8_t[]> own(all ? nullptr : new int8_t[part * bytes]);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts % blocks * block, strip = i % parts * part, end = std::min(count, strip + part);
      if (own) pack(stored, weights, strip, end, own.get());
      kernels().matmul.rows(is_signed, images[i / parts / blocks], weights, row, std::min(rows, row + block),
                            own ? own.get() : all.get() + strip * bytes, end - strip, strip * kStripChannels);
    }
  });
}

IntegerWeights scaled(const Tensor& qweight, const Tensor& scale, const std::optional<Tensor>& bias,
                      int64_t channels) {
  const int64_t outputs = qweight.size(0);
  return {memory<float>(scale, ScalarType::Float, outputs, "scale is fp32 [O]"),
          bias ? memory<float>(*bias, ScalarType::Float, outputs, "bias is fp32 [O]") : nullptr,
          outputs, qweight.size(1), channels};
}

// q int8 [M, I], x_scale fp32 [M], a stored weight [O, 1, I] with its scale and bias -> out fp32 [M, O]
void linear_a8(Tensor q, Tensor x_scale, Tensor qweight, std::optional<Tensor> multiplier, Tensor scale,
               std::optional<Tensor> bias, Tensor out) {
  demand(q.dim() == 2 && q.is_contiguous() && q.scalar_type() == ScalarType::Char, "codes are int8 [M, I]");
  const int64_t rows = q.size(0), channels = q.size(1);
  const PackedRows from_file = stored(qweight, multiplier, channels);
  demand(qweight.size(1) == 1, "a linear layer has one tap");
  const IntegerWeights weights = scaled(qweight, scale, bias, channels);
  const uint8_t* codes = static_cast<const uint8_t*>(q.data_ptr());
  const float* scales = memory<float>(x_scale, ScalarType::Float, rows, "x_scale is fp32 [M]");
  float* to = memory<float>(out, ScalarType::Float, rows * weights.outputs, "out is fp32 [M, O]");
  const int64_t no_offset = 0;
  const auto from = [&](const uint8_t* where, int64_t row) {
    return IntegerRows{where, &no_offset, scales + row, to + row * weights.outputs, channels, rows, rows, 0, true};
  };
  // Blocks are read whole: the last rows are copied to where there is memory behind them.
  const bool whole = rows % kRowsAtOnce == 0 && channels % kDepthAtOnce == 0;
  const int64_t direct = whole || rows == 0 ? rows : (rows - 1) / kRowsAtOnce * kRowsAtOnce;
  multiply(true, {from(codes, 0)}, from_file, weights, direct);
  if (direct == rows) return;
  std::vector<uint8_t> rest(kRowsAtOnce * channels + kDepthAtOnce);
  std::copy(codes + direct * channels, codes + rows * channels, rest.begin());
  multiply(true, {from(rest.data(), direct)}, from_file, weights, rows - direct);
}

// q uint8 [N, H, W, I], x_scale fp32 and x_zero uint8 [1] or [N], a weight [O, height, width, I] -> out [N, H', W', O]
void conv2d_a8(Tensor q, Tensor x_scale, Tensor x_zero, Tensor qweight, std::optional<Tensor> multiplier,
               Tensor scale, std::optional<Tensor> bias, int64_t height, int64_t width, int64_t stride_y, int64_t stride_x, int64_t padding_y, int64_t padding_x,
               int64_t dilation_y, int64_t dilation_x, Tensor out) {
  demand(q.dim() == 4 && q.is_contiguous() && q.scalar_type() == ScalarType::Byte, "codes are uint8 [N, H, W, I]");
  demand(out.dim() == 4 && q.size(0) == out.size(0), "out is [N, H', W', O]");
  demand(height > 0 && width > 0 && stride_y > 0 && stride_x > 0 && padding_y >= 0 && padding_x >= 0, "geometry");
  const int64_t samples = q.size(0), rows = q.size(1), columns = q.size(2), channels = q.size(3);
  const int64_t reach_y = dilation_y * (height - 1) + 1, reach_x = dilation_x * (width - 1) + 1;
  const int64_t made_y = (rows + 2 * padding_y - reach_y) / stride_y + 1;
  const int64_t made_x = (columns + 2 * padding_x - reach_x) / stride_x + 1;
  demand(rows + 2 * padding_y >= reach_y && columns + 2 * padding_x >= reach_x, "the image holds a patch");
  demand(out.size(1) == made_y && out.size(2) == made_x && out.size(3) == scale.numel(), "out is [N, H', W', O]");
  demand(channels > 0 && dilation_y > 0 && dilation_x > 0, "there are channels");
  const PackedRows from_file = stored(qweight, multiplier, channels);
  demand(qweight.size(1) == height * width, "weights are [O, height * width, I]");
  const IntegerWeights weights = scaled(qweight, scale, bias, channels);
  const int64_t scales = x_scale.numel();
  demand(scales == 1 || scales == samples, "one scale, or one for each sample");
  const float* x_scales = memory<float>(x_scale, ScalarType::Float, scales, "x_scale is fp32");
  const uint8_t* zeros = memory<uint8_t>(x_zero, ScalarType::Byte, scales, "x_zero is uint8");
  float* to = memory<float>(out, ScalarType::Float, samples * made_y * made_x * weights.outputs, "out is fp32");
  if (samples == 0) return;
  // The padded image has lines of a multiple of the stride, so that a step down is a whole number of steps right.
  const int64_t line = (columns + 2 * padding_x + stride_x - 1) / stride_x * stride_x;
  const int64_t image = (rows + 2 * padding_y) * line * channels, pitch = stride_y * line / stride_x;
  const int64_t all = (made_y - 1) * pitch + made_x;  // rows of the product
  std::vector<int64_t> offsets;
  for (int64_t tap = 0; tap < height * width; ++tap) {
    offsets.push_back((tap / width * dilation_y * line + tap % width * dilation_x) * channels);
  }
  const int64_t read = (all + kRowsAtOnce) * stride_x * channels + offsets.back() + channels + kDepthAtOnce;
  std::vector<uint8_t> padded((samples - 1) * image + std::max(image, read));
  const uint8_t* codes = static_cast<const uint8_t*>(q.data_ptr());
  const int64_t lines = rows + 2 * padding_y;
  torch::stable::parallel_for(0, samples * lines, grain(line * channels), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t sample = i / lines, row = i % lines - padding_y;
      uint8_t* begin = padded.data() + i * line * channels;
      std::fill(begin, begin + line * channels, zeros[scales == 1 ? 0 : sample]);
      if (row < 0 || row >= rows) continue;
      const uint8_t* own = codes + (sample * rows + row) * columns * channels;
      std::copy(own, own + columns * channels, begin + padding_x * channels);
    }
  });
  std::vector<IntegerRows> images;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t which = scales == 1 ? 0 : sample;
    images.push_back({padded.data() + sample * image, offsets.data(), x_scales + which,
                      to + sample * made_y * made_x * weights.outputs, stride_x * channels, pitch, made_x,
                      zeros[which], false});
  }
  multiply(false, images, from_file, weights, all);
}

// q [B, H, N, d], k and v [B, H, M, d] -> out fp32 [B, N, H, d]; the last axes have no gaps
void attention(Tensor q, Tensor k, Tensor v, Tensor out, double scale) {
  const Attention& kernel = kernels().attention;
  demand(kernel.block != nullptr, "this instruction set has no attention");
  const ScalarType type = q.scalar_type();
  demand(type == ScalarType::Float || type == ScalarType::BFloat16, "inputs are float32 or bfloat16");
  demand(k.scalar_type() == type && v.scalar_type() == type, "inputs have one dtype");
  demand(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "inputs are [B, H, N, d]");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3), keys = k.size(2);
  demand(k.size(0) == batch && k.size(1) == heads && k.size(3) == width, "keys fit to queries");
  demand(v.size(0) == batch && v.size(1) == heads && v.size(2) == keys && v.size(3) == width, "values fit to keys");
  demand(q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1, "the last axes have no gaps");
  demand(keys > 0 && width > 0 && width <= kWidestHead && scale > 0, "there are keys, and heads of 1 to 256 channels");
  float* to = memory<float>(out, ScalarType::Float, q.numel(), "out is fp32 [B, N, H, d]");
  const Float kind = type == ScalarType::Float ? Float::kFloat32 : Float::kBFloat16;
  const int64_t bytes = type == ScalarType::Float ? 4 : 2;
  std::vector<AttentionHead> all;
  for (int64_t i = 0; i < batch * heads; ++i) {
    const int64_t b = i / heads, h = i % heads;
    const auto of_head = [&](const Tensor& x) {
      return static_cast<const char*>(x.data_ptr()) + (b * x.stride(0) + h * x.stride(1)) * bytes;
    };
    all.push_back({of_head(q), of_head(k), of_head(v), to + (b * queries * heads + h) * width, queries, keys, width,
                   q.stride(2), k.stride(2), v.stride(2), heads * width, static_cast<float>(scale)});
  }
  if (all.empty() || queries == 0) return;
  const int64_t key_words = kernel.packed_keys(all[0]), value_words = kernel.packed_values(all[0]);
  std::vector<uint32_t> packed(all.size() * (key_words + value_words));
  const auto keys_of = [&](int64_t i) { return packed.data() + i * (key_words + value_words); };
  torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernel.pack(kind, all[i], keys_of(i), keys_of(i) + key_words);
  });
  const int64_t blocks = (queries + kernel.rows - 1) / kernel.rows;
  torch::stable::parallel_for(0, batch * heads * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = i / blocks;
      kernel.block(kind, all[head], i % blocks * kernel.rows, keys_of(head), keys_of(head) + key_words);
    }
  });
}

// Which instruction set was chosen, counted from the last of the table
int64_t instruction_set() { return std::end(kInstructionSets) - 1 - &chosen(); }

}  // namespace
}  // namespace dcomp

STABLE_TORCH_LIBRARY(dcomp_native, m) {
  m.def("quantize_token(Tensor x, Tensor(a!) codes, Tensor(b!) scale) -> ()");
  m.def("range(Tensor x, Tensor(a!) found) -> ()");
  m.def("quantize_static(Tensor x, Tensor scale, Tensor zero, Tensor(a!) codes) -> ()");
  m.def("rescale(Tensor(a!) out, Tensor x_scale, Tensor weight_scale, Tensor? bias) -> ()");
  m.def("unpack_int4(Tensor packed, Tensor multiplier, Tensor(a!) codes) -> ()");
  m.def(
      "linear_a8(Tensor q, Tensor x_scale, Tensor qweight, Tensor? multiplier, Tensor scale, Tensor? bias, "
      "Tensor(a!) out) -> ()");
  m.def(
      "conv2d_a8(Tensor q, Tensor x_scale, Tensor x_zero, Tensor qweight, Tensor? multiplier, Tensor scale, "
      "Tensor? bias, int height, int width, int stride_y, int stride_x, int padding_y, int padding_x, int dilation_y, int dilation_x, "
      "Tensor(a!) out) -> ()");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, float scale) -> ()");
  m.def("instruction_set() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CPU, m) {
  m.impl("quantize_token", TORCH_BOX(&dcomp::quantize_token));
  m.impl("range", TORCH_BOX(&dcomp::range));
  m.impl("quantize_static", TORCH_BOX(&dcomp::quantize_static));
  m.impl("rescale", TORCH_BOX(&dcomp::rescale));
  m.impl("unpack_int4", TORCH_BOX(&dcomp::unpack_int4));
  m.impl("linear_a8", TORCH_BOX(&dcomp::linear_a8));
  m.impl("conv2d_a8", TORCH_BOX(&dcomp::conv2d_a8));
  m.impl("attention", TORCH_BOX(&dcomp::attention));
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&dcomp::instruction_set));
}
