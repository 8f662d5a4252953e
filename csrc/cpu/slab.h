// How much of a matrix is masked at a time for torch's GEMM, and the division that counts such slabs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mft {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the number of rows (for d_x, columns) of bytes_each bytes in a slab. A slab has 2 MiB: with its scores it
// takes half of two 1 MiB L2 caches and some L3. A GEMM reads the operand that meets every slab once per slab. If that
// operand is large, a slab may have a quarter of its bytes, but no more than a quarter of the weight (fp32, 4096 x 4096
// and as many tokens: 1.02 dense products, compared with 1.26 with 2 MiB; Xeon).
inline int64_t slab_length(int64_t bytes_each, int64_t total, int64_t operand_bytes) {
  const int64_t each = std::max<int64_t>(bytes_each, 1);
  const int64_t fitting = std::max<int64_t>(2 << 20, std::min(operand_bytes, total * each) / 4) / each;
  return std::min(std::max<int64_t>(fitting / 32 * 32, 32), total);
}

}  // namespace mft
