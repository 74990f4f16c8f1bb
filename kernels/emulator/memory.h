// Checks of memory: bounds, alignment, races, copies that nobody waited for; and what accesses cost.
#pragma once
#include "machine.h"

namespace dcomp::emulator {

constexpr int kSeveral = -2;  // a reader that stands for more than one

struct Buffer {
  uintptr_t start, bytes;
  bool holds(uintptr_t at, size_t count) const { return at >= start && at + count <= start + bytes; }
};
inline std::vector<Buffer> buffers;  // global memory that kernels may touch; all of it if there are none

inline void check_global(const void* p, size_t bytes, const char* what) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % bytes) fail(std::string("misaligned global ") + what + " of " + std::to_string(bytes) + " bytes");
  if (buffers.empty()) return;
  for (const Buffer& buffer : buffers) {
    if (buffer.holds(at, bytes)) return;
  }
  fail(std::string("global ") + what + " outside all buffers");
}

inline Shadow* shadow_of(const void* p, size_t bytes, const char* what) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - machine.shared;
  const std::string text = std::string(what) + " of shared memory at byte " + std::to_string(offset);
  if (offset < 0 || offset + bytes > machine.shared_bytes) fail("out of bounds: " + text);
  if (offset % bytes) fail("misaligned: " + text);
  return &machine.shadow[offset / 4];
}

[[noreturn]] inline void fail_race(const Shadow& shadow, int thread, const char* what) {
  fail(std::string("race: ") + what + " by thread " + std::to_string(thread) + " of shared memory at byte " +
       std::to_string((&shadow - machine.shadow.data()) * 4) + ", which another touches between the same barriers");
}

inline void note_read(const void* p, size_t bytes, int thread) {
  Shadow* shadow = shadow_of(p, bytes, "read");
  for (size_t i = 0; i < bytes / 4; ++i) {
    Shadow& s = shadow[i];
    if (s.writer == -1) fail("read of shared memory that nobody has written");
    if (s.pending) fail("read of shared memory before its copy was waited for");
    if (s.write_stretch == machine.stretch && s.writer != thread) fail_race(s, thread, "read");
    const bool is_other = s.read_stretch == machine.stretch && s.reader != thread;
    s.reader = is_other ? kSeveral : thread;
    s.read_stretch = machine.stretch;
  }
}

inline void note_write(const void* p, size_t bytes, int thread) {
  Shadow* shadow = shadow_of(p, bytes, "write");
  for (size_t i = 0; i < bytes / 4; ++i) {
    Shadow& s = shadow[i];
    if (s.pending) fail("write of shared memory before a copy to it was waited for");
    if (s.write_stretch == machine.stretch && s.writer != thread) fail_race(s, thread, "write");
    if (s.read_stretch == machine.stretch && s.reader != thread) fail_race(s, thread, "write");
    s.writer = thread;
    s.write_stretch = machine.stretch;
  }
}

// The destination is poisoned until the copy is waited for.
inline void start_copy(uint8_t* to, const void* from, int thread) {
  note_write(to, 16, thread);
  for (Shadow* s = shadow_of(to, 16, "copy"), *end = s + 4; s < end; ++s) s->pending += 1;
  memset(to, 0x80, 16);
  machine.threads[thread].groups.back().push_back({to, from});
}

// Finishes all groups of a thread but the latest `pending`.
inline void wait_for_copies(int thread, int pending) {
  auto& groups = machine.threads[thread].groups;
  const int finished = std::max<int>(0, static_cast<int>(groups.size()) - 1 - pending);
  for (int i = 0; i < finished; ++i) {
    for (const Copy& copy : groups[i]) {
      copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
      for (Shadow* s = shadow_of(copy.to, 16, "copy"), *end = s + 4; s < end; ++s) {
        s->pending -= 1;
        s->write_stretch = machine.stretch;  // now it is there for this thread, and after a barrier for others
      }
    }
  }
  groups.erase(groups.begin(), groups.begin() + finished);
}

// Wavefronts of one access of a warp: lanes share one as long as no bank is asked for two of its words. `at` is null
// for lanes that take no part.
inline void count_wavefronts(const uint8_t* const (&at)[kWarp], int bytes) {
  const int lanes = std::min(kWarp, 128 / bytes);  // that one wavefront can serve
  for (int first = 0; first < kWarp; first += lanes) {
    std::vector<size_t> words[32];
    size_t most = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!at[lane]) continue;
      for (int i = 0; i < bytes / 4; ++i) {
        const size_t word = (at[lane] - machine.shared) / 4 + i;
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max(most, bank.size());
      }
    }
    machine.counts.wavefronts += most;
    machine.counts.ideal_wavefronts += most > 0;
  }
}

inline void count_sectors(const void* const (&from)[kWarp], int bytes) {
  std::vector<uintptr_t> sectors;
  for (const void* p : from) {
    if (!p) continue;
    machine.counts.copied_bytes += bytes;
    sectors.push_back(reinterpret_cast<uintptr_t>(p) / 32);  // 16 aligned bytes lie in one
  }
  std::sort(sectors.begin(), sectors.end());
  machine.counts.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

}  // namespace dcomp::emulator
