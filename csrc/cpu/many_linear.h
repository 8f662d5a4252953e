// The masked linear layer with a mask for each token, out of several: for few tokens the weight is read once for all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "capability.h"
#include "matrix.h"

namespace mft {

// y (M, N): row i = x[i] @ where(masks[m], weight, 0).T + bias, m = tasks[i / each]; -1: the whole weight.
// masks: words (N, ceil(K / 32)) each; bias (N,) or nullptr. Nothing is empty, and every m is -1 or one of the masks.
//
// In one pass over the weight every row has the bits of few_masked_linear() with its mask; else rows have those of
// masked_linear() of all that share their mask. `once`: in one pass, whatever is faster.
void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each, const void* bias,
                        bool once);

}  // namespace mft
