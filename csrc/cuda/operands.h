// Convert tensors to the structs of api.h, with checks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "api.h"
#include "place.h"

namespace mft::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_launch(const std::string& error) { STD_TORCH_CHECK(error.empty(), "the cuda backend: ", error); }

inline Type type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the cuda backend");
  }
}

inline void check_device(const Tensor& t, const Place& place, const char* name) {
  STD_TORCH_CHECK(t.get_device() == place.index, name, " must be on device ", place.index, ", got ", t.get_device());
}

// Return data, or another pointer if it is null. To the kernels null means "not wanted", but an empty tensor's data may
// be null.
template <class T>
T* present(T* data) {
  static char nowhere;
  return data ? data : reinterpret_cast<T*>(&nowhere);
}

inline Matrix matrix(const Tensor& t, const Place& place, const char* name, void* data) {
  check_device(t, place, name);
  const bool many = t.numel() > 0 && t.dim() == 2;  // else strides mean nothing
  STD_TORCH_CHECK(t.dim() == 2 && (!many || t.size(1) == 1 || t.stride(1) == 1), name,
                  " must be 2-d with unit column stride");
  // A single row gets a stride that is a multiple of 16 bytes, which the Hopper kernels require.
  const int64_t stride = many && t.size(0) > 1 ? t.stride(0) : (t.size(1) + 7) / 8 * 8;
  STD_TORCH_CHECK(stride >= t.size(1), name, " must have rows that do not overlap");
  return {present(data), type_of(t, name), t.size(0), t.size(1), stride};
}

inline Matrix input(const Tensor& t, const Place& place, const char* name) {
  return matrix(t, place, name, const_cast<void*>(t.const_data_ptr()));
}

inline Matrix output(const Tensor& t, const Place& place, const char* name) {
  return matrix(t, place, name, t.mutable_data_ptr());
}

inline void check_size(const Matrix& m, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(m.rows == rows && m.columns == columns, name, " must be (", rows, ", ", columns, "), got (", m.rows,
                  ", ", m.columns, ")");
}

inline const uint32_t* words(const Tensor& t, const Place& place, const Matrix& weight, const char* name) {
  check_device(t, place, name);
  const int64_t columns = (weight.columns + 31) / 32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() == 2 &&
                      t.size(0) == weight.rows && t.size(1) == columns,
                  name, " must be int32, contiguous and (", weight.rows, ", ", columns, ")");
  return present(static_cast<uint32_t*>(const_cast<void*>(t.const_data_ptr())));
}

inline Keep keep_by_scores(const Tensor& scores, const Tensor& threshold, const Place& place, bool magnitude) {
  Keep keep;
  keep.scores = input(scores, place, "scores");
  check_device(threshold, place, "threshold");
  STD_TORCH_CHECK(type_of(threshold, "threshold") == keep.scores.type, "threshold must have scores' dtype");
  STD_TORCH_CHECK(threshold.dim() == 0 || (threshold.dim() == 1 && threshold.size(0) == keep.scores.rows),
                  "threshold must be () or (", keep.scores.rows, ",)");
  keep.thresholds = threshold.const_data_ptr();
  keep.threshold_stride = threshold.dim() == 0 ? 0 : threshold.stride(0);
  keep.magnitude = magnitude;
  return keep;
}

inline Keep keep_of(const std::optional<Tensor>& scores, const std::optional<Tensor>& threshold,
             const std::optional<Tensor>& packed, const Place& place, const Matrix& weight, bool magnitude) {
  if (packed.has_value()) {
    Keep keep;
    keep.words = words(*packed, place, weight, "packed");
    return keep;
  }
  STD_TORCH_CHECK(scores.has_value() && threshold.has_value(), "give scores and threshold, or packed");
  const Keep keep = keep_by_scores(*scores, *threshold, place, magnitude);
  check_size(keep.scores, weight.rows, weight.columns, "scores");
  return keep;
}

inline Matrix weight_of(const Tensor& t, const Place& place, const char* name = "weight") {
  const Matrix weight = input(t, place, name);
  STD_TORCH_CHECK(weight.type != Type::kFloat32, name, " must be bfloat16 or float16 for the cuda backend");
  return weight;
}

inline Matrix like_weight(const Tensor& t, const Place& place, const Matrix& weight, const char* name) {
  const Matrix m = input(t, place, name);
  STD_TORCH_CHECK(m.type == weight.type, name, " must have weight's dtype");
  return m;
}

// Return the bias's data, or null if there is no bias.
inline const void* bias_of(const std::optional<Tensor>& bias, const Place& place, const Matrix& weight) {
  if (!bias.has_value()) return nullptr;
  check_device(*bias, place, "bias");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.rows && bias->is_contiguous() &&
                      type_of(*bias, "bias") == weight.type,
                  "bias must be (N,), contiguous and in weight's dtype");
  return bias->const_data_ptr();
}

inline Tensor empty_words(const Tensor& like, const Matrix& scores) {
  const int64_t sizes[] = {scores.rows, (scores.columns + 31) / 32};
  return torch::stable::new_empty(like, {sizes, 2}, ScalarType::Int);
}

// Return the workspace of a plan, if it needs one. Its memory is given back in the order of the stream.
inline std::optional<Tensor> workspace_of(const Tensor& like, const Plan& plan) {
  if (plan.workspace == 0) return std::nullopt;
  const int64_t bytes[] = {plan.workspace};
  return torch::stable::new_empty(like, {bytes, 1}, ScalarType::Byte);
}

}  // namespace mft::cuda
