// quantized_sm80 for fp16 tokens.
#include "quantized_launch_sm80.cuh"

namespace mft::cuda::sm80 {

template std::string quantized_of<Float16>(const QuantizedProduct&, const Plan&, const Device&);

}  // namespace mft::cuda::sm80
