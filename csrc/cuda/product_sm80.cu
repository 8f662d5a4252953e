// product_sm80: chooses decode_sm80 or one of the general kernels, and says what none of them takes.
#include "product_sm80.cuh"
#include "tile_cost.h"

namespace mft::cuda {
namespace {

double cycles_of(const Product& p, int tokens, int parts, const Device& device) {
  const double mask = p.keep.words != nullptr ? 1.0 / 8 : bytes_of(p.keep.scores.type);
  Jobs jobs;
  jobs.count = quotient(p.out.columns, sm80::kTileFeatures) * quotient(p.out.rows, tokens) * parts;
  jobs.steps = quotient(quotient(p.in.columns, sm80::kTileDepth), parts);
  jobs.multiply_adds = sm80::kTileFeatures * tokens * sm80::kTileDepth;
  jobs.read = sm80::kTileDepth * (2 * tokens + sm80::kTileFeatures * (2 + mask));
  jobs.written = sm80::kTileFeatures * tokens * (parts > 1 ? 4 : 2);
  const int stages = sm80::stages_of(static_cast<int>(jobs.read), device);
  const Rates rates = rates_of(device.capability);
  const double busy = busy_cycles(jobs, device.multiprocessors, 2, stages, rates.multiply_adds, rates.l2);
  return launch_cycles(busy, bytes_of(p), device) +
         sum_cycles(parts, static_cast<double>(p.out.rows) * p.out.columns, device);
}

// If the kernel must load by elements, it takes longer than the model knows, and the depth is one part.
Plan plan_of(const Product& p, const Device& device, bool in_parts) {
  Plan best{kNever, 128};
  if (!sm80::is_chunked(p)) return best;
  const int64_t steps = quotient(p.in.columns, sm80::kTileDepth);
  const int64_t part_bytes = 4 * p.out.rows * quotient(p.out.columns, sm80::kTileFeatures) * sm80::kTileFeatures;
  for (const int tokens : {64, 128}) {
    if (tokens > 64 && p.out.rows <= 64) continue;
    const int64_t tiles = quotient(p.out.columns, sm80::kTileFeatures) * quotient(p.out.rows, tokens);
    // Two blocks per multiprocessor; a part has at least 256 depths.
    const int64_t most = in_parts ? most_parts(steps / 8, 4 * device.multiprocessors, tiles, part_bytes, device) : 1;
    try_parts(best, tokens, steps, 1, most, part_bytes,
              [&](int parts) { return cycles_of(p, tokens, parts, device); });
  }
  return best;
}

}  // namespace

bool decodes(const Product& p, const Device& device) {
  if (!takes_decode(p)) return false;
  return p.out.rows <= 16 || plan_decode(p, device).cycles <= plan_general(p, device).cycles;
}

std::string product_sm80(const Product& p, const Device& device) {
  if (std::max({p.out.rows, p.weight.rows, p.weight.columns}) > sm80::kLongestSide) {
    return "x and weight must have sides below 2^31 - 2^16; split them";
  }
  if (p.out.rows == 0 || p.out.columns == 0) return "";
  return decodes(p, device) ? decode_sm80(p, device) : product_general(p, device);
}

std::string product_general(const Product& p, const Device& device) {
  const Plan plan = plan_of(p, device, p.workspace != nullptr);
  if (p.weight.type == Type::kBFloat16) return sm80::product_of<BFloat16>(p, plan, device);
  return sm80::product_of<Float16>(p, plan, device);
}

Plan plan_sm80(const Product& p, const Device& device) {
  if (p.out.rows == 0 || p.out.columns == 0) return {};
  return decodes(p, device) ? plan_decode(p, device) : plan_general(p, device);
}

Plan plan_general(const Product& p, const Device& device) { return plan_of(p, device, true); }

}  // namespace mft::cuda
