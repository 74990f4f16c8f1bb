"""Bugs that are put into copies of the CUDA sources, to see that tests find them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A bug: what it is, the check that must find it, and the text that makes it."""

    bug: str
    check: str
    file: str
    old: str
    new: str


PRODUCTS, QUANTIZE, CODES, REDUCE = "products.cuh", "quantize.cuh", "codes.cuh", "reduce.cuh"
UNPACK, NORM, SMOOTH, LOW_RANK = "unpack.cuh", "norm_quantize.cuh", "smooth.cuh", "low_rank.cuh"
MUTATIONS = [
    Mutation("no barrier", "linear w8", PRODUCTS, "      barrier();  // all copies", "      // all copies"),
    Mutation("waits for a group too few", "linear w8", PRODUCTS, "wait<kStages - 2>", "wait<kStages - 1>"),
    Mutation(
        "a live stage overwritten",
        "linear w8",
        PRODUCTS,
        "shared + step % kStages * kStageBytes;\n        rows",
        "shared + step % (kStages - 1) * kStageBytes;\n        rows",
    ),
    Mutation(
        "a step left out", "linear w8", PRODUCTS, "load_stage(step + kStages - 1);", "load_stage(step + kStages);"
    ),
    Mutation("no swizzle", "linear w8", PRODUCTS, "((chunk ^ ((row >> 1) & 3)) << 4)", "(chunk << 4)"),
    Mutation("a poor swizzle", "linear w8", PRODUCTS, "((row >> 1) & 3)", "(row & 3)"),
    Mutation("rows not masked", "linear w8", PRODUCTS, "live[i] = m < a.rows;", "live[i] = true;"),
    Mutation("depth of rows not masked", "linear w8", PRODUCTS, "there = live[i] && k < a.depth;", "there = live[i];"),
    Mutation(
        "columns not masked", "linear w8", PRODUCTS, "there = n < a.outputs && k < a.depth;", "there = k < a.depth;"
    ),
    Mutation(
        "depth of the weight not masked",
        "linear w8",
        PRODUCTS,
        "there = n < a.outputs && k < a.depth;",
        "there = n < a.outputs;",
    ),
    Mutation(
        "matrices of x in another order",
        "linear w8",
        PRODUCTS,
        "lane % 16, half * 2 + lane / 16",
        "lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2",
    ),
    Mutation(
        "matrices of the weight in another order",
        "linear w8",
        PRODUCTS,
        "lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2",
        "lane % 16, half * 2 + lane / 16",
    ),
    Mutation(
        "a lane stays away",
        "linear w8",
        PRODUCTS,
        "        load_matrices(x[half][i],",
        "        if (lane < 31) load_matrices(x[half][i],",
    ),
    Mutation(
        "halves of x swapped",
        "linear w8",
        PRODUCTS,
        "multiply_add(sums[i][j + tile], x[0][i],",
        "multiply_add(sums[i][j + tile], x[1][i],",
    ),
    Mutation(
        "unsigned rows", "linear w8", PRODUCTS, "    multiply_add_s8(sums, x, w);", "    multiply_add_u8(sums, x, w);"
    ),
    Mutation(
        "outputs one column off",
        "linear w8",
        PRODUCTS,
        "column + tile * 8 + lane % 4 * 2;",
        "column + tile * 8 + lane % 4 * 2 + 2;",
    ),
    Mutation("rows of outputs not masked", "linear w8", PRODUCTS, "      if (m >= a.rows) continue;\n", ""),
    Mutation("columns of outputs not masked", "linear w8", PRODUCTS, "        if (n >= a.outputs) continue;\n", ""),
    Mutation("pairs of odd rows stored at once", "linear w8", PRODUCTS, "a.outputs % 2 == 0);", "true);"),
    Mutation(
        "scale of another row",
        "linear w8",
        PRODUCTS,
        "Rows::Output output(a, m);",
        "Rows::Output output(a, m + 1 < a.rows ? m + 1 : 0);",
    ),
    Mutation("no bias", "linear w8", PRODUCTS, "a.bias ? load_global(a.bias + n) : 0.0f", "0.0f"),
    Mutation("nibbles not masked", "linear channel", PRODUCTS, "(word << 4) & 0xF0F0F0F0u", "word << 4"),
    Mutation(
        "blocks of columns not masked", "linear channel", PRODUCTS, "there = part && n < a.outputs;", "there = part;"
    ),
    Mutation(
        "halves of fragments swapped",
        "linear channel",
        PRODUCTS,
        "codes.word[tile * 2 + half]",
        "codes.word[tile * 2 + 1 - half]",
    ),
    Mutation(
        "high nibbles not masked", "linear group", PRODUCTS, "((nibbles >> 4) & 0x0F0F0F0Fu) * m", "(nibbles >> 4) * m"
    ),
    Mutation(
        "one multiplier for both halves", "linear group", PRODUCTS, "multipliers >> (kHalf * 16)", "multipliers >> 0"
    ),
    Mutation(
        "multipliers of another column",
        "linear group",
        PRODUCTS,
        "kFragmentBytes + lane / 4 * 8",
        "kFragmentBytes + lane % 8 * 8",
    ),
    Mutation(
        "copies beyond the stage", "linear group", PRODUCTS, "part = kAll || chunk < kBytes / 16,", "part = true,"
    ),
    Mutation(
        "the sign not turned",
        "linear group",
        PRODUCTS,
        "to[0] = ((nibbles & 0x0F0F0F0Fu) * m + shift) ^ 0x80808080u;",
        "to[0] = (nibbles & 0x0F0F0F0Fu) * m + shift;",
    ),
    Mutation(
        "padding is 0",
        "conv w8",
        PRODUCTS,
        "copy_async16(to, from, there);",
        "copy_async16(to, from, there && inside);",
    ),
    Mutation(
        "the padding of the first sample", "conv w8", PRODUCTS, "padding[i] = pixel / a.scale_rows;", "padding[i] = 0;"
    ),
    Mutation(
        "height for width", "conv w8", PRODUCTS, "static_cast<uint32>(a.width);", "static_cast<uint32>(a.height);"
    ),
    Mutation(
        "no dilation along x",
        "conv w8",
        PRODUCTS,
        "(tap - tap_y * a.kernel_width) * a.dilation_x",
        "(tap - tap_y * a.kernel_width)",
    ),
    Mutation("no stride along y", "conv w8", PRODUCTS, "/ a.out_width) * a.stride_y", "/ a.out_width)"),
    Mutation(
        "signed pixels", "conv w8", PRODUCTS, "    multiply_add_u8(sums, x, w);", "    multiply_add_s8(sums, x, w);"
    ),
    Mutation("no zero", "conv w8", PRODUCTS, "return sum - zero * weight_sum;", "return sum;"),
    Mutation(
        "depth of pixels not masked",
        "conv group",
        PRODUCTS,
        "const bool there = k < a.depth;\n#pragma",
        "const bool there = true;\n#pragma",
    ),
    Mutation("zeros of rows beyond the last one", "conv group", PRODUCTS, "pixel = live ? m : 0,", "pixel = m,"),
    Mutation(
        "ties go down",
        "static",
        CODES,
        "round_to_even(multiply(x, inverse))",
        "round_down(add(multiply(x, inverse), 0.5f))",
    ),
    Mutation(
        "the zero before rounding",
        "static",
        CODES,
        "add(round_to_even(multiply(x, inverse)), zero)",
        "round_to_even(add(multiply(x, inverse), zero))",
    ),
    Mutation("fours beyond the end loaded", "static", CODES, "if (aligned && at + kFour <= end)", "if (aligned)"),
    Mutation("fours beyond the end stored", "static", CODES, "if (at + kFour <= end && ", "if ("),
    Mutation("rows of odd length loaded in fours", "token", CODES, "aligned(row % kFour == 0 && ", "aligned("),
    Mutation(
        "halves swapped", "static", CODES, "four.word[i / 2] >> (i % 2 * 16)", "four.word[i / 2] >> (16 - i % 2 * 16)"
    ),
    Mutation(
        "blocks overlap no more",
        "static",
        QUANTIZE,
        "stride_of_parts(gridDim.x);",
        "stride_of_parts(gridDim.x) * 2;",
    ),
    Mutation("NaN lost", "token", REDUCE, "a > b || a != a ? a : b", "a > b ? a : b"),
    Mutation("no barrier between warps", "sample", REDUCE, "  barrier();\n", ""),
    Mutation("a step of the reduction left out", "token", REDUCE, "mask > 0;", "mask > 1;"),
    Mutation(
        "only some parts of the range",
        "sample",
        QUANTIZE,
        "  DCOMP_DEVICE void load(const float* ranges, int parts) {\n",
        "  DCOMP_DEVICE void load(const float* ranges, int parts) {\n    parts = parts < 32 ? parts : 32;\n",
    ),
    Mutation(
        "a width that overflows",
        "sample",
        QUANTIZE,
        "add(divide(range.high, kSampleSteps), -divide(range.low, kSampleSteps))",
        "divide(add(range.high, -range.low), kSampleSteps)",
    ),
    Mutation(
        "0 outside the range",
        "sample",
        QUANTIZE,
        "float low = 0.0f, high = 0.0f;  // 0",
        "float low = 1e30f, high = -1e30f;  // 0",
    ),
    Mutation("warps beyond the rows", "token", QUANTIZE, "    if (row >= a.rows) return;  // a whole warp\n", ""),
    Mutation("a subnormal scale", "token", CODES, "return scale < kSmallestScale ? 1.0f : scale;", "return scale;"),
    Mutation("codes of -128", "token", CODES, "kTokenLimit = 127.0f", "kTokenLimit = 128.0f"),
    Mutation(
        "no padding of rows",
        "group",
        QUANTIZE,
        "at < depth; at += kWarpLanes) store_global(",
        "false; at += kWarpLanes) store_global(",
    ),
    Mutation("a group's reach forgotten", "group", QUANTIZE, "    step = multiply(step, kReach);\n", ""),
    Mutation("no slack of multipliers", "group", QUANTIZE, "add(divide(step, scale), -kSlack)", "divide(step, scale)"),
    Mutation(
        "multipliers that are not whole",
        "group",
        QUANTIZE,
        "round_down(divide(kTokenLimit, below > above ? below : above))",
        "divide(kTokenLimit, below > above ? below : above)",
    ),
    Mutation(
        "lanes of other groups",
        "group",
        QUANTIZE,
        "high = over_lanes<Larger>(high, width);",
        "high = over_lanes<Larger>(high);",
    ),
    Mutation(
        "only a block's rows",
        "group",
        QUANTIZE,
        "peak = over_block<Larger, kThreads>(peak, reinterpret_cast<float*>(shared_memory()));",
        "peak = over_lanes<Larger>(peak);",
    ),
    Mutation(
        "warps beyond the rows of groups",
        "group token",
        QUANTIZE,
        "    if (row >= a.rows) return;  // with all of its lanes\n",
        "",
    ),
    Mutation(
        "the scale of a lane's groups",
        "group token",
        QUANTIZE,
        "usable(over_lanes<Larger>(groups.peak()))",
        "usable(groups.peak())",
    ),
    Mutation(
        "the scale of the first row",
        "group token",
        QUANTIZE,
        "store_global(a.scale + row, scale);\n    groups",
        "store_global(a.scale, scale);\n    groups",
    ),
    Mutation("factors of the pixel before", "smooth", SMOOTH, "      channel += ahead;\n", ""),
    Mutation("all threads at the first channel", "smooth", SMOOTH, "static_cast<int>(first % channels)", "0"),
    Mutation("no factors of the next pixel", "smooth", SMOOTH, "      if (factors.aligned) {", "      if (true) {"),
    Mutation(
        "pixels of a channel", "smooth", SMOOTH, "while (c >= channels) c -= channels;", "if (c >= channels) c = 0;"
    ),
    Mutation(
        "groups of odd length smoothed in fours",
        "smooth",
        SMOOTH,
        "factors(smooth, 0, channels, row) {}",
        "factors(smooth, 0, channels, channels) {}",
    ),
    Mutation(
        "a range before smoothing",
        "smooth",
        QUANTIZE,
        "        smooth.apply(v);\n#pragma unroll\n        for (int i = 0; i < kFour; ++i) range.widen(v[i]);",
        "#pragma unroll\n        for (int i = 0; i < kFour; ++i) range.widen(v[i]);",
    ),
    Mutation("one value of tf32 for fp32", "low rank", LOW_RANK, "add_products(sums[i], rest, down, k);", ""),
    Mutation("more digits than tf32 has", "low rank", LOW_RANK, "to_bits(value) & 0xFFFFE000u", "to_bits(value)"),
    Mutation("no zeros beyond rows and ranks", "low rank", LOW_RANK, "row < rows ? channels : 0", "channels"),
    Mutation(
        "rows of the two halves swapped",
        "low rank",
        LOW_RANK,
        "{x[i][0][k], x[i][1][k], x[i][0][k + 1], x[i][1][k + 1]}",
        "{x[i][0][k], x[i][0][k + 1], x[i][1][k], x[i][1][k + 1]}",
    ),
    Mutation(
        "channels of the next product", "low rank", LOW_RANK, "to_bits(down[i][k + 1])", "to_bits(down[i][(k + 2) % 4])"
    ),
    Mutation("all warps at the same channels", "low rank", LOW_RANK, "int at = warp * 16;", "int at = 0;"),
    Mutation("one warp's sums", "low rank", LOW_RANK, "other < kQuantizeWarps", "other < 1"),
    Mutation("sums overwritten", "low rank", LOW_RANK, "barrier();  // all sums", "// all sums"),
    Mutation(
        "columns of the first block",
        "low rank",
        LOW_RANK,
        "const int column = first + i / 4",
        "const int column = i / 4",
    ),
    Mutation("rows beyond the last one", "low rank", LOW_RANK, "row < a.rows && column", "column"),
    Mutation("columns beyond the rank", "low rank", LOW_RANK, "row < a.rows && column < a.rank", "row < a.rows"),
    Mutation("nibbles swapped", "unpack", UNPACK, "((byte & 15) ^ 8)", "((byte >> 4) ^ 8)"),
    Mutation("multiplier of another group", "unpack", UNPACK, "channel / a.group)", "0)"),
    Mutation("scale of a tap", "unpack", UNPACK, "a.scale + row / a.taps", "a.scale + row"),
    Mutation("channels in the wrong pixel", "group norm", NORM, "          pixel += 1;\n", ""),
    Mutation(
        "no distances between parts",
        "group norm",
        NORM,
        "add(load_global(of_part), multiply(n, multiply(distance, distance)))",
        "load_global(of_part)",
    ),
    Mutation("statistics read too early", "group norm", NORM, "    barrier();\n", ""),
    Mutation(
        "parts of equal weight", "group norm", NORM, "multiply(n, mean); }), count);", "mean; }), to_float(a.parts));"
    ),
    Mutation("channels not carried on", "group norm", NORM, "      channel += ahead;\n", ""),
    Mutation("SiLU of the wrong sign", "group norm", NORM, "exponential(-y)", "exponential(y)"),
    Mutation(
        "all pixels in every part",
        "group norm",
        NORM,
        "first = part * size < a.pixels ? part * size : a.pixels;",
        "first = 0;",
    ),
    Mutation("padding in the variance", "layer norm", NORM, "if (at + i < channels) sum", "sum"),
    Mutation(
        "padding is normalized",
        "layer norm",
        NORM,
        "v[i] = at + i < channels ? multiply(add(v[i], -mean), inverse) : 0.0f;",
        "v[i] = multiply(add(v[i], -mean), inverse);",
    ),
    Mutation("gain without 1", "layer norm", NORM, "add(1.0f, other[i])", "other[i]"),
    Mutation("no epsilon", "layer norm", NORM, "add(variance, epsilon)", "variance"),
    Mutation("gain of the first sample", "layer norm", NORM, "static_cast<int64>(row / a.gain_rows) * channels", "0"),
]
