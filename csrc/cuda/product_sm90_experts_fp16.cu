// product_sm90 over experts for fp16.
#include "product_sm90_experts.cuh"

namespace mft::cuda {

Plan plan_experts_fp16(const GroupedProduct& g, const Device& device) { return plan_experts<Float16>(g, device); }

std::string experts_fp16(const GroupedProduct& g, const Device& device) { return launch_experts<Float16>(g, device); }

}  // namespace mft::cuda
