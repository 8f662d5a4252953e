// Replacements for what the library uses from torch: products as fp64 sums rounded once, and correctly rounded roots.
#include "torch_matmul.h"

#include <cmath>
#include <cstring>

namespace mft {
namespace {

#include "formats.inl"

double element(const Matrix& m, int64_t row, int64_t column) {
  const char* at = m.row(row) + column * m.column_stride * bytes_of(m.format);
  float value;
  widen(&value, at, m.format, 1);
  return static_cast<double>(value);
}

}  // namespace

void torch_matmul(const Matrix& out, const Matrix& a, const Matrix& b) {
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      double sum = 0;
      for (int64_t d = 0; d < a.columns; ++d) sum += element(a, i, d) * element(b, d, j);
      const auto value = static_cast<float>(sum);
      narrow(out.row(i) + j * out.column_stride * bytes_of(out.format), &value, out.format, 1);
    }
  }
}

void torch_linear(const Matrix& out, const Matrix& x, const Matrix& weight, const void* bias) {
  torch_matmul(out, x, weight.transposed());
  if (bias == nullptr) return;
  const Matrix row{const_cast<void*>(bias), out.format, 1, out.columns, out.columns};
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) {
      const auto value = static_cast<float>(element(out, i, j) + element(row, 0, j));
      narrow(out.row(i) + j * bytes_of(out.format), &value, out.format, 1);
    }
  }
}

void torch_sqrt(float* out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(in[i]);
}

}  // namespace mft
