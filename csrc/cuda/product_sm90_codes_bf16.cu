// product_sm90 for quantised weights, bf16.
#include "product_sm90_codes.cuh"

namespace mft::cuda {

Plan plan_codes_bf16(const QuantizedProduct& p, const Device& device) { return plan_codes<BFloat16>(p, device); }

std::string codes_bf16(const QuantizedProduct& p, const Device& device) { return launch_codes<BFloat16>(p, device); }

}  // namespace mft::cuda
