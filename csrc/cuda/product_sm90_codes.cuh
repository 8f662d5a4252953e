// product_sm90 for quantised weights: the kernel's arguments for the codes, and the cost of a step.
#pragma once

#include "codes_sm90.h"
#include "product_sm90_launch.cuh"

namespace mft::cuda {

template <class T, bool kNf4, bool kTransposed>
std::string tell(sm90::CodedWeight<T, kNf4, kTransposed>, sm90::CodedArguments& a, const QuantizedProduct& p) {
  using Source = sm90::CodedWeight<T, kNf4, kTransposed>;
  const Quantized& w = p.weight;
  a.masked = p.words != nullptr;
  a.absmax = w.absmax, a.absmax_codes = w.absmax_codes;
  a.nested = w.nested, a.map = w.map, a.offset = w.offset;
  a.rows = static_cast<int>(w.rows), a.columns = static_cast<int>(w.columns);
  std::copy(kNf4Levels, kNf4Levels + 16, a.levels);
  const int64_t row_bytes = kNf4 ? w.columns / 2 : w.columns;
  const std::string failure = isa::make_tensor_map(&a.codes, w.codes, 1, w.rows, row_bytes, row_bytes, Source::kRows,
                                                   Source::kPitch, Source::kSwizzle);
  if (!failure.empty() || !a.masked) return failure;
  return make_words_map(&a.mask, p.words, w.rows, w.columns, Source::kRows);
}

// Two of eight warps share a scheduler. Each issues up to 654 instructions per pass of the loop, which is two steps
// (SASS of nvcc 13.0: nf4 597, transposed 654; int8 610 and 624). So a step takes as many cycles.
constexpr double kDecodingCycles = 654;

template <class T, bool kNf4, bool kTransposed>
StepCost step_cost(sm90::CodedWeight<T, kNf4, kTransposed>, const QuantizedProduct& p) {
  return {sm90::kFeatures * sm90::kStep * weight_bytes(p), kDecodingCycles};
}

template <class T, bool kNf4>
Plan plan_codes(const QuantizedProduct& p, const Device& device) {
  return p.transposed ? plan_source<sm90::CodedWeight<T, kNf4, true>>(p, device, true)
                      : plan_source<sm90::CodedWeight<T, kNf4, false>>(p, device, true);
}

template <class T>
Plan plan_codes(const QuantizedProduct& p, const Device& device) {
  return p.weight.nf4 ? plan_codes<T, true>(p, device) : plan_codes<T, false>(p, device);
}

template <class T, bool kNf4>
std::string launch_codes(const QuantizedProduct& p, const Device& device) {
  return p.transposed ? launch_source<sm90::CodedWeight<T, kNf4, true>>(p, device)
                      : launch_source<sm90::CodedWeight<T, kNf4, false>>(p, device);
}

template <class T>
std::string launch_codes(const QuantizedProduct& p, const Device& device) {
  return p.weight.nf4 ? launch_codes<T, true>(p, device) : launch_codes<T, false>(p, device);
}

}  // namespace mft::cuda
