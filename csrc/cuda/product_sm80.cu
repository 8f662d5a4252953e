// product_sm80: which of the general kernels, and what none of them takes.
#include "product_sm80.cuh"
#include "tile_cost.h"

namespace mft::cuda {

std::string product_sm80(const Product& p, const Device& device) {
  if (p.weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32; use the triton backend";
  if (std::max({p.out.rows, p.weight.rows, p.weight.columns}) > sm80::kLongestSide) {
    return "x and weight must have sides below 2^31 - 2^16; split them";
  }
  if (p.out.rows == 0 || p.out.columns == 0) return "";
  if (takes_decode(p)) return decode_sm80(p, device);
  if (p.weight.type == Type::kBFloat16) return sm80::product_of<BFloat16>(p, device);
  return sm80::product_of<Float16>(p, device);
}

// By elements it takes longer than the model knows of, and few tokens are not summed in parts.
Plan plan_sm80(const Product& p, const Device& device) {
  if (p.out.rows == 0 || p.out.columns == 0) return {};
  if (takes_decode(p)) return plan_decode(p, device);
  if (!sm80::is_chunked(p)) return {kNever, 128};
  const int parts = sm80::parts_of(p, device), tokens = p.out.rows <= sm80::kFewTokens ? sm80::kFewTokens : 128;
  const double mask = p.keep.words != nullptr ? 1.0 / 8 : bytes_of(p.keep.scores.type);
  const int64_t columns = quotient(p.out.columns, sm80::kTileFeatures);
  Jobs jobs;
  jobs.count = columns * quotient(p.out.rows, tokens) * parts;
  jobs.steps = quotient(quotient(p.in.columns, sm80::kTileDepth), parts);
  jobs.multiply_adds = sm80::kTileFeatures * tokens * sm80::kTileDepth;
  jobs.read = sm80::kTileDepth * (2 * tokens + sm80::kTileFeatures * (2 + mask));
  jobs.written = sm80::kTileFeatures * tokens * (parts > 1 ? 4 : 2);
  const int stages = sm80::stages_of(static_cast<int>(jobs.read), device);
  const double busy =
      busy_cycles(jobs, device.multiprocessors, 2, stages, rates_of(device.capability).multiply_adds);
  Plan plan{0, tokens, parts};
  plan.cycles = launch_cycles(busy, bytes_of(p), device) +
                sum_cycles(parts, static_cast<double>(p.out.rows) * p.out.columns, device);
  if (parts > 1) plan.workspace = parts * p.out.rows * columns * sm80::kTileFeatures * 4;
  return plan;
}

}  // namespace mft::cuda
