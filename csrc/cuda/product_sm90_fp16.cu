// product_sm90 for fp16.
#include "product_sm90_launch.cuh"

namespace mft::cuda {

Plan plan_sm90_fp16(const Product& p, const Device& device) { return plan_product_sm90<Float16>(p, device); }

std::string product_sm90_fp16(const Product& p, const Device& device) { return launch_product_sm90<Float16>(p, device); }

}  // namespace mft::cuda
