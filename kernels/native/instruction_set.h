// Which kernels run in this process.
#pragma once
#include "kernels.h"

namespace dcomp {

// Those of the best instruction set of this processor, or of the best from the one on that DCOMP_INSTRUCTION_SET names.
const Kernels& kernels();

// Of attention, which AVX-512 without bfloat16 leaves to AVX2; without `block` there are none.
const Attention& attention_kernels();

// The place of that instruction set, counted from the least.
int64_t instruction_set();

}  // namespace dcomp
