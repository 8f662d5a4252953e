// The weight of a masked product: a matrix, or codes (decode.h). A product decodes the codes that it is about to mask
// into a few rows of scratch memory in the cache. What follows sees the same numbers as in the whole decoded matrix.
#pragma once

#include "decode.h"
#include "matrix.h"

namespace mft {

struct Weight : Matrix {
  const Quantized* codes = nullptr;  // then data is nullptr
  Decode decode = nullptr;

  Weight(const Matrix& dense) : Matrix(dense) {}
  Weight(const Quantized& codes, Decode decode, Format format)
      : Matrix{nullptr, format, codes.rows, codes.columns, codes.columns}, codes(&codes), decode(decode) {}

  // Bytes that the caller must provide to part() for this number of elements.
  int64_t room(int64_t elements) const { return codes == nullptr ? 0 : elements * bytes_of(format); }

  // Returns `count` elements of a row from `column` on: in place, or decoded into `room`.
  const void* part(int64_t row, int64_t column, int64_t count, void* room) const {
    if (codes == nullptr) return Matrix::row(row) + column * bytes_of(format);
    decode(room, format, *codes, row, column, count);
    return room;
  }

  // Returns the memory that part() reads.
  Span span(int64_t row, int64_t column, int64_t count) const {
    if (codes != nullptr) return codes_span(*codes, row, column, count);
    return {Matrix::row(row) + column * bytes_of(format), count * bytes_of(format)};
  }
};

}  // namespace mft
