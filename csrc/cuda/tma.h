// What TMA can read and write: the rules of cuTensorMapEncodeTiled for matrices.
#pragma once

#include <limits>
#include <utility>

#include "api.h"

namespace mft::cuda {

// "" or why not.
inline std::string refusal_of_tma(const std::string& name, const Matrix& matrix) {
  const int64_t row_bytes = matrix.stride * bytes_of(matrix.type);
  if (reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0) return name + " must begin at a multiple of 16 bytes";
  if (row_bytes % 16 != 0) {
    return name + "'s rows must begin at multiples of 16 bytes, got a stride of " + std::to_string(row_bytes);
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;  // coordinates, and tiles beyond the edge
  if (matrix.rows > kMost || matrix.columns > kMost) return name + " must have less than 2^30 rows and columns";
  return "";
}

}  // namespace mft::cuda
