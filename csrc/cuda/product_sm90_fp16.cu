// product_sm90 for fp16.
#include "product_sm90_launch.cuh"

namespace mft::cuda {

Plan plan_sm90_fp16(const Product& p, const Device& device) { return plan_dense<Float16>(p, device); }

std::string product_sm90_fp16(const Product& p, const Device& device) { return launch_dense<Float16>(p, device); }

}  // namespace mft::cuda
