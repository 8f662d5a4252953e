// Products with quantised weights: what no kernel takes, which kernel is launched for the others, and for
// quantized_sm80 the tile and the number of parts.
#include "quantized_launch_sm80.cuh"
#include "tile_cost.h"

namespace mft::cuda {
namespace {

// Return the cycles of a block to decode a step. Each of 8 warps issues 310 or 275 instructions (SASS of nvcc 13.0, 16
// tokens), 4 per cycle in total.
double decode_cycles(bool nf4) { return 2 * (nf4 ? 310 : 275); }

int64_t part_stride(const QuantizedProduct& p) { return quotient(p.out.columns, sm80::kTileFeatures) * sm80::kTileFeatures; }

double cycles_of(const QuantizedProduct& p, int tokens, int parts, const Device& device) {
  const Rates rates = rates_of(device.capability);
  const double rate = rates.multiply_adds;
  Jobs jobs;
  jobs.count = quotient(p.out.columns, sm80::kTileFeatures) * quotient(p.out.rows, tokens) * parts;
  jobs.steps = quotient(quotient(p.in.columns, sm80::kQuantizedDepth), parts);
  const double products = sm80::kTileFeatures * tokens * sm80::kQuantizedDepth;
  jobs.multiply_adds = std::max(products, decode_cycles(p.weight.nf4) * rate);
  jobs.read = sm80::kQuantizedDepth * (2 * tokens + sm80::kTileFeatures * weight_bytes(p));
  jobs.written = sm80::kTileFeatures * tokens * (parts > 1 ? 4 : 2);
  const int stages = sm80::stages_of(sm80::quantized_stage(tokens, p.weight.nf4), device, 2 * 16384 + 128);
  const int blocks = tokens == 128 && !p.weight.nf4 ? 1 : 2;  // as the kernels require
  const double busy = busy_cycles(jobs, device.multiprocessors, blocks, stages, rate, rates.l2);
  return launch_cycles(busy, bytes_of(p), device) +
         sum_cycles(parts, static_cast<double>(p.out.rows) * p.out.columns, device);
}

// Return the largest number of parts to try. Each part has at least 256 depths, all parts run in two waves, and their
// sums fit in half of L2.
int most_parts(const QuantizedProduct& p, int tokens, const Device& device) {
  const int64_t tiles = quotient(p.out.columns, sm80::kTileFeatures) * quotient(p.out.rows, tokens);
  return static_cast<int>(std::min<int64_t>({kMostParts, p.in.columns / 256, 4 * device.multiprocessors / tiles,
                                             device.l2_bytes / 2 / (4 * p.out.rows * part_stride(p))}));
}

Plan plan_of(const QuantizedProduct& p, const Device& device, bool in_parts) {
  Plan best{kNever, 64};
  const int64_t steps = quotient(p.in.columns, sm80::kQuantizedDepth), row_bytes = 4 * part_stride(p);
  const bool whole = sm80::is_whole(p);
  for (const int tokens : {16, 64, 128}) {
    const int smaller = tokens == 128 ? 64 : tokens == 64 ? 16 : 0;
    if (whole ? p.out.rows <= smaller : tokens != 64) continue;
    const int most = in_parts ? most_parts(p, tokens, device) : 1;
    for (int parts = 1; parts <= std::max(1, most); ++parts) {
      if (parts > 1 && quotient(steps, quotient(steps, parts)) != parts) continue;  // a part would be empty
      const double cycles = cycles_of(p, tokens, parts, device);
      if (cycles < best.cycles) best = {cycles, tokens, parts, parts > 1 ? parts * p.out.rows * row_bytes : 0};
    }
  }
  return best;
}

// Return the cycles of Hopper's kernel, or kNever if it does not take the product.
double hopper_cycles(const QuantizedProduct& p, const Device& device) {
  return device.capability == 90 && refusal_sm90(p).empty() ? plan_sm90(p, device).cycles : kNever;
}

// Return whether Hopper's kernel is expected to take no longer than quantized_sm80.
bool is_hopper_s(const QuantizedProduct& p, const Device& device, bool in_parts) {
  const double cycles = hopper_cycles(p, device);
  return cycles < kNever && cycles <= plan_of(p, device, in_parts).cycles;
}

}  // namespace

std::string product_quantized(const QuantizedProduct& p, const Device& device) {
  if (p.out.type == Type::kFloat32) return "x must be bf16 or fp16, got fp32; use the triton backend";
  if (std::max({p.out.rows, p.weight.rows, p.weight.columns}) > sm80::kLongestSide) {
    return "x and weight must have sides below 2^31 - 2^16; split them";
  }
  if (p.out.rows == 0 || p.out.columns == 0) return "";
  if (decodes(p, device)) return decode_sm80(p, device);
  if (is_hopper_s(p, device, p.workspace != nullptr)) return product_sm90(p, device);
  return product_general(p, device);
}

std::string product_general(const QuantizedProduct& p, const Device& device) {
  const Plan plan = plan_of(p, device, p.workspace != nullptr);
  if (p.out.type == Type::kBFloat16) return sm80::quantized_of<BFloat16>(p, plan, device);
  return sm80::quantized_of<Float16>(p, plan, device);
}

Plan plan_general(const QuantizedProduct& p, const Device& device) {
  return p.out.rows == 0 || p.out.columns == 0 ? Plan{} : plan_of(p, device, true);
}

bool decodes(const QuantizedProduct& p, const Device& device) {
  if (!takes_decode(p)) return false;
  return plan_decode(p, device).cycles <= std::min(plan_general(p, device).cycles, hopper_cycles(p, device));
}

Plan plan_quantized(const QuantizedProduct& p, const Device& device) {
  if (decodes(p, device)) return plan_decode(p, device);
  return is_hopper_s(p, device, true) ? plan_sm90(p, device) : plan_general(p, device);
}

}  // namespace mft::cuda
