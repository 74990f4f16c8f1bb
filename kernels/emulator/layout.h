// Where the fields of each argument struct lie, as text, so that a test can compare them with their mirrors in Python.
#pragma once
#include <cstddef>
#include <string>

#include "../cuda/arguments.h"

// Applies WHAT(structure, field) to each field.
#define DCOMP_PARENTHESES ()
#define DCOMP_EXPAND(...) DCOMP_EXPAND_3(DCOMP_EXPAND_3(DCOMP_EXPAND_3(__VA_ARGS__)))
#define DCOMP_EXPAND_3(...) DCOMP_EXPAND_2(DCOMP_EXPAND_2(DCOMP_EXPAND_2(__VA_ARGS__)))
#define DCOMP_EXPAND_2(...) DCOMP_EXPAND_1(DCOMP_EXPAND_1(DCOMP_EXPAND_1(__VA_ARGS__)))
#define DCOMP_EXPAND_1(...) __VA_ARGS__
#define DCOMP_EACH(WHAT, structure, ...) __VA_OPT__(DCOMP_EXPAND(DCOMP_STEP(WHAT, structure, __VA_ARGS__)))
#define DCOMP_STEP(WHAT, structure, field, ...) \
  WHAT(structure, field) __VA_OPT__(DCOMP_AGAIN DCOMP_PARENTHESES(WHAT, structure, __VA_ARGS__))
#define DCOMP_AGAIN() DCOMP_STEP

namespace dcomp::emulator {

struct Place {
  const char *structure, *field;
  size_t bytes;  // from the beginning of the struct; of no field: its size
};

#define DCOMP_FIELD(structure, field) {#structure, #field, offsetof(structure, field)},
#define DCOMP_LAYOUT(structure, ...) \
  {#structure, "", sizeof(structure)}, DCOMP_EACH(DCOMP_FIELD, structure, __VA_ARGS__)

inline constexpr Place places[] = {
    DCOMP_LAYOUT(LinearArguments, x, weight, x_scale, weight_scale, bias, out, x_multipliers, weight_multipliers,
                 hidden, up, rows, outputs, depth, out_type, corrections, rank)
    DCOMP_LAYOUT(ConvArguments, x, padding, weight, weight_sum, x_scale, x_zero, weight_scale, bias, out, rows, outputs,
                 depth, out_type, height, width, channels, out_pixels, out_width, scale_rows, kernel_width, stride_y,
                 stride_x, padding_y, padding_x, dilation_y, dilation_x, channels_inverse, kernel_width_inverse)
    DCOMP_LAYOUT(QuantizeStaticArguments, x, codes, scale, zero, smooth, count, channels, x_type)
    DCOMP_LAYOUT(QuantizeSampleArguments, x, codes, scale, zero, smooth, ranges, count, channels, parts, x_type)
    DCOMP_LAYOUT(QuantizeTokenArguments, x, smooth, codes, scale, rows, channels, depth, x_type)
    DCOMP_LAYOUT(QuantizeGroupArguments, x, smooth, codes, scale, peaks, rows, channels, depth, group, parts, x_type)
    DCOMP_LAYOUT(QuantizeNibblesArguments, x, smooth, codes, multipliers, scale, rows, channels, depth, group, block,
                 x_type)
    DCOMP_LAYOUT(LowRankArguments, x, smooth, down, codes, scale, hidden, rows, channels, depth, group, rank, x_type)
    DCOMP_LAYOUT(UnpackArguments, qweight, multiplier, scale, out, rows, taps, channels, groups, group, out_type)
    DCOMP_LAYOUT(GroupNormArguments, x, weight, bias, moments, ranges, codes, scale, zero, pixels, channels, groups,
                 epsilon, silu, parts, x_type)
    DCOMP_LAYOUT(LayerNormArguments, x, weight, bias, gain, shift, codes, scale, rows, channels, depth, gain_rows,
                 epsilon, x_type)
    DCOMP_LAYOUT(KeyValueArguments, k, v, moments, tiles, v_scale, keys, heads, channels, width, parts, x_type)
    DCOMP_LAYOUT(AttentionArguments, q, q_scale, tiles, v_scale, out, queries, heads, channels, tile_count, out_type,
                 scale)
};

// Size of a struct, then name and offset of each of its fields; empty if there is none of this name.
inline std::string layout(const std::string& structure) {
  std::string text;
  for (const Place& place : places) {
    if (structure != place.structure) continue;
    if (*place.field) text += std::string(" ") + place.field + " ";
    text += std::to_string(place.bytes);
  }
  return text;
}

}  // namespace dcomp::emulator
