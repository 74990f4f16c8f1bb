// Normalization, activation and rounding as torch operations.
#include "arguments.h"
#include "instruction_set.h"

#include <cmath>

namespace dcomp {
namespace {

constexpr int64_t kFirstRows = 16;  // whose mean the sums of a group begin from: what is far from 0 keeps its variance

const float* some_vector(const std::optional<Tensor>& vector, int64_t count, const char* what) {
  return vector ? memory<float>(*vector, ScalarType::Float, count, what) : nullptr;
}

// Images [N, L, C] without gaps, cut into parts of rows that are worth a thread.
struct Images {
  Float kind;
  int64_t samples, rows, channels, parts, part;
  const char* values;

  explicit Images(const Tensor& x) {
    demand(x.dim() == 3 && x.is_contiguous() && x.numel() > 0, "inputs are [N, L, C] without gaps");
    kind = float_kind(x);
    samples = x.size(0), rows = x.size(1), channels = x.size(2);
    values = static_cast<const char*>(x.data_ptr());
    parts = std::max<int64_t>(1, std::min<int64_t>(64, rows * channels / kGrain));
    part = (rows + parts - 1) / parts;
  }

  const void* of(int64_t sample) const {
    return values + sample * rows * channels * (kind == Float::kFloat32 ? 4 : 2);
  }

  // Calls run(part, sample, first row, last row) for all parts of all samples; a part may be empty.
  template <class Run>
  void in_parts(Run run) const {
    torch::stable::parallel_for(0, samples * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = std::min(rows, i % parts * part);
        run(i, i / parts, first, std::min(rows, first + part));
      }
    });
  }
};

// The mean of the first rows of each group, for each of its channels.
void first_means(const Images& x, int64_t sample, int64_t groups, float* shift) {
  std::vector<double> sums(2 * x.channels);
  std::vector<float> scratch(2 * x.channels);
  const int64_t some = std::min(x.rows, kFirstRows), of_group = x.channels / groups;
  std::fill_n(shift, x.channels, 0.0f);
  kernels().norm.moments(x.kind, x.of(sample), 0, some, x.channels, shift, sums.data(), scratch.data());
  for (int64_t c = 0; c < x.channels; c += of_group) {
    double total = 0;
    for (int64_t i = c; i < c + of_group; ++i) total += sums[i];
    std::fill_n(shift + c, of_group, static_cast<float>(total / static_cast<double>(some * of_group)));
  }
}

// x [N, L, C], weight and bias fp32 [C] -> factor and added fp32 [N, C], of which group norm makes x * factor + added
void group_norm_factors(Tensor x, int64_t groups, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps,
                        Tensor factor, Tensor added) {
  const Images images(x);
  const int64_t channels = images.channels, parts = images.parts;
  demand(groups > 0 && channels % groups == 0, "groups share channels evenly");
  const float* weights = some_vector(weight, channels, "weight is fp32 [C]");
  const float* biases = some_vector(bias, channels, "bias is fp32 [C]");
  float* factors = memory<float>(factor, ScalarType::Float, images.samples * channels, "factor is fp32 [N, C]");
  float* addends = memory<float>(added, ScalarType::Float, images.samples * channels, "added is fp32 [N, C]");
  std::vector<float> shift(images.samples * channels);
  for (int64_t sample = 0; sample < images.samples; ++sample) {
    first_means(images, sample, groups, shift.data() + sample * channels);
  }
  std::vector<double> sums(images.samples * parts * 2 * channels);
  images.in_parts([&](int64_t part, int64_t sample, int64_t first, int64_t last) {
    std::vector<float> scratch(2 * channels);
    kernels().norm.moments(images.kind, images.of(sample), first, last, channels, shift.data() + sample * channels,
                           sums.data() + part * 2 * channels, scratch.data());
  });
  const int64_t of_group = channels / groups;
  const double count = static_cast<double>(images.rows * of_group);
  for (int64_t group = 0; group < images.samples * groups; ++group) {
    const int64_t sample = group / groups, first = group % groups * of_group;
    double total = 0, squares = 0;
    for (int64_t part = sample * parts; part < (sample + 1) * parts; ++part) {
      for (int64_t c = first; c < first + of_group; ++c) {
        total += sums[part * 2 * channels + c];
        squares += sums[(part * 2 + 1) * channels + c];
      }
    }
    const double beside = total / count, variance = squares / count - beside * beside;
    const double deviation = std::sqrt((variance < 0 ? 0 : variance) + eps);
    for (int64_t c = first; c < first + of_group; ++c) {
      const double own = (weights ? weights[c] : 1.0) / deviation;
      factors[sample * channels + c] = static_cast<float>(own);
      addends[sample * channels + c] =
          static_cast<float>((biases ? biases[c] : 0.0) - (shift[sample * channels + c] + beside) * own);
    }
  }
}

// x [N, L, C], factor and added fp32 [N, C] -> the smallest and largest normalized value of samples and 0: fp32 [2, N]
void normal_range(Tensor x, Tensor factor, Tensor added, bool silu, Tensor found) {
  const Images images(x);
  const int64_t channels = images.channels, parts = images.parts;
  const float* factors = memory<float>(factor, ScalarType::Float, images.samples * channels, "factor is fp32 [N, C]");
  const float* addends = memory<float>(added, ScalarType::Float, images.samples * channels, "added is fp32 [N, C]");
  float* out = memory<float>(found, ScalarType::Float, 2 * images.samples, "ranges are fp32 [2, N]");
  std::vector<float> low(images.samples * parts), high(images.samples * parts);
  images.in_parts([&](int64_t part, int64_t sample, int64_t first, int64_t last) {
    kernels().norm.range(images.kind, silu, images.of(sample), first, last, channels, factors + sample * channels,
                         addends + sample * channels, &low[part], &high[part]);
  });
  for (int64_t sample = 0; sample < images.samples; ++sample) {
    join_ranges(low.data() + sample * parts, high.data() + sample * parts, parts, out + sample,
                out + images.samples + sample);
  }
}

// x [N, L, C], factor and added fp32 [N, C], scale fp32 and zero uint8 [N] -> codes uint8 [N, L, C]
void normal_codes(Tensor x, Tensor factor, Tensor added, bool silu, Tensor scale, Tensor zero, Tensor codes) {
  const Images images(x);
  const int64_t channels = images.channels;
  const float* factors = memory<float>(factor, ScalarType::Float, images.samples * channels, "factor is fp32 [N, C]");
  const float* addends = memory<float>(added, ScalarType::Float, images.samples * channels, "added is fp32 [N, C]");
  const float* scales = memory<float>(scale, ScalarType::Float, images.samples, "scale is fp32 [N]");
  const uint8_t* zeros = memory<uint8_t>(zero, ScalarType::Byte, images.samples, "zero is uint8 [N]");
  uint8_t* out = memory<uint8_t>(codes, ScalarType::Byte, x.numel(), "codes are uint8 like x");
  images.in_parts([&](int64_t, int64_t sample, int64_t first, int64_t last) {
    kernels().norm.codes(images.kind, silu, images.of(sample), out + sample * images.rows * channels, first, last,
                         channels, factors + sample * channels, addends + sample * channels, scales[sample],
                         zeros[sample]);
  });
}

// x [N, L, C], weight and bias fp32 [C], gain and shift fp32 [N, C] -> codes int8 [N, L, C], scale fp32 [N, L]
void layer_norm_quantize(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                         std::optional<Tensor> gain, std::optional<Tensor> shift, double eps, Tensor codes,
                         Tensor scale) {
  const Images images(x);
  const int64_t channels = images.channels, rows = images.rows;
  const LayerNorm norm{some_vector(weight, channels, "weight is fp32 [C]"),
                       some_vector(bias, channels, "bias is fp32 [C]"), static_cast<float>(eps)};
  const float* gains = some_vector(gain, images.samples * channels, "gain is fp32 [N, C]");
  const float* shifts = some_vector(shift, images.samples * channels, "shift is fp32 [N, C]");
  int8_t* out = memory<int8_t>(codes, ScalarType::Char, x.numel(), "codes are int8 like x");
  float* scales = memory<float>(scale, ScalarType::Float, images.samples * rows, "scale is fp32 [N, L]");
  images.in_parts([&](int64_t, int64_t sample, int64_t first, int64_t last) {
    std::vector<float> scratch(channels);
    kernels().norm.tokens(images.kind, images.of(sample), out + sample * rows * channels, scales + sample * rows, first,
                          last, channels, norm, gains ? gains + sample * channels : nullptr,
                          shifts ? shifts + sample * channels : nullptr, scratch.data());
  });
}

}  // namespace
}  // namespace dcomp

STABLE_TORCH_LIBRARY_FRAGMENT(dcomp_native, m) {
  m.def(
      "group_norm_factors(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor(a!) factor, "
      "Tensor(b!) added) -> ()");
  m.def("normal_range(Tensor x, Tensor factor, Tensor added, bool silu, Tensor(a!) found) -> ()");
  m.def(
      "normal_codes(Tensor x, Tensor factor, Tensor added, bool silu, Tensor scale, Tensor zero, "
      "Tensor(a!) codes) -> ()");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, Tensor? gain, Tensor? shift, float eps, "
      "Tensor(a!) codes, Tensor(b!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CPU, m) {
  m.impl("group_norm_factors", TORCH_BOX(&dcomp::group_norm_factors));
  m.impl("normal_range", TORCH_BOX(&dcomp::normal_range));
  m.impl("normal_codes", TORCH_BOX(&dcomp::normal_codes));
  m.impl("layer_norm_quantize", TORCH_BOX(&dcomp::layer_norm_quantize));
}
