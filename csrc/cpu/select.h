// The exact k-th largest score without a sort: a histogram of the keys' upper bits, then one of the lower.
#pragma once

#include "row_kernels.h"

namespace mft {

// The value of the k-th largest |score| (score, if not magnitude) among n, 1 <= k <= n, as the bits of the format.
// NaN if any score is NaN or infinite. k == 0 gives +infinity.
uint32_t kth_largest(const void* scores, Format format, int64_t n, int64_t k, bool magnitude);

}  // namespace mft
