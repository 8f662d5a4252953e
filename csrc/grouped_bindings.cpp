// The ops of namespace mft_cpu over experts (cpu/grouped.h), and the ops that choose their masks.
// mft_kernels/backends/cpu/__init__.py makes all tensors but the weight contiguous.
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cpu/capability.h"
#include "cpu/grouped.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "operands.h"
#include "text.h"

namespace {

using mft::check_size;
using mft::empty_matrix;
using mft::Experts;
using mft::flat;
using mft::Format;
using mft::format_of;
using mft::input;
using mft::KeepRange;
using mft::Matrix;
using mft::output;
using mft::Text;
using mft::words;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
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

// Return the range of each threshold in a contiguous tensor. Neighbours are often equal and then share the work.
std::vector<KeepRange> ranges(const Tensor& thresholds, int64_t count, Format format, bool magnitude) {
  STD_TORCH_CHECK(thresholds.numel() == count && thresholds.is_contiguous(), "threshold must be (", count, ",)");
  std::vector<KeepRange> found;
  double last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double threshold = mft::value_at(thresholds, i);
    found.push_back(i > 0 && threshold == last ? found.back() : mft::range_at_least(threshold, format, magnitude));
    last = threshold;
  }
  return found;
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
    masks.ranges = ranges(*threshold, w.count, masks.score_format, magnitude);
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

// Return the k-th largest score of each expert in scores (E, ...).
Tensor kept_thresholds(Tensor scores, int64_t k, bool magnitude) {
  const Format format = format_of(scores, "scores");
  STD_TORCH_CHECK(scores.dim() >= 1 && scores.size(0) > 0 && scores.is_contiguous(), "scores must be (E, ...)");
  const int64_t count = scores.size(0), each = scores.numel() / count, width = mft::bytes_of(format);
  STD_TORCH_CHECK(k >= 0 && k <= each, "k must lie in [0, ", each, "]");
  const int64_t sizes[] = {count};
  Tensor thresholds = torch::stable::new_empty(scores, {sizes, 1});
  const auto* from = static_cast<const char*>(scores.const_data_ptr());
  auto* to = static_cast<char*>(thresholds.mutable_data_ptr());
  const auto select = [&](int64_t e) {
    const uint32_t bits = mft::kth_largest(from + e * each * width, format, each, k, magnitude);
    const auto low = static_cast<uint16_t>(bits);
    std::memcpy(to + e * width, width == 4 ? static_cast<const void*>(&bits) : &low, width);
  };
  // Each thread selects for one expert at a time, as long as there are enough. All threads together select for each of
  // the rest.
  const int64_t alone = count / mft::num_threads() * mft::num_threads();
  mft::parallel_for(0, alone, 1, [&](int64_t begin, int64_t end) {
    const mft::Alone guard;
    for (int64_t e = begin; e < end; ++e) select(e);
  });
  for (int64_t e = alone; e < count; ++e) select(e);
  return thresholds;
}

// pack_mask() with one threshold per row.
Tensor pack_mask_by_row(Tensor scores, Tensor threshold, bool magnitude) {
  const mft::Capability& cpu = mft::chosen_capability();
  const Matrix s = input(scores, "scores");
  const std::vector<KeepRange> own = ranges(threshold, s.rows, s.format, magnitude);
  const int64_t sizes[] = {s.rows, (s.columns + 31) / 32};
  Tensor packed = torch::stable::new_empty(scores, {sizes, 2}, ScalarType::Int);
  auto* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  mft::parallel_for(0, s.rows, 1 + 32768 / (s.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) cpu.rows->pack(words + r * sizes[1], s.row(r), s.format, own[r], s.columns);
  });
  return packed;
}

}  // namespace

MFT_OPS(CPU) {
  MFT_OP(grouped_product,
         "(Tensor x, Tensor weight, Tensor? scores, Tensor? threshold, Tensor? packed, Tensor offsets, Tensor? bias, "
         "bool magnitude, bool transposed, str path) -> Tensor");
  MFT_OP(grouped_score_grad_,
         "(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor offsets, Tensor? weight, Tensor? scores, Tensor? signs, "
         "bool accumulate, str path) -> ()");
  MFT_OP(kept_thresholds, "(Tensor scores, int k, bool magnitude) -> Tensor");
  MFT_OP(pack_mask_by_row, "(Tensor scores, Tensor threshold, bool magnitude) -> Tensor");
}
