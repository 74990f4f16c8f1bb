// A stand-in for NVIDIA's driver: the functions that the launcher calls, on one device, which is the emulator.
//
// Kernels are those of cuda/kernels.cu, looked up by name whatever image is loaded, and run on host memory. Beside them
// are functions for tests, whose names begin with `emulator_`.
#include <map>

#include "../cuda/kernels.cu"
#include "layout.h"

namespace dcomp {
namespace {

enum Code { kSuccess = 0, kInvalidValue = 1, kNotFound = 500, kLaunchFailed = 719 };
enum Attribute { kMultiprocessors = 16, kMajor = 75, kMinor = 76, kSharedMemory = 97 };
constexpr int kDynamicSharedMemory = 8;
constexpr size_t kWithoutAsking = 48 << 10, kMostSharedMemory = 99 << 10;  // as on sm_86

struct Kernel {
  int threads;
  size_t shared_bytes;
  void (*run)(const void*);
  size_t allowed_bytes = kWithoutAsking;
};

template <class K>
void run(const void* arguments) {
  K::run(*static_cast<const typename K::Arguments*>(arguments));
}

#define DCOMP_ROW(name, ...) {#name, {__VA_ARGS__::kThreads, __VA_ARGS__::kSharedBytes, run<__VA_ARGS__>}},
std::map<std::string, Kernel> kernels{DCOMP_ENTRIES(DCOMP_ROW)};

std::string error;

int refuse(int code, const std::string& why) {
  error = why;
  return code;
}

}  // namespace
}  // namespace dcomp

using namespace dcomp;

extern "C" {

int cuInit(unsigned) { return kSuccess; }

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

int cuDeviceGetCount(int* count) {
  *count = 1;
  return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? kSuccess : refuse(kInvalidValue, "there is one emulated device");
}

int cuDeviceGetName(char* name, int length, int) {
  strncpy(name, "emulator", length);
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case kMultiprocessors: *value = 4; return kSuccess;
    case kMajor: *value = 8; return kSuccess;
    case kMinor: *value = 6; return kSuccess;
    case kSharedMemory: *value = kMostSharedMemory; return kSuccess;
    default: return refuse(kInvalidValue, "the emulated device has no such attribute");
  }
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &kernels;
  return kSuccess;
}

int cuCtxPushCurrent_v2(void*) { return kSuccess; }
int cuCtxPopCurrent_v2(void**) { return kSuccess; }

int cuModuleLoadData(void** module, const void*) {
  *module = &kernels;
  return kSuccess;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
  const auto found = kernels.find(name);
  if (found == kernels.end()) return refuse(kNotFound, std::string("there is no kernel ") + name);
  *function = &found->second;
  return kSuccess;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != kDynamicSharedMemory || value < 0 || value > static_cast<int>(kMostSharedMemory)) {
    return refuse(kInvalidValue, "the emulated device takes no such attribute of a kernel");
  }
  static_cast<Kernel*>(function)->allowed_bytes = value;
  return kSuccess;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void*, void** parameters, void**) {
  const Kernel& kernel = *static_cast<const Kernel*>(function);
  const emulator::Position grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
  if (!grid.count() || grid_y > 65535 || grid_z > 65535) return refuse(kInvalidValue, "no grid of a launch");
  if (static_cast<int>(block_x) != kernel.threads || block_y != 1 || block_z != 1) {
    return refuse(kInvalidValue, "the kernel has blocks of " + std::to_string(kernel.threads) + " threads");
  }
  if (shared_bytes != kernel.shared_bytes) {
    return refuse(kInvalidValue, "the kernel takes " + std::to_string(kernel.shared_bytes) + " bytes of shared memory");
  }
  if (shared_bytes > kernel.allowed_bytes) return refuse(kInvalidValue, "so much shared memory was not asked for");
  try {
    emulator::launch(grid, block, shared_bytes, kernel.run, parameters[0]);
  } catch (const emulator::Failure& failure) {
    emulator::machine.current = -1;
    return refuse(kLaunchFailed, failure.what());
  }
  return kSuccess;
}

// The text of the last refusal, whatever the code.
int cuGetErrorString(int, const char** text) {
  *text = error.c_str();
  return kSuccess;
}

const char* emulator_error() { return error.c_str(); }

// Kernels may touch this global memory, and what else was allowed, and no other.
void emulator_allow(const void* p, size_t bytes) {
  emulator::buffers.push_back({reinterpret_cast<uintptr_t>(p), bytes});
}

// Kernels may touch all global memory again.
void emulator_forget() { emulator::buffers.clear(); }

// The order of warps; 0 is that of their numbers.
void emulator_seed(unsigned seed) { emulator::machine.seed = seed; }

// Writes what `emulator_count_names` names, since the last call.
void emulator_counts(uint64_t* counts) {
  memcpy(counts, &emulator::machine.counts, sizeof emulator::machine.counts);
  emulator::machine.counts = {};
}

const char* emulator_count_names() {
  return "launches blocks barriers products matrix_loads copies shuffles shared_accesses wavefronts ideal_wavefronts "
         "sectors copied_bytes";
}

// Size of an argument struct, then name and offset of each field; null if there is none of this name.
const char* emulator_layout(const char* structure) {
  static std::string text;
  text = emulator::layout(structure);
  return text.empty() ? nullptr : text.c_str();
}

}  // extern "C"
