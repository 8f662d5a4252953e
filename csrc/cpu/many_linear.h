// The masked linear layer with one of several masks for each token. For few tokens, the weight is read once for all
// masks.
#pragma once

#include <cstdint>
#include <vector>

#include "capability.h"
#include "matrix.h"

namespace mft {

// y (M, N): row i = x[i] @ where(masks[m], weight, 0).T + bias with m = tasks[i / each]; m = -1 keeps the whole weight.
// masks: words (N, ceil(K / 32)) each; bias (N,) or nullptr. Nothing is empty, and every m is -1 or an index of masks.
//
// In one pass over the weight, every row equals few_masked_linear() with its mask bit for bit. Otherwise rows equal
// masked_linear() of all rows that share their mask. `once`: take one pass even if it is slower.
void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each, const void* bias,
                        bool once);

}  // namespace mft
