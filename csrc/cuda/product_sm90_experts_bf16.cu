// product_sm90 over experts for bf16.
#include "product_sm90_experts.cuh"

namespace mft::cuda {

Plan plan_experts_bf16(const GroupedProduct& g, const Device& device) { return plan_experts<BFloat16>(g, device); }

std::string experts_bf16(const GroupedProduct& g, const Device& device) { return launch_experts<BFloat16>(g, device); }

}  // namespace mft::cuda
