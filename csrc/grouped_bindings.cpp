// The ops of namespace mft_cpu over experts (cpu/grouped.h).
// mft_kernels/backends/cpu/__init__.py makes all tensors but the weight contiguous.
#include <optional>

#include "cpu/capability.h"
#include "cpu/grouped.h"
#include "operands.h"
#include "text.h"

namespace mft::ops {
namespace {

using Optional = std::optional<Tensor>;

Experts experts(const Tensor& t, const char* name, void* data) {
  STD_TORCH_CHECK(t.dim() == 3, name, " must be (E, N, K)");
  return {data, format_of(t, name), t.size(0), t.size(1), t.size(2), {t.stride(0), t.stride(1), t.stride(2)}};
}

Experts inputs(const Tensor& t, const char* name) { return experts(t, name, const_cast<void*>(t.const_data_ptr())); }

const int32_t* ends(const Tensor& offsets, const Experts& weight) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.is_contiguous() && offsets.dim() == 1 &&
                      offsets.size(0) == weight.count,
                  "offsets must be int32 (E,) and contiguous");
  return static_cast<const int32_t*>(offsets.const_data_ptr());
}

// Return a contiguous tensor (E, N, K) as one matrix (E N, K).
Matrix stacked(const Tensor& t, const Experts& like, const char* name, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == like.count && t.size(1) == like.rows && t.size(2) == columns &&
                      t.is_contiguous(),
                  name, " must be (", like.count, ", ", like.rows, ", ", columns, ") and contiguous");
  return {const_cast<void*>(t.const_data_ptr()), Format::kFloat32, like.count * like.rows, columns, columns};
}

const uint32_t* stacked_words(const Tensor& t, const Experts& like, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, " must be int32");
  return static_cast<const uint32_t*>(stacked(t, like, name, (like.columns + 31) / 32).data);
}

Tensor grouped_product(Tensor x, Tensor weight, Optional scores, Optional threshold, Optional packed, Tensor offsets,
                       Optional bias, bool magnitude, bool transposed, Text path) {
  const Experts w = inputs(weight, "weight");
  const Matrix in = input(x, "x");
  const int64_t length = transposed ? w.rows : w.columns, across = transposed ? w.columns : w.rows;
  STD_TORCH_CHECK(in.columns == length && in.format == w.format, "x must be (T, ", length, ") in weight's dtype");
  mft::ExpertMasks masks{nullptr, Format::kFloat32, nullptr, {}};
  if (packed.has_value()) {
    masks.words = stacked_words(*packed, w, "packed");
  } else {
    STD_TORCH_CHECK(scores.has_value() && threshold.has_value(), "give scores and threshold, or packed");
    masks.score_format = format_of(*scores, "scores");
    masks.scores = stacked(*scores, w, "scores", w.columns).data;
    masks.ranges = mft::ranges(*threshold, w.count, masks.score_format, magnitude);
  }
  if (bias.has_value()) {
    check_size(*bias, w.count, across, "bias");
    STD_TORCH_CHECK(input(*bias, "bias").format == w.format, "bias must be in weight's dtype");
  }
  Tensor y = empty_matrix(x, in.rows, across, in.rows);
  mft::grouped_product(mft::chosen_capability(), output(y, "y"), in, w, masks, ends(offsets, w),
                       bias.has_value() ? bias->const_data_ptr() : nullptr, transposed, mft::path_of(path));
  return y;
}

void grouped_score_grad_(Tensor out, Tensor grad_output, Tensor x, Tensor offsets, Optional weight, Optional scores,
                         Optional signs, bool accumulate, Text path) {
  const Experts result = experts(out, "out", out.mutable_data_ptr());
  const Matrix in = input(x, "x"), grad = input(grad_output, "grad_output");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  STD_TORCH_CHECK(grad.format == in.format && grad.rows == in.rows && grad.columns == result.rows &&
                      in.columns == result.columns,
                  "grad_output must be (T, N) and x (T, K), of one dtype");
  Experts w{nullptr, in.format, result.count, result.rows, result.columns, {0, 0, 0}};
  if (weight.has_value()) {
    w = inputs(*weight, "weight");
    STD_TORCH_CHECK(w.format == in.format && w.count == result.count && w.rows == result.rows && w.columns == result.columns,
                    "weight must be of out's shape, in x's dtype");
  }
  mft::SignSource sign{nullptr, Format::kFloat32, nullptr, result.columns};
  if (signs.has_value()) {
    sign.words = stacked_words(*signs, result, "signs");
  } else if (scores.has_value()) {
    sign.scores = stacked(*scores, result, "scores", result.columns).data;
    sign.score_format = format_of(*scores, "scores");
  }
  mft::grouped_grad_scores(mft::chosen_capability(), result, grad, in, ends(offsets, result), w, sign, accumulate,
                           mft::path_of(path));
}

}  // namespace

MFT_OPS(CPU) {
  MFT_OP(grouped_product,
         "(Tensor x, Tensor weight, Tensor? scores, Tensor? threshold, Tensor? packed, Tensor offsets, Tensor? bias, "
         "bool magnitude, bool transposed, str path) -> Tensor");
  MFT_OP(grouped_score_grad_,
         "(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor offsets, Tensor? weight, Tensor? scores, Tensor? signs, "
         "bool accumulate, str path) -> ()");
}

}  // namespace mft::ops
