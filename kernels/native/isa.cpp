// The kernels of one instruction set: compiled once for each, with its flags and DCOMP_ISA naming it.
//
// Nothing of the C++ library is used here: the linker could take what these flags made of it for processors without.
#include "kernels.h"
#include "norm.h"
#include "quantize.h"
#include "quantize_group.h"
#if defined(__AVX2__) && !defined(__AMX_INT8__)
#include "matmul_avx2.h"
#else
#include "matmul_tiles.h"
#endif
#if defined(__AVX512BF16__)
#include "attention.h"
#define DCOMP_HAS_ATTENTION
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "attention_avx2.h"
#define DCOMP_HAS_ATTENTION
#endif

namespace dcomp::DCOMP_ISA {
namespace {

// Calls what(x) with a pointer of the kind that x is of.
template <class What>
void with_values(Float kind, const void* x, What what) {
  if (kind == Float::kFloat32) {
    what(static_cast<const float*>(x));
  } else {
    what(static_cast<const BFloat16*>(x));
  }
}

// Calls what(x) for the values of a row.
template <class What>
void with_row(const Inputs& inputs, int64_t row, What what) {
  with_values(inputs.kind, inputs.x, [&](const auto* from) {
    from += row * inputs.channels;
    if (inputs.smooth) {
      what(smoothed(from, inputs.smooth));
    } else {
      what(from);
    }
  });
}

// Calls what(x, place, count) for stretches of the values from `first` to `last`, wherever these are in rows.
template <class What>
void with_stretches(const Inputs& inputs, int64_t first, int64_t last, What what) {
  with_values(inputs.kind, inputs.x, [&](const auto* from) {
    if (!inputs.smooth) return what(from + first, first, last - first);
    for (int64_t place = first; place < last; place += kSmoothedAtOnce) {
      const int64_t count = last - place < kSmoothedAtOnce ? last - place : kSmoothedAtOnce;
      what(smoothed(from + place, inputs.smooth + place % inputs.channels), place, count);
    }
  });
}

void token_rows(const Inputs& inputs, int8_t* codes, float* scale, int64_t first, int64_t last) {
  // A short row alone would wait for its scale; as many as are near enough to be read again do not.
  constexpr int64_t kMostRows = 8, kNearValues = 1 << 13;
  const int64_t near = kNearValues / (inputs.channels > 0 ? inputs.channels : 1);
  const int64_t at_once = near < 1 ? 1 : near < kMostRows ? near : kMostRows;
  for (; first < last; first += at_once) {
    const int64_t end = last - first < at_once ? last : first + at_once;
    for (int64_t row = first; row < end; ++row) {
      with_row(inputs, row, [&](auto x) { scale[row] = token_scale(x, inputs.channels); });
    }
    for (int64_t row = first; row < end; ++row) {
      with_row(inputs, row, [&](auto x) {
        token_codes(x, codes + row * inputs.channels, scale[row], inputs.channels);
      });
    }
  }
}

void range(const Inputs& inputs, int64_t first, int64_t last, float* low, float* high) {
  Range found{0.0f, 0.0f};
  with_stretches(inputs, first, last, [&](auto x, int64_t, int64_t count) {
    const Range part = range_of(x, count);
    found.join(part.low, part.high);
  });
  *low = found.low;
  *high = found.high;
}

void codes(const Inputs& inputs, uint8_t* codes, int64_t first, int64_t last, float scale, float zero) {
  with_stretches(inputs, first, last, [=](auto x, int64_t place, int64_t count) {
    quantize_static(x, codes + place, count, scale, zero);
  });
}

float grids(const Inputs& inputs, int64_t row, int64_t group, float* step, float* below) {
  float peak;
  with_row(inputs, row, [&](auto x) { peak = group_grids(x, inputs.channels, group, step, below); });
  return peak;
}

void image(const Inputs& inputs, int8_t* image, int64_t row, int64_t group, const float* step, const float* below,
           float scale) {
  with_row(inputs, row, [&](auto x) {
    write_group_image(x, image + row * inputs.channels, inputs.channels, group, step, below, scale);
  });
}

void rescale_rows(const int32_t* sums, float* out, const float* x_scale, int64_t rows_of_scale,
                  const float* weight_scale, const float* bias, int64_t first, int64_t last, int64_t channels) {
  for (int64_t row = first; row < last; ++row) {
    rescale(sums + row * channels, out + row * channels, x_scale[row / rows_of_scale], weight_scale, bias, channels);
  }
}

void unpack_rows(const uint8_t* packed, const int8_t* multiplier, int8_t* codes, int64_t first, int64_t last,
                 int64_t channels, int64_t groups, int64_t group) {
  for (int64_t row = first; row < last; ++row) {
    unpack_int4(packed + row * (groups * group / 2), multiplier + row * groups, codes + row * channels, channels,
                group);
  }
}

void multiply(bool is_signed, const IntegerRows& rows, const IntegerWeights& weights, int64_t first, int64_t last,
              const int8_t* strips, int64_t count, int64_t channel) {
  if (is_signed) {
    multiply_rows<true>(rows, weights, first, last, strips, count, channel);
  } else {
    multiply_rows<false>(rows, weights, first, last, strips, count, channel);
  }
}

void moments(Float kind, const void* x, int64_t first, int64_t last, int64_t channels, const float* shift,
             double* sums, float* scratch) {
  with_values(kind, x, [=](const auto* from) {
    add_moments(from + first * channels, last - first, channels, shift, sums, scratch);
  });
}

void normal_range(Float kind, bool with_silu, const void* x, int64_t first, int64_t last, int64_t channels,
                  const float* factor, const float* added, float* low, float* high) {
  with_values(kind, x, [=](const auto* from) {
    from += first * channels;
    const Range found = with_silu ? normalized_range<true>(from, last - first, channels, factor, added)
                                  : normalized_range<false>(from, last - first, channels, factor, added);
    *low = found.low;
    *high = found.high;
  });
}

void normal_codes(Float kind, bool with_silu, const void* x, uint8_t* codes, int64_t first, int64_t last,
                  int64_t channels, const float* factor, const float* added, float scale, float zero) {
  with_values(kind, x, [=](const auto* from) {
    from += first * channels;
    uint8_t* to = codes + first * channels;
    if (with_silu) {
      normalized_codes<true>(from, to, last - first, channels, factor, added, scale, zero);
    } else {
      normalized_codes<false>(from, to, last - first, channels, factor, added, scale, zero);
    }
  });
}

void normal_tokens(Float kind, const void* x, int8_t* codes, float* scale, int64_t first, int64_t last,
                   int64_t channels, const LayerNorm& norm, const float* gain, const float* shift, float* scratch) {
  with_values(kind, x, [&](const auto* from) {
    for (int64_t row = first; row < last; ++row) {
      layer_norm_token(from + row * channels, codes + row * channels, scale + row, channels, norm, gain, shift,
                       scratch);
    }
  });
}

#ifdef DCOMP_HAS_ATTENTION
void pack(Float kind, const AttentionHead& head, uint32_t* keys, uint32_t* values) {
  if (kind == Float::kFloat32) {
    pack_head<float>(head, keys, values);
  } else {
    pack_head<BFloat16>(head, keys, values);
  }
}

void block(Float kind, const AttentionHead& head, int64_t first, const uint32_t* keys, const uint32_t* values) {
  if (kind == Float::kFloat32) {
    attend_block<float>(head, first, keys, values);
  } else {
    attend_block<BFloat16>(head, first, keys, values);
  }
}

constexpr Attention kAttention = {packed_keys, packed_values, pack, kQueries, block};
#else
constexpr Attention kAttention = {};
#endif

}  // namespace

extern const Kernels kernels = {token_rows, range, codes, rescale_rows, unpack_rows, {grids, image},
                                {moments, normal_range, normal_codes, normal_tokens},
                                {strip_bytes, pack_strip, multiply}, kAttention};

}  // namespace dcomp::DCOMP_ISA
