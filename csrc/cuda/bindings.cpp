// The ops of namespace mft_cuda: their schemas, and the functions that pass tensors to the kernels of api.h. They use
// torch's stable ABI, so one shared object serves torch 2.11 and newer. mft_kernels/backends/cuda/__init__.py makes
// every input 2-d with unit column stride.

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "operands.h"

#define MFT_TEXT(x) #x
#define MFT_EXPANDED(x) MFT_TEXT(x)
#ifndef MFT_CUDA_TARGETS
#define MFT_CUDA_TARGETS none
#endif

namespace mft::cuda {

// Stubs of the kernels that this build leaves out (building/cuda.py says why).
#ifndef MFT_CUDA_PRODUCT_SM90
std::string refusal_sm90(const Product&) { return "this build has no product_sm90"; }
Plan plan_sm90(const Product&, const Device&) { return {}; }
std::string product_sm90(const Product& product, const Device&) { return refusal_sm90(product); }
#endif
#ifndef MFT_CUDA_SCORE_GRAD_SM90
std::string refusal_sm90(const ScoreGrad&) { return "this build has no score_grad_sm90"; }
Plan plan_sm90(const ScoreGrad&, const Device&) { return {}; }
std::string score_grad_sm90(const ScoreGrad& grad, const Device&) { return refusal_sm90(grad); }
#endif

}  // namespace mft::cuda

namespace mft::cuda::ops {
namespace {

// Return whether Hopper's kernel is expected to take no longer than the general one, and the plan of the chosen kernel.
template <class Problem>
std::pair<bool, Plan> chosen_plan(const Problem& problem, const Device& device) {
  const Plan general = mft::cuda::plan_sm80(problem, device);
  if (device.capability == 90 && mft::cuda::refusal_sm90(problem).empty()) {
    const Plan own = mft::cuda::plan_sm90(problem, device);
    if (own.cycles <= general.cycles) return {true, own};
  }
  return {false, general};
}

// Return the plan of Hopper's product with the tile and the parts that p asks for.
Plan plan_as_asked(const mft::cuda::Product& p, const Device& device) {
  const std::string refusal = device.capability == 90 ? mft::cuda::refusal_sm90(p) : "the device must be of 9.0";
  STD_TORCH_CHECK(refusal.empty(), "tokens and parts are those of Hopper's product: ", refusal);
  const Plan plan = p.parts > 0 ? mft::cuda::plan_sm90(p, device) : Plan{};
  STD_TORCH_CHECK(plan.tokens == p.tokens && plan.parts == p.parts,
                  "tokens must be 64, 128 or 256, and each of parts must have steps to sum, got ", p.tokens, " and ",
                  p.parts);
  return plan;
}

Tensor product(Tensor x, Tensor weight, std::optional<Tensor> scores, std::optional<Tensor> threshold,
               std::optional<Tensor> packed, std::optional<Tensor> bias, bool magnitude, bool transposed,
               int64_t tokens, int64_t parts) {
  const Place place(weight);
  mft::cuda::Product p;
  p.weight = weight_of(weight, place);
  p.in = like_weight(x, place, p.weight, "x");
  check_size(p.in, p.in.rows, transposed ? p.weight.rows : p.weight.columns, "x");
  p.keep = keep_of(scores, threshold, packed, place, p.weight, magnitude);
  p.transposed = transposed;
  STD_TORCH_CHECK(!bias.has_value() || !transposed, "bias must be for the forward product");
  p.bias = bias_of(bias, place, p.weight);
  const int64_t sizes[] = {p.in.rows, transposed ? p.weight.columns : p.weight.rows};
  Tensor out = torch::stable::new_empty(x, {sizes, 2});
  p.out = output(out, place, "out");
  p.tokens = static_cast<int>(tokens), p.parts = static_cast<int>(parts);
  const auto [hopper, plan] = tokens > 0 ? std::pair(true, plan_as_asked(p, place.device)) : chosen_plan(p, place.device);
  const std::optional<Tensor> workspace = workspace_of(x, plan);
  if (workspace.has_value()) p.workspace = workspace->mutable_data_ptr();
  check_launch(hopper ? mft::cuda::product_sm90(p, place.device) : mft::cuda::product_sm80(p, place.device));
  return out;
}

void score_grad_(std::optional<Tensor> d_scores, std::optional<Tensor> d_weight, Tensor grad_output, Tensor x,
                 std::optional<Tensor> weight, std::optional<Tensor> sign_scores, std::optional<Tensor> sign_words,
                 std::optional<Tensor> scores, std::optional<Tensor> threshold, std::optional<Tensor> packed,
                 bool magnitude, bool accumulate) {
  const Place place(x);
  mft::cuda::ScoreGrad g;
  if (weight.has_value()) {
    g.weight = weight_of(*weight, place);
  } else {
    const Matrix in = weight_of(x, place, "x");
    g.weight = {nullptr, in.type, input(grad_output, place, "grad_output").columns, in.columns, in.columns};
  }
  g.x = like_weight(x, place, g.weight, "x");
  g.grad_output = like_weight(grad_output, place, g.weight, "grad_output");
  check_size(g.x, g.x.rows, g.weight.columns, "x");
  check_size(g.grad_output, g.x.rows, g.weight.rows, "grad_output");
  g.accumulate = accumulate;
  if (d_scores.has_value()) {
    g.d_scores = output(*d_scores, place, "d_scores");
    check_size(g.d_scores, g.weight.rows, g.weight.columns, "d_scores");
  }
  if (d_weight.has_value()) {
    g.d_weight = output(*d_weight, place, "d_weight");
    check_size(g.d_weight, g.weight.rows, g.weight.columns, "d_weight");
    STD_TORCH_CHECK(g.d_weight.type == g.weight.type, "d_weight must have weight's dtype");
    g.keep = keep_of(scores, threshold, packed, place, g.weight, magnitude);
  }
  if (sign_words.has_value()) {
    g.sign.words = words(*sign_words, place, g.weight, "signs");
  } else if (sign_scores.has_value()) {
    g.sign.scores = input(*sign_scores, place, "scores");
    check_size(g.sign.scores, g.weight.rows, g.weight.columns, "scores");
  }
  const auto [hopper, plan] = chosen_plan(g, place.device);
  const std::optional<Tensor> workspace = workspace_of(x, plan);
  if (workspace.has_value()) g.workspace = workspace->mutable_data_ptr();
  check_launch(hopper ? mft::cuda::score_grad_sm90(g, place.device) : mft::cuda::score_grad_sm80(g, place.device));
}

Tensor kept_threshold(Tensor scores, int64_t k, bool magnitude) {
  const Place place(scores);
  STD_TORCH_CHECK(scores.is_contiguous() && k >= 0 && k <= scores.numel(), "k must lie in [0, numel]");
  mft::cuda::Select s;
  s.scores = scores.const_data_ptr();
  s.type = type_of(scores, "scores");
  s.count = scores.numel();
  s.k = k;
  s.magnitude = magnitude;
  Tensor threshold = torch::stable::new_empty(scores, {});
  const int64_t bytes[] = {mft::cuda::select_workspace(s.type)};
  Tensor workspace = torch::stable::new_empty(scores, {bytes, 1}, ScalarType::Byte);
  s.threshold = threshold.mutable_data_ptr();
  s.workspace = workspace.mutable_data_ptr();
  check_launch(mft::cuda::kept_threshold(s, place.device));
  return threshold;
}

Tensor pack_mask(Tensor scores, Tensor threshold, bool magnitude) {
  const Place place(scores);
  mft::cuda::PackMask p;
  p.keep = keep_by_scores(scores, threshold, place, magnitude);
  Tensor packed = empty_words(scores, p.keep.scores);
  p.words = static_cast<uint32_t*>(packed.mutable_data_ptr());
  check_launch(mft::cuda::pack_mask(p, place.device));
  return packed;
}

std::tuple<Tensor, Tensor> pack_signs(Tensor scores) {
  const Place place(scores);
  mft::cuda::PackSigns p;
  p.scores = input(scores, place, "scores");
  Tensor signs = empty_words(scores, p.scores);
  Tensor zeros = torch::stable::new_empty(scores, {}, ScalarType::Long);
  p.words = static_cast<uint32_t*>(signs.mutable_data_ptr());
  p.zeros = static_cast<int64_t*>(zeros.mutable_data_ptr());
  check_launch(mft::cuda::pack_signs(p, place.device));
  return {signs, zeros};
}

// Return what the library contains: its targets, as "sm_80.sm_90.compute_80", then a space and the name of each Hopper
// kernel.
std::string contents() {
  std::string text = MFT_EXPANDED(MFT_CUDA_TARGETS);
#ifdef MFT_CUDA_PRODUCT_SM90
  text += " product_sm90";
#endif
#ifdef MFT_CUDA_SCORE_GRAD_SM90
  text += " score_grad_sm90";
#endif
  return text;
}

// Return the library's own CUDA version and the newest that the driver supports (0: no driver), as
// 1000 * major + 10 * minor.
std::tuple<int64_t, int64_t> versions() {
  int runtime = 0, driver = 0;
#ifndef MFT_CUDA_ON_HOST
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
#endif
  return {runtime, driver};
}

}  // namespace

MFT_OPS(MFT_KEY) {
  MFT_OP(product,
         "(Tensor x, Tensor weight, Tensor? scores, Tensor? threshold, Tensor? packed, Tensor? bias, bool magnitude, "
         "bool transposed, int tokens=0, int parts=0) -> Tensor");
  MFT_OP(score_grad_,
         "(Tensor(a!)? d_scores, Tensor(b!)? d_weight, Tensor grad_output, Tensor x, Tensor? weight, Tensor? "
         "sign_scores, Tensor? sign_words, Tensor? scores, Tensor? threshold, Tensor? packed, bool magnitude, bool "
         "accumulate) -> ()");
  MFT_OP(kept_threshold, "(Tensor scores, int k, bool magnitude) -> Tensor");
  MFT_OP(pack_mask, "(Tensor scores, Tensor threshold, bool magnitude) -> Tensor");
  MFT_OP(pack_signs, "(Tensor scores) -> (Tensor, Tensor)");
}

MFT_OPS(CompositeExplicitAutograd) {
  MFT_OP(contents, "() -> str");
  MFT_OP(versions, "() -> (int, int)");
}

}  // namespace mft::cuda::ops
