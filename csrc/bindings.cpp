// The ops of namespace mft_cpu: their schemas, and the functions that pass tensors to the kernels. They use torch's
// stable ABI, so one shared object serves torch 2.11 and newer. mft_kernels/backends/cpu/__init__.py makes every input
// contiguous, and 2-d except for the tokens of masked_linear and grad_x.

#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/capability.h"
#include "cpu/choice.h"
#include "cpu/parallel.h"
#include "cpu/score_step.h"
#include "cpu/select.h"
#include "operands.h"
#include "text.h"

namespace mft::ops {
namespace {

Tensor masked_linear(Tensor x, Tensor weight, std::optional<Tensor> scores, std::optional<Tensor> threshold,
                     std::optional<Tensor> packed, std::optional<Tensor> bias, bool magnitude, Text path) {
  const Matrix w = input(weight, "weight");
  return forward_of(x, w, mask_source(scores, threshold, packed, magnitude, w.rows, w.columns),
                    bias_of(bias, w.rows, w.format), mft::path_of(path));
}

Tensor grad_x(Tensor grad_output, Tensor weight, std::optional<Tensor> scores, std::optional<Tensor> threshold,
              std::optional<Tensor> packed, bool magnitude, Text path) {
  const Matrix w = input(weight, "weight");
  return d_x_of(grad_output, w, mask_source(scores, threshold, packed, magnitude, w.rows, w.columns),
                mft::path_of(path));
}

Tensor grad_weight(Tensor grad_output, Tensor x, std::optional<Tensor> scores, std::optional<Tensor> threshold,
                   std::optional<Tensor> packed, bool magnitude) {
  const mft::Capability& cpu = mft::chosen_capability();
  const Matrix in = input(x, "x"), grad = input(grad_output, "grad_output");
  STD_TORCH_CHECK(grad.format == in.format && grad.rows == in.rows, "grad_output must be (M, N) in x's dtype");
  Tensor d_weight = empty_matrix(x, grad.columns, in.columns, in.rows);
  mft::grad_weight(cpu, output(d_weight, "d_weight"), grad, in,
                   mask_source(scores, threshold, packed, magnitude, grad.columns, in.columns));
  return d_weight;
}

void grad_scores_(Tensor out, Tensor grad_output, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> scores,
                  std::optional<Tensor> signs, bool accumulate, Text path) {
  const mft::Capability& cpu = mft::chosen_capability();
  const Matrix in = input(x, "x"), grad = input(grad_output, "grad_output");
  const Matrix w = weight.has_value() ? input(*weight, "weight")
                                      : Matrix{nullptr, in.format, grad.columns, in.columns, in.columns};
  STD_TORCH_CHECK(grad.format == w.format && in.format == w.format && grad.rows == in.rows &&
                      grad.columns == w.rows && in.columns == w.columns,
                  "grad_output must be (M, N) and x (M, K), in weight's dtype");
  check_size(out, w.rows, w.columns, "out");
  const mft::SignSource sign = sign_source(scores, signs, w.rows, w.columns);
  const Matrix destination = output(out, "out");
  if (!accumulate) {  // then out was most likely just allocated
    expect_writes(destination.data, w.rows * w.columns * mft::bytes_of(destination.format), in.rows);
  }
  mft::grad_scores(cpu, destination, grad, in, w, sign, accumulate, mft::path_of(path));
}

// Write the bits of a number of 4 or 2 bytes.
void write(void* to, uint32_t bits, int64_t bytes) {
  const auto low = static_cast<uint16_t>(bits);
  std::memcpy(to, bytes == 4 ? static_cast<const void*>(&bits) : &low, bytes);
}

// Return the k-th largest score of each matrix in scores (E, ...), (E,).
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
    write(to + e * width, mft::kth_largest(from + e * each * width, format, each, k, magnitude), width);
  };
  // Each thread selects for one matrix at a time, as long as there are enough. All threads together select for each of
  // the rest.
  const int64_t alone = count / mft::num_threads() * mft::num_threads();
  mft::parallel_for(0, alone, 1, [&](int64_t begin, int64_t end) {
    const mft::Alone guard;
    for (int64_t e = begin; e < end; ++e) select(e);
  });
  for (int64_t e = alone; e < count; ++e) select(e);
  return thresholds;
}

// Returns int32 (rows, ceil(columns / 32)). pack(words, row) writes one row.
template <typename Pack>
Tensor packed_rows(const Matrix& s, const Tensor& like, const Pack& pack) {
  const int64_t sizes[] = {s.rows, (s.columns + 31) / 32};
  Tensor packed = torch::stable::new_empty(like, {sizes, 2}, ScalarType::Int);
  auto* words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  mft::parallel_for(0, s.rows, 1 + 32768 / (s.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) pack(words + r * sizes[1], r);
  });
  return packed;
}

Tensor pack_mask(Tensor scores, Tensor threshold, bool magnitude) {
  const mft::RowKernels& rows = *mft::chosen_capability().rows;
  const Matrix s = input(scores, "scores");
  const auto keep = ranges(threshold, threshold.dim() == 0 ? 1 : s.rows, s.format, magnitude);
  return packed_rows(s, scores, [&](uint32_t* words, int64_t r) {
    rows.pack(words, s.row(r), s.format, keep[keep.size() == 1 ? 0 : r], s.columns);
  });
}

std::tuple<Tensor, Tensor> pack_signs(Tensor scores) {
  const mft::RowKernels& rows = *mft::chosen_capability().rows;
  const Matrix s = input(scores, "scores");
  const mft::KeepRange positive = mft::range_positive(s.format), zero = mft::range_zero(s.format);
  std::atomic<int64_t> zeros{0};
  Tensor signs = packed_rows(s, scores, [&](uint32_t* words, int64_t r) {
    rows.pack(words, s.row(r), s.format, positive, s.columns);
    zeros += rows.count(s.row(r), s.format, zero, s.columns);
  });
  Tensor count = torch::stable::new_empty(scores, {}, ScalarType::Long);
  *static_cast<int64_t*>(count.mutable_data_ptr()) = zeros;
  return {signs, count};
}

mft::ScoreFormat score_format_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return mft::ScoreFormat::kFloat32;
  if (t.scalar_type() == ScalarType::BFloat16) return mft::ScoreFormat::kBFloat16;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Short, "scores must be float32, bfloat16 or int16");
  return mft::ScoreFormat::kFixed16;
}

void* moment(const Tensor& t, const Tensor& scores, bool coded, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == scores.numel(), name, " must be contiguous, one a score");
  STD_TORCH_CHECK(t.scalar_type() == (coded ? ScalarType::Byte : ScalarType::Float), name,
                  " must be uint8 with scales, float32 without");
  return t.mutable_data_ptr();
}

// Run one optimiser step. With k < 0 no threshold is requested, and the returned value is not a threshold.
Tensor score_step_(Tensor scores, Tensor grad, std::optional<Tensor> weight, Tensor exp_avg, Tensor exp_avg_sq,
                   std::optional<Tensor> scales, int64_t step, double step_size, double beta1, double beta2,
                   double correction, double eps, double decay, std::optional<Tensor> grad_scale, int64_t seed,
                   bool sign, int64_t k, bool magnitude, std::optional<Tensor> near) {
  const int64_t n = scores.numel(), blocks = (n + mft::kStepBlock - 1) / mft::kStepBlock;
  STD_TORCH_CHECK(scores.is_contiguous() && grad.is_contiguous() && grad.numel() == n && k <= n,
                  "scores and grad must be contiguous and of one size");
  mft::StepTensors t{};
  t.scores = scores.mutable_data_ptr();
  t.score_format = score_format_of(scores);
  t.grad = grad.const_data_ptr();
  t.grad_format = format_of(grad, "grad");
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->is_contiguous() && weight->numel() == n, "weight must be contiguous, one a score");
    t.weight = weight->const_data_ptr();
    t.weight_format = format_of(*weight, "weight");
  }
  t.exp_avg = moment(exp_avg, scores, scales.has_value(), "exp_avg");
  t.exp_avg_sq = moment(exp_avg_sq, scores, scales.has_value(), "exp_avg_sq");
  if (scales.has_value()) {
    STD_TORCH_CHECK(scales->scalar_type() == ScalarType::Float && scales->is_contiguous(), "scales must be float32");
    check_size(*scales, 2, blocks, "scales");
    t.mean_scales = static_cast<float*>(scales->mutable_data_ptr());
    t.square_scales = t.mean_scales + blocks;
  }
  mft::StepConstants c{};
  c.beta1 = static_cast<float>(beta1);
  c.one_minus_beta1 = static_cast<float>(1 - beta1);
  c.beta2 = static_cast<float>(beta2);
  c.one_minus_beta2 = static_cast<float>(1 - beta2);
  c.decay = static_cast<float>(decay);
  c.decays = decay != 1;
  c.minus_step_size = static_cast<float>(-step_size);
  c.correction = static_cast<float>(correction);
  c.eps = static_cast<float>(eps);
  if (grad_scale.has_value()) {
    STD_TORCH_CHECK(grad_scale->scalar_type() == ScalarType::Float && grad_scale->numel() == 1,
                    "grad_scale must be one float32");
    c.grad_scale = *static_cast<const float*>(grad_scale->const_data_ptr());
    c.scales_grad = true;
  }
  c.sign = sign;
  c.seed_low = static_cast<uint32_t>(seed);
  c.seed_high = static_cast<uint32_t>(seed >> 32);
  c.step = static_cast<uint32_t>(step);
  const void* hint = nullptr;
  if (near.has_value()) {
    STD_TORCH_CHECK(near->numel() == 1 && near->scalar_type() == scores.scalar_type(),
                    "threshold must be one of the scores' dtype");
    hint = near->const_data_ptr();
  }
  const uint32_t bits = mft::score_step(*mft::chosen_capability().step, t, c, n, k, magnitude, hint);
  Tensor threshold = torch::stable::new_empty(scores, {});
  write(threshold.mutable_data_ptr(), bits, t.score_format == mft::ScoreFormat::kFloat32 ? 4 : 2);
  return threshold;
}

// Return the paths of a product of these sizes, the fastest first, separated by commas. `capability` may be one that
// this CPU cannot run.
std::string paths(Text capability, Text product, Text dtype, int64_t m, int64_t n, int64_t k,
                  double weight_bytes, double mask_bytes) {
  const mft::Call call{mft::product_of(product), mft::format_of(dtype), m, n, k, weight_bytes, mask_bytes};
  std::string names;
  for (const mft::Path path : mft::paths(capability, call)) {
    if (!names.empty()) names += ",";
    names += mft::name_of(path);
  }
  return names;
}

// Return the weight_bytes argument of `paths` and `path_work`, from bytes per element; see choice.h.
double weight_bytes(Text product, int64_t weight, double mask, int64_t out, bool accumulate) {
  return mft::weight_bytes(mft::product_of(product), static_cast<int>(weight), mask, static_cast<int>(out), accumulate);
}

// Return the work on a path in the terms of the cost model, as numbers separated by commas. `paths` returns the fastest
// path first.
std::string path_work(Text capability, Text path, Text product, Text dtype, int64_t m, int64_t n, int64_t k,
                      double weight_bytes, double mask_bytes) {
  const mft::Call call{mft::product_of(product), mft::format_of(dtype), m, n, k, weight_bytes, mask_bytes};
  std::string numbers;
  for (const double term : mft::work_of(std::string(capability), call, mft::path_of(path))) {
    if (!numbers.empty()) numbers += ",";
    numbers += std::to_string(term);
  }
  return numbers;
}

std::string capability() { return mft::chosen_capability().name; }

std::string capabilities() { return mft::available_capabilities(); }

std::string missing_capabilities() { return mft::missing_capabilities(); }

}  // namespace

MFT_OPS(CPU) {
  MFT_OP(masked_linear,
         "(Tensor x, Tensor weight, Tensor? scores, Tensor? threshold, Tensor? packed, Tensor? bias, bool magnitude, str "
         "path) -> Tensor");
  MFT_OP(grad_x,
         "(Tensor grad_output, Tensor weight, Tensor? scores, Tensor? threshold, Tensor? packed, bool magnitude, str "
         "path) -> Tensor");
  MFT_OP(grad_weight,
         "(Tensor grad_output, Tensor x, Tensor? scores, Tensor? threshold, Tensor? packed, bool magnitude) -> Tensor");
  MFT_OP(grad_scores_,
         "(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor? weight, Tensor? scores, Tensor? signs, bool accumulate, "
         "str path) -> ()");
  MFT_OP(kept_thresholds, "(Tensor scores, int k, bool magnitude) -> Tensor");
  MFT_OP(pack_mask, "(Tensor scores, Tensor threshold, bool magnitude) -> Tensor");
  MFT_OP(pack_signs, "(Tensor scores) -> (Tensor, Tensor)");
  MFT_OP(score_step_,
         "(Tensor(a!) scores, Tensor grad, Tensor? weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? "
         "scales, int step, float step_size, float beta1, float beta2, float correction, float eps, float decay, Tensor? "
         "grad_scale, int seed, bool sign, int k, bool magnitude, Tensor? near) -> Tensor");
}

MFT_OPS(CompositeExplicitAutograd) {
  MFT_OP(paths,
         "(str capability, str product, str dtype, int m, int n, int k, float weight_bytes, float mask_bytes) -> str");
  MFT_OP(weight_bytes, "(str product, int weight, float mask, int out, bool accumulate) -> float");
  MFT_OP(path_work,
         "(str capability, str path, str product, str dtype, int m, int n, int k, float weight_bytes, float mask_bytes) "
         "-> str");
  MFT_OP(capability, "() -> str");
  MFT_OP(capabilities, "() -> str");
  MFT_OP(missing_capabilities, "() -> str");
}

}  // namespace mft::ops
