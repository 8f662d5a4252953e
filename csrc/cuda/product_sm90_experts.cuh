// product_sm90 over experts: the kernel's arguments for their weights, and the time that the product is expected to
// take.
#pragma once

#include "product_sm90_launch.cuh"

namespace mft::cuda {

template <class T, MaskKind kMask, bool kTransposed>
std::string tell(sm90::DenseWeight<T, kMask, kTransposed, true>, sm90::DenseArguments& a, const GroupedProduct& g) {
  constexpr int kRows = sm90::DenseWeight<T, kMask, kTransposed, true>::kRows;
  const Product& p = g.of;
  a.thresholds = static_cast<const uint16_t*>(p.keep.thresholds);
  a.threshold_stride = 1;
  // Nothing behind a single expert is read, but TMA requires a stride.
  const auto apart = [&](const Matrix& m, int64_t stride) { return g.experts > 1 ? stride : m.rows * m.stride; };
  const std::string failure =
      make_matrix_map(&a.weight, p.weight, kRows, g.experts, apart(p.weight, g.weight_stride));
  if (!failure.empty()) return failure;
  if constexpr (kMask == MaskKind::kWords) {
    return make_words_map(&a.mask, p.keep.words, p.weight.rows, p.weight.columns, kRows, g.experts);
  } else {
    return make_matrix_map(&a.mask, p.keep.scores, kRows, g.experts, apart(p.keep.scores, g.score_stride));
  }
}

template <class Source, int kTokens>
void try_experts(Plan& best, const GroupedProduct& g, const Device& device) {
  if (g.of.tokens > 0 && g.of.tokens != kTokens) return;
  const int64_t tiles = usual_tiles(g, kTokens);
  const double busy = busy_cycles_of<Source, kTokens>(tiles, g.of.out, g.of.in, 1, device);
  const double cycles = launch_cycles(busy, bytes_of(g), device);
  if (cycles < best.cycles) best = {cycles, kTokens, 1, 0};
}

template <class Source>
Plan plan_experts_of(const GroupedProduct& g, const Device& device) {
  Plan best{kNever};
  try_experts<Source, 128>(best, g, device);
  try_experts<Source, 256>(best, g, device);
  return best;
}

template <class T>
Plan plan_experts(const GroupedProduct& g, const Device& device) {
  using sm90::DenseWeight;
  if (g.of.keep.words == nullptr) {
    return plan_experts_of<DenseWeight<T, MaskKind::kMagnitude, false, true>>(g, device);
  }
  return g.of.transposed ? plan_experts_of<DenseWeight<T, MaskKind::kWords, true, true>>(g, device)
                         : plan_experts_of<DenseWeight<T, MaskKind::kWords, false, true>>(g, device);
}

template <class T, MaskKind kMask>
std::string launch_experts(const GroupedProduct& g, int tokens, const Device& device) {
  using Forward = sm90::DenseWeight<T, kMask, false, true>;
  using Transposed = sm90::DenseWeight<T, kMask, true, true>;
  if (tokens == 256) {
    return g.of.transposed ? launch_tile<Transposed, 256>(g, 1, device) : launch_tile<Forward, 256>(g, 1, device);
  }
  return g.of.transposed ? launch_tile<Transposed, 128>(g, 1, device) : launch_tile<Forward, 128>(g, 1, device);
}

template <class T>
std::string launch_experts(const GroupedProduct& g, const Device& device) {
  const int tokens = plan_experts<T>(g, device).tokens;
  if (g.of.keep.words != nullptr) return launch_experts<T, MaskKind::kWords>(g, tokens, device);
  return g.of.keep.magnitude ? launch_experts<T, MaskKind::kMagnitude>(g, tokens, device)
                             : launch_experts<T, MaskKind::kValue>(g, tokens, device);
}

}  // namespace mft::cuda
