// How product_sm90 is launched: into how many parts Q is cut and how many tokens a tile has, by the model of tile_cost.h,
// and what the kernel is told.
#pragma once

#include <algorithm>

#include "api.h"
#include "product_sm90.cuh"
#include "tile_cost.h"

namespace mft::cuda {

// How many steps a part has, an even number.
constexpr int part_steps(int64_t q, int step, int parts) {
  return static_cast<int>(quotient(quotient(q, 2 * step), parts) * 2);
}

// A row of the workspace: whole tiles.
constexpr int64_t part_stride_sm90(int64_t features) { return quotient(features, 256) * 256; }

template <class T, MaskKind kMask, bool kTransposed, int kTokens>
std::string launch_product_sm90(const Product& p, int parts, const Device& device) {
  using Kernel = ProductSm90<T, kMask, kTransposed, kTokens>;
  static_assert(Kernel::kCluster * Kernel::kFeatures == 256);
  typename Kernel::Arguments a{};
  const int64_t q = p.in.columns;
  a.thresholds = static_cast<const uint16_t*>(p.keep.thresholds);
  a.threshold_stride = p.keep.threshold_stride;
  a.bias = static_cast<const T*>(p.bias);
  a.features = static_cast<int>(p.out.columns);
  a.tokens = static_cast<int>(p.out.rows);
  a.steps = part_steps(q, Kernel::kStep, 1);
  a.feature_tiles = static_cast<int>(quotient(a.features, Kernel::kCluster * Kernel::kFeatures));
  a.token_tiles = static_cast<int>(quotient(a.tokens, kTokens));
  a.part_count = parts;
  a.part_steps = part_steps(q, Kernel::kStep, parts);
  if (parts > 1) a.parts = static_cast<float*>(p.workspace);
  a.part_stride = part_stride_sm90(a.features);

  const auto map = [](isa::TensorMap* m, const Matrix& matrix, int rows) {
    return isa::make_tensor_map(m, matrix.data, 2, matrix.rows, matrix.columns, 2 * matrix.stride, rows,
                                kRowBytes / 2, true);
  };
  const int weight_rows = kTransposed ? Kernel::kStep : Kernel::kFeatures;
  std::string failure = map(&a.weight, p.weight, weight_rows);
  if (failure.empty()) failure = map(&a.in, p.in, kTokens / Kernel::kCluster);
  if (failure.empty()) failure = map(&a.out, p.out, Kernel::kStoreTokens);
  if (!failure.empty()) return failure;
  if constexpr (kMask == MaskKind::kWords) {
    const int64_t words = (p.weight.columns + 31) / 32;
    failure = isa::make_tensor_map(&a.mask, p.keep.words, 4, p.weight.rows, words, 4 * words, Kernel::kMaskRows,
                                   Kernel::kWordsOfTile, false);
  } else {
    failure = map(&a.mask, p.keep.scores, weight_rows);
  }
  if (!failure.empty()) return failure;

  const int64_t tiles = static_cast<int64_t>(a.feature_tiles) * a.token_tiles * parts;
  const int64_t clusters = device.multiprocessors / Kernel::kCluster;
  LaunchShape shape;
  shape.x = (tiles < clusters ? tiles : clusters > 0 ? clusters : 1) * Kernel::kCluster;
  shape.cluster = Kernel::kCluster;
  shape.shared_bytes = Kernel::kSharedBytes;
  return isa::launch<Kernel>(shape, device.stream, a);
}

// What parts of Q are worth trying: four steps at least, no more than there are places for in two waves, and all of
// them in half of L2.
template <class Kernel, int kTokens>
int most_parts(const Product& p, const Device& device) {
  const int64_t tiles = quotient(p.out.columns, 256) * quotient(p.out.rows, kTokens);
  const int64_t of_l2 = device.l2_bytes / 2 / (4 * p.out.rows * part_stride_sm90(p.out.columns));
  return static_cast<int>(std::min<int64_t>(
      {kMostParts, p.in.columns / (4 * Kernel::kStep), device.multiprocessors / tiles, of_l2}));
}

// A cluster's two blocks, each on its multiprocessor, read half of the tokens from L2.
template <class Kernel, int kTokens>
double cycles_of_tile(const Product& p, int parts, const Device& device) {
  Jobs jobs;
  jobs.count = quotient(p.out.columns, 256) * quotient(p.out.rows, kTokens) * parts;
  jobs.steps = part_steps(p.in.columns, Kernel::kStep, parts);
  jobs.multiply_adds = Kernel::kFeatures * kTokens * Kernel::kStep;
  jobs.read = Kernel::kWeightStageBytes + Kernel::kInputBytes / Kernel::kCluster;
  jobs.written = (parts > 1 ? 4 : 2) * Kernel::kFeatures * kTokens;
  const int clusters = std::max(1, device.multiprocessors / Kernel::kCluster);
  const double busy = busy_cycles(jobs, clusters, Kernel::kBlocksPerMultiprocessor, Kernel::kStages, kWgmma,
                                  rates_of(device.capability).l2);
  return launch_cycles(busy, bytes_of(p), device) +
         sum_cycles(parts, static_cast<double>(p.out.rows) * p.out.columns, device);
}

template <class Kernel, int kTokens>
void try_tile(Plan& best, const Product& p, const Device& device, bool in_parts) {
  const bool is_asked = p.tokens > 0;
  // No more tokens than there are need.
  if (is_asked ? p.tokens != kTokens : kTokens > 64 && p.out.rows <= kTokens / 2) return;
  const int most = is_asked ? p.parts : in_parts ? most_parts<Kernel, kTokens>(p, device) : 1;
  const int64_t pairs = part_steps(p.in.columns, Kernel::kStep, 1) / 2;
  for (int parts = is_asked ? p.parts : 1; parts <= std::max(1, most); ++parts) {
    if (quotient(pairs, quotient(pairs, parts)) != parts) continue;  // one would be empty
    const double cycles = cycles_of_tile<Kernel, kTokens>(p, parts, device);
    const int64_t row_bytes = 4 * part_stride_sm90(p.out.columns);
    if (cycles < best.cycles) best = {cycles, kTokens, parts, parts > 1 ? parts * p.out.rows * row_bytes : 0};
  }
}

// The fastest by that estimate.
template <class T, MaskKind kMask, bool kTransposed>
Plan plan_product_sm90(const Product& p, const Device& device, bool in_parts) {
  Plan best{kNever};
  try_tile<ProductSm90<T, kMask, kTransposed, 64>, 64>(best, p, device, in_parts);
  try_tile<ProductSm90<T, kMask, kTransposed, 128>, 128>(best, p, device, in_parts);
  try_tile<ProductSm90<T, kMask, kTransposed, 256>, 256>(best, p, device, in_parts);
  return best;
}

template <class T>
Plan plan_product_sm90(const Product& p, const Device& device) {
  if (p.keep.words == nullptr) return plan_product_sm90<T, MaskKind::kMagnitude, false>(p, device, true);
  return p.transposed ? plan_product_sm90<T, MaskKind::kWords, true>(p, device, true)
                      : plan_product_sm90<T, MaskKind::kWords, false>(p, device, true);
}

template <class T, MaskKind kMask, bool kTransposed>
std::string launch_product_sm90(const Product& p, const Device& device) {
  const Plan plan = plan_product_sm90<T, kMask, kTransposed>(p, device, p.workspace != nullptr);
  const auto launch = plan.tokens == 256   ? launch_product_sm90<T, kMask, kTransposed, 256>
                      : plan.tokens == 128 ? launch_product_sm90<T, kMask, kTransposed, 128>
                                           : launch_product_sm90<T, kMask, kTransposed, 64>;
  const std::string error = launch(p, plan.parts, device);
  return error.empty() && plan.parts > 1 ? sum_parts(p, plan.parts, part_stride_sm90(p.out.columns), device) : error;
}

template <class T>
std::string launch_product_sm90(const Product& p, const Device& device) {
  if (p.keep.words != nullptr) {
    return p.transposed ? launch_product_sm90<T, MaskKind::kWords, true>(p, device)
                        : launch_product_sm90<T, MaskKind::kWords, false>(p, device);
  }
  if (p.keep.magnitude) {
    return p.transposed ? launch_product_sm90<T, MaskKind::kMagnitude, true>(p, device)
                        : launch_product_sm90<T, MaskKind::kMagnitude, false>(p, device);
  }
  return p.transposed ? launch_product_sm90<T, MaskKind::kValue, true>(p, device)
                      : launch_product_sm90<T, MaskKind::kValue, false>(p, device);
}

}  // namespace mft::cuda
