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
UNPACK, NORM, SMOOTH = "unpack.cuh", "norm_quantize.cuh", "smooth.cuh"
ATTENTION, TILES = "attention.cuh", "key_value_tiles.cuh"
NIBBLES, QUANTIZE_NIBBLES, LOW_RANK = "nibble_products.cuh", "quantize_nibbles.cuh", "low_rank.cuh"
QUANTIZE_LOW_RANK = "quantize_low_rank.cuh"
FLOAT_TYPES = "float_types.cuh"
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
        "    load_matrices(x, stage",
        "    if (lane < 31) load_matrices(x, stage",
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
        "no barrier between stages of nibbles",
        "nibbles 64",
        NIBBLES,
        "      barrier();  // all copies",
        "      // all copies",
    ),
    Mutation("nibbles not waited for", "nibbles 64", NIBBLES, "wait<kStages - 2>", "wait<kStages - 1>"),
    Mutation(
        "a step of nibbles left out",
        "nibbles 64",
        NIBBLES,
        "load_stage(step + kStages - 1);",
        "load_stage(step + kStages);",
    ),
    Mutation("upper parts of corrections count too little", "nibbles 64", NIBBLES, "high[k] * 128", "high[k] * 64"),
    Mutation(
        "a stage of corrections taken for codes",
        "nibbles 64",
        NIBBLES,
        "step < a.corrections;",
        "step + 1 < a.corrections;",
    ),
    Mutation(
        "multipliers of the stage before", "nibbles 64", NIBBLES, "step - a.corrections);", "step - a.corrections - 1);"
    ),
    Mutation(
        "multipliers of other rows", "nibbles 64", NIBBLES, "half * 8 + lane / 4) * 4", "half * 8 + lane % 8) * 4"
    ),
    Mutation(
        "multipliers of other pairs of columns",
        "nibbles 64",
        NIBBLES,
        "(column + j * 8) / 2 + lane % 4",
        "(column + j * 8) / 2 + lane / 8",
    ),
    Mutation(
        "multipliers beyond the last row read", "nibbles 64", NIBBLES, "there = part && at < stride;", "there = part;"
    ),
    Mutation("the multiplier of the first column for both", "nibbles 64", NIBBLES, "dot_high(lower", "dot_low(lower"),
    Mutation(
        "sums of blocks swapped",
        "nibbles 64",
        NIBBLES,
        "lower_halves(block[0][half * 2], block[1][half * 2])",
        "lower_halves(block[1][half * 2], block[0][half * 2])",
    ),
    Mutation(
        "one multiplier of rows for both blocks",
        "nibbles 64",
        NIBBLES,
        "word >> (pair * 16 + kBlock / 4) & 0xFF",
        "word >> (pair * 16) & 0xFF",
    ),
    Mutation(
        "multipliers of the first blocks alone",
        "nibbles 32",
        NIBBLES,
        "columns * kPairBytes + pair * 8",
        "columns * kPairBytes",
    ),
    Mutation(
        "codes of the first half alone",
        "nibbles 32",
        NIBBLES,
        "stage, row + i * 16, pair + half, lane);",
        "stage, row + i * 16, half, lane);",
    ),
    Mutation(
        "registers of rows in another order",
        "nibbles 32",
        NIBBLES,
        "{x[0][block * 2], x[0][block * 2 + 1]}",
        "{x[0][block], x[0][block + 2]}",
    ),
    Mutation("nibbles in the wrong order", "quantize nibbles", QUANTIZE_NIBBLES, "<< (4 * i)", "<< (12 - 4 * i)"),
    Mutation(
        "codes without their zero",
        "quantize nibbles",
        QUANTIZE_NIBBLES,
        "GroupGrid::kSteps - grid.below) + zero",
        "GroupGrid::kSteps - grid.below)",
    ),
    Mutation("codes beyond the channels", "quantize nibbles", QUANTIZE_NIBBLES, " || at + i >= end", ""),
    Mutation(
        "a sum over other blocks",
        "quantize nibbles",
        QUANTIZE_NIBBLES,
        "to_float(sum), a.block / kFour)",
        "to_float(sum))",
    ),
    Mutation(
        "the scale of a lane",
        "quantize nibbles",
        QUANTIZE_NIBBLES,
        "usable(over_lanes<Larger>(groups.peak()))",
        "usable(groups.peak())",
    ),
    Mutation("a lower part of eight bits", "quantize nibbles", QUANTIZE_NIBBLES, "(sum & 127)", "(sum & 255)"),
    Mutation(
        "corrections in the first stage alone",
        "quantize nibbles",
        QUANTIZE_NIBBLES,
        "block / kCorrections * kStageBytes",
        "0",
    ),
    Mutation(
        "corrections of no block left as they were",
        "quantize nibbles",
        QUANTIZE_NIBBLES,
        "int block = blocks + lane;",
        "int block = blocks + 1 + lane;",
    ),
    Mutation(
        "multipliers of another stage",
        "quantize nibbles",
        QUANTIZE_NIBBLES,
        "static_cast<int64>(unit / kUnitsOfStage) *",
        "static_cast<int64>(0) *",
    ),
    Mutation(
        "half of the digits of a branch",
        "low rank",
        LOW_RANK,
        "          multiply_add_tf32(values[i][j], lower, up[j]);\n",
        "",
    ),
    Mutation(
        "digits that tf32 has not", "low rank", LOW_RANK, "uint32 bits = to_tf32(value);", "uint32 bits = both.word[t];"
    ),
    Mutation("every other rank", "low rank", LOW_RANK, "k < a.rank; k += kDepth", "k < a.rank; k += 2 * kDepth"),
    Mutation("up of other columns", "low rank", LOW_RANK, "column + j * 8 + lane / 4", "column + j * 8 + lane % 8"),
    Mutation("hidden of rows beyond the last", "low rank", LOW_RANK, "(m < a.rows ? m : 0)", "(m)"),
    Mutation("up of columns beyond the last", "low rank", LOW_RANK, "(n < a.outputs ? n : 0)", "(n)"),
    Mutation(
        "halves of rows swapped", "low rank", LOW_RANK, "upper[t * 2 + half] = bits;", "upper[t * 2 + 1 - half] = bits;"
    ),
    Mutation(
        "a branch without what it is added to", "low rank", PRODUCTS, "columns[j][k].scaled(output, pair[k])", "0.0f"
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
    Mutation(
        "one value of tf32 for fp32",
        "quantize low rank",
        QUANTIZE_LOW_RANK,
        "add_products(sums[i], rest, down, k);",
        "",
    ),
    Mutation(
        "more digits than tf32 has",
        "quantize low rank",
        FLOAT_TYPES,
        "to_bits(value) & 0xFFFFE000u",
        "to_bits(value)",
    ),
    Mutation(
        "no zeros beyond rows and ranks",
        "quantize low rank",
        QUANTIZE_LOW_RANK,
        "row < rows ? channels : 0",
        "channels",
    ),
    Mutation(
        "rows of the two halves swapped",
        "quantize low rank",
        QUANTIZE_LOW_RANK,
        "{x[i][0][k], x[i][1][k], x[i][0][k + 1], x[i][1][k + 1]}",
        "{x[i][0][k], x[i][0][k + 1], x[i][1][k], x[i][1][k + 1]}",
    ),
    Mutation(
        "channels of the next product",
        "quantize low rank",
        QUANTIZE_LOW_RANK,
        "to_bits(down[i][k + 1])",
        "to_bits(down[i][(k + 2) % 4])",
    ),
    Mutation(
        "all warps at the same channels", "quantize low rank", QUANTIZE_LOW_RANK, "int at = warp * 16;", "int at = 0;"
    ),
    Mutation("one warp's sums", "quantize low rank", QUANTIZE_LOW_RANK, "other < kQuantizeWarps", "other < 1"),
    Mutation("sums overwritten", "quantize low rank", QUANTIZE_LOW_RANK, "barrier();  // all sums", "// all sums"),
    Mutation(
        "columns of the first block",
        "quantize low rank",
        QUANTIZE_LOW_RANK,
        "const int column = first + i / 4",
        "const int column = i / 4",
    ),
    Mutation("rows beyond the last one", "quantize low rank", QUANTIZE_LOW_RANK, "row < a.rows && column", "column"),
    Mutation(
        "columns beyond the rank",
        "quantize low rank",
        QUANTIZE_LOW_RANK,
        "row < a.rows && column < a.rank",
        "row < a.rows",
    ),
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
    Mutation(
        "no barrier between tiles", "attention", ATTENTION, "      barrier();  // all copies", "      // all copies"
    ),
    Mutation("a tile that is not waited for", "attention", ATTENTION, "copy_async_wait<0>", "copy_async_wait<1>"),
    Mutation(
        "the running sum not rescaled", "attention", ATTENTION, "multiply(rows.total[half], less)", "rows.total[half]"
    ),
    Mutation(
        "the running values not rescaled",
        "attention",
        ATTENTION,
        "tile[half * 2] = multiply(tile[half * 2], less);",
        "",
    ),
    Mutation(
        "a maximum of half of the lanes", "attention", ATTENTION, "maximum(shuffle_xor(highest, 2), highest)", "highest"
    ),
    Mutation(
        "no running maximum",
        "attention",
        ATTENTION,
        "float highest = rows.highest[half];",
        "float highest = Rows::kLowest();",
    ),
    Mutation(
        "scales of the keys before", "attention", ATTENTION, "((j + t) * 8 + lane % 4 * 2)", "((j + t) * 8 + lane % 4)"
    ),
    Mutation("sums that begin at another bias", "attention", TILES, "kSumBits = 0x4B400000;", "kSumBits = 0x4B000000;"),
    Mutation(
        "a scale of another query",
        "attention",
        ATTENTION,
        "load_global(a.q_scale + row)",
        "load_global(a.q_scale + row - row % 2)",
    ),
    Mutation(
        "queries beyond the last one",
        "attention",
        ATTENTION,
        "query + half * 8 < a.queries ? query + half * 8 : a.queries - 1",
        "query + half * 8",
    ),
    Mutation(
        "rows beyond the last one stored", "attention", ATTENTION, "      if (there >= a.queries) continue;\n", ""
    ),
    Mutation("halves of a query's depth swapped", "attention", ATTENTION, "q[step][half + 2] =", "q[step][half] ="),
    Mutation(
        "probabilities transposed",
        "attention",
        ATTENTION,
        "p[i][j * 2 + r / 2] + r % 2 * 2",
        "p[i][j * 2 + r % 2] + r / 2 * 2",
    ),
    Mutation("the other stage", "attention", ATTENTION, "shared + step % kStages * kTileBytes;\n", "shared;\n"),
    Mutation("copies beyond the tile", "attention", ATTENTION, "|| chunk < kCopies;", "|| true;"),
    Mutation(
        "no mask of keys",
        "tiles",
        TILES,
        "live ? multiply(-kSumBias, scale) : from_bits(0xFF800000u)",
        "multiply(-kSumBias, scale)",
    ),
    Mutation("values beyond the last one", "tiles", TILES, "token < a.keys && c < a.channels;", "c < a.channels;"),
    Mutation(
        "the mean not taken off", "tiles", TILES, "add(v[piece][i], -from_bits(mean[piece].word[i]))", "v[piece][i]"
    ),
    Mutation("scales with all digits", "tiles", TILES, "& ~3u);", "& ~0u);"),
    Mutation(
        "keys in another order",
        "tiles",
        TILES,
        "(key % 16 / 8 * 2 + channel % 32 / 16) * 4",
        "(key % 16 / 8 + channel % 32 / 16 * 2) * 4",
    ),
    Mutation(
        "values not transposed",
        "tiles",
        TILES,
        "first + i % 2 * 8 + j, c = channel + i / 2 * 8;",
        "first + i / 2 * 8 + j, c = channel + i % 2 * 8;",
    ),
    Mutation(
        "moments read too early",
        "tiles",
        TILES,
        "    combine(a, means, inverses);\n    barrier();\n",
        "    combine(a, means, inverses);\n",
    ),
    Mutation("moments of some threads alone", "tiles", TILES, "other < groups; ++other", "other + 1 < groups; ++other"),
    Mutation(
        "a scale of values that is no power of two", "tiles", TILES, "from_bits(to_bits(peak) & 0x7F800000u)", "peak"
    ),
]
