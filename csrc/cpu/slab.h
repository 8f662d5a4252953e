// How much of a matrix is masked at a time where torch's GEMM takes it, and the division that counts such pieces.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mft {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows, or for d_x columns, of bytes_each: 2 MiB of them, with their scores half of two 1 MiB L2 and some L3. A GEMM reads
// the operand that meets every slab once a slab: beside a large one a slab may take a quarter of its bytes, and no more
// than a quarter of the weight (fp32, 4096 x 4096 and as many tokens: 1.02 dense products, with 2 MiB 1.26; Xeon).
inline int64_t slab_length(int64_t bytes_each, int64_t total, int64_t operand_bytes) {
  const int64_t each = std::max<int64_t>(bytes_each, 1);
  const int64_t fitting = std::max<int64_t>(2 << 20, std::min(operand_bytes, total * each) / 4) / each;
  return std::min(std::max<int64_t>(fitting / 32 * 32, 32), total);
}

}  // namespace mft
