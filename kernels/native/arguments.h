// What all operations ask of their tensors, on torch's stable ABI. Outputs are given, so that nothing is allocated.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace dcomp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

inline void demand(bool holds, const char* what) { STD_TORCH_CHECK(holds, "dcomp_native: ", what); }

template <class T>
T* memory(const Tensor& tensor, ScalarType type, int64_t count, const char* what) {
  demand(tensor.scalar_type() == type && tensor.numel() == count && tensor.is_contiguous(), what);
  return static_cast<T*>(tensor.data_ptr());
}

inline int64_t grain(int64_t elements_of_one) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_of_one));
}

inline Float float_kind(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  demand(type == ScalarType::Float || type == ScalarType::BFloat16, "inputs are float32 or bfloat16");
  return type == ScalarType::Float ? Float::kFloat32 : Float::kBFloat16;
}

// One range of several, each with 0 in it; NaN if one has it.
inline void join_ranges(const float* low, const float* high, int64_t count, float* lowest, float* highest) {
  *lowest = *highest = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    if (low[i] < *lowest || low[i] != low[i]) *lowest = low[i];
    if (high[i] > *highest || high[i] != high[i]) *highest = high[i];
  }
}

}  // namespace dcomp
