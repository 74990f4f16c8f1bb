// Four rows of codes with 16 output channels in AVX2, which has no sum of four products that cannot saturate.
//
// What is wide are 16-bit numbers: sums of two products fit 32 bits whatever they are. Bytes are unsigned 8-bit codes
// with 8-bit weights of which no two neighbours add up to more than 128, so that sums of two fit 16 bits; each is
// widened. What is narrow are unsigned 8-bit codes with 4-bit weights: sums of two are 4080 at most, so eight of them
// fit 16 bits, and are widened by the product with the multiplier of their group. It is assembly because g++ 12 keeps
// moving the eight sums between registers.
#pragma once
#include <cstdint>

namespace dcomp::DCOMP_ISA {

constexpr int64_t kRowsOfProducts = 4;
constexpr int64_t kWordsOfRound = 4;  // of four bytes
constexpr int64_t kNarrowDepth = 32;  // channels between two widenings
constexpr int64_t kNarrowBytes = kNarrowDepth * 16 + 16 * 4;  // their codes, [8, 16, 4], and multipliers, int16 [16, 2]

// Rows 0 to 3 of an operand lie at `a`, each `stride` bytes behind the one before; weights are in registers 8 and 9.
#define DCOMP_ROW0(at) at "(%[a])"
#define DCOMP_ROW1(at) at "(%[a],%[stride])"
#define DCOMP_ROW2(at) at "(%[a],%[stride],2)"
#define DCOMP_ROW3(at) at "(%[a],%[stride3])"
#define DCOMP_MULTIPLY(multiply, row, low, high)     \
  "vpbroadcastd " row ", %%ymm10\n"                  \
  multiply " %%ymm8, %%ymm10, %%ymm" low "\n"        \
  multiply " %%ymm9, %%ymm10, %%ymm" high "\n"
#define DCOMP_ACCUMULATE(multiply, add, row, low, high) \
  DCOMP_MULTIPLY(multiply, row, "11", "10")             \
  add " %%ymm11, %%ymm" low ", %%ymm" low "\n"          \
  add " %%ymm10, %%ymm" high ", %%ymm" high "\n"
#define DCOMP_LOAD_SUMS                \
  "vmovdqa (%[sums]), %%ymm0\n"       \
  "vmovdqa 32(%[sums]), %%ymm1\n"     \
  "vmovdqa 64(%[sums]), %%ymm2\n"     \
  "vmovdqa 96(%[sums]), %%ymm3\n"     \
  "vmovdqa 128(%[sums]), %%ymm4\n"    \
  "vmovdqa 160(%[sums]), %%ymm5\n"    \
  "vmovdqa 192(%[sums]), %%ymm6\n"    \
  "vmovdqa 224(%[sums]), %%ymm7\n"
#define DCOMP_STORE_SUMS               \
  "vmovdqa %%ymm0, (%[sums])\n"       \
  "vmovdqa %%ymm1, 32(%[sums])\n"     \
  "vmovdqa %%ymm2, 64(%[sums])\n"     \
  "vmovdqa %%ymm3, 96(%[sums])\n"     \
  "vmovdqa %%ymm4, 128(%[sums])\n"    \
  "vmovdqa %%ymm5, 160(%[sums])\n"    \
  "vmovdqa %%ymm6, 192(%[sums])\n"    \
  "vmovdqa %%ymm7, 224(%[sums])\n"
#define DCOMP_WEIGHTS(low, high) "vmovdqa " low "(%[b]), %%ymm8\nvmovdqa " high "(%[b]), %%ymm9\n"
#define DCOMP_REGISTERS \
  "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "memory", "cc"

// sums[4][16] += a[4][2 * pairs] * b[pairs][16][2]
inline void multiply_wide(const int16_t* a, int64_t stride, const int16_t* b, int64_t pairs, int32_t* sums) {
#define DCOMP_WIDE(row, low, high) DCOMP_ACCUMULATE("vpmaddwd", "vpaddd", row, low, high)
  asm volatile(
      DCOMP_LOAD_SUMS
      ".p2align 5\n"
      "1:\n"
      DCOMP_WEIGHTS("", "32")
      DCOMP_WIDE(DCOMP_ROW0(""), "0", "1")
      DCOMP_WIDE(DCOMP_ROW1(""), "2", "3")
      DCOMP_WIDE(DCOMP_ROW2(""), "4", "5")
      DCOMP_WIDE(DCOMP_ROW3(""), "6", "7")
      "add $64, %[b]\n"
      "add $4, %[a]\n"
      "dec %[pairs]\n"
      "jnz 1b\n"
      DCOMP_STORE_SUMS
      : [a] "+r"(a), [b] "+r"(b), [pairs] "+r"(pairs)
      : [sums] "r"(sums), [stride] "r"(stride), [stride3] "r"(3 * stride)
      : DCOMP_REGISTERS);
#undef DCOMP_WIDE
}

// sums[4][16] += a[4][4 * words] * b[words][16][4], words in rounds of four
inline void multiply_bytes(const uint8_t* a, int64_t stride, const int8_t* b, int64_t rounds, int32_t* sums) {
#define DCOMP_BYTES(row, low, high)                    \
  DCOMP_MULTIPLY("vpmaddubsw", row, "11", "10")        \
  "vpmaddwd %%ymm12, %%ymm11, %%ymm11\n"               \
  "vpmaddwd %%ymm12, %%ymm10, %%ymm10\n"               \
  "vpaddd %%ymm11, %%ymm" low ", %%ymm" low "\n"       \
  "vpaddd %%ymm10, %%ymm" high ", %%ymm" high "\n"
#define DCOMP_WORD(at, low, high)          \
  DCOMP_WEIGHTS(low, high)                 \
  DCOMP_BYTES(DCOMP_ROW0(at), "0", "1")    \
  DCOMP_BYTES(DCOMP_ROW1(at), "2", "3")    \
  DCOMP_BYTES(DCOMP_ROW2(at), "4", "5")    \
  DCOMP_BYTES(DCOMP_ROW3(at), "6", "7")
  asm volatile(
      "vpcmpeqw %%ymm12, %%ymm12, %%ymm12\n"
      "vpabsw %%ymm12, %%ymm12\n"  // ones
      DCOMP_LOAD_SUMS
      ".p2align 5\n"
      "1:\n"
      DCOMP_WORD("", "", "32")
      DCOMP_WORD("4", "64", "96")
      DCOMP_WORD("8", "128", "160")
      DCOMP_WORD("12", "192", "224")
      "add $256, %[b]\n"
      "add $16, %[a]\n"
      "dec %[rounds]\n"
      "jnz 1b\n"
      DCOMP_STORE_SUMS
      : [a] "+r"(a), [b] "+r"(b), [rounds] "+r"(rounds)
      : [sums] "r"(sums), [stride] "r"(stride), [stride3] "r"(3 * stride)
      : DCOMP_REGISTERS, "ymm12");
#undef DCOMP_WORD
#undef DCOMP_BYTES
}

// sums[4][16] += a[4][32 * blocks] * b, whose blocks have `kNarrowBytes` each
inline void multiply_narrow(const uint8_t* a, int64_t stride, const int8_t* b, int64_t blocks, int32_t* sums) {
#define DCOMP_NARROW(row, low, high) DCOMP_ACCUMULATE("vpmaddubsw", "vpaddw", row, low, high)
#define DCOMP_WORD(at, low, high)           \
  DCOMP_WEIGHTS(low, high)                  \
  DCOMP_NARROW(DCOMP_ROW0(at), "0", "1")    \
  DCOMP_NARROW(DCOMP_ROW1(at), "2", "3")    \
  DCOMP_NARROW(DCOMP_ROW2(at), "4", "5")    \
  DCOMP_NARROW(DCOMP_ROW3(at), "6", "7")
#define DCOMP_WIDEN(sum, multiplier, at)                              \
  "vpmaddwd %%ymm" multiplier ", %%ymm" sum ", %%ymm" sum "\n"        \
  "vpaddd " at "(%[sums]), %%ymm" sum ", %%ymm" sum "\n"              \
  "vmovdqa %%ymm" sum ", " at "(%[sums])\n"
  asm volatile(
      ".p2align 5\n"
      "1:\n"
      DCOMP_WEIGHTS("", "32")
      DCOMP_MULTIPLY("vpmaddubsw", DCOMP_ROW0(""), "0", "1")
      DCOMP_MULTIPLY("vpmaddubsw", DCOMP_ROW1(""), "2", "3")
      DCOMP_MULTIPLY("vpmaddubsw", DCOMP_ROW2(""), "4", "5")
      DCOMP_MULTIPLY("vpmaddubsw", DCOMP_ROW3(""), "6", "7")
      DCOMP_WORD("4", "64", "96")
      DCOMP_WORD("8", "128", "160")
      DCOMP_WORD("12", "192", "224")
      DCOMP_WORD("16", "256", "288")
      DCOMP_WORD("20", "320", "352")
      DCOMP_WORD("24", "384", "416")
      DCOMP_WORD("28", "448", "480")
      DCOMP_WEIGHTS("512", "544")
      DCOMP_WIDEN("0", "8", "")
      DCOMP_WIDEN("1", "9", "32")
      DCOMP_WIDEN("2", "8", "64")
      DCOMP_WIDEN("3", "9", "96")
      DCOMP_WIDEN("4", "8", "128")
      DCOMP_WIDEN("5", "9", "160")
      DCOMP_WIDEN("6", "8", "192")
      DCOMP_WIDEN("7", "9", "224")
      "add $576, %[b]\n"
      "add $32, %[a]\n"
      "dec %[blocks]\n"
      "jnz 1b\n"
      : [a] "+r"(a), [b] "+r"(b), [blocks] "+r"(blocks)
      : [sums] "r"(sums), [stride] "r"(stride), [stride3] "r"(3 * stride)
      : DCOMP_REGISTERS);
#undef DCOMP_WIDEN
#undef DCOMP_WORD
#undef DCOMP_NARROW
}

#undef DCOMP_ROW0
#undef DCOMP_ROW1
#undef DCOMP_ROW2
#undef DCOMP_ROW3
#undef DCOMP_MULTIPLY
#undef DCOMP_ACCUMULATE
#undef DCOMP_LOAD_SUMS
#undef DCOMP_STORE_SUMS
#undef DCOMP_WEIGHTS
#undef DCOMP_REGISTERS

}  // namespace dcomp::DCOMP_ISA
