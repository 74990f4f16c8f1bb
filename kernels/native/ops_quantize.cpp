// Quantization of activations, rescaling of sums and unpacking of weights as torch operations.
#include "arguments.h"
#include "instruction_set.h"

namespace dcomp {
namespace {

// x in rows of channels, and smooth fp32 [channels]
Inputs inputs_of(const Tensor& x, const std::optional<Tensor>& smooth, int64_t channels) {
  demand(x.is_contiguous() && (channels == 0 ? x.numel() == 0 : x.numel() % channels == 0), "inputs are dense rows");
  const float* factors = smooth ? memory<float>(*smooth, ScalarType::Float, channels, "smooth is fp32 [I]") : nullptr;
  return {float_kind(x), x.data_ptr(), factors, channels};
}

// The same for stretches that begin anywhere: `repeated` holds the factors then.
Inputs inputs_of(const Tensor& x, const std::optional<Tensor>& smooth, std::vector<float>& repeated) {
  demand(x.dim() == 2, "inputs are a matrix");
  Inputs inputs = inputs_of(x, smooth, smooth ? smooth->numel() : x.size(1));
  if (inputs.smooth) {
    demand(inputs.channels > 0 && x.size(1) % inputs.channels == 0, "samples are rows of channels");
    repeated.resize(inputs.channels + kSmoothedAtOnce);
    for (size_t i = 0; i < repeated.size(); ++i) repeated[i] = inputs.smooth[i % inputs.channels];
    inputs.smooth = repeated.data();
  }
  return inputs;
}

// x [M, I], smooth fp32 [I] or none -> codes int8 [M, I], scale fp32 [M]
void quantize_token(Tensor x, std::optional<Tensor> smooth, Tensor codes, Tensor scale) {
  demand(x.dim() == 2, "inputs are a matrix");
  const int64_t rows = x.size(0), channels = x.size(1);
  const Inputs inputs = inputs_of(x, smooth, channels);
  int8_t* bytes = memory<int8_t>(codes, ScalarType::Char, rows * channels, "codes are int8 like x");
  float* scales = memory<float>(scale, ScalarType::Float, rows, "scale is fp32 [M]");
  torch::stable::parallel_for(0, rows, grain(channels), [&](int64_t first, int64_t last) {
    kernels().token_rows(inputs, bytes, scales, first, last);
  });
}

// x [N, P * I], smooth fp32 [I] or none -> the smallest and largest value of each row and 0: fp32 [2, N]
void range(Tensor x, std::optional<Tensor> smooth, Tensor found) {
  std::vector<float> repeated;
  const Inputs inputs = inputs_of(x, smooth, repeated);
  const int64_t samples = x.size(0), length = x.size(1);
  float* out = memory<float>(found, ScalarType::Float, 2 * samples, "ranges are fp32 [2, N]");
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(64, length / kGrain));
  const int64_t part = (length + parts - 1) / parts;
  std::vector<float> low(samples * parts), high(samples * parts);
  torch::stable::parallel_for(0, samples * parts, grain(part), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t start = i % parts * part, stop = std::min(length, start + part), row = i / parts * length;
      low[i] = high[i] = 0.0f;
      if (start < stop) kernels().range(inputs, row + start, row + stop, &low[i], &high[i]);
    }
  });
  for (int64_t i = 0; i < samples; ++i) {
    join_ranges(low.data() + i * parts, high.data() + i * parts, parts, out + i, out + samples + i);
  }
}

// x [N, P * I], smooth fp32 [I] or none, scale fp32 [N], zero uint8 [N] -> codes uint8 like x
void quantize_static(Tensor x, std::optional<Tensor> smooth, Tensor scale, Tensor zero, Tensor codes) {
  std::vector<float> repeated;
  const Inputs inputs = inputs_of(x, smooth, repeated);
  const int64_t samples = x.size(0), length = x.size(1);
  const float* scales = memory<float>(scale, ScalarType::Float, samples, "scale is fp32 [N]");
  const uint8_t* zeros = memory<uint8_t>(zero, ScalarType::Byte, samples, "zero is uint8 [N]");
  uint8_t* bytes = memory<uint8_t>(codes, ScalarType::Byte, samples * length, "codes are uint8 like x");
  torch::stable::parallel_for(0, samples * length, kGrain, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t sample = first / length, stop = std::min(last, (sample + 1) * length);
      kernels().codes(inputs, bytes, first, stop, scales[sample], zeros[sample]);
      first = stop;
    }
  });
}

// x [N, M, I], smooth fp32 [I] or none -> image int8 [N, M, I] of grids of groups, scale fp32 [N]
void quantize_group(Tensor x, std::optional<Tensor> smooth, int64_t group, Tensor image, Tensor scale) {
  demand(x.dim() == 3 && group > 0, "inputs are [N, M, I]");
  const int64_t samples = x.size(0), rows = x.size(1), channels = x.size(2);
  const Inputs inputs = inputs_of(x, smooth, channels);
  int8_t* bytes = memory<int8_t>(image, ScalarType::Char, samples * rows * channels, "the image is int8 like x");
  float* scales = memory<float>(scale, ScalarType::Float, samples, "scale is fp32 [N]");
  const Groups& groups = kernels().groups;
  const int64_t room = ((channels + group - 1) / group + kMostLanes - 1) / kMostLanes * kMostLanes;
  const auto usable = [](float peak) { return peak < kSmallestScale ? 1.0f : peak; };
  if (rows == 1) {  // a row is written while it is in the cache
    torch::stable::parallel_for(0, samples, grain(channels), [&](int64_t first, int64_t last) {
      std::vector<float> step(room), below(room);
      for (int64_t i = first; i < last; ++i) {
        scales[i] = usable(groups.grids(inputs, i, group, step.data(), below.data()));
        groups.image(inputs, bytes, i, group, step.data(), below.data(), scales[i]);
      }
    });
    return;
  }
  const int64_t all = samples * rows;
  std::vector<float> step(all * room), below(all * room), peak(all);
  torch::stable::parallel_for(0, all, grain(channels), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      peak[i] = groups.grids(inputs, i, group, &step[i * room], &below[i * room]);
    }
  });
  for (int64_t i = 0; i < samples; ++i) {
    float found = 0.0f;
    for (int64_t row = i * rows; row < (i + 1) * rows; ++row) {
      if (peak[row] > found || peak[row] != peak[row]) found = peak[row];
    }
    scales[i] = usable(found);
  }
  torch::stable::parallel_for(0, all, grain(channels), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      groups.image(inputs, bytes, i, group, &step[i * room], &below[i * room], scales[i / rows]);
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

}  // namespace
}  // namespace dcomp

STABLE_TORCH_LIBRARY_FRAGMENT(dcomp_native, m) {
  m.def("quantize_token(Tensor x, Tensor? smooth, Tensor(a!) codes, Tensor(b!) scale) -> ()");
  m.def("quantize_group(Tensor x, Tensor? smooth, int group, Tensor(a!) image, Tensor(b!) scale) -> ()");
  m.def("range(Tensor x, Tensor? smooth, Tensor(a!) found) -> ()");
  m.def("quantize_static(Tensor x, Tensor? smooth, Tensor scale, Tensor zero, Tensor(a!) codes) -> ()");
  m.def("rescale(Tensor(a!) out, Tensor x_scale, Tensor weight_scale, Tensor? bias) -> ()");
  m.def("unpack_int4(Tensor packed, Tensor multiplier, Tensor(a!) codes) -> ()");
  m.def("instruction_set() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CPU, m) {
  m.impl("quantize_token", TORCH_BOX(&dcomp::quantize_token));
  m.impl("quantize_group", TORCH_BOX(&dcomp::quantize_group));
  m.impl("range", TORCH_BOX(&dcomp::range));
  m.impl("quantize_static", TORCH_BOX(&dcomp::quantize_static));
  m.impl("rescale", TORCH_BOX(&dcomp::rescale));
  m.impl("unpack_int4", TORCH_BOX(&dcomp::unpack_int4));
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&dcomp::instruction_set));
}
