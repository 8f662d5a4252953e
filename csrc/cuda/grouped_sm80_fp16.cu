// The product over experts for fp16.
#include "grouped_sm80.cuh"

namespace mft::cuda::sm80 {

template std::string grouped_of<Float16>(const GroupedProduct&, int, const Device&);

}  // namespace mft::cuda::sm80
