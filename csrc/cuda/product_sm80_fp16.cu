// The general product for fp16.
#include "product_sm80.cuh"

namespace mft::cuda::sm80 {

template std::string product_of<Float16>(const Product&, const Plan&, const Device&);

}  // namespace mft::cuda::sm80
