// The product over experts for bf16.
#include "grouped_sm80.cuh"

namespace mft::cuda::sm80 {

template std::string grouped_of<BFloat16>(const GroupedProduct&, int, const Device&);

}  // namespace mft::cuda::sm80
