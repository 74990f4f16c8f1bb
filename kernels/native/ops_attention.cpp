// Attention as a torch operation.
#include "arguments.h"
#include "instruction_set.h"

namespace dcomp {
namespace {

// q [B, H, N, d], k and v [B, H, M, d] -> out fp32 [B, N, H, d]; the last axes have no gaps
void attention(Tensor q, Tensor k, Tensor v, Tensor out, double scale) {
  const Attention& kernel = attention_kernels();
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
  const Float kind = float_kind(q);
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
  struct alignas(64) Line {  // of the cache; heads take whole ones
    uint32_t words[16];
  };
  constexpr int64_t kWords = sizeof(Line) / sizeof(uint32_t);
  const int64_t lines = (key_words + value_words + kWords - 1) / kWords;
  std::vector<Line> packed(all.size() * lines);
  const auto keys_of = [&](int64_t i) { return packed[i * lines].words; };
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

}  // namespace
}  // namespace dcomp

STABLE_TORCH_LIBRARY_FRAGMENT(dcomp_native, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dcomp_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&dcomp::attention));
}
