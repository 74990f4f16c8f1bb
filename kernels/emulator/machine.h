// A block of CUDA threads on the host: a fiber for each thread, warps run in an order that a seed shuffles.
//
// A thread runs until it meets something that its warp or its block does together. A warp's operation happens once all
// of its 32 lanes are there; lanes that wait at different ones have diverged, which is a failure.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace dcomp::emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;  // bytes of a fiber

struct Position {
  unsigned x = 0, y = 0, z = 0;
  unsigned count() const { return x * y * z; }
};

// Sums over all launches since they were last read; names are in driver.cpp.
struct Counts {
  uint64_t launches, blocks, barriers;
  uint64_t products, matrix_loads, copies, shuffles, shared_accesses;
  uint64_t wavefronts, ideal_wavefronts;  // of shared memory: more than ideal are bank conflicts
  uint64_t sectors, copied_bytes;         // 32 bytes each, of asynchronous copies from global memory
};

enum class Operation {
  kNone,
  kMultiplyAddS8,
  kMultiplyAddU8,
  kMultiplyAddTf32,
  kLoadMatrices,
  kLoadShared,
  kStoreShared,
  kCopy,
  kShuffle,
};
enum class State { kReady, kAtOperation, kAtBarrier, kDone };

// What a lane brings to an operation of its warp, and what it takes away.
struct Operands {
  uint32_t in[10], out[4];
  uint8_t* shared;
  const void* global;
  int bytes;
  bool live, part;
};

struct Copy {
  uint8_t* to;
  const void* from;  // null: zeros
};

struct Thread {
  ucontext_t boot;
  jmp_buf context;
  bool is_started;
  State state;
  Operation operation;
  Operands operands;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is still open
};

// Who touched four bytes of shared memory last, and in which stretch between two barriers.
struct Shadow {
  int writer, write_stretch;
  int reader, read_stretch;
  int pending;  // copies that nobody has waited for
};

struct Machine {
  Position grid, block, block_index, thread_index;
  void (*body)(const void*);
  const void* arguments;
  std::vector<Thread> threads;
  std::unique_ptr<char[]> stacks;
  std::vector<uint8_t> memory;  // 128 bytes more than `shared_bytes`, to align it
  uint8_t* shared;
  size_t shared_bytes;
  std::vector<Shadow> shadow;
  int stretch;  // barriers passed
  jmp_buf scheduler;
  int current = -1;  // the thread that runs, -1 in the scheduler
  std::string failure;
  unsigned seed = 0;
  Counts counts{};
};
inline Machine machine;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string place() {
  const Position& b = machine.block_index;
  std::string text = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ")";
  return machine.current < 0 ? text : text + ", thread " + std::to_string(machine.current);
}

// Ends the launch. An exception may not leave a fiber's stack, so a fiber hands the text to the scheduler.
[[noreturn]] inline void fail(const std::string& why) {
  const std::string text = why + ", " + place();
  if (machine.current < 0) throw Failure(text);
  machine.failure = text;
  _longjmp(machine.scheduler, 1);
}

inline void leave(State state) {
  Thread& thread = machine.threads[machine.current];
  thread.state = state;
  if (!_setjmp(thread.context)) _longjmp(machine.scheduler, 1);
}

inline Operands& operands() { return machine.threads[machine.current].operands; }

// Waits until the warp has done `operation`.
inline Operands& together(Operation operation) {
  Thread& thread = machine.threads[machine.current];
  thread.operation = operation;
  leave(State::kAtOperation);
  return thread.operands;
}

inline void start_fiber() {
  machine.body(machine.arguments);
  machine.threads[machine.current].state = State::kDone;
  _longjmp(machine.scheduler, 1);
}

inline void resume(int id) {
  Thread& thread = machine.threads[id];
  const unsigned across = machine.block.x, plane = across * machine.block.y;
  machine.thread_index = {id % across, id % plane / across, id / plane};
  machine.current = id;
  if (!_setjmp(machine.scheduler)) {
    if (thread.is_started) _longjmp(thread.context, 1);
    thread.is_started = true;
    getcontext(&thread.boot);
    thread.boot.uc_stack.ss_sp = machine.stacks.get() + id * kStack;
    thread.boot.uc_stack.ss_size = kStack;
    thread.boot.uc_link = nullptr;
    makecontext(&thread.boot, start_fiber, 0);
    setcontext(&thread.boot);
  }
  machine.current = -1;
  if (!machine.failure.empty()) throw Failure(machine.failure);
}

void run_operation(int warp);  // warp.h

inline int count_lanes(int warp, State state) {
  const auto first = machine.threads.begin() + warp * kWarp;
  return std::count_if(first, first + kWarp, [&](const Thread& t) { return t.state == state; });
}

// Runs a warp until its threads are at a barrier or done.
inline void run_warp(int warp) {
  for (;;) {
    for (int id = warp * kWarp; id < (warp + 1) * kWarp; ++id) {
      if (machine.threads[id].state == State::kReady) resume(id);
    }
    const int waiting = count_lanes(warp, State::kAtOperation);
    if (waiting == 0) return;
    if (waiting < kWarp) fail("warp " + std::to_string(warp) + " diverged: some lanes are not at its operation");
    run_operation(warp);
    for (int id = warp * kWarp; id < (warp + 1) * kWarp; ++id) machine.threads[id].state = State::kReady;
  }
}

inline void prepare_block() {
  for (Thread& thread : machine.threads) {
    thread.is_started = false;
    thread.state = State::kReady;
    thread.groups.assign(1, {});
  }
  machine.stretch = 0;
  std::fill(machine.memory.begin(), machine.memory.end(), 0x80);
  std::fill(machine.shadow.begin(), machine.shadow.end(), Shadow{-1, -1, -1, -1, 0});
}

inline void run_block(std::mt19937& random) {
  prepare_block();
  const int warps = machine.threads.size() / kWarp;
  std::vector<int> order(warps);
  for (int i = 0; i < warps; ++i) order[i] = i;
  for (;;) {
    if (machine.seed) std::shuffle(order.begin(), order.end(), random);
    for (int warp : order) run_warp(warp);
    int done = 0;
    for (int warp = 0; warp < warps; ++warp) done += count_lanes(warp, State::kDone);
    if (done == warps * kWarp) break;
    if (done) fail("some threads have returned before a barrier");
    for (Thread& thread : machine.threads) thread.state = State::kReady;
    machine.stretch += 1;
    machine.counts.barriers += 1;
  }
  for (const Thread& thread : machine.threads) {
    for (const auto& group : thread.groups) {
      if (!group.empty()) fail("a thread returned before its copies were waited for");
    }
  }
  machine.counts.blocks += 1;
}

// Runs a kernel; throws Failure.
inline void launch(Position grid, Position block, size_t shared_bytes, void (*body)(const void*),
                   const void* arguments) {
  const unsigned count = block.count();
  machine.grid = grid;
  machine.block = block;
  machine.body = body;
  machine.arguments = arguments;
  machine.failure.clear();
  if (machine.threads.size() < count) machine.stacks.reset(new char[count * kStack]);
  machine.threads.resize(count);
  machine.memory.resize(shared_bytes + 128);
  machine.shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(machine.memory.data()) + 127) / 128 * 128);
  machine.shared_bytes = shared_bytes;
  machine.shadow.resize(shared_bytes / 4);
  machine.counts.launches += 1;
  if (count % kWarp) fail("a block is no whole number of warps");
  std::mt19937 random(machine.seed);
  Position& at = machine.block_index;
  for (at.z = 0; at.z < grid.z; ++at.z) {
    for (at.y = 0; at.y < grid.y; ++at.y) {
      for (at.x = 0; at.x < grid.x; ++at.x) run_block(random);
    }
  }
}

}  // namespace dcomp::emulator
