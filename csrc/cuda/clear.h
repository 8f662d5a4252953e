// Fill memory with zeros, in the order of the stream.
#pragma once

#include <algorithm>

#include "isa.h"

namespace mft::cuda {

struct ClearKernel {
  static constexpr int kThreads = 1024, kBlocksPerMultiprocessor = 1;

  struct Arguments {
    uint32_t* words;
    int64_t count;
  };

  MFT_DEVICE static void run(const Arguments& a) {
    for (int64_t i = isa::block(0) * kThreads + isa::thread(); i < a.count; i += isa::blocks(0) * kThreads) {
      a.words[i] = 0;
    }
  }
};

inline std::string clear(void* memory, int64_t words, void* stream) {
  LaunchShape shape;
  shape.x = std::min<int64_t>((words + ClearKernel::kThreads - 1) / ClearKernel::kThreads, 32);
  return isa::launch<ClearKernel>(shape, stream, {static_cast<uint32_t*>(memory), words});
}

}  // namespace mft::cuda
