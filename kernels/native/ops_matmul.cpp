// Linear layers and convolutions of integers as torch operations.
#include "arguments.h"
#include "instruction_set.h"

#include <memory>

namespace dcomp {
namespace {

constexpr int64_t kBytesAtOnce = 1 << 19;  // of rows that stay in the cache of a core
constexpr int64_t kBytesBefore = 1 << 22;  // of strips that are packed before any product
constexpr int64_t kMostRows = 512;         // of one task

// Strips lie on lines of the cache: their sizes are multiples of them.
struct alignas(64) Line {
  int8_t bytes[64];
};
using Strips = std::unique_ptr<Line[]>;

Strips strips_of(int64_t bytes) { return Strips(new Line[bytes / sizeof(Line)]); }

int8_t* bytes_of(const Strips& strips) { return reinterpret_cast<int8_t*>(strips.get()); }

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
  const int64_t bytes = kernels().matmul.strip_bytes(weights);
  const int64_t row_bytes = rows.multiplier ? rows.groups * rows.group / 2 : rows.channels;
  std::vector<int8_t> scratch(kStripChannels * (rows.channels + kDepthAtOnce));
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t channel = strip * kStripChannels, before = channel * weights.taps;
    PackedRows own = rows;
    own.codes = static_cast<const char*>(rows.codes) + before * row_bytes;
    if (rows.multiplier) own.multiplier = rows.multiplier + before * rows.groups;
    kernels().matmul.pack(own, weights, std::min(kStripChannels, weights.outputs - channel),
                          strips + (strip - first) * bytes, scratch.data());
  }
}

// Multiplies rows of images with a weight. Tasks are pairs of strips; those that a thread has of the same rows are
// multiplied together. Strips of a large weight are packed by the thread that needs them, for all rows, those of a small
// one before, so that there are tasks enough.
void multiply(bool is_signed, const std::vector<IntegerRows>& images, const PackedRows& stored,
              const IntegerWeights& weights, int64_t rows) {
  if (rows == 0 || images.empty() || weights.outputs == 0) return;
  const int64_t bytes = kernels().matmul.strip_bytes(weights);
  const int64_t count = (weights.outputs + kStripChannels - 1) / kStripChannels;
  const int64_t fitting = kBytesAtOnce / images[0].stride;
  const int64_t block = std::min(kMostRows, std::max(kRowsAtOnce, fitting / kRowsAtOnce * kRowsAtOnce));
  const int64_t blocks = (rows + block - 1) / block, pairs = (count + 1) / 2, each = images.size() * blocks;
  const auto run = [&](int64_t which, int64_t strip, int64_t last, const int8_t* strips) {
    const int64_t row = which % blocks * block;
    kernels().matmul.rows(is_signed, images[which / blocks], weights, row, std::min(rows, row + block), strips,
                          last - strip, strip * kStripChannels);
  };
  const int64_t products = std::min(rows, block) * 2 * kStripChannels * weights.taps * weights.channels;
  const int64_t at_once = std::max<int64_t>(1, (int64_t{1} << 22) / products);
  if (each == 1 || count * bytes > kBytesBefore) {
    torch::stable::parallel_for(0, pairs, std::max<int64_t>(1, at_once / each), [&](int64_t first, int64_t last) {
      const int64_t end = std::min(count, 2 * last);
      const Strips own = strips_of(std::min(kStripsAtOnce, end - 2 * first) * bytes);
      for (int64_t strip = 2 * first; strip < end; strip += kStripsAtOnce) {
        const int64_t stop = std::min(end, strip + kStripsAtOnce);
        pack(stored, weights, strip, stop, bytes_of(own));
        for (int64_t which = 0; which < each; ++which) run(which, strip, stop, bytes_of(own));
      }
    });
    return;
  }
  const Strips all = strips_of(count * bytes);
  torch::stable::parallel_for(0, count, grain(bytes), [&](int64_t first, int64_t last) {
    pack(stored, weights, first, last, bytes_of(all) + first * bytes);
  });
  torch::stable::parallel_for(0, each * pairs, at_once, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last;) {
      const int64_t pair = i % pairs, some = std::min({kStripsAtOnce / 2, pairs - pair, last - i});
      run(i / pairs, 2 * pair, std::min(count, 2 * (pair + some)), bytes_of(all) + 2 * pair * bytes);
      i += some;
    }
  });
}

IntegerWeights scaled(const Tensor& qweight, const PackedRows& rows, const Tensor& scale,
                      const std::optional<Tensor>& bias, int64_t products) {
  const int64_t outputs = qweight.size(0);
  const int64_t depth = (rows.channels + kDepthAtOnce - 1) / kDepthAtOnce * kDepthAtOnce;
  const int64_t group = !rows.multiplier ? 0 : rows.groups == 1 ? depth : rows.group;
  return {memory<float>(scale, ScalarType::Float, outputs, "scale is fp32 [O]"),
          bias ? memory<float>(*bias, ScalarType::Float, outputs, "bias is fp32 [O]") : nullptr,
          outputs, qweight.size(1), rows.channels, group, products};
}

// q int8 [M, I], x_scale fp32 [M], a stored weight [O, 1, I] with its scale and bias -> out fp32 [M, O]
void linear_a8(Tensor q, Tensor x_scale, Tensor qweight, std::optional<Tensor> multiplier, Tensor scale,
               std::optional<Tensor> bias, Tensor out) {
  demand(q.dim() == 2 && q.is_contiguous() && q.scalar_type() == ScalarType::Char, "codes are int8 [M, I]");
  const int64_t rows = q.size(0), channels = q.size(1);
  const PackedRows from_file = stored(qweight, multiplier, channels);
  demand(qweight.size(1) == 1, "a linear layer has one tap");
  const IntegerWeights weights = scaled(qweight, from_file, scale, bias, rows);
  const uint8_t* codes = static_cast<const uint8_t*>(q.data_ptr());
  const float* scales = memory<float>(x_scale, ScalarType::Float, rows, "x_scale is fp32 [M]");
  float* to = memory<float>(out, ScalarType::Float, rows * weights.outputs, "out is fp32 [M, O]");
  const int64_t no_offset = 0;
  const auto from = [&](const uint8_t* where, int64_t row) {
    return IntegerRows{where, &no_offset, scales + row, to + row * weights.outputs, channels, rows, rows, 0, true};
  };
  // Blocks are read whole: the last rows are copied to where there is memory behind them, few rows all together.
  const bool whole = rows % kRowsAtOnce == 0 && channels % kDepthAtOnce == 0;
  const int64_t direct = whole ? rows : rows > kMostRows ? (rows - 1) / kRowsAtOnce * kRowsAtOnce : 0;
  multiply(true, {from(codes, 0)}, from_file, weights, direct);
  if (direct == rows) return;
  std::vector<uint8_t> rest((rows - direct + kRowsAtOnce) * channels + kDepthAtOnce);
  std::copy(codes + direct * channels, codes + rows * channels, rest.begin());
  multiply(true, {from(rest.data(), direct)}, from_file, weights, rows - direct);
}

// q uint8 [N, H, W, I], x_scale fp32 and x_zero uint8 [1] or [N], a weight [O, height, width, I] -> out [N, H', W', O]
void conv2d_a8(Tensor q, Tensor x_scale, Tensor x_zero, Tensor qweight, std::optional<Tensor> multiplier,
               Tensor scale, std::optional<Tensor> bias, int64_t height, int64_t width, int64_t stride_y,
               int64_t stride_x, int64_t padding_y, int64_t padding_x, int64_t dilation_y, int64_t dilation_x,
               Tensor out) {
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
  const IntegerWeights weights = scaled(qweight, from_file, scale, bias, samples * made_y * made_x);
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

}  // namespace
}  // namespace dcomp

STABLE_TORCH_LIBRARY_FRAGMENT(dcomp_native, m) {
  m.def(
      "linear_a8(Tensor q, Tensor x_scale, Tensor qweight, Tensor? multiplier, Tensor scale, Tensor? bias, "
      "Tensor(a!) out) -> ()");
  m.def(
      "conv2d_a8(Tensor q, Tensor x_scale, Tensor x_zero, Tensor qweight, Tensor? multiplier, Tensor scale, "
      "Tensor? bias, int height, int width, int stride_y, int stride_x, int padding_y, int padding_x, "
      "int dilation_y, int dilation_x, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CPU, m) {
  m.impl("linear_a8", TORCH_BOX(&dcomp::linear_a8));
  m.impl("conv2d_a8", TORCH_BOX(&dcomp::conv2d_a8));
}
