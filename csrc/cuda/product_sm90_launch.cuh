// How product_sm90 is launched: the number of parts of Q and the tokens of a tile, both chosen by the model of
// tile_cost.h, and the kernel's arguments.
#pragma once

#include <algorithm>

#include "api.h"
#include "product_sm90.cuh"
#include "tile_cost.h"

namespace mft::cuda {

// Return how many steps a part has: an even number.
constexpr int part_steps(int64_t q, int step, int parts) {
  return static_cast<int>(quotient(quotient(q, 2 * step), parts) * 2);
}

// Return the elements of a row of the workspace: whole tiles.
constexpr int64_t part_stride_sm90(int64_t features) { return quotient(features, 256) * 256; }

inline std::string make_matrix_map(isa::TensorMap* map, const Matrix& matrix, int rows) {
  return isa::make_tensor_map(map, matrix.data, 2, matrix.rows, matrix.columns, 2 * matrix.stride, rows, kRowBytes / 2,
                              isa::Swizzle::k128);
}

inline std::string make_words_map(isa::TensorMap* map, const uint32_t* words, int64_t rows, int64_t columns,
                                  int box_rows) {
  const int64_t row_words = quotient(columns, 32);
  return isa::make_tensor_map(map, words, 4, rows, row_words, 4 * row_words, box_rows, sm90::kWordsOfTile,
                              isa::Swizzle::kNone);
}

// Write the kernel's arguments for the weight. Return "" or an error text.
template <class T, MaskKind kMask, bool kTransposed>
std::string tell(sm90::DenseWeight<T, kMask, kTransposed>, sm90::DenseArguments& a, const Product& p) {
  constexpr int kRows = sm90::DenseWeight<T, kMask, kTransposed>::kRows;
  a.thresholds = static_cast<const uint16_t*>(p.keep.thresholds);
  a.threshold_stride = p.keep.threshold_stride;
  const std::string failure = make_matrix_map(&a.weight, p.weight, kRows);
  if (!failure.empty()) return failure;
  if constexpr (kMask == MaskKind::kWords) {
    return make_words_map(&a.mask, p.keep.words, p.weight.rows, p.weight.columns, kRows);
  } else {
    return make_matrix_map(&a.mask, p.keep.scores, kRows);
  }
}

template <class Source, int kTokens>
std::string launch_tile(const Product& p, int parts, const Device& device) {
  using Kernel = ProductSm90<Source, kTokens>;
  static_assert(Kernel::kCluster * Kernel::kFeatures == 256);
  typename Kernel::Arguments a{};
  const int64_t q = p.in.columns;
  a.bias = static_cast<const typename Kernel::T*>(p.bias);
  a.features = static_cast<int>(p.out.columns);
  a.tokens = static_cast<int>(p.out.rows);
  a.steps = part_steps(q, Kernel::kStep, 1);
  a.feature_tiles = static_cast<int>(quotient(a.features, Kernel::kCluster * Kernel::kFeatures));
  a.token_tiles = static_cast<int>(quotient(a.tokens, kTokens));
  a.part_count = parts;
  a.part_steps = part_steps(q, Kernel::kStep, parts);
  if (parts > 1) a.parts = static_cast<float*>(p.workspace);
  a.part_stride = part_stride_sm90(a.features);

  std::string failure = tell(Source{}, a.weight, p);
  if (failure.empty()) failure = make_matrix_map(&a.in, p.in, kTokens / Kernel::kCluster);
  if (failure.empty()) failure = make_matrix_map(&a.out, p.out, Kernel::kStoreTokens);
  if (!failure.empty()) return failure;

  const int64_t tiles = static_cast<int64_t>(a.feature_tiles) * a.token_tiles * parts;
  const int64_t clusters = device.multiprocessors / Kernel::kCluster;
  LaunchShape shape;
  shape.x = (tiles < clusters ? tiles : clusters > 0 ? clusters : 1) * Kernel::kCluster;
  shape.cluster = Kernel::kCluster;
  shape.shared_bytes = Kernel::kSharedBytes;
  return isa::launch<Kernel>(shape, device.stream, a);
}

// Return the largest number of parts of Q worth trying. Each part has at least four steps, all parts run in two waves,
// and their sums fit in half of L2.
inline int most_parts(const Product& p, int tokens, const Device& device) {
  const int64_t tiles = quotient(p.out.columns, 256) * quotient(p.out.rows, tokens);
  const int64_t of_l2 = device.l2_bytes / 2 / (4 * p.out.rows * part_stride_sm90(p.out.columns));
  return static_cast<int>(std::min<int64_t>(
      {kMostParts, p.in.columns / (4 * sm90::kStep), device.multiprocessors / tiles, of_l2}));
}

// Return the busy cycles with tiles of kTokens. A cluster's two blocks, each on its multiprocessor, read half of the
// tokens from L2.
template <class Source, int kTokens>
double busy_cycles_of(const Product& p, int parts, const Device& device) {
  using Kernel = ProductSm90<Source, kTokens>;
  Jobs jobs;
  jobs.count = quotient(p.out.columns, 256) * quotient(p.out.rows, kTokens) * parts;
  jobs.steps = part_steps(p.in.columns, Kernel::kStep, parts);
  jobs.multiply_adds = Kernel::kFeatures * kTokens * Kernel::kStep;
  jobs.read = Source::kStageBytes + Kernel::kInputBytes / Kernel::kCluster;
  jobs.written = (parts > 1 ? 4 : 2) * Kernel::kFeatures * kTokens;
  const int clusters = std::max(1, device.multiprocessors / Kernel::kCluster);
  return busy_cycles(jobs, clusters, Kernel::kBlocksPerMultiprocessor, Kernel::kStages, kWgmma,
                     rates_of(device.capability).l2);
}

template <class Source, int kTokens>
double cycles_of_tile(const Product& p, int parts, const Device& device) {
  const double busy = busy_cycles_of<Source, kTokens>(p, parts, device);
  return launch_cycles(busy, bytes_of(p), device) +
         sum_cycles(parts, static_cast<double>(p.out.rows) * p.out.columns, device);
}

template <class Source, int kTokens>
void try_tile(Plan& best, const Product& p, const Device& device, bool in_parts) {
  const bool is_asked = p.tokens > 0;
  // No tiles with more tokens than the product needs.
  if (is_asked ? p.tokens != kTokens : kTokens > 64 && p.out.rows <= kTokens / 2) return;
  const int most = is_asked ? p.parts : in_parts ? most_parts(p, kTokens, device) : 1;
  const int64_t pairs = part_steps(p.in.columns, sm90::kStep, 1) / 2;
  for (int parts = is_asked ? p.parts : 1; parts <= std::max(1, most); ++parts) {
    if (quotient(pairs, quotient(pairs, parts)) != parts) continue;  // a part would be empty
    const double cycles = cycles_of_tile<Source, kTokens>(p, parts, device);
    const int64_t row_bytes = 4 * part_stride_sm90(p.out.columns);
    if (cycles < best.cycles) best = {cycles, kTokens, parts, parts > 1 ? parts * p.out.rows * row_bytes : 0};
  }
}

// Return the fastest plan by this estimate.
template <class Source>
Plan plan_source(const Product& p, const Device& device, bool in_parts) {
  Plan best{kNever};
  try_tile<Source, 64>(best, p, device, in_parts);
  try_tile<Source, 128>(best, p, device, in_parts);
  try_tile<Source, 256>(best, p, device, in_parts);
  return best;
}

template <class Source>
std::string launch_source(const Product& p, const Device& device) {
  const Plan plan = plan_source<Source>(p, device, p.workspace != nullptr);
  std::string error;
  if (plan.tokens == 256) {
    error = launch_tile<Source, 256>(p, plan.parts, device);
  } else if (plan.tokens == 128) {
    error = launch_tile<Source, 128>(p, plan.parts, device);
  } else {
    error = launch_tile<Source, 64>(p, plan.parts, device);
  }
  if (!error.empty() || plan.parts == 1) return error;
  return sum_parts(p, plan.parts, part_stride_sm90(p.out.columns), device);
}

template <class T>
Plan plan_dense(const Product& p, const Device& device) {
  using sm90::DenseWeight;
  if (p.keep.words == nullptr) return plan_source<DenseWeight<T, MaskKind::kMagnitude, false>>(p, device, true);
  return p.transposed ? plan_source<DenseWeight<T, MaskKind::kWords, true>>(p, device, true)
                      : plan_source<DenseWeight<T, MaskKind::kWords, false>>(p, device, true);
}

template <class T, MaskKind kMask>
std::string launch_dense(const Product& p, const Device& device) {
  return p.transposed ? launch_source<sm90::DenseWeight<T, kMask, true>>(p, device)
                      : launch_source<sm90::DenseWeight<T, kMask, false>>(p, device);
}

template <class T>
std::string launch_dense(const Product& p, const Device& device) {
  if (p.keep.words != nullptr) return launch_dense<T, MaskKind::kWords>(p, device);
  return p.keep.magnitude ? launch_dense<T, MaskKind::kMagnitude>(p, device)
                          : launch_dense<T, MaskKind::kValue>(p, device);
}

}  // namespace mft::cuda
