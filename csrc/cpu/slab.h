// How much of a matrix is masked at a time where torch's GEMM takes it, and the division that counts such pieces.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mft {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows, or for d_x columns, of bytes_each: 2 MiB of them, with their scores half of two 1 MiB L2 and some L3.
inline int64_t slab_length(int64_t bytes_each, int64_t total) {
  const int64_t fitting = (2 << 20) / std::max<int64_t>(bytes_each, 1);
  return std::min(std::max<int64_t>(fitting / 32 * 32, 32), total);
}

}  // namespace mft
