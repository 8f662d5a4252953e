// score_grad_sm80: the arguments of the general kernel, and what it does not take.
#include "score_grad_sm80.cuh"
#include "tile_cost.h"

#include <algorithm>

namespace mft::cuda {
namespace {

using Chunked = sm80::ScoreGradKernel<BFloat16, true>;
constexpr int kTile = Chunked::kTile, kTileDepth = Chunked::kTileDepth;

bool is_chunked(const ScoreGrad& p) { return sm80::view_of(p.grad_output).chunked && sm80::view_of(p.x).chunked; }

// Return the elements of a row of the workspace: whole tiles.
int64_t part_stride(const ScoreGrad& p) { return quotient(p.weight.columns, kTile) * kTile; }

double cycles_of(const ScoreGrad& p, int parts, const Device& device) {
  const double elements = static_cast<double>(p.weight.rows) * p.weight.columns;
  Jobs jobs;
  jobs.count = quotient(p.weight.rows, kTile) * quotient(p.weight.columns, kTile) * parts;
  jobs.steps = quotient(quotient(p.x.rows, kTileDepth), parts);
  jobs.multiply_adds = kTile * kTile * kTileDepth;
  jobs.read = Chunked::kStageBytes;
  jobs.written = kTile * kTile * (parts > 1 ? 4 : kEpilogueBytes);
  const int stages = std::clamp(sm80::stages_of(Chunked::kStageBytes, device), 3, Chunked::kMostStages);
  const Rates rates = rates_of(device.capability);
  const double busy = busy_cycles(jobs, device.multiprocessors, Chunked::kBlocksPerMultiprocessor, stages,
                                  rates.multiply_adds, rates.l2);
  const double finished = parts > 1 ? kEpilogueBytes * elements / (rates.l2 * device.multiprocessors) : 0;
  return launch_cycles(busy, bytes_of(p), device) + sum_cycles(parts, elements, device) + finished;
}

std::string finish_parts(const sm80::ScoreGradArguments& a, int parts, const Device& device) {
  using Kernel = sm80::FinishPartsKernel;
  LaunchShape shape;
  shape.x = sm80::tiles_of(static_cast<int64_t>(a.weight.rows) * sm80::tiles_of(a.weight.columns, 8), Kernel::kThreads);
  return isa::launch<Kernel>(shape, device.stream, {a, parts});
}

template <class T>
std::string start(sm80::ScoreGradArguments a, int parts, const Device& device) {
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    a.stages = std::clamp(sm80::stages_of(Kernel::kStageBytes, device), 3, Kernel::kMostStages);
    LaunchShape shape;
    shape.x = static_cast<int64_t>(a.tile_rows) * a.tile_columns;
    shape.y = parts;
    shape.shared_bytes = a.stages * Kernel::kStageBytes;
    if (shape.x > sm80::kLongestSide) return std::string("weight has too many elements, 2^31 tiles of 128 x 128");
    return isa::launch<Kernel>(shape, device.stream, a);
  };
  if (!a.grad_output.chunked || !a.x.chunked) return launch(sm80::ScoreGradKernel<T, false>{});
  const std::string error = launch(sm80::ScoreGradKernel<T, true>{});
  return error.empty() && parts > 1 ? finish_parts(a, parts, device) : error;
}

}  // namespace

// If the kernel must load by elements, it takes longer than the model knows, and tokens are not summed in parts.
Plan plan_sm80(const ScoreGrad& p, const Device& device) {
  if (p.weight.rows == 0 || p.weight.columns == 0) return {};
  Plan best{kNever, kTileDepth};
  if (!is_chunked(p)) return best;
  const int64_t tiles = quotient(p.weight.rows, kTile) * quotient(p.weight.columns, kTile);
  const int64_t part_bytes = 4 * p.weight.rows * part_stride(p);
  // Two blocks per multiprocessor; a part has at least 256 tokens.
  const int64_t most = most_parts(p.x.rows / 256, 4 * device.multiprocessors, tiles, part_bytes, device);
  try_parts(best, kTileDepth, quotient(p.x.rows, kTileDepth), 1, most, part_bytes,
            [&](int parts) { return cycles_of(p, parts, device); });
  return best;
}

std::string score_grad_sm80(const ScoreGrad& p, const Device& device) {
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
  const int parts = p.workspace != nullptr ? plan_sm80(p, device).parts : 1;
  if (parts > 1) a.parts = static_cast<float*>(p.workspace);
  a.part_tiles = sm80::tiles_of(a.depth_tiles, parts);
  a.part_stride = part_stride(p);
  return p.weight.type == Type::kBFloat16 ? start<BFloat16>(a, parts, device) : start<Float16>(a, parts, device);
}

}  // namespace mft::cuda
