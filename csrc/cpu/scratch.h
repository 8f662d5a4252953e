// Scratch memory that one call leaves to the next: with fresh pages every time, a narrow layer's d_x on 4,096 tokens
// spent more on having them zeroed than on packing.
#pragma once

#include <cstdint>

namespace mft {

// Uninitialised memory, aligned to 64 bytes or, from that size on, to a huge page. What is given back stays with the
// process, 32 MiB of it at most and no piece of more than 16; any thread may take it up again.
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
