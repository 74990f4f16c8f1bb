#include "instruction_set.h"

#include <cstdlib>
#include <iterator>
#include <string>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dcomp {
namespace {

struct InstructionSet {
  const char* name;
  int64_t place;
  const Kernels& kernels;
  bool (*is_here)();
};

#ifdef DCOMP_HAS_AVX2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef DCOMP_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#ifdef DCOMP_HAS_AVX512BF16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef DCOMP_HAS_AMX
// Registers of tiles must be asked for, once for a process.
bool has_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool always() { return true; }

const InstructionSet kInstructionSets[] = {  // the best first; places are those of the names in `rows.py`
#ifdef DCOMP_HAS_AMX
    {"amx", 4, amx::kernels, has_amx},
#endif
#ifdef DCOMP_HAS_AVX512BF16
    {"avx512bf16", 3, avx512bf16::kernels, has_avx512bf16},
#endif
#ifdef DCOMP_HAS_AVX512
    {"avx512", 2, avx512::kernels, has_avx512},
#endif
#ifdef DCOMP_HAS_AVX2
    {"avx2", 1, avx2::kernels, has_avx2},
#endif
    {"generic", 0, generic::kernels, always},
};

const InstructionSet* best_instruction_set() {
  const char* named = std::getenv("DCOMP_INSTRUCTION_SET");
  bool allowed = named == nullptr;
  for (const InstructionSet& set : kInstructionSets) {
    allowed = allowed || std::string(named) == set.name;
    if (allowed && set.is_here()) return &set;
  }
  return std::end(kInstructionSets) - 1;
}

const InstructionSet& chosen() {
  static const InstructionSet* best = best_instruction_set();
  return *best;
}

// The best from the chosen one on that has attention; the least if none has.
const Attention& best_attention() {
  const InstructionSet* set = &chosen();
  while (set->place > 0 && !(set->kernels.attention.block && set->is_here())) ++set;
  return set->kernels.attention;
}

}  // namespace

const Kernels& kernels() { return chosen().kernels; }

const Attention& attention_kernels() {
  static const Attention& best = best_attention();
  return best;
}

int64_t instruction_set() { return chosen().place; }

}  // namespace dcomp
