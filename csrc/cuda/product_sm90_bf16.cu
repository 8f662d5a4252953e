// product_sm90 for bf16.
#include "product_sm90_launch.cuh"

namespace mft::cuda {

Plan plan_sm90_bf16(const Product& p, const Device& device) { return plan_dense<BFloat16>(p, device); }

std::string product_sm90_bf16(const Product& p, const Device& device) { return launch_dense<BFloat16>(p, device); }

}  // namespace mft::cuda
