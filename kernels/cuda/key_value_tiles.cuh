// Keys and values of attention, laid out for it once: tiles of 64 tokens that lanes read 16 bytes at a time.
//
// Keys lose their mean over tokens, which moves all scores of a query alike and so leaves the softmax as it is; then a
// token has int8 codes and a scale of its own (Zhang et al. 2024, SageAttention, sections 3 and 4). Values become
// float16 over a power of two for each channel of a head. `pack_tiles` of packing.py defines the bytes.
#pragma once
#include "quantize.cuh"

namespace dcomp {

constexpr int kTileKeys = 64;
constexpr int kWidestHead = 160;
constexpr int kPairBytes = 8;  // of a key: scale and offset
// A sum of products is added to these bits of 1.5 * 2^23, and so is a float already: exact up to 2^22 in magnitude.
constexpr int kSumBits = 0x4B400000;
constexpr float kSumBias = 12582912.0f;

// Bytes of a tile for heads of `width` channels, padded to 16: codes padded to 32 channels, pairs, values.
constexpr DCOMP_DEVICE int depth_of(int width) { return (width + 31) / 32 * 32; }
constexpr DCOMP_DEVICE int pairs_at(int width) { return kTileKeys * depth_of(width); }
constexpr DCOMP_DEVICE int values_at(int width) { return pairs_at(width) + kTileKeys * kPairBytes; }
constexpr DCOMP_DEVICE int tile_bytes(int width) { return values_at(width) + kTileKeys * width * 2; }

// The mean of keys and the largest magnitude of values, of each channel in the tokens of a part.
struct KeyValueMoments : QuantizeKernel<KeyValueArguments, 2 * kQuantizeThreads> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    const int groups = kThreads / a.channels, group = threadIdx.x / a.channels, channel = threadIdx.x % a.channels;
    const int size = (a.keys + a.parts - 1) / a.parts, first = blockIdx.x * size;
    const int end = first + size < a.keys ? first + size : a.keys;
    const int64 stride = static_cast<int64>(a.heads) * a.channels;
    const int64 origin = blockIdx.y / a.heads * a.keys * stride + blockIdx.y % a.heads * a.channels + channel;
    const float share = divide(1.0f, to_float(a.keys));  // each term takes its share: sums of finite keys stay finite
    float mean = 0.0f, peak = 0.0f;
    with_type(a.x_type, [&](auto type) {
      using Type = decltype(type);
      const auto* const k = static_cast<const typename Type::Stored*>(a.k);
      const auto* const v = static_cast<const typename Type::Stored*>(a.v);
      for (int token = group < groups ? first + group : end; token < end; token += groups) {
        const int64 at = origin + token * stride;
        mean = add(mean, multiply(Type::widen(load_global(k + at)), share));
        peak = Larger::of(magnitude(Type::widen(load_global(v + at))), peak);
      }
    });
    float* const means = reinterpret_cast<float*>(shared_memory());
    float* const peaks = means + kThreads;
    store_shared(means + threadIdx.x, mean);
    store_shared(peaks + threadIdx.x, peak);
    barrier();
    for (int other = 1; other < groups; ++other) {
      const int at = other * a.channels + static_cast<int>(threadIdx.x);
      mean = add(mean, load_shared(means + (at < kThreads ? at : 0)));
      peak = Larger::of(load_shared(peaks + (at < kThreads ? at : 0)), peak);
    }
    if (static_cast<int>(threadIdx.x) < a.channels) {
      float* const to = a.moments + (static_cast<int64>(blockIdx.y) * a.parts + blockIdx.x) * 2 * a.channels;
      store_global(to + channel, mean);
      store_global(to + a.channels + channel, peak);
    }
  }

  static DCOMP_DEVICE float magnitude(float value) { return value < 0.0f ? -value : value; }
};

struct KeyValueTiles : QuantizeKernel<KeyValueArguments, 2 * kQuantizeThreads> {
  static DCOMP_DEVICE void run(const Arguments& a) {
    float* const means = reinterpret_cast<float*>(shared_memory());
    float* const inverses = means + kThreads;  // of the scales of values
    combine(a, means, inverses);
    barrier();
    uint8* const tile = a.tiles + (static_cast<int64>(blockIdx.y) * gridDim.x + blockIdx.x) * tile_bytes(a.width);
    with_type(a.x_type, [&](auto type) {
      pack_keys<decltype(type)>(a, tile, means);
      pack_values<decltype(type)>(a, tile + values_at(a.width), inverses);
    });
  }

  // From those of all parts, a thread for each channel; 0 and 1 beyond the channels.
  static DCOMP_DEVICE void combine(const Arguments& a, float* means, float* inverses) {
    const int channel = threadIdx.x;
    float mean = 0.0f, peak = 0.0f;
    for (int part = 0; channel < a.channels && part < a.parts; ++part) {
      const float* const of_part = a.moments + (static_cast<int64>(blockIdx.y) * a.parts + part) * 2 * a.channels;
      mean = add(mean, load_global(of_part + channel));
      peak = Larger::of(load_global(of_part + a.channels + channel), peak);
    }
    const float scale = usable(from_bits(to_bits(peak) & 0x7F800000u));  // a power of two; infinite for NaN
    store_shared(means + channel, mean);
    store_shared(inverses + channel, divide(1.0f, scale));
    if (blockIdx.x == 0 && channel < a.width) {
      store_global(a.v_scale + static_cast<int64>(blockIdx.y) * a.width + channel, scale);
    }
  }

  // The channels of a token of this block's head.
  template <class Type>
  static DCOMP_DEVICE Floats<Type> channels_of(const Arguments& a, const void* x, int token) {
    const int64 row = (static_cast<int64>(blockIdx.y / a.heads) * a.keys + token) * a.heads + blockIdx.y % a.heads;
    return Floats<Type>(x, row * a.channels, a.channels, a.channels);
  }

  // A warp takes a token at a time.
  template <class Type>
  static DCOMP_DEVICE void pack_keys(const Arguments& a, uint8* tile, const float* means) {
    constexpr int kPieces = (kWidestHead + kWarpLanes * kFour - 1) / (kWarpLanes * kFour);
    const int lane = threadIdx.x % kWarpLanes, depth = depth_of(a.width);
    Words<4> mean[kPieces];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      mean[piece] = load_shared16(reinterpret_cast<const uint8*>(means + (piece * kWarpLanes + lane) * kFour));
    }
    for (int key = threadIdx.x / kWarpLanes; key < kTileKeys; key += kQuantizeWarps) {
      const int token = blockIdx.x * kTileKeys + key;
      const bool live = token < a.keys;
      const Floats<Type> x = channels_of<Type>(a, a.k, live ? token : 0);
      float v[kPieces][kFour], peak = 0.0f;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int at = (piece * kWarpLanes + lane) * kFour;
        x.load(v[piece], at, live ? a.channels : 0);
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          v[piece][i] = live ? add(v[piece][i], -from_bits(mean[piece].word[i])) : 0.0f;
          peak = Larger::of(KeyValueMoments::magnitude(v[piece][i]), peak);
        }
      }
      // Two digits less, so that the product with the bias of sums is exact.
      const float scale = from_bits(to_bits(token_scale(over_lanes<Larger>(peak))) & ~3u);
      const float inverse = divide(1.0f, scale);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int at = (piece * kWarpLanes + lane) * kFour;
        uint32 word = 0;
#pragma unroll
        for (int i = 0; i < kFour; ++i) {
          word |= (code(v[piece][i], inverse, 0.0f, -kTokenLimit, kTokenLimit) & 0xFFu) << (i * 8);
        }
        if (at < depth) store_global(reinterpret_cast<uint32*>(tile + code_at(key, at, depth)), word);
      }
      if (lane == 0) {  // a key that is not there has the score -infinity
        const float factor = live ? scale : 0.0f;
        const float offset = live ? multiply(-kSumBias, scale) : from_bits(0xFF800000u);
        const Words<2> pair{{to_bits(factor), to_bits(offset)}};
        store_global(reinterpret_cast<Words<2>*>(tile + pairs_at(a.width) + key * kPairBytes), pair);
      }
    }
  }

  // Where the codes of four channels lie: the operand of a product is 32 channels of 8 keys, and 16 keys lie together.
  static DCOMP_DEVICE int code_at(int key, int channel, int depth) {
    const int block = key / 16 * (depth / 32) + channel / 32, lane = key % 8 * 4 + channel % 16 / 4;
    return (block * kWarpLanes + lane) * 16 + (key % 16 / 8 * 2 + channel % 32 / 16) * 4;
  }

  // A thread makes the 16 bytes of a lane: 16 keys of two channels are four lanes.
  template <class Type>
  static DCOMP_DEVICE void pack_values(const Arguments& a, uint8* to, const float* inverses) {
    const int lane = threadIdx.x % kWarpLanes, across = a.width / 16;
    for (int block = threadIdx.x / kWarpLanes; block < kTileKeys / 16 * across; block += kQuantizeWarps) {
      const int first = blockIdx.x * kTileKeys + block / across * 16 + lane % 4 * 2;
      const int channel = block % across * 16 + lane / 4;
      const float inverse[2] = {load_shared(inverses + channel), load_shared(inverses + channel + 8)};
      Words<4> words;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = first + i % 2 * 8 + j, c = channel + i / 2 * 8;
          const bool live = token < a.keys && c < a.channels;
          const Floats<Type> x = channels_of<Type>(a, a.v, live ? token : 0);
          pair[j] = live ? multiply(Type::widen(load_global(x.values + c)), inverse[i / 2]) : 0.0f;
        }
        words.word[i] = to_float16s(pair[0], pair[1]);
      }
      store_global(reinterpret_cast<Words<4>*>(to + (block * kWarpLanes + lane) * 16), words);
    }
  }
};

}  // namespace dcomp
