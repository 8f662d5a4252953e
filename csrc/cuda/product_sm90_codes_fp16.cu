// product_sm90 for quantised weights, fp16.
#include "product_sm90_codes.cuh"

namespace mft::cuda {

Plan plan_codes_fp16(const QuantizedProduct& p, const Device& device) { return plan_codes<Float16>(p, device); }

std::string codes_fp16(const QuantizedProduct& p, const Device& device) { return launch_codes<Float16>(p, device); }

}  // namespace mft::cuda
