// Scratch memory that one call leaves to the next. With fresh pages every time, d_x of a layer of 576 x 576 on 4,096
// tokens took 13.6 ms instead of 8.4 (2 Zen 4 cores).
#pragma once

#include <cstdint>

namespace mft {

// Uninitialised memory, aligned to 64 bytes, or to a huge page if it is at least that large. The process keeps released
// memory, and any thread may reuse it: at most 32 MiB in all, in pieces of at most 16 MiB.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return memory_; }

 private:
  void* memory_;
  int64_t bytes_;
};

}  // namespace mft
