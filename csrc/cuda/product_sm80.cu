// product_sm80: chooses decode_sm80 or one of the general kernels, and says what none of them takes.
#include "product_sm80.cuh"
#include "tile_cost.h"

namespace mft::cuda {
namespace {

int64_t part_stride(const Product& p) { return quotient(p.out.columns, sm80::kTileFeatures) * sm80::kTileFeatures; }

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

// Return the largest number of parts to try. Each part has at least 256 depths, all parts run in two waves, and their
// sums fit in half of L2.
int most_parts(const Product& p, int tokens, const Device& device) {
  const int64_t tiles = quotient(p.out.columns, sm80::kTileFeatures) * quotient(p.out.rows, tokens);
  return static_cast<int>(std::min<int64_t>({kMostParts, quotient(p.in.columns, sm80::kTileDepth) / 8,
                                             4 * device.multiprocessors / tiles,
                                             device.l2_bytes / 2 / (4 * p.out.rows * part_stride(p))}));
}

// If the kernel must load by elements, it takes longer than the model knows, and the depth is one part.
Plan plan_of(const Product& p, const Device& device, bool in_parts) {
  Plan best{kNever, 128};
  if (!sm80::is_chunked(p)) return best;
  const int64_t depth_tiles = quotient(p.in.columns, sm80::kTileDepth), row_bytes = 4 * part_stride(p);
  for (const int tokens : {64, 128}) {
    if (tokens > 64 && p.out.rows <= 64) continue;
    const int most = in_parts ? most_parts(p, tokens, device) : 1;
    for (int parts = 1; parts <= std::max(1, most); ++parts) {
      if (parts > 1 && quotient(depth_tiles, quotient(depth_tiles, parts)) != parts) continue;  // a part would be empty
      const double cycles = cycles_of(p, tokens, parts, device);
      if (cycles < best.cycles) best = {cycles, tokens, parts, parts > 1 ? parts * p.out.rows * row_bytes : 0};
    }
  }
  return best;
}

}  // namespace

bool decodes(const Product& p, const Device& device) {
  if (!takes_decode(p)) return false;
  return p.out.rows <= 16 || plan_decode(p, device).cycles <= plan_general(p, device).cycles;
}

std::string product_sm80(const Product& p, const Device& device) {
  if (p.weight.type == Type::kFloat32) return "weight must be bf16 or fp16, got fp32; use the triton backend";
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
