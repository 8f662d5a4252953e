// What TMA can read and write: the rules of cuTensorMapEncodeTiled for matrices.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "api.h"

namespace mft::cuda {

constexpr int64_t kLargestTmaSize = int64_t{1} << 30;  // coordinates are ints, and boxes reach beyond the edge

// Return why TMA cannot move the matrix, or "".
inline std::string refusal_of_tma(const std::string& name, const Matrix& matrix) {
  constexpr int64_t kAlignment = 16, kLargestStride = int64_t{1} << 40;  // bytes
  const int64_t row = matrix.stride * bytes_of(matrix.type);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data) % kAlignment);
  if (past != 0) {
    return name + " must begin at a multiple of 16 bytes, got " + std::to_string(past) + " bytes past one";
  }
  if (row % kAlignment != 0) {
    return name + "'s rows must begin at multiples of 16 bytes, got a stride of " + std::to_string(row) + " bytes";
  }
  if (matrix.stride < matrix.columns || row >= kLargestStride) {
    return name + "'s rows must not overlap and lie less than 2^40 bytes apart, got a stride of " +
           std::to_string(row) + " bytes";
  }
  if (matrix.rows > kLargestTmaSize || matrix.columns > kLargestTmaSize) {
    return name + " must have at most 2^30 rows and columns";
  }
  return "";
}

}  // namespace mft::cuda
