// A borrowed 2-d matrix: what the kernels see of a tensor.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace mft {

struct Matrix {
  void* data;
  Format format;
  int64_t rows, columns;
  int64_t row_stride;         // in elements
  int64_t column_stride = 1;

  char* row(int64_t r) const { return static_cast<char*>(data) + r * row_stride * bytes_of(format); }
  Matrix narrow_rows(int64_t first, int64_t count) const {
    return {row(first), format, count, columns, row_stride, column_stride};
  }
  Matrix narrow_columns(int64_t first, int64_t count) const {
    char* start = static_cast<char*>(data) + first * column_stride * bytes_of(format);
    return {start, format, rows, count, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, format, columns, rows, column_stride, row_stride}; }
};

// Returns the address of an element; nullptr if there is no data.
inline const char* skip(const void* data, int64_t elements, Format format) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * bytes_of(format);
}

}  // namespace mft
