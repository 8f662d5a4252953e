// Convert tensors to the kernels' operands, with checks. The files of ops (*bindings.cpp) share these functions.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/recycled.h"
#include "cpu/keep_range.h"
#include "cpu/linear.h"
#include "registration.h"

namespace mft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format format_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Format::kFloat32;
    case ScalarType::BFloat16:
      return Format::kBFloat16;
    case ScalarType::Half:
      return Format::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the cpu backend");
  }
}

inline Matrix matrix(const Tensor& t, const char* name, void* data) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), name, " must be 2-d and contiguous");
  return {data, format_of(t, name), t.size(0), t.size(1), t.size(1)};
}

inline Matrix input(const Tensor& t, const char* name) { return matrix(t, name, const_cast<void*>(t.const_data_ptr())); }

// Return a tensor (..., columns) as a matrix (M, columns).
inline Matrix flat(const Tensor& t, int64_t columns, const char* name, void* data) {
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(-1) == columns && t.is_contiguous(), name, " must be (..., ", columns,
                  ") and contiguous");
  int64_t rows = 1;
  for (int64_t d = 0; d < t.dim() - 1; ++d) rows *= t.size(d);
  return {data, format_of(t, name), rows, columns, columns};
}

inline Matrix output(const Tensor& t, const char* name) { return matrix(t, name, t.mutable_data_ptr()); }

inline void check_size(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be (", rows, ", ", columns,
                  ")");
}

inline const uint32_t* words(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name, " must be int32 and contiguous");
  check_size(t, rows, (columns + 31) / 32, name);
  return static_cast<const uint32_t*>(t.const_data_ptr());
}

// Return threshold i of a contiguous tensor.
inline double value_at(const Tensor& thresholds, int64_t i) {
  const void* data = thresholds.const_data_ptr();
  if (thresholds.scalar_type() == ScalarType::Double) return static_cast<const double*>(data)[i];
  const Format format = format_of(thresholds, "threshold");
  const uint32_t bits = format == Format::kFloat32 ? static_cast<const uint32_t*>(data)[i]
                                                   : static_cast<const uint16_t*>(data)[i];
  const uint32_t top = 1u << (8 * bytes_of(format) - 1);
  const double magnitude = value_of_key(bits & ~top, format, true);
  return bits & top ? -magnitude : magnitude;
}

inline double value_of(const Tensor& threshold) {
  STD_TORCH_CHECK(threshold.numel() == 1, "threshold must hold one element");
  return value_at(threshold, 0);
}

// Return the range of each threshold in a contiguous tensor. Neighbours are often equal and then share the work.
inline std::vector<KeepRange> ranges(const Tensor& thresholds, int64_t count, Format format, bool magnitude) {
  STD_TORCH_CHECK(thresholds.numel() == count && thresholds.is_contiguous(), "threshold must be (", count, ",)");
  std::vector<KeepRange> found;
  double last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double threshold = value_at(thresholds, i);
    found.push_back(i > 0 && threshold == last ? found.back() : range_at_least(threshold, format, magnitude));
    last = threshold;
  }
  return found;
}

// Return the source of the sign of scores (rows, columns): words if given, else scores, else none.
inline SignSource sign_source(const std::optional<Tensor>& scores, const std::optional<Tensor>& signs, int64_t rows,
                              int64_t columns) {
  if (signs.has_value()) return {nullptr, Format::kFloat32, words(*signs, rows, columns, "signs"), columns};
  if (!scores.has_value()) return {nullptr, Format::kFloat32, nullptr, columns};
  check_size(*scores, rows, columns, "scores");
  const Matrix s = input(*scores, "scores");
  return {s.data, s.format, nullptr, columns};
}

// Return the data of a bias (rows,), or nullptr if there is none.
inline const void* bias_of(const std::optional<Tensor>& bias, int64_t rows, Format format) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->numel() == rows && bias->is_contiguous() && format_of(*bias, "bias") == format,
                  "bias must be (N,) in x's dtype");
  return bias->const_data_ptr();
}

inline MaskSource mask_source(const std::optional<Tensor>& scores, const std::optional<Tensor>& threshold,
                       const std::optional<Tensor>& packed, bool magnitude, int64_t rows, int64_t columns) {
  if (packed.has_value()) {
    return {nullptr, Format::kFloat32, words(*packed, rows, columns, "packed"), {0, 0, false}, columns};
  }
  STD_TORCH_CHECK(scores.has_value() && threshold.has_value(), "give scores and threshold, or packed");
  check_size(*scores, rows, columns, "scores");
  const Matrix s = input(*scores, "scores");
  return {s.data, s.format, nullptr, range_at_least(value_of(*threshold), s.format, magnitude), columns};
}

// Prepare new memory that a product of `tokens` tokens will write. Many tokens request no huge pages: these cost time
// if a hypervisor takes freed ones back. A step of 4096 tokens at 4096 x 4096 on such a machine (a virtual Xeon with
// AMX), in dense steps:
//
//                      with huge pages        without
//   scores, fp32       1.22                   1.04
//   scores, bf16       0.8 or 1.2 by chance   1.01
//   held mask, bf16    0.77                   0.94
inline bool takes_huge_pages(int64_t tokens) { return tokens < 2048; }

inline void expect_writes(void* memory, int64_t bytes, int64_t tokens) {
  if (takes_huge_pages(tokens)) advise_huge_pages(memory, bytes);
}

// Return a new tensor of the weight's shape, in recycled memory if it is large.
inline Tensor empty_gradient(const Tensor& weight, ScalarType type, int64_t tokens) {
  const int64_t sizes[] = {weight.size(0), weight.size(1)}, strides[] = {sizes[1], 1};
  const int64_t bytes = weight.numel() * (type == ScalarType::Float ? 4 : 2);
  void* memory = bytes < kRecycledBytes ? nullptr : take_recycled(bytes, takes_huge_pages(tokens));
  if (memory != nullptr) {
    return torch::stable::from_blob(memory, {sizes, 2}, {strides, 2}, weight.device(), type, &recycle);
  }
  Tensor t = torch::stable::new_empty(weight, {sizes, 2}, type);
  expect_writes(t.mutable_data_ptr(), bytes, tokens);
  return t;
}

inline Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, int64_t tokens) {
  const int64_t sizes[] = {rows, columns};
  Tensor t = torch::stable::new_empty(like, {sizes, 2});
  expect_writes(t.mutable_data_ptr(), rows * columns * bytes_of(format_of(like, "input")), tokens);
  return t;
}

// Return a new tensor (..., columns) for the `rows` tokens of x (..., K).
inline Tensor empty_product(const Tensor& x, int64_t rows, int64_t columns) {
  const auto tokens = x.sizes();
  std::vector<int64_t> sizes(tokens.begin(), tokens.end());
  sizes.back() = columns;
  Tensor t = torch::stable::new_empty(x, {sizes.data(), sizes.size()});
  expect_writes(t.mutable_data_ptr(), rows * columns * bytes_of(format_of(x, "x")), rows);
  return t;
}

inline Matrix tokens_of(const Tensor& t, const char* name, int64_t columns, Format format) {
  const Matrix tokens = flat(t, columns, name, const_cast<void*>(t.const_data_ptr()));
  STD_TORCH_CHECK(tokens.format == format, name, " must be in weight's dtype");
  return tokens;
}

// Return masked_linear() of x (..., K), (..., N).
inline Tensor forward_of(const Tensor& x, const Weight& weight, const MaskSource& mask, const void* bias,
                         Path path = Path::kAuto) {
  const Matrix in = tokens_of(x, "x", weight.columns, weight.format);
  Tensor y = empty_product(x, in.rows, weight.rows);
  masked_linear(chosen_capability(), flat(y, weight.rows, "y", y.mutable_data_ptr()), in, weight, mask, bias, path);
  return y;
}

// Return grad_x() of grad_output (..., N), (..., K).
inline Tensor d_x_of(const Tensor& grad_output, const Weight& weight, const MaskSource& mask, Path path = Path::kAuto) {
  const Matrix grad = tokens_of(grad_output, "grad_output", weight.rows, weight.format);
  Tensor d_x = empty_product(grad_output, grad.rows, weight.columns);
  grad_x(chosen_capability(), flat(d_x, weight.columns, "d_x", d_x.mutable_data_ptr()), grad, weight, mask, path);
  return d_x;
}

}  // namespace mft
