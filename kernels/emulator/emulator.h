// Runs CUDA kernels on the host, for tests: the parts, from the threads of a block up to what its warps do.
//
// Kernels reach shared and global memory and other lanes only through primitives, whose bodies for the host call this.
// So warps use the fragment layouts of the PTX ISA; bounds, alignment, races, divergence and reads of copies that
// nobody waited for are reported as text; and bank conflicts and sectors are counted. Not emulated: the order in which
// a real memory shows writes of one block to another, and time.
#pragma once
#include "machine.h"
#include "memory.h"
#include "warp.h"
