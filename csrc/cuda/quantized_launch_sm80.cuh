// Choose and launch the kernels of quantized_sm80 for one type of tokens. One file per type compiles them.
#pragma once

#include "quantized_sm80.cuh"

namespace mft::cuda::sm80 {

// Return the bytes of a stage with this number of tokens.
constexpr int quantized_stage(int tokens, bool nf4) {
  return 2 * tokens * kQuantizedDepth + kThreads * ((nf4 ? 1 : 2) * kChunkBytes + 8);
}

template <class T, bool kNf4, bool kTransposed>
std::string launch_quantized(const QuantizedProduct& p, const Plan& plan, const Device& device) {
  auto a = tile_arguments<QuantizedArguments>(p, plan, kQuantizedDepth);
  a.weight = codes_arguments(p);
  a.rows = static_cast<int>(p.weight.rows), a.columns = static_cast<int>(p.weight.columns);
  const auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    a.tile_rows = tiles_of(p.out.rows, plan.tokens);
    LaunchShape shape;
    shape.x = static_cast<int64_t>(a.tile_rows) * a.tile_columns;
    shape.y = plan.parts;
    a.stages = stages_of(Kernel::kStageBytes, device, Kernel::kBeside);
    shape.shared_bytes = Kernel::kBeside + a.stages * Kernel::kStageBytes;
    if (shape.x > kLongestSide) return std::string("x has too many tokens, 2^31 tiles and more; split them");
    return isa::launch<Kernel>(shape, device.stream, a);
  };
  std::string error;
  if (!is_whole(p)) {
    error = start(QuantizedKernel<T, kNf4, kTransposed, false, 64>{});
  } else if (plan.tokens == 16) {
    error = start(QuantizedKernel<T, kNf4, kTransposed, true, 16>{});
  } else if (plan.tokens == 64) {
    error = start(QuantizedKernel<T, kNf4, kTransposed, true, 64>{});
  } else {
    error = start(QuantizedKernel<T, kNf4, kTransposed, true, 128>{});
  }
  if (!error.empty() || plan.parts == 1) return error;
  Product sum;
  sum.out = p.out, sum.bias = p.bias, sum.workspace = p.workspace;
  return sum_parts(sum, plan.parts, a.part_stride, device);
}

template <class T>
std::string quantized_of(const QuantizedProduct& p, const Plan& plan, const Device& device) {
  if (p.weight.nf4) {
    return p.transposed ? launch_quantized<T, true, true>(p, plan, device)
                        : launch_quantized<T, true, false>(p, plan, device);
  }
  return p.transposed ? launch_quantized<T, false, true>(p, plan, device)
                      : launch_quantized<T, false, false>(p, plan, device);
}

extern template std::string quantized_of<BFloat16>(const QuantizedProduct&, const Plan&, const Device&);
extern template std::string quantized_of<Float16>(const QuantizedProduct&, const Plan&, const Device&);

}  // namespace mft::cuda::sm80
