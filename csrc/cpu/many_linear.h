// The masked linear layer with one of several masks for each token.
#pragma once

#include <cstdint>
#include <vector>

#include "capability.h"
#include "matrix.h"

namespace mft {

// kDots and kTiles read the weight once for all masks, for a number of tokens at a time. kTiles needs tiles of AMX, and
// bf16. kByMask makes a product per mask.
enum class ManyWay { kAuto, kDots, kTiles, kByMask };

// y (M, N): row i = x[i] @ where(masks[m], weight, 0).T + bias with m = tasks[i / each]; m = -1 keeps the whole weight.
// masks: words (N, ceil(K / 32)) each; bias (N,) or nullptr. Nothing is empty, and every m is -1 or an index of masks.
//
// Every row equals, bit for bit: by dots, few_masked_linear() with its mask; by tiles, fused_masked_linear() with its mask
// and at most kMostFarTokens tokens; by mask, masked_linear() of all rows that share its mask. kAuto chooses from the
// shapes and from the numbers of tokens and of different masks.
void many_masked_linear(const Capability& cpu, const Matrix& y, const Matrix& x, const Matrix& weight,
                        const std::vector<const uint32_t*>& masks, const int64_t* tasks, int64_t each, const void* bias,
                        ManyWay way);

}  // namespace mft
