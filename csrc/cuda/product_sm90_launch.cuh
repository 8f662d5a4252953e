// How product_sm90 is launched: the number of parts of Q and the tokens of a tile, both chosen by the model of
// tile_cost.h, and the kernel's arguments.
#pragma once

#include <algorithm>
#include <type_traits>

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

// Map the words of the weight's mask.
inline std::string make_words_map(isa::TensorMap* map, const Product& p, int rows) {
  const int64_t row_words = quotient(p.weight.columns, 32);
  return isa::make_tensor_map(map, p.keep.words, 4, p.weight.rows, row_words, 4 * row_words, rows, sm90::kWordsOfTile,
                              isa::Swizzle::kNone);
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
  a.weight.thresholds = static_cast<const uint16_t*>(p.keep.thresholds);
  a.weight.threshold_stride = p.keep.threshold_stride;

  isa::TensorMap* const mask = &a.weight.mask;
  std::string failure = make_matrix_map(&a.weight.weight, p.weight, Source::kRows);
  if (failure.empty()) {
    failure = Source::kByWords ? make_words_map(mask, p, Source::kRows)
                               : make_matrix_map(mask, p.keep.scores, Source::kRows);
  }
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

// Return the cycles with tiles of kTokens. A cluster's two blocks, each on its multiprocessor, read half of the tokens
// from L2.
template <class Source, int kTokens>
double cycles_of_tile(const Product& p, int parts, const Device& device) {
  using Kernel = ProductSm90<Source, kTokens>;
  Jobs jobs;
  jobs.count = quotient(p.out.columns, 256) * quotient(p.out.rows, kTokens) * parts;
  jobs.steps = part_steps(p.in.columns, Kernel::kStep, parts);
  jobs.multiply_adds = Kernel::kFeatures * kTokens * Kernel::kStep;
  jobs.read = Source::kStageBytes + Kernel::kInputBytes / Kernel::kCluster;
  jobs.written = (parts > 1 ? 4 : 2) * Kernel::kFeatures * kTokens;
  const int clusters = std::max(1, device.multiprocessors / Kernel::kCluster);
  const double busy = busy_cycles(jobs, clusters, Kernel::kBlocksPerMultiprocessor, Kernel::kStages, kWgmma,
                                  rates_of(device.capability).l2);
  return launch_cycles(busy, bytes_of(p), device) +
         sum_cycles(parts, static_cast<double>(p.out.rows) * p.out.columns, device);
}

template <class Source, int kTokens>
void try_tile(Plan& best, const Product& p, const Device& device, bool in_parts) {
  const bool is_asked = p.tokens > 0;
  // No tiles with more tokens than the product needs.
  if (is_asked ? p.tokens != kTokens : kTokens > 64 && p.out.rows <= kTokens / 2) return;
  const int64_t tiles = quotient(p.out.columns, 256) * quotient(p.out.rows, kTokens);
  const int64_t part_bytes = 4 * p.out.rows * part_stride_sm90(p.out.columns);
  // Two waves of clusters of two blocks; a part has at least four steps.
  const int64_t planned =
      in_parts ? most_parts(p.in.columns / (4 * sm90::kStep), device.multiprocessors, tiles, part_bytes, device) : 1;
  try_parts(best, kTokens, part_steps(p.in.columns, sm90::kStep, 1) / 2, is_asked ? p.parts : 1,
            is_asked ? p.parts : planned, part_bytes,
            [&](int parts) { return cycles_of_tile<Source, kTokens>(p, parts, device); });
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

// Return f(weight) with the product's kind of MaskedWeight.
template <class T, class F>
auto with_weight(const Product& p, const F& f) {
  const auto by = [&](auto mask) {
    constexpr MaskKind kMask = decltype(mask)::value;
    return p.transposed ? f(sm90::MaskedWeight<T, kMask, true>{}) : f(sm90::MaskedWeight<T, kMask, false>{});
  };
  if (p.keep.words != nullptr) return by(std::integral_constant<MaskKind, MaskKind::kWords>{});
  return p.keep.magnitude ? by(std::integral_constant<MaskKind, MaskKind::kMagnitude>{})
                          : by(std::integral_constant<MaskKind, MaskKind::kValue>{});
}

template <class T>
Plan plan_dense(const Product& p, const Device& device) {
  return with_weight<T>(p, [&](auto weight) { return plan_source<decltype(weight)>(p, device, true); });
}

template <class T>
std::string launch_dense(const Product& p, const Device& device) {
  return with_weight<T>(p, [&](auto weight) { return launch_source<decltype(weight)>(p, device); });
}

}  // namespace mft::cuda
