// The ops over experts: grouped_product, grouped_score_grad_ and kept_thresholds. weight, scores and out are (E, N, K),
// one matrix per expert; offsets are int32 (E,).
#include <algorithm>
#include <string>

#include "operands.h"

namespace {

using mft::cuda::Matrix;
using mft::cuda::Place;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The first expert's matrix, the number of experts, and the elements from one expert to the next.
struct Experts {
  Matrix first;
  int64_t count, stride;

  static Experts of(const Tensor& t, const Place& place, const char* name, void* data) {
    mft::cuda::check_device(t, place, name);
    STD_TORCH_CHECK(t.dim() == 3 && (t.numel() == 0 || t.size(2) == 1 || t.stride(2) == 1), name,
                    " must be 3-d with unit column stride");
    const int64_t rows = t.size(1), columns = t.size(2);
    const int64_t stride = t.numel() > 0 && rows > 1 ? t.stride(1) : (columns + 7) / 8 * 8;
    STD_TORCH_CHECK(stride >= columns, name, " must have rows that do not overlap");
    const Matrix first{mft::cuda::present(data), mft::cuda::type_of(t, name), rows, columns, stride};
    return {first, t.size(0), t.stride(0)};
  }
  static Experts input(const Tensor& t, const Place& place, const char* name) {
    return of(t, place, name, const_cast<void*>(t.const_data_ptr()));
  }

  void check_size(const Experts& other, const char* name) const {
    STD_TORCH_CHECK(count == other.count, name, " must be of ", other.count, " experts, got ", count);
    mft::cuda::check_size(first, other.first.rows, other.first.columns, name);
  }
};

const void* contiguous(const Tensor& t, const Place& place, ScalarType type, int64_t numel, const char* name) {
  mft::cuda::check_device(t, place, name);
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, name,
                  " must be contiguous, of its dtype and of ", numel, " elements, got ", t.numel());
  return mft::cuda::present(t.const_data_ptr());
}

const int32_t* offsets_of(const Tensor& t, const Place& place, int64_t experts) {
  return static_cast<const int32_t*>(contiguous(t, place, ScalarType::Int, experts, "offsets"));
}

const uint32_t* words_of(const Tensor& t, const Place& place, const Experts& weight, const char* name) {
  const int64_t numel = weight.count * weight.first.rows * ((weight.first.columns + 31) / 32);
  return static_cast<const uint32_t*>(contiguous(t, place, ScalarType::Int, numel, name));
}

// Pack the masks of scores that the product kernel does not read, with one launch per expert.
Tensor packed_of(const mft::cuda::GroupedProduct& g, const Place& place, const Tensor& like) {
  const Matrix& scores = g.of.keep.scores;
  const int64_t columns = (scores.columns + 31) / 32, sizes[] = {g.experts * scores.rows * columns};
  Tensor packed = torch::stable::new_empty(like, {sizes, 1}, ScalarType::Int);
  const int64_t bytes = mft::cuda::bytes_of(scores.type);
  for (int64_t e = 0; e < g.experts; ++e) {
    mft::cuda::PackMask p;
    p.words = static_cast<uint32_t*>(packed.mutable_data_ptr()) + e * scores.rows * columns;
    p.keep = g.of.keep;
    p.keep.scores.data = static_cast<char*>(scores.data) + e * g.score_stride * bytes;
    p.keep.thresholds = static_cast<const char*>(g.of.keep.thresholds) + e * bytes;
    mft::cuda::check_launch(mft::cuda::pack_mask(p, place.device));
  }
  return packed;
}

Tensor grouped_product(Tensor x, Tensor weight, std::optional<Tensor> scores, std::optional<Tensor> threshold,
                       std::optional<Tensor> packed, Tensor offsets, std::optional<Tensor> bias, bool magnitude,
                       bool transposed) {
  const Place place(weight);
  const Experts experts = Experts::input(weight, place, "weight");
  mft::cuda::GroupedProduct g;
  mft::cuda::Product& p = g.of;
  p.weight = experts.first;
  STD_TORCH_CHECK(p.weight.type != mft::cuda::Type::kFloat32, "weight must be bfloat16 or float16 for the cuda backend");
  g.experts = experts.count, g.weight_stride = experts.stride;
  p.in = mft::cuda::like_weight(x, place, p.weight, "x");
  mft::cuda::check_size(p.in, p.in.rows, transposed ? p.weight.rows : p.weight.columns, "x");
  g.offsets = offsets_of(offsets, place, g.experts);
  p.transposed = transposed;
  if (packed.has_value()) {
    p.keep.words = words_of(*packed, place, experts, "packed");
  } else {
    STD_TORCH_CHECK(scores.has_value() && threshold.has_value(), "give scores and threshold, or packed");
    const Experts keep = Experts::input(*scores, place, "scores");
    keep.check_size(experts, "scores");
    p.keep.scores = keep.first, g.score_stride = keep.stride;
    p.keep.thresholds = contiguous(*threshold, place, scores->scalar_type(), g.experts, "threshold");
    p.keep.magnitude = magnitude;
  }
  const int64_t sizes[] = {p.in.rows, transposed ? p.weight.columns : p.weight.rows};
  if (bias.has_value()) {
    p.bias = contiguous(*bias, place, weight.scalar_type(), g.experts * sizes[1], "bias");
  }
  Tensor out = torch::stable::new_empty(x, {sizes, 2});
  p.out = mft::cuda::output(out, place, "out");
  std::optional<Tensor> bits;
  if (!packed.has_value() && !mft::cuda::reads_scores(g)) {
    bits = packed_of(g, place, weight);
    p.keep = {};
    p.keep.words = mft::cuda::present(static_cast<const uint32_t*>(bits->const_data_ptr()));
  }
  mft::cuda::check_launch(mft::cuda::grouped_product(g, place.device));
  return out;
}

void grouped_score_grad_(Tensor out, Tensor grad_output, Tensor x, Tensor offsets, std::optional<Tensor> weight,
                         std::optional<Tensor> sign_scores, std::optional<Tensor> sign_words, bool accumulate) {
  const Place place(x);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const Experts sums = Experts::of(out, place, "out", out.mutable_data_ptr());
  mft::cuda::GroupedScoreGrad g;
  mft::cuda::ScoreGrad& p = g.of;
  g.experts = sums.count;
  p.d_scores = sums.first, p.accumulate = accumulate;
  const Matrix in = mft::cuda::weight_of(x, place, "x");
  p.weight = {nullptr, in.type, sums.first.rows, sums.first.columns, sums.first.columns};
  if (weight.has_value()) {
    const Experts factor = Experts::input(*weight, place, "weight");
    factor.check_size(sums, "weight");
    STD_TORCH_CHECK(factor.first.type == in.type, "weight must have x's dtype");
    p.weight = factor.first, g.weight_stride = factor.stride;
  }
  p.x = in;
  p.grad_output = mft::cuda::like_weight(grad_output, place, p.weight, "grad_output");
  mft::cuda::check_size(p.x, p.x.rows, p.weight.columns, "x");
  mft::cuda::check_size(p.grad_output, p.x.rows, p.weight.rows, "grad_output");
  g.offsets = offsets_of(offsets, place, g.experts);
  if (sign_words.has_value()) {
    p.sign.words = words_of(*sign_words, place, sums, "signs");
  } else if (sign_scores.has_value()) {
    const Experts sign = Experts::input(*sign_scores, place, "scores");
    sign.check_size(sums, "scores");
    p.sign.scores = sign.first, g.score_stride = sign.stride;
  }
  mft::cuda::check_launch(mft::cuda::grouped_score_grad(g, place.device));
}

// Return the threshold of each expert, all with the same k. The launches follow each other in the stream, so one
// workspace serves all.
Tensor kept_thresholds(Tensor scores, int64_t k, bool magnitude) {
  const Place place(scores);
  STD_TORCH_CHECK(scores.is_contiguous() && scores.dim() > 0 && scores.size(0) > 0,
                  "scores must be contiguous and of one expert at least");
  const int64_t sizes[] = {scores.size(0)};
  mft::cuda::Select s;
  s.type = mft::cuda::type_of(scores, "scores");
  s.count = scores.numel() / sizes[0], s.k = k, s.magnitude = magnitude;
  STD_TORCH_CHECK(k >= 0 && k <= s.count, "k must lie in [0, ", s.count, "]");
  Tensor thresholds = torch::stable::new_empty(scores, {sizes, 1});
  const int64_t bytes[] = {mft::cuda::select_workspace(s.type)}, size = mft::cuda::bytes_of(s.type);
  Tensor workspace = torch::stable::new_empty(scores, {bytes, 1}, ScalarType::Byte);
  s.workspace = workspace.mutable_data_ptr();
  for (int64_t e = 0; e < sizes[0]; ++e) {
    s.scores = static_cast<const char*>(scores.const_data_ptr()) + e * s.count * size;
    s.threshold = static_cast<char*>(thresholds.mutable_data_ptr()) + e * size;
    mft::cuda::check_launch(mft::cuda::kept_threshold(s, place.device));
  }
  return thresholds;
}

}  // namespace

MFT_OPS(m) {
  m.def(
      "grouped_product(Tensor x, Tensor weight, Tensor? scores, Tensor? threshold, Tensor? packed, Tensor offsets, "
      "Tensor? bias, bool magnitude, bool transposed) -> Tensor");
  m.def(
      "grouped_score_grad_(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor offsets, Tensor? weight, "
      "Tensor? sign_scores, Tensor? sign_words, bool accumulate) -> ()");
  m.def("kept_thresholds(Tensor scores, int k, bool magnitude) -> Tensor");
}

MFT_OPS_ON(MFT_KEY, m) {
  m.impl("grouped_product", TORCH_BOX(&grouped_product));
  m.impl("grouped_score_grad_", TORCH_BOX(&grouped_score_grad_));
  m.impl("kept_thresholds", TORCH_BOX(&kept_thresholds));
}
