// score_grad_sm80: the arguments of the general kernel, and what it does not take.
#include "score_grad_sm80.cuh"

#include <algorithm>

namespace mft::cuda {
namespace {

template <class T>
std::string start(sm80::ScoreGradArguments a, const Device& device) {
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    a.stages = std::clamp(sm80::stages_of(Kernel::kStageBytes, device), 3, Kernel::kMostStages);
    LaunchShape shape;
    shape.x = static_cast<int64_t>(a.tile_rows) * a.tile_columns;
    shape.shared_bytes = a.stages * Kernel::kStageBytes;
    if (shape.x > sm80::kLongestSide) return std::string("weight has too many elements, 2^31 tiles of 128 x 128");
    return isa::launch<Kernel>(shape, device.stream, a);
  };
  if (a.grad_output.chunked && a.x.chunked) return launch(sm80::ScoreGradKernel<T, true>{});
  return launch(sm80::ScoreGradKernel<T, false>{});
}

}  // namespace

std::string score_grad_sm80(const ScoreGrad& p, const Device& device) {
  if (p.weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32; use the triton backend";
  if (std::max({p.x.rows, p.weight.rows, p.weight.columns}) > sm80::kLongestSide) {
    return "x and weight must have sides below 2^31 - 2^16; split them";
  }
  if (p.weight.rows == 0 || p.weight.columns == 0) return "";
  sm80::ScoreGradArguments a = {};
  a.d_scores = sm80::view_of(p.d_scores), a.d_weight = sm80::view_of(p.d_weight);
  a.grad_output = sm80::view_of(p.grad_output), a.x = sm80::view_of(p.x), a.weight = sm80::view_of(p.weight);
  a.sign_scores = sm80::view_of(p.sign.scores), a.sign_words = p.sign.words;
  a.keep_scores = sm80::view_of(p.keep.scores), a.keep_words = p.keep.words;
  a.thresholds = static_cast<const char*>(p.keep.thresholds);
  a.threshold_bytes = p.keep.threshold_stride * bytes_of(p.keep.scores.type);
  a.accumulate = p.accumulate, a.magnitude = p.keep.magnitude;
  a.row_words = sm80::tiles_of(p.weight.columns, 32);
  a.depth_tiles = sm80::tiles_of(p.x.rows, 32);
  a.tile_rows = sm80::tiles_of(p.weight.rows, 128), a.tile_columns = sm80::tiles_of(p.weight.columns, 128);
  return p.weight.type == Type::kBFloat16 ? start<BFloat16>(a, device) : start<Float16>(a, device);
}

}  // namespace mft::cuda
